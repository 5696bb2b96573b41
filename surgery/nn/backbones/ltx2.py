"""`PladisLTX2VideoTransformer3DModel`: LTX-2, video and sound."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import LTX2VideoTransformer3DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.transformers.transformer_ltx2 import (
    LTX2Attention,
    LTX2AudioVideoAttnProcessor,
    LTX2PerturbedAttnProcessor,
)
from torch import nn

from ..further_text import FurtherTexts
from ..model import PladisModel
from .processors import CrossAttention
from .record import Backbone


class PladisLTX2Attention(CrossAttention, LTX2Attention):
    """Cross-attention to text in LTX-2, of the video (attn2) and of its sound (audio_attn2)."""

    stock = LTX2Attention
    own_processors = (LTX2AudioVideoAttnProcessor, LTX2PerturbedAttnProcessor)


class PladisLTX2VideoTransformer3DModel(PladisModel, LTX2VideoTransformer3DModel):
    """LTX2VideoTransformer3DModel with some of its attention modules turned into PladisLTX2Attention."""

    stock = LTX2VideoTransformer3DModel
    forms = (PladisLTX2Attention,)

    def encoded(self, pipeline: Any, result: Any) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, ...]]:
        """As PladisModel's, by the pipeline's connectors."""
        side = getattr(getattr(pipeline, "tokenizer", None), "padding_side", "left")
        text, heard, mask = pipeline.connectors(*result[:2], padding_side=side)
        return text, mask, (heard,)

    def with_negative(self, given: dict[str, Any], texts: FurtherTexts) -> dict[str, Any]:
        """As PladisModel's. more: the texts as the sound reads them."""
        changed = super().with_negative(given, texts)
        (further,) = texts.more
        heard, own = given["audio_encoder_hidden_states"], given.get("audio_encoder_attention_mask")
        changed["audio_encoder_hidden_states"] = torch.cat([heard, further.to(heard)], dim=1)
        if own is not None:
            changed["audio_encoder_attention_mask"] = torch.cat(
                [own, self._mask_of_negative(own, further, texts.mask)], dim=1
            )
        return changed

    @classmethod
    def refusal_of(cls, module: nn.Module, path: str, self_attention: bool = False) -> str | None:
        """As PladisModel's. The kinds of attention are alike in all but their place."""
        if path.rpartition(".")[2] not in ("attn2", "audio_attn2"):
            return "it attends among tokens of video or sound, or from one to the other; it stays dense"
        return super().refusal_of(module, path, self_attention)


def _grid(config: Mapping, given: Mapping) -> tuple[int, int, int]:
    return given["num_frames"], given["height"], given["width"]


BACKBONE = Backbone(
    patched=PladisLTX2VideoTransformer3DModel,
    attention="attn2",
    grid=_grid,
    streams={"transformer_blocks": ("hidden_states", "audio_hidden_states")},
    self_attention=("attn1",),
    predicts_sound=True,
)
