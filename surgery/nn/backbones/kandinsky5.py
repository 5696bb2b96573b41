"""`PladisKandinsky5Transformer3DModel`: Kandinsky 5, images and videos."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import Kandinsky5Transformer3DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5Attention, Kandinsky5AttnProcessor
from torch import nn

from ..further_text import FurtherTexts
from ..model import PladisModel
from .processors import CrossAttention
from .record import Backbone


class PladisKandinsky5Attention(CrossAttention, Kandinsky5Attention):
    """Cross-attention of Kandinsky 5 to its text."""

    stock = Kandinsky5Attention
    own_processors = (Kandinsky5AttnProcessor,)


class PladisKandinsky5Transformer3DModel(PladisModel, Kandinsky5Transformer3DModel):
    """Kandinsky5Transformer3DModel with some of its attention modules turned into PladisKandinsky5Attention."""

    stock = Kandinsky5Transformer3DModel
    forms = (PladisKandinsky5Attention,)
    marked_key = "num_visual_blocks"
    apart = {r"text_transformer_blocks\.\d+": {"x": 1, "rope": 1}}

    @classmethod
    def refusal_of(cls, module: nn.Module, path: str, self_attention: bool = False) -> str | None:
        """As PladisModel's. The two kinds of attention are alike in all but their place."""
        if path.rpartition(".")[2] == "self_attention":
            return "it is self-attention; sparsifying it destroys the image, so it stays dense"
        return super().refusal_of(module, path, self_attention)

    def with_negative(self, given: dict[str, Any], texts: FurtherTexts) -> dict[str, Any]:
        """As PladisModel's, with the places of a prompt."""
        places = given["text_rope_pos"]
        further = [torch.arange(length).to(places) for length in texts.lengths]
        changed = super().with_negative(given, texts)
        return {**changed, "text_rope_pos": torch.cat([places, *further])}


def _grid(config: Mapping, given: Mapping) -> tuple[int, int, int]:
    sizes = given["hidden_states"].shape[1:4]
    return tuple(size // patch for size, patch in zip(sizes, config["patch_size"], strict=True))


BACKBONE = Backbone(
    patched=PladisKandinsky5Transformer3DModel,
    attention="cross_attention",
    blocks=("visual_transformer_blocks",),
    grid=_grid,
    batches_cfg=False,
    streams={"visual_transformer_blocks": ("visual_embed",)},
    channels_last=True,
    time_embedding="time_embeddings",
)
