"""`PladisErnieImageTransformer2DModel`: ERNIE-Image, one stream of image and then text."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ErnieImageTransformer2DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.transformers.transformer_ernie_image import (
    ErnieImageAttention,
    ErnieImageSingleStreamAttnProcessor,
)

from ..additions import placed
from .processors import JointAttention, JointModel, Text
from .record import Backbone, image_grid


class PladisErnieImageAttention(JointAttention, ErnieImageAttention):
    """Joint attention of ERNIE-Image."""

    stock = ErnieImageAttention
    own_processors = (ErnieImageSingleStreamAttnProcessor,)

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **kwargs):
        """As `ErnieImageAttention.forward`, whose processor has another name for the rotary embeddings."""
        text = self.text_of({})
        if image_rotary_emb is not None and text is not None and text.length is not None:
            image = image_rotary_emb.shape[1] - text.length
            places = [image_rotary_emb[:, :image], placed(self, image_rotary_emb[:, image:], 1)]
            image_rotary_emb = torch.cat(places, dim=1)
        return super().forward(hidden_states, attention_mask, image_rotary_emb, **kwargs)


class PladisErnieImageTransformer2DModel(JointModel, ErnieImageTransformer2DModel):
    """ErnieImageTransformer2DModel with some of its attention modules turned into PladisErnieImageAttention."""

    stock = ErnieImageTransformer2DModel
    forms = (PladisErnieImageAttention,)
    joint_blocks = ("layers",)
    text = "text_bth"
    hides_negative = True

    def text_of_model(self, given: Mapping[str, Any]) -> Text | None:
        """As JointModel's: behind the image."""
        return Text(given["text_bth"].shape[1], first=False)


BACKBONE = Backbone(
    patched=PladisErnieImageTransformer2DModel,
    attention="self_attention",
    blocks=("layers",),
    grid=image_grid,
    text_first=False,
    one_stream=True,
    streams={"layers": ("x",)},
)
