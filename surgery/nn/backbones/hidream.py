"""`PladisHiDreamImageTransformer2DModel`: HiDream-I1, whose joint attention has the image first, then the text."""

from collections.abc import Mapping
from typing import Any

from diffusers import HiDreamImageTransformer2DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.transformers.transformer_hidream_image import HiDreamAttention, HiDreamAttnProcessor

from .processors import JointAttention, JointModel, Text
from .record import IMAGE_AND_TEXT, ONE_STREAM, Backbone, image_grid


class PladisHiDreamAttention(JointAttention, HiDreamAttention):
    """Joint attention of HiDream, in blocks of two streams and of one.

    Text is T5's tokens and twice Llama's: those of its last layer, and of a layer that is the block's own.
    """

    stock = HiDreamAttention
    own_processors = (HiDreamAttnProcessor,)
    text_first = False

    def forward(
        self, norm_hidden_states, hidden_states_masks=None, norm_encoder_hidden_states=None, image_rotary_emb=None
    ):
        """As `HiDreamAttention.forward`."""
        return super().forward(norm_hidden_states, hidden_states_masks, norm_encoder_hidden_states, image_rotary_emb)


class PladisHiDreamImageTransformer2DModel(JointModel, HiDreamImageTransformer2DModel):
    """HiDreamImageTransformer2DModel with some of its attention modules turned into PladisHiDreamAttention."""

    stock = HiDreamImageTransformer2DModel
    timestep = "timesteps"
    forms = (PladisHiDreamAttention,)
    joint_blocks = ("double_stream_blocks", "single_stream_blocks")

    def text_of_model(self, given: Mapping[str, Any]) -> Text | None:
        """As JointModel's: behind the image, which is filled up where it is not square."""
        states = given["hidden_states"]
        if states.ndim == 3:
            return Text(None, first=False, image=states.shape[1])
        height, width = (size // self.config.patch_size for size in states.shape[-2:])
        return Text(None, first=False, image=height * width if height == width else self.max_seq)


BACKBONE = Backbone(
    patched=PladisHiDreamImageTransformer2DModel,
    attention="attn1",
    blocks=("double_stream_blocks", "single_stream_blocks"),
    grid=image_grid,
    text_first=False,
    turns_velocity=True,
    streams={
        "double_stream_blocks": IMAGE_AND_TEXT,
        "single_stream_blocks": ONE_STREAM,
    },
    batch_second=("encoder_hidden_states_llama3",),
)
