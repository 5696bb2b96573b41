"""`PladisLumina2Transformer2DModel`: Lumina-Image 2.0 and Neta, one stream of text and then image.

Each entry of a batch has as many tokens of text as its prompt, and its padding last.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import Lumina2Transformer2DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_lumina2 import Lumina2AttnProcessor2_0

from .processors import JointAttention, JointModel, Text
from .record import ONE_STREAM, Backbone, image_grid


class PladisLumina2Attention(JointAttention, Attention):
    """Joint attention of Lumina 2, whose padding stands behind text and image.

    24 heads of queries share 8 of keys, which its processor repeats.
    """

    stock = Attention
    own_processors = (Lumina2AttnProcessor2_0,)

    def text_of(self, given: Mapping[str, Any]) -> Text | None:
        """As JointAttention's; what the module is given as text is its whole sequence."""
        return super().text_of({})


class PladisLumina2Transformer2DModel(JointModel, Lumina2Transformer2DModel):
    """Lumina2Transformer2DModel with some of its attention modules turned into PladisLumina2Attention."""

    stock = Lumina2Transformer2DModel
    timestep_rises = True
    forms = (PladisLumina2Attention,)
    joint_blocks = ("layers",)

    def text_of_model(self, given: Mapping[str, Any]) -> Text | None:
        """As JointModel's: as many tokens of each entry as its mask keeps."""
        height, width = given["hidden_states"].shape[-2:]
        image = (height // self.config.patch_size) * (width // self.config.patch_size)
        return Text(None, image=image, lengths=given["encoder_attention_mask"].sum(dim=1))


def _image_start(config: Mapping, given: Mapping) -> torch.Tensor:
    return given["encoder_attention_mask"].sum(dim=1).long()


BACKBONE = Backbone(
    patched=PladisLumina2Transformer2DModel,
    attention="attn",
    blocks=("layers",),
    grid=image_grid,
    batches_cfg=False,
    turns_complex=True,
    one_stream=True,
    turns_velocity=True,
    streams={"layers": ONE_STREAM},
    image_start=_image_start,
    keeps_norm=True,
)
