"""`PladisFlux3Transformer2DModel`: FLUX.3, whose joint attention has the text first, then all images."""

from diffusers import Flux3Transformer2DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.transformers.transformer_flux3 import Flux3Attention, Flux3AttnProcessor

from .processors import JointAttention, JointModel
from .record import OTHER_IMAGES, Backbone


class PladisFlux3Attention(JointAttention, Flux3Attention):
    """Joint attention in the blocks of FLUX.3 where text and image meet."""

    stock = Flux3Attention
    own_processors = (Flux3AttnProcessor,)


class PladisFlux3Transformer2DModel(JointModel, Flux3Transformer2DModel):
    """Flux3Transformer2DModel with some of its attention modules turned into PladisFlux3Attention."""

    stock = Flux3Transformer2DModel
    forms = (PladisFlux3Attention,)
    joint_blocks = ("single_transformer_blocks",)
    apart = {r"txt_mode_blocks\.\d+": {"hidden_states": 1, "temb_mod": 1, "image_rotary_emb": 0}}


def _grid(config, given):
    """`grid` by the places of the image's tokens, (frame, row, column, 0), which are scaled."""
    ids = given["img_ids"]
    rows, columns = ((ids[0] if ids.ndim == 3 else ids)[:, axis].unique().numel() for axis in (1, 2))
    if given.get("image_cond_hidden_states") is not None or rows * columns != given["hidden_states"].shape[1]:
        raise ValueError(OTHER_IMAGES)
    return 1, rows, columns


BACKBONE = Backbone(
    patched=PladisFlux3Transformer2DModel,
    attention="attn",
    blocks=("single_transformer_blocks",),
    grid=_grid,
    batches_cfg=False,
)
