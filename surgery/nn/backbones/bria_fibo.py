"""`PladisBriaFiboTransformer2DModel`: FIBO, blocks of two streams and of one as FLUX.1's."""

from typing import Any

import torch
from diffusers import BriaFiboTransformer2DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_bria import BriaAttnProcessor
from diffusers.models.transformers.transformer_bria_fibo import BriaFiboAttention, BriaFiboAttnProcessor

from ..further_text import FurtherTexts
from .flux_streams import grid_by_ids
from .processors import JointAttention, JointModel
from .record import ONE_STREAM, TEXT_AND_IMAGE, Backbone


class PladisBriaFiboAttention(JointAttention, BriaFiboAttention):
    """Joint attention of [text, image] in a block of two streams; half of the text's channels is every block's own."""

    stock = BriaFiboAttention
    own_processors = (BriaFiboAttnProcessor,)


class PladisBriaFiboSingleAttention(JointAttention, Attention):
    """The same in a block of one stream, with padding masked in both."""

    stock = Attention
    own_processors = (BriaAttnProcessor,)


class PladisBriaFiboTransformer2DModel(JointModel, BriaFiboTransformer2DModel):
    """BriaFiboTransformer2DModel with some of its attention modules turned into the forms above."""

    stock = BriaFiboTransformer2DModel
    forms = (
        PladisBriaFiboSingleAttention,
        PladisBriaFiboAttention,
    )

    def encoded(self, pipeline: Any, result: Any) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, ...]]:
        """As PladisModel's, with a layer for each block as the pipeline chooses them."""
        tokens, layers = result[0], list(result[5])
        blocks = len(self.transformer_blocks) + len(self.single_transformer_blocks)
        layers = layers[-blocks:] + [layers[-1]] * (blocks - len(layers))
        return tokens, result[3], tuple(layers)

    def with_negative(self, given: dict[str, Any], texts: FurtherTexts) -> dict[str, Any]:
        """As PladisModel's. more: the layers of its language model."""
        layers = [
            torch.cat([own, one.to(own)], dim=1)
            for own, one in zip(given["text_encoder_layers"], texts.more, strict=True)
        ]
        changed = super().with_negative(given, texts)
        keywords = given.get("joint_attention_kwargs") or {}
        if (whole := keywords.get("attention_mask")) is not None:
            length, kept = given["encoder_hidden_states"].shape[1], whole.new_ones(texts.tokens.shape[:2])
            kept = (kept if texts.mask is None else texts.mask.to(whole))[:, None, None]
            whole = torch.cat([whole[..., :length], kept, whole[..., length:]], dim=-1)
            changed["joint_attention_kwargs"] = {**keywords, "attention_mask": whole}
        return {**changed, "text_encoder_layers": layers}


BACKBONE = Backbone(
    patched=PladisBriaFiboTransformer2DModel,
    attention="attn",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    grid=grid_by_ids,
    streams={
        "transformer_blocks": TEXT_AND_IMAGE,
        "single_transformer_blocks": ONE_STREAM,
    },
)
