"""`PladisGlmImageTransformer2DModel`: GLM-Image, whose joint attention has the glyphs' text first, then the image."""

from collections.abc import Mapping
from typing import Any

from diffusers import GlmImageTransformer2DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_glm_image import GlmImageAttnProcessor

from .processors import JointAttention, JointModel, Text
from .record import IMAGE_AND_TEXT, Backbone, image_grid


class PladisGlmImageAttention(JointAttention, Attention):
    """Joint attention of GLM-Image, whose text are the glyphs that its picture has to show.

    The prompt itself comes as tokens that a language model drew of it, added to the image's.
    """

    stock = Attention
    own_processors = (GlmImageAttnProcessor,)

    def text_of(self, given: Mapping[str, Any]) -> Text | None:
        """As JointAttention's. Raises ValueError where keys of images to edit were kept: they stand before the text."""
        cache = given.get("kv_cache")
        if cache is not None and cache.mode == "read":
            raise ValueError("GLM-Image with images to edit keeps their keys before the text; draw without them")
        return super().text_of(given)


class PladisGlmImageTransformer2DModel(JointModel, GlmImageTransformer2DModel):
    """GlmImageTransformer2DModel with some of its attention modules turned into PladisGlmImageAttention."""

    stock = GlmImageTransformer2DModel
    forms = (PladisGlmImageAttention,)


BACKBONE = Backbone(
    patched=PladisGlmImageTransformer2DModel,
    attention="attn1",
    grid=image_grid,
    batches_cfg=False,
    streams={"transformer_blocks": IMAGE_AND_TEXT},
)
