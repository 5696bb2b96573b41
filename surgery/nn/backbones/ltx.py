"""`PladisLTXVideoTransformer3DModel`: LTX-Video."""

from diffusers import LTXVideoTransformer3DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin here
from diffusers.models.transformers.transformer_ltx import LTXAttention
from torch import nn

from ..compat import is_context_parallel
from ..model import PladisModel
from ..module import PladisModule, warn_of_unknown
from .record import Backbone


class PladisLTXAttention(PladisModule, LTXAttention):
    """Cross-attention of LTX-Video to its text, with the norms of query and key over all heads together.

    The backend that `set_attention_backend` names means nothing here. Context parallelism, which would split the text
    between devices, is refused.
    """

    stock = LTXAttention
    processors = ("LTXVideoAttnProcessor",)

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **kwargs):
        """As `LTXAttention.forward` around cross-attention: (batch, queries, channels), out as in.

        encoder_hidden_states: (batch, keys, channels). attention_mask: additive, (batch, 1 or queries, keys). Raises
        ValueError for self-attention, which has no text or has rotary embeddings, and under context parallelism.
        """
        if encoder_hidden_states is None or image_rotary_emb is not None:
            raise ValueError("this is cross-attention to text; self-attention stays diffusers' own")
        if is_context_parallel(self.processor):
            raise ValueError("context parallelism splits the text between devices, and the operators need all of it")
        warn_of_unknown(kwargs)
        query = self._split_heads(self.norm_q(self.to_q(hidden_states)))
        key = self._split_heads(self.norm_k(self.to_k(encoder_hidden_states)))
        value = self._split_heads(self.to_v(encoder_hidden_states))
        output = self.attend(query, key, value, self._mask_per_head(attention_mask, encoder_hidden_states))
        output = self._merge_heads(output, query)
        return self.to_out[1](self.to_out[0](output))


class PladisLTXVideoTransformer3DModel(PladisModel, LTXVideoTransformer3DModel):
    """LTXVideoTransformer3DModel with some of its cross-attention modules (attn2) turned into PladisLTXAttention."""

    stock = LTXVideoTransformer3DModel
    forms = (PladisLTXAttention,)

    @classmethod
    def refusal_of(cls, module: nn.Module, path: str, self_attention: bool = False) -> str | None:
        """As PladisModel's. The two kinds of attention are alike in all but their place: text is as wide as image."""
        if path.rpartition(".")[2] == "attn1" and not self_attention:
            return "it is self-attention; sparsifying it destroys the video, so it stays dense"
        return super().refusal_of(module, path, self_attention)


def _grid(config, given):
    return given["num_frames"], given["height"], given["width"]


BACKBONE = Backbone(patched=PladisLTXVideoTransformer3DModel, attention="attn2", grid=_grid)
