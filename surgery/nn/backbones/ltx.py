"""`PladisLTXVideoTransformer3DModel`: LTX-Video."""

from collections.abc import Mapping

from diffusers import LTXVideoTransformer3DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin here
from diffusers.models.transformers.transformer_ltx import LTXAttention, LTXVideoAttnProcessor
from torch import nn

from ..model import PladisModel
from .processors import CrossAttention
from .record import Backbone


class PladisLTXAttention(CrossAttention, LTXAttention):
    """Cross-attention of LTX-Video to its text."""

    stock = LTXAttention
    own_processors = (LTXVideoAttnProcessor,)


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


def _grid(config: Mapping, given: Mapping) -> tuple[int, int, int]:
    return given["num_frames"], given["height"], given["width"]


BACKBONE = Backbone(patched=PladisLTXVideoTransformer3DModel, attention="attn2", grid=_grid)
