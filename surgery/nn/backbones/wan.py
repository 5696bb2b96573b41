"""`PladisWanTransformer3DModel`: Wan 2.1 and 2.2."""

import torch.nn.functional as F
from diffusers import ModelMixin, WanTransformer3DModel  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.transformers.transformer_wan import WanAttention

from ..additions import negative_count
from ..model import PladisModel
from ..module import PladisModule, warn_of_unknown
from .record import Backbone, video_grid

WAN_TEXT_LENGTH = 512  # diffusers takes it for granted wherever image tokens stand before the text


class PladisWanAttention(PladisModule, WanAttention):
    """Cross-attention of Wan to its text, with the norms of query and key over all heads together.

    Image-to-video models have image tokens before the text, with projections and an attention of their own, whose
    output is added: that one stays dense, as the operators are defined on text. Text is padded with zeros to 512 tokens
    that are not masked, here as in diffusers. The backend that `set_attention_backend` names means nothing here, nor
    does context parallelism: diffusers, too, has the whole text on each device.
    """

    stock = WanAttention
    processors = ("WanAttnProcessor",)

    @classmethod
    def own_refusal(cls, module):
        """As PladisModule's: self-attention."""
        if not module.is_cross_attention:
            return "it is self-attention; sparsifying it destroys the video, so it stays dense"
        return None

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None, **kwargs):
        """As `WanAttention.forward` around cross-attention: (batch, queries, channels), out as in.

        encoder_hidden_states: (batch, keys, channels), with added projections the image's keys and then 512 of text.
        attention_mask: boolean or additive, broadcastable to (batch, heads, queries, text keys). Raises ValueError for
        self-attention, which has no text or has rotary embeddings.
        """
        if encoder_hidden_states is None or rotary_emb is not None:
            raise ValueError("this is cross-attention to text; self-attention stays diffusers' own")
        warn_of_unknown(kwargs)
        image = None
        if self.add_k_proj is not None:
            image_length = encoder_hidden_states.shape[1] - WAN_TEXT_LENGTH - negative_count(self)
            image, encoder_hidden_states = (
                encoder_hidden_states[:, :image_length],
                encoder_hidden_states[:, image_length:],
            )
        query = self._split_heads(self.norm_q(self.to_q(hidden_states)))
        key = self._split_heads(self.norm_k(self.to_k(encoder_hidden_states)))
        value = self._split_heads(self.to_v(encoder_hidden_states))
        output = self._merge_heads(self.attend(query, key, value, attention_mask), query)
        if image is not None:
            assert self.add_k_proj is not None and self.add_v_proj is not None
            key = self._split_heads(self.norm_added_k(self.add_k_proj(image)))
            value = self._split_heads(self.add_v_proj(image))
            output = output + self._merge_heads(F.scaled_dot_product_attention(query, key, value), query)
        return self.to_out[1](self.to_out[0](output))


class PladisWanTransformer3DModel(PladisModel, WanTransformer3DModel):
    """WanTransformer3DModel with some of its cross-attention modules (attn2) turned into PladisWanAttention."""

    stock = WanTransformer3DModel
    forms = (PladisWanAttention,)


BACKBONE = Backbone(
    patched=PladisWanTransformer3DModel, attention="attn2", blocks=("blocks",), grid=video_grid, batches_cfg=False
)
