"""`PladisSanaTransformer2DModel`: SANA and SANA-Sprint."""

from diffusers import ModelMixin, SanaTransformer2DModel  # noqa: F401  diffusers looks for ModelMixin in this module

from ..model import PladisModel
from .cross import PladisAttention
from .record import ONE_STREAM, Backbone, image_grid


class PladisSanaTransformer2DModel(PladisModel, SanaTransformer2DModel):
    """SanaTransformer2DModel with some of its cross-attention modules turned into PladisAttention; attn1 is linear."""

    stock = SanaTransformer2DModel
    forms = (PladisAttention,)


BACKBONE = Backbone(
    patched=PladisSanaTransformer2DModel,
    attention="attn2",
    grid=image_grid,
    streams={"transformer_blocks": ONE_STREAM},
)
