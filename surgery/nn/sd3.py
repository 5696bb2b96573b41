"""`PladisSD3Transformer2DModel`: Stable Diffusion 3 and 3.5, where the image comes first in joint attention."""

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, SD3Transformer2DModel  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.attention_processor import Attention

from .joint import attend_jointly
from .model import PladisModel
from .module import PladisModule, warn_of_unknown


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
        """As PladisModule's."""
        super().revert()
        if type(self.processor).__name__ == "FusedJointAttnProcessor2_0" and not hasattr(self, "to_qkv"):
            self.fuse_projections()  # asked for while this class ignored it
        return self

    def forward(
        self,
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
        image_query = self._split_heads(self.to_q(hidden_states))
        image_key = self._split_heads(self.to_k(hidden_states))
        image_value = self._split_heads(self.to_v(hidden_states))
        text_query = self._split_heads(self.add_q_proj(encoder_hidden_states))
        text_key = self._split_heads(self.add_k_proj(encoder_hidden_states))
        text_value = self._split_heads(self.add_v_proj(encoder_hidden_states))

        query = torch.cat([_normed(self.norm_q, image_query), _normed(self.norm_added_q, text_query)], dim=2)
        key = torch.cat([_normed(self.norm_k, image_key), _normed(self.norm_added_k, text_key)], dim=2)
        value = torch.cat([image_value, text_value], dim=2)
        output = attend_jointly(self, query, key, value, text_query.shape[2], text_first=False)
        output = self._merge_heads(output, query)

        image, text = output[:, : hidden_states.shape[1]], output[:, hidden_states.shape[1] :]
        if not self.context_pre_only:
            text = self.to_add_out(text)
        if ip_hidden_states is not None and hasattr(self.processor, "to_k_ip") and self.processor.scale != 0:
            prompted = self._attend_to_image_prompt(image_query, image_key, image_value, ip_hidden_states, temb)
            image = image + prompted * self.processor.scale
        return self.to_out[1](self.to_out[0](image)), text

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
