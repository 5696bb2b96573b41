"""`PladisZImageTransformer2DModel`: Z-Image, Turbo and Omni, one stream of image and then text."""

import math
from collections.abc import Mapping
from typing import Any

from diffusers import ModelMixin, ZImageTransformer2DModel  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, ZSingleStreamAttnProcessor

from .processors import JointAttention, JointModel, Text
from .record import OTHER_IMAGES, Backbone


class PladisZImageAttention(JointAttention, Attention):
    """Joint attention of Z-Image.

    Image and text are each filled up to a multiple of 32 with a learned token that is attended to. Behind the text it
    is text to the operator, as FLUX.1's padding is, and behind the image it is image: the model was trained so.
    """

    stock = Attention
    own_processors = (ZSingleStreamAttnProcessor,)


class PladisZImageTransformer2DModel(JointModel, ZImageTransformer2DModel):
    """ZImageTransformer2DModel with some of its attention modules turned into PladisZImageAttention."""

    stock = ZImageTransformer2DModel
    timestep = "t"
    timestep_rises = True
    forms = (PladisZImageAttention,)
    marked_key = "n_layers"
    joint_blocks = ("layers",)

    def text_of_model(self, given: Mapping[str, Any]) -> Text | None:
        """As JointModel's: behind the image; in Omni before all images, with one length for the whole batch."""
        images, captions = given["x"], given["cap_feats"]
        if isinstance(images[0], list):
            lengths = {sum(_filled(len(part)) for part in parts) for parts in captions}
            if len(lengths) > 1:
                raise ValueError("Z-Image Omni: prompts of one length at a time, for the image stands behind the text")
            return Text(lengths.pop())
        shapes = {tuple(image.shape[1:]) for image in images}
        if len(shapes) > 1:
            raise ValueError("Z-Image: images of one size at a time, for the text stands behind the image")
        return Text(None, first=False, image=_filled(math.prod(_grid(self.config, given))))


def _filled(length):
    return length + -length % SEQ_MULTI_OF


def _grid(config: Mapping, given: Mapping) -> tuple[int, int, int]:
    if isinstance(given["x"][0], list):
        raise ValueError(OTHER_IMAGES)
    frames, height, width = given["x"][0].shape[1:]
    patch, frame = given.get("patch_size", 2), given.get("f_patch_size", 1)
    return frames // frame, height // patch, width // patch


BACKBONE = Backbone(
    patched=PladisZImageTransformer2DModel,
    attention="attention",
    blocks=("layers",),
    grid=_grid,
    latents="x",
    text_first=False,
    fills_up_to=SEQ_MULTI_OF,
    turns_complex=True,
    one_stream=True,
    turns_velocity=True,
    streams={"layers": ("x",)},
    prompt_first=True,
    lists=True,
    adds_to_cond=True,
    time_embedding="t_embedder",
)
