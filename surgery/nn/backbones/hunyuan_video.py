"""`PladisHunyuanVideoTransformer3DModel`: HunyuanVideo."""

from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin here
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb

from ..joint import attend_jointly
from ..model import PladisModel
from ..module import PladisModule, warn_of_unknown
from .record import Backbone, video_grid


class PladisHunyuanVideoAttention(PladisModule, Attention):
    """Joint attention of HunyuanVideo over [image, text], in blocks of two streams and of one.

    In both kinds of block the module is given image and text apart, so it knows where text begins. In image-to-video
    models the text's tokens include those that its language model made of the image. The backend that
    `set_attention_backend` names means nothing here, nor does context parallelism, which diffusers has no plan of here.
    """

    stock = Attention
    kind = "joint"
    processors = ("HunyuanVideoAttnProcessor2_0",)

    @classmethod
    def own_refusal(cls, module):
        """As PladisModule's: the self-attention of the text's refiner."""
        if module.add_q_proj is None and module.to_out is not None:
            return "it is self-attention among text tokens, which refines them before image meets text; it stays dense"
        return None

    def forward(
        self,
        hidden_states,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb=None,
        **kwargs,
    ):
        """As `Attention.forward`: (batch, image tokens, channels), (batch, text tokens, channels); out as in.

        attention_mask: boolean, (batch, 1, 1, image and text tokens), True for all of the image. image_rotary_emb:
        (cos, sin) of the image tokens, each (image tokens, head_dim).
        """
        warn_of_unknown(kwargs)
        image_length, text_length = hidden_states.shape[1], encoder_hidden_states.shape[1]
        own = (self.to_q, self.to_k, self.to_v, self.norm_q, self.norm_k)
        query, key, value = self._projected(hidden_states, *own)
        if image_rotary_emb is not None:
            turned: Any = (apply_rotary_emb(states, image_rotary_emb, sequence_dim=1) for states in (query, key))
            query, key = turned
        if self.add_q_proj is not None:  # in a block of one stream both are projected alike
            own = (self.add_q_proj, self.add_k_proj, self.add_v_proj, self.norm_added_q, self.norm_added_k)
        text_query, text_key, text_value = self._projected(encoder_hidden_states, *own)
        # (batch, heads, image and text tokens, head_dim)
        query, key, value = (
            torch.cat(pair, dim=1).transpose(1, 2)
            for pair in ((query, text_query), (key, text_key), (value, text_value))
        )
        output = attend_jointly(
            self, query, key, value, text_length, text_first=False, mask=attention_mask, only_text_is_masked=True
        )
        output = self._merge_heads(output, query)
        image, text = output.split((image_length, text_length), dim=1)
        if self.to_out is not None:
            image = self.to_out[1](self.to_out[0](image))
        if self.to_add_out is not None:
            text = self.to_add_out(text)
        return image, text

    def _projected(self, states, to_query, to_key, to_value, norm_query, norm_key):
        """(query, key, value) of tokens (batch, length, channels), each (batch, length, heads, head_dim)."""
        query, key, value = (
            projection(states).unflatten(2, (self.heads, -1)) for projection in (to_query, to_key, to_value)
        )
        return query if norm_query is None else norm_query(query), key if norm_key is None else norm_key(key), value


class PladisHunyuanVideoTransformer3DModel(PladisModel, HunyuanVideoTransformer3DModel):
    """HunyuanVideoTransformer3DModel with some attention modules turned into PladisHunyuanVideoAttention."""

    stock = HunyuanVideoTransformer3DModel
    forms = (PladisHunyuanVideoAttention,)


BACKBONE = Backbone(
    patched=PladisHunyuanVideoTransformer3DModel,
    attention="attn",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    grid=video_grid,
    text_first=False,
    batches_cfg=False,
    embeds_guidance=True,
)
