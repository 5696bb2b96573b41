"""`PladisNucleusMoEImageTransformer2DModel`: NucleusMoE-Image, whose image tokens alone ask, of image and text."""

from collections.abc import Mapping
from typing import Any

from diffusers import ModelMixin, NucleusMoEImageTransformer2DModel  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoEAttnProcessor2_0

from ..additions import placed
from .processors import JointAttention, JointModel, Text
from .record import ONE_STREAM, Backbone


class PladisNucleusMoEAttention(JointAttention, Attention):
    """Attention of the image to [image, text] in NucleusMoE."""

    stock = Attention
    own_processors = (NucleusMoEAttnProcessor2_0,)
    text_first = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As ByProcessor's; a negative prompt's tokens have the places of a prompt's."""
        if (given := kwargs.get("image_rotary_emb")) is not None:
            kwargs["image_rotary_emb"] = given[0], placed(self, given[1])
        return super().forward(*args, **kwargs)

    def text_of(self, given: Mapping[str, Any]) -> Text | None:
        """Behind the image, all the keys that no query stands for; they may come from a cache."""
        return Text(None, first=False)


class PladisNucleusMoEImageTransformer2DModel(JointModel, NucleusMoEImageTransformer2DModel):
    """NucleusMoEImageTransformer2DModel with some of its attention modules turned into PladisNucleusMoEAttention."""

    stock = NucleusMoEImageTransformer2DModel
    forms = (PladisNucleusMoEAttention,)


def _grid(config: Mapping, given: Mapping) -> tuple[int, int, int]:
    shapes = given["img_shapes"]
    return tuple(shapes[0] if isinstance(shapes, list) else shapes)


BACKBONE = Backbone(
    patched=PladisNucleusMoEImageTransformer2DModel,
    attention="attn",
    grid=_grid,
    text_first=False,
    batches_cfg=False,
    one_stream=True,
    turns_complex=True,
    turns_velocity=True,
    streams={"transformer_blocks": ONE_STREAM},
    keeps_norm=True,
)
