"""`PladisBriaFiboTransformer2DModel`: FIBO, blocks of two streams and of one as FLUX.1's."""

from diffusers import BriaFiboTransformer2DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_bria import BriaAttnProcessor
from diffusers.models.transformers.transformer_bria_fibo import BriaFiboAttention, BriaFiboAttnProcessor

from .flux_streams import grid_by_ids
from .processors import JointAttention, JointModel
from .record import ONE_STREAM, TEXT_AND_IMAGE, Backbone


class PladisBriaFiboAttention(JointAttention, BriaFiboAttention):
    """Joint attention of [text, image] in a block of two streams; half of the text's channels is every block's own."""

    stock = BriaFiboAttention
    own_processors = (BriaFiboAttnProcessor,)


class PladisBriaFiboSingleAttention(JointAttention, Attention):
    """The same in a block of one stream, with padding masked in both."""

    stock = Attention
    own_processors = (BriaAttnProcessor,)


class PladisBriaFiboTransformer2DModel(JointModel, BriaFiboTransformer2DModel):
    """BriaFiboTransformer2DModel with some of its attention modules turned into the forms above."""

    stock = BriaFiboTransformer2DModel
    forms = (
        PladisBriaFiboSingleAttention,
        PladisBriaFiboAttention,
    )


BACKBONE = Backbone(
    patched=PladisBriaFiboTransformer2DModel,
    attention="attn",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    grid=grid_by_ids,
    streams={
        "transformer_blocks": TEXT_AND_IMAGE,
        "single_transformer_blocks": ONE_STREAM,
    },
)
