"""`PladisFluxTransformer2DModel`: FLUX.1, whose joint attention has the text first, then the image."""

from typing import cast

import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxIPAdapterAttnProcessor
from torch import nn

from ..model import PladisModel
from ..module import is_pladis, warn_of_unknown
from .flux_streams import FluxStreams, grid_by_ids, with_text_length
from .record import Backbone

_OF_BLOCK = ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "joint_attention_kwargs")


class PladisFluxAttention(FluxStreams, FluxAttention):
    """Joint attention of FLUX.1, in blocks of two streams and of one, the image's attention to the text by an operator.

    Text is all that the pipeline passes as prompt: Redux's image tokens are among it. The images that Kontext, Fill and
    the control models are given stand with the image.
    """

    stock = FluxAttention
    # They compute plain joint attention, or add an IP-Adapter to it: forward() below computes what they would.
    processors = ("FluxAttnProcessor", "FluxIPAdapterAttnProcessor")

    @classmethod
    def own_refusal(cls, module):
        """As PladisModule's: attention with neither text of its own nor a single stream's sequence."""
        if module.added_kv_proj_dim is None and not module.pre_only:
            return "it is self-attention; sparsifying it destroys the image, so it stays dense"
        return None

    def forward(
        self,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        image_rotary_emb=None,
        ip_hidden_states=None,
        ip_adapter_masks=None,
        pladis_text_length=None,
        **kwargs,
    ):
        """As `FluxAttnProcessor`: in a block of two streams (image, text), (batch, tokens, channels) each.

        In a block of one stream [text, image], of which pladis_text_length tokens are text.
        ip_hidden_states: the image tokens of each IP-Adapter that the processor has, (batch, images, tokens, channels)
        or (batch, tokens, channels); their part of the output comes third, dense as PLADIS is on text.
        ip_adapter_masks: ignored, as by that processor.
        """
        warn_of_unknown(kwargs)
        if self.added_kv_proj_dim is None:
            query, key, value = self.one_stream(
                self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)
            )
            return self.attended(query, key, value, pladis_text_length, attention_mask, image_rotary_emb)
        assert encoder_hidden_states is not None  # in a block of two streams
        text_length = encoder_hidden_states.shape[1]
        query, key, value = self.two_streams(hidden_states, encoder_hidden_states)
        output = self.attended(query, key, value, text_length, attention_mask, image_rotary_emb)
        image = self.to_out[1](self.to_out[0](output[:, text_length:]))
        text = self.to_add_out(output[:, :text_length])
        if ip_hidden_states is None or not hasattr(self.processor, "to_k_ip"):
            return image, text
        return image, text, self._attend_to_image_prompts(query[:, text_length:], ip_hidden_states)

    def _attend_to_image_prompts(self, query, ip_hidden_states):
        """The IP-Adapters' part, (batch, tokens, channels). query: the image's, (batch, tokens, heads, head_dim)."""
        adapter, output = cast(FluxIPAdapterAttnProcessor, self.processor), 0
        batch, _, heads, head_dim = query.shape
        for tokens, scale, to_key, to_value in zip(
            ip_hidden_states, adapter.scale, adapter.to_k_ip, adapter.to_v_ip, strict=False
        ):
            key, value = (to(tokens).reshape(batch, -1, heads, head_dim).transpose(1, 2) for to in (to_key, to_value))
            found = F.scaled_dot_product_attention(query.transpose(1, 2), key, value)
            output = output + scale * self._merge_heads(found, query)
        return output


class PladisFluxTransformer2DModel(PladisModel, FluxTransformer2DModel):
    """FluxTransformer2DModel with some of its attention modules turned into PladisFluxAttention."""

    stock = FluxTransformer2DModel
    forms = (PladisFluxAttention,)

    def _convert_modules(self, operations, implementation):
        super()._convert_modules(operations, implementation)
        self._text_length_hooks = [
            block.register_forward_pre_hook(_tell_text_length, with_kwargs=True)
            for block in self.single_transformer_blocks
            if is_pladis(cast(nn.Module, block.attn))
        ]

    def revert(self):
        for hook in self._text_length_hooks:
            hook.remove()
        del self._text_length_hooks
        return super().revert()


def _tell_text_length(block, args, kwargs):
    """A forward pre-hook of a block of one stream: it is given text and image apart, its attention module is not."""
    given = {**dict(zip(_OF_BLOCK, args, strict=False)), **kwargs}
    told = with_text_length(given.get("joint_attention_kwargs"), given["encoder_hidden_states"])
    return (), {**given, "joint_attention_kwargs": told}


BACKBONE = Backbone(
    patched=PladisFluxTransformer2DModel,
    attention="attn",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    grid=grid_by_ids,
    batches_cfg=False,
    embeds_guidance=True,
)
