"""`PladisHunyuanVideo15Transformer3DModel`: HunyuanVideo 1.5, with the text last in joint attention."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import HunyuanVideo15Transformer3DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0

from .processors import JointAttention
from .record import IMAGE_AND_TEXT, Backbone, video_grid
from .refined_texts import WithRefinedTexts


class PladisHunyuanVideo15Attention(JointAttention, Attention):
    """Joint attention of HunyuanVideo 1.5.

    Text is what both of its encoders read and, from image to video, the tokens of the image's encoder.
    """

    stock = Attention
    own_processors = (HunyuanVideo15AttnProcessor2_0,)
    text_first = False
    masks_queries = True


class PladisHunyuanVideo15Transformer3DModel(WithRefinedTexts, HunyuanVideo15Transformer3DModel):
    """HunyuanVideo15Transformer3DModel with some of its attention modules turned into PladisHunyuanVideo15Attention."""

    stock = HunyuanVideo15Transformer3DModel
    forms = (PladisHunyuanVideo15Attention,)

    def shared_mask(self, given: Mapping[str, Any]) -> list[torch.Tensor]:
        """As WithRefinedTexts's: from image to video the image's tokens too, which are zeros from text."""
        masks, images = super().shared_mask(given), given["image_embeds"]
        return [(images != 0).any().expand(images.shape[:2]), *masks]

    def refined(self, tokens: torch.Tensor, timestep: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """As WithRefinedTexts's, marked as text."""
        return super().refined(tokens, timestep, mask) + self.cond_type_embed.weight[0]


BACKBONE = Backbone(
    patched=PladisHunyuanVideo15Transformer3DModel,
    attention="attn",
    grid=video_grid,
    text_first=False,
    batches_cfg=False,
    streams={"transformer_blocks": IMAGE_AND_TEXT},
    guider=True,
    reads_lengths=True,
)
