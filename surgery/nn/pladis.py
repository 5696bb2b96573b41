"""`PladisAttention`: diffusers' cross-attention module with one of our operators in place of its softmax.

It is made from a live `Attention` by changing the class of that very object and registering float32 buffers.
So nothing that holds the module loses it: parents, LoRA layers, quantised Linears, IP-Adapter processors, offload
and forward hooks, compiled blocks. Taking the buffers away and setting the class back is the exact inverse.
"""

import types

import torch
from diffusers.models.attention_processor import Attention
from diffusers.utils import logging

from .attention import attention
from .fused import choice_problem
from .ip_adapter import image_attention, split_image_tokens
from .operators import ALL_HYPERPARAMETERS, LARGEST, OPERATORS
from .schedule import schedule_problems, stored_schedule

BUFFERS = tuple(f"pladis_{name}" for name in ALL_HYPERPARAMETERS)  # "scale" alone would clash with Attention.scale

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
    """Cross-attention by PLADIS (arXiv 2503.07677, eq. 15), GAG, or another of OPERATORS, hyperparameters as buffers.

    Buffers `pladis_alpha`, `pladis_temperature` and those that the operator has besides (`pladis_scale`, the papers'
    lambda, and so on): float32 scalars that stay float32 under .half(), .to(dtype) and
    from_pretrained(torch_dtype=...). Change them in place (`fill_`, `surgery.tune`): a compiled graph need not be
    compiled again. `pladis_schedule`: how they change over the denoising steps (schedule.py), or None.
    """

    @classmethod
    def convert(
        cls, module, operator="pladis", *, unit="head", schedule=None, implementation="auto", **hyperparameters
    ):
        """Turn a live `Attention` into a PladisAttention in place and return it; its parameters are not touched.

        hyperparameters: the operator's own; what is left out takes its default.
        Raises ValueError for a module that `refusal` names a reason against, an unknown operator, unit, hyperparameter
        or implementation.
        """
        reason = cls.refusal(module)
        if reason:
            raise ValueError(reason)
        problem = choice_problem(operator, unit, implementation)
        if problem:
            raise ValueError(problem)
        unknown = sorted(set(hyperparameters) - set(OPERATORS[operator]))
        if unknown:
            raise ValueError(f"{operator} has no {unknown[0]}; it has {', '.join(OPERATORS[operator])}")
        if unit != "head" and operator != "gag":
            raise ValueError(f"unit is gag's; {operator} projects nothing")
        if schedule is not None:
            for key, message in schedule_problems(schedule, operator):
                raise ValueError(f"schedule{f'.{key}' if key else ''} {message}")
        device = next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))
        module.__class__ = cls
        module.pladis_operator, module.pladis_unit = operator, unit
        module.pladis_schedule = None if schedule is None else stored_schedule(schedule)
        module.pladis_implementation = implementation
        for name, default in OPERATORS[operator].items():
            value = min(float(hyperparameters.get(name, default)), LARGEST)
            # No device given on the meta device's behalf: diffusers builds models there and loads the buffers after.
            module.register_buffer(f"pladis_{name}", torch.tensor(value, dtype=torch.float32, device=device))
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
        for name in OPERATORS[self.pladis_operator]:
            del self._buffers[f"pladis_{name}"]
        del self.pladis_operator, self.pladis_unit, self.pladis_schedule, self.pladis_implementation
        self.__class__ = Attention
        if type(self.processor).__name__ == "FusedAttnProcessor2_0" and not hasattr(self, "to_kv"):
            self.fuse_projections()  # asked for while this class ignored it
        _rebind_hooked_forward(self)
        return self

    def hyperparameters(self):
        """{name: float} of the operator's hyperparameters, each the shortest float for its float32 value."""
        return {name: shortest_float(self._buffers[f"pladis_{name}"]) for name in OPERATORS[self.pladis_operator]}

    def set_hyperparameters(self, values):
        """Write hyperparameters, {name: float}, into the buffers in place."""
        for name, value in values.items():
            self._buffers[f"pladis_{name}"].fill_(min(float(value), LARGEST))

    def setting(self):
        """All that the operator is, as a config says it: operator, hyperparameters, gag's unit, schedule if any."""
        setting = {"operator": self.pladis_operator, **self.hyperparameters()}
        if self.pladis_operator == "gag":
            setting["unit"] = self.pladis_unit
        return setting if self.pladis_schedule is None else {**setting, "schedule": self.pladis_schedule}

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
            operator=self.pladis_operator,
            unit=self.pladis_unit,
            **{name: self._buffers[f"pladis_{name}"] for name in OPERATORS[self.pladis_operator]},
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
            if name in self._buffers:
                self._buffers[name] = self._buffers[name].float()

    def _apply(self, fn, recurse=True):
        before = {name: self._buffers[name] for name in BUFFERS if name in self._buffers}
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
    return "pladis_alpha" in module._buffers and "pladis_temperature" in module._buffers


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
