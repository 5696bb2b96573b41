"""`PladisUNet2DConditionModel`: SD1.5, SD2, SDXL and what is distilled from them."""

from diffusers import ModelMixin, UNet2DConditionModel  # noqa: F401  diffusers looks for ModelMixin in this module

from ..model import PladisModel
from .cross import PladisAttention


class PladisUNet2DConditionModel(PladisModel, UNet2DConditionModel):
    """UNet2DConditionModel with some of its cross-attention modules turned into PladisAttention."""

    stock = UNet2DConditionModel
    forms = (PladisAttention,)
    marked_key = "mid_block_type"  # "unknown mid_block_type: ..." is what the stock class says
    copied_key = "act_fn"  # "activation function ... not found" is what they say
