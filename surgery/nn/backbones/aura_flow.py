"""`PladisAuraFlowTransformer2DModel`: AuraFlow, whose joint attention has the text first, then the image."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AuraFlowTransformer2DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.attention_processor import Attention, AuraFlowAttnProcessor2_0

from ..additions import Teller
from ..further_text import FurtherTexts
from .processors import JointAttention, JointModel, Text
from .record import ONE_STREAM, TEXT_AND_IMAGE, Backbone, image_grid


class PladisAuraFlowAttention(JointAttention, Attention):
    """Joint attention of AuraFlow, in blocks of two streams and of one.

    The model's eight learned register tokens stand before the text in its stream and are text to the operator.
    """

    stock = Attention
    own_processors = (AuraFlowAttnProcessor2_0,)


class PladisAuraFlowTransformer2DModel(JointModel, AuraFlowTransformer2DModel):
    """AuraFlowTransformer2DModel with some of its attention modules turned into PladisAuraFlowAttention."""

    stock = AuraFlowTransformer2DModel
    forms = (PladisAuraFlowAttention,)
    marked_key = "num_mmdit_layers"
    joint_blocks = ("joint_transformer_blocks", "single_transformer_blocks")
    negative_blocks = ("joint_transformer_blocks",)

    def around_negative(self, tokens: int, given: Mapping[str, Any]) -> tuple[int, int]:
        """As PladisModel's: every text has the registers before it."""
        return self.register_tokens.shape[1], 0

    def with_negative(self, given: dict[str, Any], texts: FurtherTexts) -> dict[str, Any]:
        """As PladisModel's, with room for the registers."""
        around = (0, 0, *self.around_negative(texts.tokens.shape[1], given))
        room = torch.cat([F.pad(text, around) for text in texts.tokens.chunk(len(texts.lengths), dim=1)], dim=1)
        return super().with_negative(given, texts._replace(tokens=room))

    def at_block(self, teller: Teller, given: dict[str, Any], first: bool) -> dict[str, Any]:
        """As PladisModel's: the registers take their room."""
        if not first:
            return given
        text, registers = given["encoder_hidden_states"], self.register_tokens
        begin, registers = text.shape[1] - teller.told.negative, registers.expand(len(text), -1, -1).to(text)
        whole = [text[:, :begin]]
        for part in text[:, begin:].chunk(len(teller.told.lengths), dim=1):
            whole += [registers, part[:, registers.shape[1] :]]
        return {**given, "encoder_hidden_states": torch.cat(whole, dim=1)}

    def text_of_model(self, given: Mapping[str, Any]) -> Text | None:
        """As JointModel's, with the registers."""
        return Text(given["encoder_hidden_states"].shape[1] + self.register_tokens.shape[1])


BACKBONE = Backbone(
    patched=PladisAuraFlowTransformer2DModel,
    attention="attn",
    blocks=("joint_transformer_blocks", "single_transformer_blocks"),
    grid=image_grid,
    streams={
        "joint_transformer_blocks": TEXT_AND_IMAGE,
        "single_transformer_blocks": ONE_STREAM,
    },
)
