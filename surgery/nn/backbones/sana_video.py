"""`PladisSanaVideoTransformer3DModel`: SANA-Video."""

from diffusers import ModelMixin, SanaVideoTransformer3DModel  # noqa: F401  diffusers looks for ModelMixin in this module

from ..model import PladisModel
from .cross import PladisAttention
from .record import ONE_STREAM, Backbone, video_grid


class PladisSanaVideoTransformer3DModel(PladisModel, SanaVideoTransformer3DModel):
    """SanaVideoTransformer3DModel with some of its attention modules turned into PladisAttention."""

    stock = SanaVideoTransformer3DModel
    forms = (PladisAttention,)


BACKBONE = Backbone(
    patched=PladisSanaVideoTransformer3DModel,
    attention="attn2",
    grid=video_grid,
    streams={"transformer_blocks": ONE_STREAM},
)
