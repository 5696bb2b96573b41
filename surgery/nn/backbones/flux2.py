"""`PladisFlux2Transformer2DModel`: FLUX.2 (dev and Klein), whose joint attention has the text first, then the image."""

import functools
import inspect
from typing import cast

import torch
from diffusers import Flux2Transformer2DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.transformers.transformer_flux2 import Flux2Attention, Flux2ParallelSelfAttention
from torch import nn

from ..model import PladisModel
from ..module import is_pladis, warn_of_unknown
from .flux_streams import FluxStreams, forget_text_length, grid_by_ids, with_text_length
from .record import Backbone

_OF_MODEL = tuple(inspect.signature(Flux2Transformer2DModel.forward).parameters)[1:]


class PladisFlux2Attention(FluxStreams, Flux2Attention):
    """Joint attention in a block of two streams of FLUX.2, the image's attention to the text by one of OPERATORS.

    Reference images stand with the image. The processors that cache their keys (FLUX.2 Klein KV) are refused.
    """

    stock = Flux2Attention
    processors = ("Flux2AttnProcessor",)

    @classmethod
    def own_refusal(cls, module):
        """As PladisModule's: attention without text of its own."""
        if module.added_kv_proj_dim is None:
            return "it is self-attention; sparsifying it destroys the image, so it stays dense"
        return None

    def forward(
        self,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        image_rotary_emb=None,
        pladis_text_length=None,
        **kwargs,
    ):
        """As `Flux2AttnProcessor`: (image, text) of the shapes that came in, (batch, tokens, channels) each."""
        warn_of_unknown(kwargs)
        assert encoder_hidden_states is not None  # in a block of two streams
        text_length = encoder_hidden_states.shape[1]
        query, key, value = self.two_streams(hidden_states, encoder_hidden_states)
        output = self.attended(query, key, value, text_length, attention_mask, image_rotary_emb)
        image = self.to_out[1](self.to_out[0](output[:, text_length:]))
        return image, self.to_add_out(output[:, :text_length])


class PladisFlux2ParallelSelfAttention(FluxStreams, Flux2ParallelSelfAttention):
    """Joint attention in a block of one stream of FLUX.2, which also holds the block's feed-forward network.

    Its projections are one Linear by design, not fused by `fuse_qkv_projections`.
    """

    stock = Flux2ParallelSelfAttention
    processors = ("Flux2ParallelSelfAttnProcessor",)

    def forward(self, hidden_states, attention_mask=None, image_rotary_emb=None, pladis_text_length=None, **kwargs):
        """As `Flux2ParallelSelfAttnProcessor`: [text, image], (batch, tokens, channels), out as in."""
        warn_of_unknown(kwargs)
        projected = self.to_qkv_mlp_proj(hidden_states)
        # By their shares of the whole, as in diffusers: tensor parallelism leaves each device a part of both.
        whole = 3 * self.inner_dim + self.mlp_hidden_dim * self.mlp_mult_factor
        attention_channels = projected.shape[-1] * 3 * self.inner_dim // whole
        query, key, value = self.one_stream(*projected[..., :attention_channels].chunk(3, dim=-1))
        output = self.attended(query, key, value, pladis_text_length, attention_mask, image_rotary_emb)
        hidden = self.mlp_act_fn(projected[..., attention_channels:])
        return self.to_out(torch.cat([output, hidden], dim=-1))


class PladisFlux2Transformer2DModel(PladisModel, Flux2Transformer2DModel):
    """Flux2Transformer2DModel with some of its attention modules turned into the forms above."""

    stock = Flux2Transformer2DModel
    forms = (PladisFlux2Attention, PladisFlux2ParallelSelfAttention)

    @functools.wraps(Flux2Transformer2DModel.forward)
    def forward(self, *args, **kwargs):
        """As Flux2Transformer2DModel's, telling the blocks of one stream how much of their one sequence is text."""
        given = {**dict(zip(_OF_MODEL, args, strict=False)), **kwargs}
        told = with_text_length(given.get("joint_attention_kwargs"), given["encoder_hidden_states"])
        return super().forward(**{**given, "joint_attention_kwargs": told})

    def _convert_modules(self, operations, implementation):
        super()._convert_modules(operations, implementation)
        blocks = (*self.transformer_blocks, *self.single_transformer_blocks)
        self._text_length_hooks = [
            block.attn.register_forward_pre_hook(forget_text_length, with_kwargs=True)
            for block in blocks
            if not is_pladis(cast(nn.Module, block.attn))
        ]

    def revert(self):
        for hook in self._text_length_hooks:
            hook.remove()
        del self._text_length_hooks
        return super().revert()


_KV = "Flux2KleinKVPipeline"
BACKBONE = Backbone(
    patched=PladisFlux2Transformer2DModel,
    attention="attn",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    grid=grid_by_ids,
    batches_cfg=False,
    embeds_guidance=True,
    guided_pipelines=("Flux2KleinPipeline",),
    refused_pipelines={
        _KV: f"{_KV} puts processors of its own into every attention module, which PLADIS would replace"
    },
)
