"""`PladisUNet2DConditionModel`: SD1.5, SD2, SDXL and what is distilled from them."""

import dataclasses

from diffusers import ModelMixin, UNet2DConditionModel  # noqa: F401  diffusers looks for ModelMixin in this module

from ..model import PladisModel
from .cross import PladisAttention
from .record import SINGLE_KEY, Backbone


class PladisUNet2DConditionModel(PladisModel, UNet2DConditionModel):
    """UNet2DConditionModel with some of its cross-attention modules turned into PladisAttention."""

    stock = UNet2DConditionModel
    forms = (PladisAttention,)
    marked_key = "mid_block_type"  # "unknown mid_block_type: ..." is what the stock class says
    copied_key = "act_fn"  # "activation function ... not found" is what they say


def _grid(config, given):
    return 1, *given["sample"].shape[-2:]  # a video's frames are in the batch


BACKBONE = Backbone(
    patched=PladisUNet2DConditionModel,
    attention="attn2",
    blocks=("*.transformer_blocks",),
    latents="sample",
    grid=_grid,
    has_levels=True,
    own_methods=("sag", "nag"),
    refused_pipelines={"StableDiffusionImageVariationPipeline": SINGLE_KEY},
)
# UNetSpatioTemporalConditionModel, of Stable Video Diffusion: its cross-attention has a single key, so none is patched.
GUIDED_ALONE = dataclasses.replace(BACKBONE, patched=None, own_methods=())
