"""`PladisCosmosTransformer3DModel`: Cosmos 1, 2 and 2.5, and Anima."""

from diffusers import CosmosTransformer3DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_cosmos import (
    CosmosAttention,
    CosmosAttnProcessor2_0,
    CosmosAttnProcessor2_5,
)
from torch import nn

from ..model import PladisModel
from .processors import CrossAttention
from .record import ONE_STREAM, Backbone, video_grid


class PladisCosmosAttention(CrossAttention, Attention):
    """Cross-attention of Cosmos to its text."""

    stock = Attention
    own_processors = (CosmosAttnProcessor2_0,)

    @classmethod
    def own_refusal(cls, module: nn.Module) -> str | None:
        """As PladisModule's: self-attention."""
        if not module.is_cross_attention:
            return "it is self-attention; sparsifying it destroys the video, so it stays dense"
        return None


class PladisCosmosImageAttention(CrossAttention, CosmosAttention):
    """The same in Cosmos 2.5, which also attends to an image: that part stays dense."""

    stock = CosmosAttention
    own_processors = (CosmosAttnProcessor2_5,)


class PladisCosmosTransformer3DModel(PladisModel, CosmosTransformer3DModel):
    """CosmosTransformer3DModel with some of its attention modules turned into the forms above."""

    stock = CosmosTransformer3DModel
    forms = (PladisCosmosAttention, PladisCosmosImageAttention)


BACKBONE = Backbone(
    patched=PladisCosmosTransformer3DModel,
    attention="attn2",
    grid=video_grid,
    batches_cfg=False,
    streams={"transformer_blocks": ONE_STREAM},
    adds_to_cond=True,
    time_embedding="time_embed.t_embedder",
)
