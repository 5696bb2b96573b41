"""`PladisFlux3Transformer2DModel`: FLUX.3, whose joint attention has the text first, then all images."""

from diffusers import Flux3Transformer2DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.transformers.transformer_flux3 import Flux3Attention, Flux3AttnProcessor

from .flux_streams import grid_by_ids
from .processors import JointAttention, JointModel
from .record import Backbone


class PladisFlux3Attention(JointAttention, Flux3Attention):
    """Joint attention in the blocks of FLUX.3 where text and image meet."""

    stock = Flux3Attention
    own_processors = (Flux3AttnProcessor,)


class PladisFlux3Transformer2DModel(JointModel, Flux3Transformer2DModel):
    """Flux3Transformer2DModel with some of its attention modules turned into PladisFlux3Attention."""

    stock = Flux3Transformer2DModel
    forms = (PladisFlux3Attention,)
    joint_blocks = ("single_transformer_blocks",)


BACKBONE = Backbone(
    patched=PladisFlux3Transformer2DModel,
    attention="attn",
    blocks=("single_transformer_blocks",),
    grid=grid_by_ids,
    batches_cfg=False,
    unguided="it has a modular pipeline alone, whose guiders are its own",
)
