"""`PladisOvisImageTransformer2DModel`: Ovis-Image, blocks of two streams and of one as FLUX.1's."""

from diffusers import ModelMixin, OvisImageTransformer2DModel  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.transformers.transformer_ovis_image import OvisImageAttention, OvisImageAttnProcessor

from .flux_streams import grid_by_ids
from .processors import JointAttention, JointModel
from .record import TEXT_AND_IMAGE, Backbone


class PladisOvisImageAttention(JointAttention, OvisImageAttention):
    """Joint attention of [text, image]."""

    stock = OvisImageAttention
    own_processors = (OvisImageAttnProcessor,)


class PladisOvisImageTransformer2DModel(JointModel, OvisImageTransformer2DModel):
    """OvisImageTransformer2DModel with some of its attention modules turned into PladisOvisImageAttention."""

    stock = OvisImageTransformer2DModel
    forms = (PladisOvisImageAttention,)


BACKBONE = Backbone(
    patched=PladisOvisImageTransformer2DModel,
    attention="attn",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    grid=grid_by_ids,
    batches_cfg=False,
    streams={
        "transformer_blocks": TEXT_AND_IMAGE,
        "single_transformer_blocks": TEXT_AND_IMAGE,
    },
)
