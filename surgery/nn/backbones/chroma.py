"""`PladisChromaTransformer2DModel`: Chroma, whose joint attention has the text first, then the image."""

from typing import Any

import torch
from diffusers import ChromaTransformer2DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor, FluxIPAdapterAttnProcessor

from ..further_text import FurtherTexts
from .flux_streams import grid_by_ids
from .processors import JointAttention, JointModel
from .record import ONE_STREAM, TEXT_AND_IMAGE, Backbone


class PladisChromaAttention(JointAttention, FluxAttention):
    """FLUX's attention with Chroma's mask.

    Its pipeline hands 1 and 0 as numbers, so diffusers adds them to the scores and leaves no padding out; so does this.
    """

    stock = FluxAttention
    own_processors = (FluxAttnProcessor, FluxIPAdapterAttnProcessor)


class PladisChromaTransformer2DModel(JointModel, ChromaTransformer2DModel):
    """ChromaTransformer2DModel with some of its attention modules turned into PladisChromaAttention."""

    stock = ChromaTransformer2DModel
    forms = (PladisChromaAttention,)

    def with_negative(self, given: dict[str, Any], texts: FurtherTexts) -> dict[str, Any]:
        """As PladisModel's; its mask is of text and image."""
        changed, whole = super().with_negative(given, texts), given.get("attention_mask")
        if whole is not None:
            length = given["encoder_hidden_states"].shape[1]
            own = whole.new_ones(texts.tokens.shape[:2]) if texts.mask is None else texts.mask.to(whole)
            changed["attention_mask"] = torch.cat([whole[:, :length], own, whole[:, length:]], dim=1)
        return changed


BACKBONE = Backbone(
    patched=PladisChromaTransformer2DModel,
    attention="attn",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    grid=grid_by_ids,
    batches_cfg=False,
    streams={
        "transformer_blocks": TEXT_AND_IMAGE,
        "single_transformer_blocks": ONE_STREAM,
    },
    time_embedding="distilled_guidance_layer",
)
