"""`PladisPixArtTransformer2DModel`: PixArt-alpha and PixArt-Sigma."""

from diffusers import ModelMixin, PixArtTransformer2DModel  # noqa: F401  diffusers looks for ModelMixin in this module

from ..model import PladisModel
from .cross import PladisAttention
from .record import Backbone, image_grid


class PladisPixArtTransformer2DModel(PladisModel, PixArtTransformer2DModel):
    """PixArtTransformer2DModel with some of its cross-attention modules turned into PladisAttention."""

    stock = PixArtTransformer2DModel
    forms = (PladisAttention,)


BACKBONE = Backbone(patched=PladisPixArtTransformer2DModel, attention="attn2", grid=image_grid)
