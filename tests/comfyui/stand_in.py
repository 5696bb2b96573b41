"""What ComfyUI promises to nodes, in little: its attention signature, a patcher with wrappers, models of its classes.

By its documentation and code: an attention function is called as `attention(q, k, v, heads, mask, ...)` and asks
`optimized_attention_override` of the transformer_options that it is given; wrappers of a kind call one another.
"""

import copy
import sys
import types

import torch
import torch.nn.functional as F
from torch import nn


def attention(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    """As ComfyUI's optimized_attention."""
    options = kwargs.get("transformer_options") or {}
    if "optimized_attention_override" in options and "_inside_attn_wrapper" not in kwargs:
        more = {"attn_precision": attn_precision, "skip_reshape": skip_reshape}
        more |= {"skip_output_reshape": skip_output_reshape, "_inside_attn_wrapper": True, **kwargs}
        return options["optimized_attention_override"](attention, q, k, v, heads, mask, **more)
    if not skip_reshape:
        q, k, v = (states.unflatten(-1, (heads, -1)).transpose(1, 2) for states in (q, k, v))
    if mask is not None:
        mask = mask[None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return output if skip_output_reshape else output.transpose(1, 2).flatten(2)


def of_class(name):
    """A class decorator: what it is called in ComfyUI, module and name."""

    def named(cls):
        module, _, own = name.rpartition(".")
        cls.__module__, cls.__qualname__, cls.__name__ = f"comfy.ldm.{module}", own, own
        return cls

    return named


class CrossAttention(nn.Module):
    """As in comfy.ldm.modules.attention; the projections are left out."""

    heads = 2

    def forward(self, x, context=None, value=None, mask=None, transformer_options={}):  # noqa: B006  as there
        text = x if context is None else context
        return attention(x, text, text, self.heads, mask, transformer_options=transformer_options)


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn1, self.attn2 = CrossAttention(), CrossAttention()

    def forward(self, x, context, options):
        x = x + self.attn1(x, transformer_options=options)
        return x + self.attn2(x, context=context, transformer_options=options)


class _Spatial(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.transformer_blocks = nn.ModuleList(_Block() for _ in range(depth))

    def forward(self, x, context, options):
        for block in self.transformer_blocks:
            x = block(x, context, options)
        return x


class _Other(nn.Module):
    def forward(self, x, context, options):
        return x


class Downsample(_Other):
    """A place where a level ends."""


class Upsample(_Other):
    """A place where a level ends."""


@of_class("modules.diffusionmodules.openaimodel.UNetModel")
class UNet(nn.Module):
    """Of two levels with one residual block each, attention in both and the middle."""

    def __init__(self):
        super().__init__()
        first, other = _Spatial(1), _Spatial(2)
        self.input_blocks = _lists([_Other()], [_Other(), first], [Downsample()], [_Other(), other])
        self.middle_block = nn.ModuleList([_Other(), _Spatial(1), _Other()])
        self.output_blocks = _lists(
            [_Other()], [_Other(), _Spatial(1), Upsample()], [_Other(), _Spatial(1)], [_Other()]
        )

    def forward(self, x, t, context=None, control=None, transformer_options={}, **_):  # noqa: B006
        for parts in (*self.input_blocks, self.middle_block, *self.output_blocks):
            for part in parts:
                x = part(x, context, transformer_options)
        return x


def _lists(*groups):
    return nn.ModuleList(nn.ModuleList(group) for group in groups)


def _heads(states):
    return states.unflatten(-1, (2, -1)).transpose(1, 2)


class _Double(nn.Module):
    def __init__(self, text_first):
        super().__init__()
        self.text_first = text_first

    def forward(self, img, txt, vec=None, pe=None, attn_mask=None, transformer_options={}):  # noqa: B006
        both = torch.cat([txt, img] if self.text_first else [img, txt], dim=1)
        states = _heads(both)
        both = attention(
            states, states, states, 2, attn_mask, skip_reshape=True, transformer_options=transformer_options
        )
        lengths = [txt.shape[1], img.shape[1]] if self.text_first else [img.shape[1], txt.shape[1]]
        first, last = both.split(lengths, dim=1)
        text, image = (first, last) if self.text_first else (last, first)
        return img + image, txt + text


class _Single(nn.Module):
    def forward(self, x, vec=None, pe=None, attn_mask=None, transformer_options={}):  # noqa: B006
        states = _heads(x)
        return x + attention(
            states, states, states, 2, attn_mask, skip_reshape=True, transformer_options=transformer_options
        )


class _Streams(nn.Module):
    text_first = True

    def __init__(self):
        super().__init__()
        self.double_blocks = nn.ModuleList([_Double(self.text_first)])
        self.single_blocks = nn.ModuleList([_Single()])

    def forward(self, x, t, context=None, control=None, transformer_options={}, attention_mask=None, **_):  # noqa: B006
        image, text = x, context
        for block in self.double_blocks:
            image, text = block(image, text, attn_mask=attention_mask, transformer_options=transformer_options)
        both = torch.cat([text, image] if self.text_first else [image, text], dim=1)
        for block in self.single_blocks:
            both = block(both, attn_mask=attention_mask, transformer_options=transformer_options)
        return both[:, text.shape[1] :] if self.text_first else both[:, : image.shape[1]]


@of_class("flux.model.Flux")
class Flux(_Streams):
    """One block of two streams, one of one, the text first."""


@of_class("hunyuan_video.model.HunyuanVideo")
class HunyuanVideo(_Streams):
    """The same with the text last."""

    text_first = False


class _WanCross(nn.Module):
    def forward(self, x, context, context_img_len, transformer_options={}):  # noqa: B006
        image, text = context[:, :context_img_len], context[:, context_img_len:]
        found = torch.zeros_like(x)
        for keys in (image, text) if context_img_len else (text,):
            found = found + attention(x, keys, keys, heads=2, transformer_options=transformer_options)
        return found


class _WanBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.cross_attn = _WanCross()


@of_class("wan.model.WanModel")
class Wan(nn.Module):
    """One block with cross-attention to the tokens of an image, then of the text."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([_WanBlock()])

    def forward(self, x, t, context=None, control=None, transformer_options={}, clip_len=0, **_):  # noqa: B006
        return x + self.blocks[0].cross_attn(x, context, clip_len, transformer_options=transformer_options)


class Unknown(nn.Module):
    """Of a class that the pack does not know."""

    def forward(self, x, t, context=None, control=None, transformer_options={}, **_):  # noqa: B006
        return x + attention(x, context, context, 2, transformer_options=transformer_options)


class Executor:
    """As comfy.patcher_extension.WrapperExecutor."""

    def __init__(self, original, class_obj, wrappers):
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args, **kwargs):
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](Executor(self.original, self.class_obj, self.wrappers[1:]), *args, **kwargs)


class Patcher:
    """As comfy.model_patcher.ModelPatcher: options and wrappers that clones have copies of."""

    def __init__(self, network):
        self.model = types.SimpleNamespace(diffusion_model=network)
        self.model_options, self.wrappers = {"transformer_options": {}}, {}

    def clone(self):
        other = Patcher(self.model.diffusion_model)
        other.model_options = copy.deepcopy(self.model_options)
        other.wrappers = {kind: {key: list(of) for key, of in own.items()} for kind, own in self.wrappers.items()}
        return other

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.get(kind, {}).pop(key, None)

    def set_model_sampler_cfg_function(self, function, disable_cfg1_optimization=False):
        self.model_options["sampler_cfg_function"] = function
        if disable_cfg1_optimization:
            self.model_options["disable_cfg1_optimization"] = True

    def set_model_attn2_replace(self, patch, block, number, transformer_index=None):
        replaced = self.model_options["transformer_options"].setdefault("patches_replace", {}).setdefault("attn2", {})
        replaced[block, number, transformer_index] = patch

    def run(self, x, context, sigmas=(5.0, 1.0), conds=(0,), **more):
        """One sampling run of a call at each of `sigmas`, all of the same x; the last call's output."""

        def sample():
            for sigma in sigmas:
                options = {**self.model_options["transformer_options"], "cond_or_uncond": list(conds)}
                options |= {"sigmas": torch.tensor([sigma]), "sample_sigmas": torch.tensor([*sigmas, 0.0])}
                found = self._executor("apply_model", self._apply)(
                    x, torch.full((x.shape[0],), sigma), None, context, None, options, **more
                )
            return found

        return self._executor("outer_sample", sample)()

    def _executor(self, kind, original):
        return Executor(original, self.model, [one for of in self.wrappers.get(kind, {}).values() for one in of])

    def _apply(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **more):  # noqa: B006
        return self.model.diffusion_model(
            x, t, context=c_crossattn, control=control, transformer_options=transformer_options, **more
        )


def install(monkeypatch, override=True):
    """Have `comfy.ldm.modules.attention` be this; override: of a version that asks for an override."""
    own = types.ModuleType("comfy.ldm.modules.attention")
    own.CrossAttention = CrossAttention
    if override:
        own.wrap_attn = lambda function: function
    for name in ("comfy", "comfy.ldm", "comfy.ldm.modules"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["comfy.ldm.modules"].attention = own
    monkeypatch.setitem(sys.modules, "comfy.ldm.modules.attention", own)
