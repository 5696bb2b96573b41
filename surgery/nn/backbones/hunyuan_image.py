"""`PladisHunyuanImageTransformer2DModel`: HunyuanImage 2.1, with the text last in joint attention."""

from collections.abc import Mapping
from typing import Any

from diffusers import HunyuanImageTransformer2DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_hunyuanimage import HunyuanImageAttnProcessor

from .processors import JointAttention, Text
from .record import Backbone
from .refined_texts import WithRefinedTexts


class PladisHunyuanImageAttention(JointAttention, Attention):
    """Joint attention of HunyuanImage, in blocks of two streams and of one; text is what both of its encoders read."""

    stock = Attention
    own_processors = (HunyuanImageAttnProcessor,)
    text_first = False


class PladisHunyuanImageTransformer2DModel(WithRefinedTexts, HunyuanImageTransformer2DModel):
    """HunyuanImageTransformer2DModel with some of its attention modules turned into PladisHunyuanImageAttention."""

    stock = HunyuanImageTransformer2DModel
    forms = (PladisHunyuanImageAttention,)
    negative_blocks = ("transformer_blocks", "single_transformer_blocks")

    def text_of_model(self, given: Mapping[str, Any]) -> Text | None:
        """None: both kinds of block hand their attention image and text apart."""
        return None


def _grid(config: Mapping, given: Mapping) -> tuple[int, int, int]:
    sizes = [size // patch for size, patch in zip(given["hidden_states"].shape[2:], config["patch_size"], strict=True)]
    return (1, *sizes) if len(sizes) == 2 else tuple(sizes)


BACKBONE = Backbone(
    patched=PladisHunyuanImageTransformer2DModel,
    attention="attn",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    grid=_grid,
    text_first=False,
    batches_cfg=False,
    guider=True,
)
