"""`PladisKrea2Transformer2DModel`: Krea 2, one stream of text and then image; 48 heads of queries share 12 of keys."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import Krea2Transformer2DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.transformers.transformer_krea2 import Krea2Attention
from torch import Tensor

from ..further_text import FurtherTexts
from .processors import JointAttention, JointModel, rotated
from .record import ONE_STREAM, Backbone


class PladisKrea2Attention(JointAttention, Krea2Attention):
    """Joint attention of Krea 2, with a gate behind it."""

    stock = Krea2Attention
    processors = ("Krea2AttnProcessor",)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As the stock class's: (batch, length, channels), out as in."""
        projections = (self.to_q, self.to_k, self.to_v)
        query, key, value = (project(hidden_states).unflatten(-1, (-1, self.head_dim)) for project in projections)
        query, key = self.norm_q(query), self.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (rotated(states, image_rotary_emb, sequence_dim=1) for states in (query, key))
        output = self.attended(query, key, value, attention_mask)
        return self.to_out[0](output * torch.sigmoid(self.to_gate(hidden_states)))


class PladisKrea2Transformer2DModel(JointModel, Krea2Transformer2DModel):
    """Krea2Transformer2DModel with some of its attention modules turned into PladisKrea2Attention."""

    stock = Krea2Transformer2DModel
    forms = (PladisKrea2Attention,)
    apart = {"text_fusion": {"encoder_hidden_states": 1, "attention_mask": -1}}

    def with_negative(self, given: dict[str, Any], texts: FurtherTexts) -> dict[str, Any]:
        """As PladisModel's; all text stands in one place."""
        ids, length = given["position_ids"], given["encoder_hidden_states"].shape[1]
        changed = super().with_negative(given, texts)
        further = ids.new_zeros(sum(texts.lengths), ids.shape[1])
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
