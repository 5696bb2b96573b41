"""`PladisPRXTransformer2DModel`: PRX, whose image tokens alone ask, of text and image."""

from diffusers import ModelMixin, PRXTransformer2DModel  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.transformers.transformer_prx import PRXAttention, PRXAttnProcessor2_0

from .processors import JointAttention, JointModel
from .record import ONE_STREAM, Backbone, image_grid


class PladisPRXAttention(JointAttention, PRXAttention):
    """Attention of the image to [text, image] in PRX."""

    stock = PRXAttention
    own_processors = (PRXAttnProcessor2_0,)


class PladisPRXTransformer2DModel(JointModel, PRXTransformer2DModel):
    """PRXTransformer2DModel with some of its attention modules turned into PladisPRXAttention."""

    stock = PRXTransformer2DModel
    forms = (PladisPRXAttention,)
    marked_key = "depth"
    joint_blocks = ("blocks",)
    text_masks = ("attention_mask",)


BACKBONE = Backbone(
    patched=PladisPRXTransformer2DModel,
    attention="attention",
    blocks=("blocks",),
    grid=image_grid,
    one_stream=True,
    streams={"blocks": ONE_STREAM},
    time_embedding="time_in",
)
