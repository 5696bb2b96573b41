"""`PladisKrea2Transformer2DModel`: Krea 2, one stream of text and then image; 48 heads of queries share 12 of keys."""

from collections.abc import Mapping
from typing import Any

import torch
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
    apart = {"text_fusion": {"encoder_hidden_states": 1, "attention_mask": -1}}

    def with_negative(
        self,
        given: dict[str, Any],
        tokens: torch.Tensor,
        mask: torch.Tensor | None,
        more: tuple[torch.Tensor, ...],
        lengths: tuple[int, ...],
    ) -> dict[str, Any]:
        """As PladisModel's; all text stands in one place."""
        ids, length = given["position_ids"], given["encoder_hidden_states"].shape[1]
        changed = super().with_negative(given, tokens, mask, more, lengths)
        further = ids.new_zeros(sum(lengths), ids.shape[1])
        return {**changed, "position_ids": torch.cat([ids[:length], further, ids[length:]])}


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
