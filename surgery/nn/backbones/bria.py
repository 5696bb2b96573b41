"""`PladisBriaTransformer2DModel`: Bria 3.2, blocks of two streams and of one as FLUX.1's."""

from diffusers import BriaTransformer2DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.transformers.transformer_bria import BriaAttention, BriaAttnProcessor

from .flux_streams import grid_by_ids
from .processors import JointAttention, JointModel
from .record import TEXT_AND_IMAGE, Backbone


class PladisBriaAttention(JointAttention, BriaAttention):
    """Joint attention of [text, image], of which no padding is masked."""

    stock = BriaAttention
    own_processors = (BriaAttnProcessor,)


class PladisBriaTransformer2DModel(JointModel, BriaTransformer2DModel):
    """BriaTransformer2DModel with some of its attention modules turned into PladisBriaAttention."""

    stock = BriaTransformer2DModel
    forms = (PladisBriaAttention,)


BACKBONE = Backbone(
    patched=PladisBriaTransformer2DModel,
    attention="attn",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    grid=grid_by_ids,
    streams={
        "transformer_blocks": TEXT_AND_IMAGE,
        "single_transformer_blocks": TEXT_AND_IMAGE,
    },
)
