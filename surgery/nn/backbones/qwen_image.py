"""`PladisQwenImageTransformer2DModel`: Qwen-Image and its editing models, whose joint attention has the text first."""

from collections.abc import Mapping
from typing import Any

from diffusers import (  # noqa: F401  diffusers looks for ModelMixin in this module
    ModelMixin,
    QwenImageTransformer2DModel,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from torch import nn

from ..additions import placed
from ..model import PladisModel
from .processors import JointAttention
from .record import OTHER_IMAGES, Backbone


class PladisQwenImageAttention(JointAttention, Attention):
    """Joint attention of text and image as in Qwen-Image, the image's attention to the text by one of OPERATORS."""

    stock = Attention
    own_processors = (QwenDoubleStreamAttnProcessor2_0,)

    @classmethod
    def own_refusal(cls, module: nn.Module) -> str | None:
        """As PladisModule's: what is not joint attention of two streams."""
        if module.added_kv_proj_dim is None or module.to_add_out is None or module.to_out is None:
            return "it is not joint attention as in Qwen-Image: text or image lacks projections of its own"
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As ByProcessor's; a negative prompt's tokens have the places of a prompt's."""
        if (given := kwargs.get("image_rotary_emb")) is not None:
            kwargs["image_rotary_emb"] = given[0], placed(self, given[1])
        return super().forward(*args, **kwargs)


class PladisQwenImageTransformer2DModel(PladisModel, QwenImageTransformer2DModel):
    """QwenImageTransformer2DModel with some of its attention modules turned into PladisQwenImageAttention."""

    stock = QwenImageTransformer2DModel
    forms = (PladisQwenImageAttention,)


def _grid(config: Mapping, given: Mapping) -> tuple[int, int, int]:
    shapes = given["img_shapes"][0]
    if isinstance(shapes, list) and len(shapes) > 1:
        raise ValueError(OTHER_IMAGES)
    return tuple(shapes[0] if isinstance(shapes, list) else shapes)


BACKBONE = Backbone(
    patched=PladisQwenImageTransformer2DModel,
    attention="attn",
    grid=_grid,
    batches_cfg=False,
    embeds_guidance=True,
    turns_complex=True,
    keeps_norm=True,
)
