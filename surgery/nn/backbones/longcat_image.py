"""`PladisLongCatImageTransformer2DModel`: LongCat-Image, blocks of two streams and of one as FLUX.1's."""

from diffusers import LongCatImageTransformer2DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.transformers.transformer_longcat_image import LongCatImageAttention, LongCatImageAttnProcessor

from .flux_streams import grid_by_ids
from .processors import JointAttention, JointModel
from .record import TEXT_AND_IMAGE, Backbone


class PladisLongCatImageAttention(JointAttention, LongCatImageAttention):
    """Joint attention of [text, image]; an image to edit stands with the image."""

    stock = LongCatImageAttention
    own_processors = (LongCatImageAttnProcessor,)


class PladisLongCatImageTransformer2DModel(JointModel, LongCatImageTransformer2DModel):
    """LongCatImageTransformer2DModel with some of its attention modules turned into PladisLongCatImageAttention."""

    stock = LongCatImageTransformer2DModel
    forms = (PladisLongCatImageAttention,)


BACKBONE = Backbone(
    patched=PladisLongCatImageTransformer2DModel,
    attention="attn",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    grid=grid_by_ids,
    batches_cfg=False,
    streams={
        "transformer_blocks": TEXT_AND_IMAGE,
        "single_transformer_blocks": TEXT_AND_IMAGE,
    },
)
