"""`PladisHunyuanVideoTransformer3DModel`: HunyuanVideo."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin here
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import nn

from ..model import PladisModel
from .processors import JointAttention
from .record import Backbone, video_grid


class PladisHunyuanVideoAttention(JointAttention, Attention):
    """Joint attention of HunyuanVideo over [image, text], in blocks of two streams and of one.

    In both kinds of block the module is given image and text apart, so it knows where text begins. In image-to-video
    models the text's tokens include those that its language model made of the image.
    """

    stock = Attention
    own_processors = (HunyuanVideoAttnProcessor2_0,)
    text_first = False

    @classmethod
    def own_refusal(cls, module: nn.Module) -> str | None:
        """As PladisModule's: the self-attention of the text's refiner."""
        if module.add_q_proj is None and module.to_out is not None:
            return "it is self-attention among text tokens, which refines them before image meets text; it stays dense"
        return None


class PladisHunyuanVideoTransformer3DModel(PladisModel, HunyuanVideoTransformer3DModel):
    """HunyuanVideoTransformer3DModel with some attention modules turned into PladisHunyuanVideoAttention."""

    stock = HunyuanVideoTransformer3DModel
    forms = (PladisHunyuanVideoAttention,)
    apart = {"context_embedder": {"hidden_states": 1, "attention_mask": 1}}
    hides_negative = True

    def negative_shown(self, mask: torch.Tensor, given: Mapping[str, Any]) -> torch.Tensor:
        """As PladisModel's: as many of its first tokens as its mask keeps, as forward() takes a prompt's mask."""
        return torch.arange(mask.shape[1], device=mask.device) < mask.sum(1, keepdim=True)


BACKBONE = Backbone(
    patched=PladisHunyuanVideoTransformer3DModel,
    attention="attn",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    grid=video_grid,
    text_first=False,
    batches_cfg=False,
    embeds_guidance=True,
)
