"""What an IP-Adapter adds to a cross-attention: dense attention from the same queries to the image tokens.

The image tokens come beside the text as `(text, [tokens of each adapter])`, and their projections live in the module's
processor (`to_k_ip`, `to_v_ip`, `scale`), where diffusers' loader puts them. PLADIS is defined on text keys, so these
branches stay dense.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_processor import Attention
from torch import nn

from ..module import PladisModule, warn_of_unknown


class ImagePrompts(Protocol):
    """What diffusers' processors of IP-Adapters have: each adapter's projections, scale and how many tokens it has."""

    to_k_ip: Iterable[nn.Module]
    to_v_ip: Iterable[nn.Module]
    scale: list
    num_tokens: Sequence[int]


def split_image_tokens(
    processor: object, encoder_hidden_states: torch.Tensor | tuple | None
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """(text, image tokens of each adapter, (batch, images, tokens, dim)); the list is empty without adapter."""
    if isinstance(encoder_hidden_states, tuple):
        return encoder_hidden_states[0], list(encoder_hidden_states[1])
    if not hasattr(processor, "to_k_ip") or encoder_hidden_states is None:
        return encoder_hidden_states, []
    # diffusers' older calling convention: the image tokens are the last keys of one tensor.
    text_keys = encoder_hidden_states.shape[1] - cast(ImagePrompts, processor).num_tokens[0]
    return encoder_hidden_states[:, :text_keys], [encoder_hidden_states[:, text_keys:]]


def image_attention(
    processor: ImagePrompts,
    query: torch.Tensor,
    image_tokens: list[torch.Tensor],
    masks: torch.Tensor | list | None = None,
) -> torch.Tensor | float:
    """The sum over adapters of `scale * attention(query, image keys)`, shaped as `query`: (batch, heads, queries, dim).

    Where all scales are 0, that number. masks: None, or for each adapter None or (1, images, height, width), as
    `cross_attention_kwargs["ip_adapter_masks"]` brings them. Raises ValueError where masks and adapters do not fit
    together.
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


class PladisAttention(PladisModule, Attention):
    """Cross-attention by PLADIS (arXiv 2503.07677, eq. 15), GAG or another of OPERATORS, hyperparameters in buffers."""

    stock = Attention
    takes_self_attention = True
    # They compute plain attention, or add an IP-Adapter to it: forward() below computes what they would.
    processors = (
        "AttnProcessor",
        "AttnProcessor2_0",
        "AttnProcessorNPU",
        "FusedAttnProcessor2_0",
        "IPAdapterAttnProcessor",
        "IPAdapterAttnProcessor2_0",
        "IPAdapterXFormersAttnProcessor",
        "SanaAttnProcessor2_0",
        "SlicedAttnProcessor",
        "XFormersAttnProcessor",
    )

    @classmethod
    def own_refusal(cls, module):
        """As PladisModule's: self-attention and joint attention."""
        if not module.is_cross_attention:
            return "it is self-attention; sparsifying it destroys the image, so it stays dense"
        return cls._joint_refusal(module)

    @classmethod
    def self_attention_refusal(cls, module):
        """As PladisModule's, and joint attention."""
        return super().self_attention_refusal(module) or cls._joint_refusal(module)

    @classmethod
    def _joint_refusal(cls, module):
        if module.added_kv_proj_dim is not None or module.to_k is None:
            return "it attends to image and text in one softmax (added key/value projections); not supported yet"
        if module.to_out is None or module.context_pre_only is not None:
            return "it is joint attention without an output of its own; not supported yet"
        return None

    def revert(self):
        super().revert()
        if type(self.processor).__name__ == "FusedAttnProcessor2_0" and not hasattr(self, "to_kv"):
            self.fuse_projections()  # asked for while this class ignored it
        return self

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **kwargs):
        """As `Attention.forward`: (batch, queries, channels) or (batch, channels, height, width), out as in.

        encoder_hidden_states: (batch, keys, cross_attention_dim), or IP-Adapter's (text, [image tokens]).
        attention_mask: additive, (batch, 1 or queries, keys). `ip_adapter_masks` is taken from the keyword arguments.
        """
        masks = kwargs.pop("ip_adapter_masks", None)
        kwargs.pop("scale", None)  # the LoRA scale; peft has applied it before the call
        warn_of_unknown(kwargs)
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

        assert self.to_k is not None and self.to_v is not None  # own_refusal has seen to it
        query, key = self.to_q(hidden_states), self.to_k(text)
        query = self._normed(self.norm_q, query)
        key = self._normed(self.norm_k, key)
        value = self._split_heads(self.to_v(text))
        output = self.attend(query, key, value, self._mask_per_head(attention_mask, text), self.scale)
        if image_tokens:
            output = output + image_attention(cast(ImagePrompts, self.processor), query, image_tokens, masks)
        output = self._merge_heads(output, query)

        assert self.to_out is not None  # own_refusal has seen to it
        output = self.to_out[1](self.to_out[0](output))
        if image_shape is not None:
            output = output.transpose(-1, -2).reshape(image_shape)
        if self.residual_connection:
            output = output + residual
        return output if self.rescale_output_factor == 1.0 else output / self.rescale_output_factor

    def _normed(self, norm, projected):
        """A projection split into heads and normed: (batch, heads, length, head_dim)."""
        if norm is None:
            return self._split_heads(projected)
        if type(self.processor).__name__ == "SanaAttnProcessor2_0":  # whose norms are over all heads together
            return self._split_heads(norm(projected))
        return norm(self._split_heads(projected))
