"""PLADIS cross-attention for a diffusers UNet (arXiv 2503.07677), in one file. Apache-2.0.

Joined mechanically from the surgery/nn folder of the pladis-surgery package; the name carries the hash of the content.
Needs torch and diffusers alone:

    DiffusionPipeline.from_pretrained(this_model, trust_remote_code=True)
"""

MODULE_NAME = __name__.rpartition(".")[2]


def shipped_source():
    """This file's own text, for models saved again."""
    with open(__file__, encoding="utf-8") as file:
        return file.read()


# -------------------- entmax.py --------------------------------------------------------------------------------------

# alpha-entmax without a sort: Newton's method on the norm of the positive part.
#
# `p = [(alpha-1) z - tau]_+^(1/(alpha-1))` with tau such that p sums to one (Peters et al. 2019, arXiv 1905.05702,
# eq. 10). With r = 1/(alpha-1) the sum is one exactly where `||relu(x - t)||_r = 1`, x = (alpha-1)(z - max z). That norm
# is convex and decreasing in t, so Newton's iterates rise monotonically from t = -1 to the root: a small fixed number
# of steps serves every alpha, with only elementwise operations and row sums.
#
# Two choices make it hold over the whole of [1, 2] in float32. The threshold is carried as `lift = t + 1`, and powers
# are taken as exp(r log1p(.)): near alpha = 1, where r is huge and relu(x - t) is close to one, the plain power would
# lose every digit, while this form goes over into softmax. And alpha is data, never a branch, so that a compiled graph
# serves every alpha.

import torch

# The smallest alpha - 1 that is solved; below it (that is, at alpha = 1 in float32) entmax is softmax to rounding.
_SMALLEST_ALPHA_MINUS_ONE = 2.0**-23
# log1p(-1) is -inf, and 0 * -inf is NaN at alpha = 2; values outside the support are masked to zero afterwards.
_ABOVE_MINUS_ONE = -1.0 + 2.0**-24


def newton_steps(keys):
    """Steps that reach float32 rounding for rows of `keys` scores, at any alpha and any spread of the scores.

    Found by searching for the slowest rows; `tests/nn/test_entmax.py` holds them to the float64 oracle.
    """
    return 6 if keys <= 128 else 8 if keys <= 1024 else 10


def shift_by_row_max(scores):
    """Scores less the largest of their row, in float32 at least; a row that is masked whole stays -inf."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if scores.shape[-1] == 0:
        return scores
    row_max = scores.amax(dim=-1, keepdim=True)
    # -inf - -inf is NaN: a row without any key keeps its -inf and comes out as zeros.
    return scores - torch.where(row_max == float("-inf"), torch.zeros_like(row_max), row_max)


def softmax_of_shifted(shifted):
    """Softmax over the last dimension of max-shifted scores; zeros where every key is masked."""
    weights = shifted.exp()
    # The largest score of a row contributes exp(0) = 1, so only a row without keys has a sum below one.
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(1.0)


def entmax_of_shifted(shifted, alpha):
    """alpha-entmax over the last dimension of max-shifted scores; zeros where every key is masked.

    `alpha` is a tensor that broadcasts against `shifted`.
    """
    alpha_minus_one = (alpha.to(shifted.dtype) - 1.0).clamp_min(_SMALLEST_ALPHA_MINUS_ONE)
    r = 1.0 / alpha_minus_one
    x = shifted * alpha_minus_one
    lift = torch.zeros_like(x[..., :1])
    for _ in range(newton_steps(shifted.shape[-1])):
        power_r_minus_1, base = _powers(x - lift, r)
        norm_r = (power_r_minus_1 * base).sum(dim=-1, keepdim=True).clamp_min(1.0)  # ||.||_r ** r, at least 1 here
        log_norm = norm_r.log() / r
        # (N - 1) N^(r-1) / sum p^(r-1), with N = norm_r ** (1/r)
        step = torch.expm1(log_norm) * torch.exp((r - 1.0) * log_norm)
        lift = lift + step / power_r_minus_1.sum(dim=-1, keepdim=True).clamp_min(1.0)
    power_r_minus_1, base = _powers(x - lift, r)
    weights = power_r_minus_1 * base
    # What is left of the residual is float32's resolution of the threshold, times the number of keys. One more Newton
    # step in the weights instead of the threshold removes it: d weights = (1 - sum) p^(r-1) / sum p^(r-1).
    total_slope = power_r_minus_1.sum(dim=-1, keepdim=True)
    residual = 1.0 - weights.sum(dim=-1, keepdim=True)
    correction = residual / torch.where(total_slope > 0, total_slope, torch.ones_like(total_slope))
    return torch.addcmul(weights, correction, power_r_minus_1).clamp_min(0.0)


def _powers(depth, r):
    """`(1 + depth)^(r-1)` and `1 + depth` where depth > -1, zero elsewhere; NaN stays NaN."""
    power = torch.exp((r - 1.0) * torch.log1p(depth.clamp_min(_ABOVE_MINUS_ONE)))
    outside = depth <= -1.0
    return power.masked_fill(outside, 0.0), (1.0 + depth).masked_fill(outside, 0.0)


def entmax(scores, alpha, dim=-1):
    """alpha-entmax of `scores` along `dim`: softmax at alpha = 1, sparsemax at alpha = 2.

    scores: any shape, any floating dtype; solved in float32 (float64 input in float64) and returned in its own dtype.
        A score of -inf is a masked key; a row of nothing else comes out as zeros.
    alpha: a number in [1, 2], or a tensor that broadcasts against `scores` with `dim` moved last (its values are the
        caller's to check: reading them would stop the device).
    Raises ValueError for a number outside [1, 2], TypeError for scores that are not floating. Source: Peters et al.
    2019 for the definition; the solver is ours.
    """
    if scores.ndim == 0:
        return torch.ones_like(scores)
    if not scores.is_floating_point():
        raise TypeError(f"entmax needs floating scores, not {scores.dtype}")
    if not isinstance(alpha, torch.Tensor):
        if not 1.0 <= alpha <= 2.0:
            raise ValueError(f"alpha must lie in [1, 2] (1 is softmax, 2 is sparsemax), not {alpha}")
        alpha = torch.tensor(float(alpha), dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32)
    shifted = shift_by_row_max(scores.movedim(dim, -1))
    return entmax_of_shifted(shifted, alpha.to(shifted.device)).movedim(-1, dim).to(scores.dtype)


# -------------------- attention.py -----------------------------------------------------------------------------------

# The attention operators as one function over query, key, value.
#
# `reference` is plain torch in float32 and defines what every faster implementation must compute. `entmax` is the same
# formula with the entmax package's sort-based (bisecting, for other alphas) functions: the papers' own arithmetic, kept
# to reproduce and to compare.

import importlib

import torch


OPERATORS = ("pladis",)
IMPLEMENTATIONS = ("reference", "entmax")


def attention(
    query,
    key,
    value,
    *,
    operator="pladis",
    alpha=1.5,
    scale=2.0,
    temperature=1.0,
    mask=None,
    qk_scale=None,
    implementation="reference",
):
    """PLADIS: `((1 - scale) softmax(z) + scale entmax_alpha(z)) value`, z = query key^T qk_scale / temperature.

    query: (batch, heads, queries, head_dim); key, value: (batch, heads, keys, head_dim); any floating dtype. Scores,
        both maps and their combination are float32 (float64 for float64 input); the product with `value` is taken once,
        in value's dtype.
    operator: "pladis" (PLADIS, arXiv 2503.07677, eq. 15).
    alpha: in [1, 2]. scale: the paper's lambda; 0 is dense attention, 1 purely sparse, above 1 extrapolates, so that
        weights may be negative. temperature: > 0, divides the scores of both maps (eq. 36). Each is a number or a
        tensor of one element; a tensor's value is not read, so changing it never recompiles a graph.
    mask: boolean (True keeps a key) or additive, broadcastable to (batch, heads, queries, keys). A query whose keys
        are all masked gets zeros.
    qk_scale: 1/sqrt(head_dim) unless given.
    Returns (batch, heads, queries, head_dim) in value's dtype. Raises ValueError for numbers out of range, an unknown
    operator or implementation; ImportError when implementation="entmax" and that package is missing.
    """
    if operator not in OPERATORS:
        raise ValueError(f"unknown operator {operator!r}; there is {', '.join(OPERATORS)}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}")
    _check_numbers(alpha, temperature)
    shifted = shift_by_row_max(attention_scores(query, key, temperature, mask, qk_scale))
    dense = softmax_of_shifted(shifted)
    if implementation == "entmax":
        sparse = _entmax_by_package(shifted, alpha)
    else:
        sparse = entmax_of_shifted(shifted, _as_tensor(alpha, shifted))
    # Not (1 - scale) * dense + scale * sparse: this form leaves dense untouched at scale 0.
    weights = dense + _as_tensor(scale, shifted) * (sparse - dense)
    return torch.matmul(weights.to(value.dtype), value)


def attention_scores(query, key, temperature=1.0, mask=None, qk_scale=None):
    """`query key^T qk_scale / temperature`, masked: (batch, heads, queries, keys) in float32 (float64 for float64).

    The product is taken in float32: half-precision scores are off by a percent of a weight, and SD 2.1's overflow.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    qk_scale = query.shape[-1] ** -0.5 if qk_scale is None else qk_scale
    scores = torch.matmul(query.to(dtype) * qk_scale, key.to(dtype).transpose(-1, -2))
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask must be boolean (True keeps a key) or additive floating, not {mask.dtype}")
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask.to(dtype)
    return scores / _as_tensor(temperature, scores)


def _check_numbers(alpha, temperature):
    if not isinstance(alpha, torch.Tensor) and not 1.0 <= alpha <= 2.0:
        raise ValueError(f"alpha must lie in [1, 2] (1 is softmax, 2 is sparsemax), not {alpha}")
    if not isinstance(temperature, torch.Tensor) and not 1e-30 <= temperature <= 1e30:
        raise ValueError(f"temperature must be above 0 (1e-30 to 1e30), not {temperature}")


def _as_tensor(number, like):
    if isinstance(number, torch.Tensor):
        return number.to(like.dtype)
    return torch.full((), float(number), dtype=like.dtype, device=like.device)


def _entmax_by_package(shifted, alpha):
    """alpha-entmax by the entmax package, zeros for masked rows. Reads alpha's value, so it breaks graphs."""
    try:
        package = importlib.import_module("entmax")
    except ImportError as error:
        raise ImportError('implementation="entmax" needs the entmax package: pip install entmax') from error
    alpha = float(alpha)
    # The package's cumulative sums turn -inf into NaN. Below -1e4 every alpha > 1.0001 gives zero anyway.
    finite = shifted.clamp_min(-1.0e4)
    if alpha == 1.0:
        sparse = torch.softmax(finite, dim=-1)
    elif alpha == 1.5:
        sparse = package.entmax15(finite, dim=-1)
    elif alpha == 2.0:
        sparse = package.sparsemax(finite, dim=-1)
    else:
        sparse = package.entmax_bisect(finite, alpha=alpha, dim=-1)
    return sparse.masked_fill(shifted == float("-inf"), 0.0)


# -------------------- ip_adapter.py ----------------------------------------------------------------------------------

# What an IP-Adapter adds to a cross-attention: dense attention from the same queries to the image tokens.
#
# The image tokens come beside the text as `(text, [tokens of each adapter])`, and their projections live in the module's
# processor (`to_k_ip`, `to_v_ip`, `scale`), where diffusers' loader puts them. PLADIS is defined on text keys, so these
# branches stay dense.

import torch.nn.functional as F
from diffusers.image_processor import IPAdapterMaskProcessor


def split_image_tokens(processor, encoder_hidden_states):
    """(text, image tokens of each adapter, (batch, images, tokens, dim)); the list is empty without adapter."""
    if isinstance(encoder_hidden_states, tuple):
        return encoder_hidden_states[0], list(encoder_hidden_states[1])
    if not hasattr(processor, "to_k_ip") or encoder_hidden_states is None:
        return encoder_hidden_states, []
    # diffusers' older calling convention: the image tokens are the last keys of one tensor.
    text_keys = encoder_hidden_states.shape[1] - processor.num_tokens[0]
    return encoder_hidden_states[:, :text_keys], [encoder_hidden_states[:, text_keys:]]


def image_attention(processor, query, image_tokens, masks=None):
    """The sum over adapters of `scale * attention(query, image keys)`, shaped as `query`: (batch, heads, queries, dim).

    masks: None, or for each adapter None or (1, images, height, width), as `cross_attention_kwargs["ip_adapter_masks"]`
    brings them. Raises ValueError where masks and adapters do not fit together.
    """
    scales = processor.scale
    if masks is None:
        masks = [None] * len(scales)
    elif not isinstance(masks, list):
        masks = list(masks.unsqueeze(1))
    if not len(masks) == len(scales) == len(image_tokens):
        raise ValueError(
            f"{len(masks)} ip_adapter_masks, {len(scales)} adapter scales and {len(image_tokens)} image embeddings "
            "must be as many: give one of each for every loaded IP-Adapter"
        )
    total = 0.0
    for tokens, scale, mask, to_key, to_value in zip(
        image_tokens, scales, masks, processor.to_k_ip, processor.to_v_ip, strict=True
    ):
        if mask is not None:
            total = total + _masked_adapter(query, tokens, scale, mask, to_key, to_value)
        elif isinstance(scale, list) and any(scale):
            raise ValueError("an IP-Adapter with one scale per image needs ip_adapter_masks in cross_attention_kwargs")
        elif not isinstance(scale, list) and scale != 0:
            total = total + scale * _dense(query, to_key(tokens), to_value(tokens))
    return total


def _masked_adapter(query, tokens, scale, mask, to_key, to_value):
    images = mask.shape[1]
    scale = scale if isinstance(scale, list) else [scale] * images
    if mask.ndim != 4 or images != tokens.shape[1] or images != len(scale):
        raise ValueError(
            f"an ip_adapter_mask of shape {tuple(mask.shape)} does not fit {tokens.shape[1]} images and {len(scale)} "
            "scales: make it (1, images, height, width) with IPAdapterMaskProcessor.preprocess"
        )
    batch, heads, queries, head_dim = query.shape
    total = 0.0
    for index in range(images):
        image = tokens[:, index]
        output = _dense(query, to_key(image), to_value(image))
        region = IPAdapterMaskProcessor.downsample(mask[:, index], batch, queries, heads * head_dim)
        region = region.view(batch, queries, heads, head_dim).transpose(1, 2)
        total = total + scale[index] * output * region.to(dtype=query.dtype, device=query.device)
    return total


def _dense(query, key, value):
    batch, heads, _, head_dim = query.shape
    key = key.reshape(batch, -1, heads, head_dim).transpose(1, 2)
    value = value.reshape(batch, -1, heads, head_dim).transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value)


# -------------------- pladis.py --------------------------------------------------------------------------------------

# `PladisAttention`: diffusers' cross-attention module with its softmax extrapolated towards alpha-entmax.
#
# It is made from a live `Attention` by changing the class of that very object and registering three float32 buffers.
# So nothing that holds the module loses it: parents, LoRA layers, quantised Linears, IP-Adapter processors, offload
# and forward hooks, compiled blocks. Taking the buffers away and setting the class back is the exact inverse.

import types

import torch
from diffusers.models.attention_processor import Attention
from diffusers.utils import logging


HYPERPARAMETERS = ("alpha", "scale", "temperature")
BUFFERS = tuple(f"pladis_{name}" for name in HYPERPARAMETERS)  # "scale" alone would clash with Attention.scale

# Processors that compute plain attention, or that add an IP-Adapter to it: forward() below computes what they would.
KNOWN_PROCESSORS = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnProcessorNPU",
    "FusedAttnProcessor2_0",
    "IPAdapterAttnProcessor",
    "IPAdapterAttnProcessor2_0",
    "IPAdapterXFormersAttnProcessor",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
)


class PladisAttention(Attention):
    """Cross-attention by PLADIS (arXiv 2503.07677, eq. 15), with its hyperparameters as buffers.

    Buffers `pladis_alpha`, `pladis_scale` (the paper's lambda), `pladis_temperature`: float32 scalars that stay float32
    under .half(), .to(dtype) and from_pretrained(torch_dtype=...). Change them in place (`fill_`, `surgery.tune`):
    a compiled graph need not be compiled again.
    """

    @classmethod
    def convert(cls, module, alpha=1.5, scale=2.0, temperature=1.0, implementation="reference"):
        """Turn a live `Attention` into a PladisAttention in place and return it; its parameters are not touched.

        Raises ValueError for a module that `refusal` names a reason against, or an unknown implementation.
        """
        reason = cls.refusal(module)
        if reason:
            raise ValueError(reason)
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"unknown implementation {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}")
        device = next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))
        module.__class__ = cls
        module.pladis_implementation = implementation
        for name, value in zip(BUFFERS, (alpha, scale, temperature), strict=True):
            # No device given on the meta device's behalf: diffusers builds models there and loads the buffers after.
            module.register_buffer(name, torch.tensor(float(value), dtype=torch.float32, device=device))
        _rebind_hooked_forward(module)
        return module

    @staticmethod
    def refusal(module):
        """Why `module` cannot be converted, as one sentence; None if it can."""
        if type(module) is not Attention:
            return f"{type(module).__name__} is not diffusers' Attention class; there is no PLADIS form of it yet"
        if not module.is_cross_attention:
            return "it is self-attention; sparsifying it destroys the image, so it stays dense"
        if module.added_kv_proj_dim is not None or module.to_k is None:
            return "it attends to image and text in one softmax (added key/value projections); not supported yet"
        if module.to_out is None or module.context_pre_only is not None:
            return "it is joint attention without an output of its own; not supported yet"
        processor = type(module.processor).__name__
        if processor not in KNOWN_PROCESSORS:
            return (
                f"its processor {processor} computes attention in its own way, which PLADIS would replace; "
                "call set_default_attn_processor() first"
            )
        hooks = [name for name in ("_diffusers_hook",) if getattr(module, name, None) is not None]
        if hooks and "forward" in module.__dict__:
            return "a diffusers hook (a cache such as PAB or FasterCache) is on it; patch first, enable the hook after"
        return None

    def revert(self):
        """Turn this very object back into the `Attention` that it was, and return it."""
        for name in BUFFERS:
            del self._buffers[name]
        del self.pladis_implementation
        self.__class__ = Attention
        if type(self.processor).__name__ == "FusedAttnProcessor2_0" and not hasattr(self, "to_kv"):
            self.fuse_projections()  # asked for while this class ignored it
        _rebind_hooked_forward(self)
        return self

    def hyperparameters(self):
        """{"alpha": ..., "scale": ..., "temperature": ...} as floats, each the shortest for its float32 value."""
        return {name: shortest_float(self._buffers[f"pladis_{name}"]) for name in HYPERPARAMETERS}

    def set_processor(self, processor):
        """As `Attention.set_processor`, but a processor with an attention of its own is refused, not ignored."""
        name = type(processor).__name__
        if name not in KNOWN_PROCESSORS:
            raise ValueError(
                f"PladisAttention computes attention itself and cannot run {name}; call surgery.unpatch(pipe) first"
            )
        super().set_processor(processor)

    def fuse_projections(self, fuse=True):
        """Nothing: a fused to_kv goes stale when it is unfused, and forward() reads to_k and to_v."""

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **kwargs):
        """As `Attention.forward`: (batch, queries, channels) or (batch, channels, height, width), out as in.

        encoder_hidden_states: (batch, keys, cross_attention_dim), or IP-Adapter's (text, [image tokens]).
        attention_mask: additive, (batch, 1 or queries, keys). `ip_adapter_masks` is taken from the keyword arguments.
        """
        masks = kwargs.pop("ip_adapter_masks", None)
        kwargs.pop("scale", None)  # the LoRA scale; peft has applied it before the call
        if kwargs:
            unknown = ", ".join(sorted(kwargs))
            logging.get_logger(__name__).warning(f"cross_attention_kwargs {unknown} mean nothing here; ignored")
        text, image_tokens = split_image_tokens(self.processor, encoder_hidden_states)

        residual = hidden_states
        if self.spatial_norm is not None:
            hidden_states = self.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # (batch, height * width, channels)
        if self.group_norm is not None:
            hidden_states = self.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if text is None:
            text = hidden_states
        elif self.norm_cross is not None:
            text = self.norm_encoder_hidden_states(text)

        query = self._split_heads(self.to_q(hidden_states))
        key = self._split_heads(self.to_k(text))
        value = self._split_heads(self.to_v(text))
        query = query if self.norm_q is None else self.norm_q(query)
        key = key if self.norm_k is None else self.norm_k(key)
        output = attention(
            query,
            key,
            value,
            alpha=self.pladis_alpha,
            scale=self.pladis_scale,
            temperature=self.pladis_temperature,
            mask=self._mask_per_head(attention_mask, text),
            qk_scale=self.scale,
            implementation=self.pladis_implementation,
        )
        if image_tokens:
            output = output + image_attention(self.processor, query, image_tokens, masks)
        output = output.transpose(1, 2).flatten(2).to(query.dtype)  # (batch, queries, heads * head_dim)

        output = self.to_out[1](self.to_out[0](output))
        if image_shape is not None:
            output = output.transpose(-1, -2).reshape(image_shape)
        if self.residual_connection:
            output = output + residual
        return output / self.rescale_output_factor

    def _split_heads(self, projected):
        batch, length, _ = projected.shape
        return projected.view(batch, length, self.heads, -1).transpose(1, 2)  # (batch, heads, length, head_dim)

    def _mask_per_head(self, attention_mask, text):
        if attention_mask is None:
            return None
        batch, keys, _ = text.shape
        attention_mask = self.prepare_attention_mask(attention_mask, keys, batch)
        return attention_mask.view(batch, self.heads, -1, attention_mask.shape[-1])

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args, **kwargs):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        for name in BUFFERS:  # load_state_dict(assign=True) takes the dtype of what it is given
            self._buffers[name] = self._buffers[name].float()

    def _apply(self, fn, recurse=True):
        before = {name: self._buffers[name] for name in BUFFERS}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new.dtype != old.dtype:  # follow the device, not the dtype: bf16 would turn 1.3 into 1.296875
                meta = "meta" in (new.device.type, old.device.type)
                self._buffers[name] = torch.empty_like(old, device=new.device) if meta else old.to(new.device)
        return self


def is_pladis(module):
    """Whether `module` is a PladisAttention, of this file or of any other copy of it.

    By its buffers: diffusers runs a shipped file anew at every load, and each time makes classes of the same name.
    """
    return all(name in module._buffers for name in BUFFERS)


def shortest_float(tensor):
    """The float32 scalar as the Python float of fewest digits that rounds to it: 1.3, not 1.2999999523162842."""
    value = tensor.float()
    for digits in range(1, 10):
        candidate = float(f"{value.item():.{digits}g}")
        if torch.tensor(candidate, dtype=torch.float32) == value.cpu():
            return candidate
    return value.item()


def _rebind_hooked_forward(module):
    """Point an accelerate hook at the present class's forward: it keeps the bound method that it found."""
    if "_old_forward" in module.__dict__:
        module._old_forward = types.MethodType(type(module).forward, module)


# -------------------- unet.py ----------------------------------------------------------------------------------------

# `PladisUNet2DConditionModel`: the UNet whose config says which of its modules are PladisAttention.
#
# The class exists so that a patched model is saved, loaded and shared as such: a folder whose model_index.json names it
# either loads patched or is refused. Config and buffers say the same thing twice on purpose; loading compares them.

import inspect
import json
import math
import os
import sys

import torch
from diffusers import ModelMixin, UNet2DConditionModel  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.utils import is_accelerate_available


# Behind a saved config's mid_block_type, so that the stock class, which ignores keys it does not know and would run the
# model unpatched, stops with "unknown mid_block_type: ..." and these words.
STOCK_CLASS_REFUSAL = " patched with PLADIS: load with surgery.load or trust_remote_code=True"


class PladisUNet2DConditionModel(UNet2DConditionModel):
    """UNet2DConditionModel with some of its cross-attention modules turned into PladisAttention.

    Config key `pladis`: a list of operations, each {"operator": "pladis", "alpha", "scale", "temperature", "layers":
    [module paths]}. Raises ValueError where the config names no layer, an unknown operator or a module that is not
    there, and where a checkpoint's buffers are missing or disagree with the config.
    """

    _keep_in_fp32_modules = list(BUFFERS)  # from_pretrained(torch_dtype=...) would round them

    def __init__(self, *args, pladis=None, **kwargs):
        if "mid_block_type" in kwargs:
            kwargs["mid_block_type"] = (kwargs["mid_block_type"] or "").removesuffix(STOCK_CLASS_REFUSAL) or None
        super().__init__(*args, **kwargs)
        for operation in check_operations(pladis):
            for path in operation["layers"]:
                PladisAttention.convert(module_at(self, path), **{name: operation[name] for name in HYPERPARAMETERS})
        self.register_to_config(pladis=pladis)

    @classmethod
    def convert(cls, unet, operations, implementation="reference"):
        """Turn a live UNet2DConditionModel into this class in place, and its named modules into PladisAttention."""
        operations = check_operations(operations)
        modules = [(module_at(unet, path), operation) for operation in operations for path in operation["layers"]]
        for module, _ in modules:  # all or none
            reason = PladisAttention.refusal(module)
            if reason:
                raise ValueError(reason)
        for module, operation in modules:
            numbers = {name: operation[name] for name in HYPERPARAMETERS}
            PladisAttention.convert(module, **numbers, implementation=implementation)
        unet.__class__ = cls
        unet.update_config()
        return unet

    def revert(self):
        """Turn this very object back into the UNet2DConditionModel that it was, and return it."""
        for module in self.modules():
            if is_pladis(module):
                module.revert()
        self.__class__ = UNet2DConditionModel
        _set_config(self, {key: value for key, value in self.config.items() if key != "pladis"})
        return self

    def update_config(self):
        """Write the live buffers' values into the config."""
        _set_config(self, {**self.config, "pladis": self.pladis_operations()})

    def pladis_operations(self):
        """The operations as the live buffers have them, for the config: one per setting, layers in model order."""
        by_setting = {}
        for path, module in self.named_modules():
            if is_pladis(module):
                setting = {"operator": "pladis", **module.hyperparameters()}
                by_setting.setdefault(tuple(setting.items()), (setting, []))[1].append(path)
        return [{**setting, "layers": layers} for setting, layers in by_setting.values()]

    def save_config(self, save_directory, *args, **kwargs):
        """Also writes the code of this class beside the config, so that what is saved can be loaded."""
        # Hooked here because a save_pretrained(*args, **kwargs) of ours would hide variant= and max_shard_size= from
        # the pipeline, which looks for them in its signature.
        manifest = os.path.join(os.path.dirname(os.path.abspath(save_directory)), "surgery.json")
        if os.path.exists(manifest):
            raise ValueError(f"{manifest} describes an artifact, which saving into it would break; save elsewhere")
        self.update_config()
        super().save_config(save_directory, *args, **kwargs)
        with open(os.path.join(save_directory, MODULE_NAME + ".py"), "w", encoding="utf-8") as file:
            file.write(shipped_source())

    def to_json_string(self):
        """The config as it is saved: marked so that the stock class refuses it."""
        return json.dumps(refused_by_stock_class(json.loads(super().to_json_string())), indent=2) + "\n"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As diffusers' from_pretrained; raises ValueError where buffers are missing or disagree with the config."""
        with_info = kwargs.pop("output_loading_info", False)
        low_memory = kwargs.get("low_cpu_mem_usage", True) and is_accelerate_available()
        if low_memory:
            model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        else:
            # diffusers refuses _keep_in_fp32_modules on this path, so load in the file's own precision and cast after:
            # .to() leaves the buffers float32.
            dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
            kwargs.pop("torch_dtype", None)
            plain = type(cls.__name__, (cls,), {"_keep_in_fp32_modules": None, "__module__": cls.__module__})
            load = super(PladisUNet2DConditionModel, plain).from_pretrained
            model, info = load(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
            model.__class__ = cls
            model = model if dtype is None else model.to(dtype)
        _compare_buffers_with_config(model, info, pretrained_model_name_or_path)
        return (model, info) if with_info else model


def refused_by_stock_class(config):
    """A UNet config that UNet2DConditionModel cannot load; PladisUNet2DConditionModel reads it as before."""
    middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn") or ""
    return {**config, "mid_block_type": middle.removesuffix(STOCK_CLASS_REFUSAL) + STOCK_CLASS_REFUSAL}


def check_operations(operations):
    """The config's list of operations, or ValueError saying what is wrong with it."""
    if operations and not (isinstance(operations, (list, tuple)) and all(isinstance(o, dict) for o in operations)):
        raise ValueError("the config's `pladis` must be a list of operations")
    if not operations:
        raise ValueError("the config's `pladis` names no layer; an unpatched UNet is a plain UNet2DConditionModel")
    seen = set()
    for index, operation in enumerate(operations):
        missing = [key for key in ("operator", *HYPERPARAMETERS, "layers") if key not in operation]
        if missing:
            raise ValueError(f"the config's pladis[{index}] lacks {', '.join(missing)}")
        if operation["operator"] != "pladis":
            raise ValueError(
                f"the config's pladis[{index}].operator is {operation['operator']!r}, unknown to this code"
            )
        for name in HYPERPARAMETERS:
            if not is_in_range(name, operation[name]):
                raise ValueError(f"the config's pladis[{index}].{name} is {operation[name]!r}, which is out of range")
        twice = seen.intersection(operation["layers"])
        if twice:
            raise ValueError(f"the config's pladis[{index}] names {sorted(twice)[0]} a second time")
        seen.update(operation["layers"])
    return operations


def is_in_range(name, value):
    """Whether a hyperparameter's value is a number that the operator is defined for, as float32."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return False
    low, high = {"alpha": (1, 2), "scale": (-1e30, 1e30), "temperature": (1e-30, 1e30)}[name]
    return low <= value <= high


def module_at(model, path):
    """The module of `model` at a dotted path; ValueError naming the path where there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"this model has no module {path}") from None


def _set_config(model, values):
    """Replace a model's config; unlike register_to_config, keeping what was set on it as an attribute alone.

    diffusers' IP-Adapter loader marks the UNet so (config.encoder_hid_dim_type), and the adapter goes without that.
    """
    old = model.config
    model._internal_dict = type(old)(values)
    for name, value in vars(old).items():
        if name in values and value is not old[name]:
            setattr(model._internal_dict, name, value)


def _compare_buffers_with_config(model, info, source):
    missing, unnamed = (
        sorted(key for key in info[kind] if key.rpartition(".")[2] in BUFFERS)
        for kind in ("missing_keys", "unexpected_keys")
    )
    if unnamed:
        raise ValueError(
            f"{source}: the weights hold {unnamed[0]}, but the config names no operation there; the config was edited: "
            "fetch or build the model again"
        )
    if missing:
        raise ValueError(
            f"{source}: {len(missing)} PLADIS buffers are not in the weights, the first {missing[0]}; the shard that "
            "holds them, or its index, is missing or damaged: fetch or build the model again"
        )
    for index, operation in enumerate(model.config.pladis):
        for path in operation["layers"]:
            for name, buffer in zip(HYPERPARAMETERS, BUFFERS, strict=True):
                found = module_at(model, path)._buffers[buffer]
                wanted = torch.tensor(float(operation[name]), dtype=torch.float32)
                if found.device.type != "meta" and not torch.equal(found.detach().cpu(), wanted):
                    raise ValueError(
                        f"{source}: the config says {name} {operation[name]} (pladis[{index}]) but {path}.{buffer} "
                        f"holds {found.item()}; one of the two was edited: fetch or build the model again"
                    )


# ConfigMixin reads the constructor's signature to know which config keys are its own.
_parameters = dict(inspect.signature(UNet2DConditionModel.__init__).parameters)
_parameters["pladis"] = inspect.Parameter("pladis", inspect.Parameter.KEYWORD_ONLY, default=None)
PladisUNet2DConditionModel.__init__.__signature__ = inspect.Signature(list(_parameters.values()))
# model_index.json names a component by its class's module: the shipped file, wherever this code was imported from.
PladisUNet2DConditionModel.__module__ = MODULE_NAME
sys.modules.setdefault(MODULE_NAME, sys.modules[__name__])  # so that pickle and diffusers find the class under it
