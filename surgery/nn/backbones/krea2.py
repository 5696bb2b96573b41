"""`PladisKrea2Transformer2DModel`: Krea 2, one stream of text and then image; 48 heads of queries share 12 of keys."""

from collections.abc import Mapping

from diffusers import Krea2Transformer2DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.transformers.transformer_krea2 import Krea2Attention, Krea2AttnProcessor

from .processors import JointAttention, JointModel
from .record import ONE_STREAM, Backbone


class PladisKrea2Attention(JointAttention, Krea2Attention):
    """Joint attention of Krea 2, with a gate behind it. Its processor repeats the keys, for it and for any kernel."""

    stock = Krea2Attention
    own_processors = (Krea2AttnProcessor,)


class PladisKrea2Transformer2DModel(JointModel, Krea2Transformer2DModel):
    """Krea2Transformer2DModel with some of its attention modules turned into PladisKrea2Attention."""

    stock = Krea2Transformer2DModel
    forms = (PladisKrea2Attention,)


def _grid(config: Mapping, given: Mapping) -> tuple[int, int, int]:
    height, width = (given["position_ids"][:, axis].max() + 1 for axis in (1, 2))
    return 1, int(height), int(width)


BACKBONE = Backbone(
    patched=PladisKrea2Transformer2DModel,
    attention="attn",
    grid=_grid,
    batches_cfg=False,
    one_stream=True,
    streams={"transformer_blocks": ONE_STREAM},
    adds_to_cond=True,
    time_embedding="time_embed",
)
