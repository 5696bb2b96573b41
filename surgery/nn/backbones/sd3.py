"""`PladisSD3Transformer2DModel`: Stable Diffusion 3 and 3.5, where the image comes first in joint attention."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, SD3Transformer2DModel  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.attention_processor import Attention

from ..joint import attend_jointly
from ..model import PladisModel
from ..module import PladisModule, warn_of_unknown
from .record import Backbone, image_grid


class PladisSD3Attention(PladisModule, Attention):
    """Joint attention of image and text as in SD3, the image's attention to the text by one of OPERATORS."""

    stock = Attention
    kind = "joint"
    # They compute plain joint attention, or add an IP-Adapter to it: forward() below computes what they would.
    processors = (
        "FusedJointAttnProcessor2_0",
        "JointAttnProcessor2_0",
        "SD3IPAdapterJointAttnProcessor2_0",
        "XFormersJointAttnProcessor",
    )

    @classmethod
    def own_refusal(cls, module):
        """As PladisModule's: SD3.5-medium's attn2, and what has no queries of the text's own."""
        if module.added_kv_proj_dim is None:
            return (
                "it is self-attention among image tokens, which SD3.5-medium has beside the joint attention; "
                "sparsifying it destroys the image, so it stays dense"
            )
        if module.context_pre_only is None or module.to_k is None or module.to_out is None:
            return "it is not joint attention as in SD3: text or image lacks projections of its own"
        return None

    def revert(self):
        super().revert()
        if type(self.processor).__name__ == "FusedJointAttnProcessor2_0" and not hasattr(self, "to_qkv"):
            self.fuse_projections()  # asked for while this class ignored it
        return self

    def forward(
        self: Any,
        hidden_states,
        encoder_hidden_states,
        attention_mask=None,
        ip_hidden_states=None,
        temb=None,
        **kwargs,
    ):
        """As `JointAttnProcessor2_0`: (image, text) of the shapes that came in, (batch, tokens, channels) each.

        In a model's last block (context_pre_only) the text comes without its output projection: nothing reads it.
        attention_mask: ignored, as by that processor. ip_hidden_states, temb: an IP-Adapter's image tokens and its
        timestep embedding, used where the processor is one.
        """
        warn_of_unknown(kwargs)
        image_query, text_query = self.to_q(hidden_states), self.add_q_proj(encoder_hidden_states)
        image_key, text_key = self.to_k(hidden_states), self.add_k_proj(encoder_hidden_states)
        image_value, text_value = self.to_v(hidden_states), self.add_v_proj(encoder_hidden_states)

        query = self._joined(image_query, text_query, self.norm_q, self.norm_added_q)
        key = self._joined(image_key, text_key, self.norm_k, self.norm_added_k)
        value = self._joined(image_value, text_value)
        output = attend_jointly(self, query, key, value, encoder_hidden_states.shape[1], text_first=False)
        output = self._merge_heads(output, query)

        image, text = output[:, : hidden_states.shape[1]], output[:, hidden_states.shape[1] :]
        if not self.context_pre_only:
            text = self.to_add_out(text)
        if ip_hidden_states is not None and hasattr(self.processor, "to_k_ip") and self.processor.scale != 0:
            of_image = (self._split_heads(projected) for projected in (image_query, image_key, image_value))
            image = image + self._attend_to_image_prompt(*of_image, ip_hidden_states, temb) * self.processor.scale
        return self.to_out[1](self.to_out[0](image)), text

    def _joined(self, image, text, image_norm=None, text_norm=None):
        """Projections (batch, tokens, channels) of image and text as one sequence, (batch, heads, tokens, head_dim)."""
        if image_norm is None and text_norm is None:
            return self._split_heads(torch.cat([image, text], dim=1))
        image, text = _normed(image_norm, self._split_heads(image)), _normed(text_norm, self._split_heads(text))
        # Joined as they lie in memory, where heads are inside tokens.
        return torch.cat([image.transpose(1, 2), text.transpose(1, 2)], dim=1).transpose(1, 2)

    def _attend_to_image_prompt(self, query, key, value, ip_hidden_states, temb):
        """An IP-Adapter's branch: from the image's tokens to themselves and the adapter's, dense as PLADIS is on text.

        query, key, value: the image's, (batch, heads, tokens, head_dim), not normed: the adapter has norms of its own.
        Returns (batch, tokens, heads * head_dim).
        """
        adapter = self.processor
        prompt = adapter.norm_ip(ip_hidden_states, temb=temb)
        prompt_key = adapter.norm_ip_k(self._split_heads(adapter.to_k_ip(prompt)))
        key = torch.cat([adapter.norm_k(key), prompt_key], dim=2)
        value = torch.cat([value, self._split_heads(adapter.to_v_ip(prompt))], dim=2)
        output = F.scaled_dot_product_attention(adapter.norm_q(query), key, value)
        return self._merge_heads(output, query)


def _normed(norm, projected):
    return projected if norm is None else norm(projected)


class PladisSD3Transformer2DModel(PladisModel, SD3Transformer2DModel):
    """SD3Transformer2DModel with some of its joint attention modules turned into PladisSD3Attention."""

    stock = SD3Transformer2DModel
    forms = (PladisSD3Attention,)


BACKBONE = Backbone(patched=PladisSD3Transformer2DModel, attention="attn", grid=image_grid, text_first=False)
