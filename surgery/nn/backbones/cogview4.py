"""`PladisCogView4Transformer2DModel`: CogView4, whose joint attention has the text first, then the image."""

from diffusers import CogView4Transformer2DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_cogview4 import CogView4AttnProcessor

from .processors import JointAttention, JointModel
from .record import Backbone, image_grid


class PladisCogView4Attention(JointAttention, Attention):
    """Joint attention of CogView4; the processor that packs a batch for training is refused."""

    stock = Attention
    own_processors = (CogView4AttnProcessor,)


class PladisCogView4Transformer2DModel(JointModel, CogView4Transformer2DModel):
    """CogView4Transformer2DModel with some of its attention modules turned into PladisCogView4Attention."""

    stock = CogView4Transformer2DModel
    forms = (PladisCogView4Attention,)


BACKBONE = Backbone(
    patched=PladisCogView4Transformer2DModel,
    attention="attn1",
    grid=image_grid,
    batches_cfg=False,
)
