"""`PladisZImageTransformer2DModel`: Z-Image, Turbo and Omni, one stream of image and then text."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, ZImageTransformer2DModel  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, ZSingleStreamAttnProcessor

from ..additions import Teller
from ..further_text import FurtherTexts
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
    text = "cap_feats"
    hides_negative = True
    negative_blocks = ("layers",)

    def around_negative(self, tokens: int, given: Mapping[str, Any]) -> tuple[int, int]:
        """As PladisModel's: learned tokens behind a text."""
        return 0, _filled(tokens) - tokens

    def negative_shown(self, mask: torch.Tensor, given: Mapping[str, Any]) -> torch.Tensor:
        """As PladisModel's: of each entry its own tokens, filled up."""
        count, lengths = _filled(mask.shape[1]), mask.sum(1, keepdim=True)
        return torch.arange(count, device=mask.device) < lengths + -lengths % SEQ_MULTI_OF

    def with_negative(self, given: dict[str, Any], texts: FurtherTexts) -> dict[str, Any]:
        """The same arguments: `at_block` puts the texts in."""
        if isinstance(given["x"][0], list):
            raise ValueError("Z-Image Omni: its text stands before the images, where no other text has a place")
        samples = given.get("controlnet_block_samples")
        if samples is None:
            return given
        count = sum(_filled(length) for length in texts.lengths)
        return {
            **given,
            "controlnet_block_samples": {key: F.pad(one, (0, 0, 0, count)) for key, one in samples.items()},
        }

    def at_block(self, teller: Teller, given: dict[str, Any], first: bool) -> dict[str, Any]:
        """As PladisModel's: the texts, as the model refines a prompt, behind all else."""
        stream, mask, turns = given["x"], given["attn_mask"], given["freqs_cis"]
        if first:
            length = teller.told.encoded[0].shape[1] // len(teller.told.lengths)
            teller.kept = self._refined(*teller.told.encoded[:2], stream, length)
            stream = torch.cat([stream, teller.kept[0]], dim=1)
        _, own_turns = teller.kept
        count = own_turns.shape[1]
        if mask is None:
            mask = torch.ones(stream.shape[0], turns.shape[1], dtype=torch.bool, device=stream.device)
        mask = F.pad(mask, (0, count), value=True)  # the modules know which are padding
        return {**given, "x": stream, "attn_mask": mask, "freqs_cis": torch.cat([turns, own_turns], dim=1)}

    def _refined(self, tokens, mask, stream, length):
        """(states, turns) of texts, (batch, tokens, channels or turns), as forward() makes a prompt's."""
        batch, texts = stream.shape[0], tokens.shape[1] // length
        tokens = tokens.reshape(batch * texts, length, -1)
        mask = None if mask is None else mask.reshape(batch * texts, length)
        kept = [len(text) for text in tokens] if mask is None else mask.sum(1).tolist()
        texts = [text[: int(length)].to(stream) for text, length in zip(tokens, kept, strict=True)]
        filled: Any = [self._pad_with_ids(text, (_filled(len(text)), 1, 1), (1, 0, 0), stream.device) for text in texts]
        states, places, padding = ([one[part] for one in filled] for part in range(3))
        embedded = list(self.cap_embedder(torch.cat(states)).split([len(text) for text in states]))
        prepared: Any = self._prepare_sequence(embedded, places, padding, self.cap_pad_token, None, stream.device)
        states, turns, own = prepared[:3]
        for layer in self.context_refiner:
            states = layer(states, own, turns)
        behind = (0, 0, 0, _filled(length) - states.shape[1])
        return tuple(F.pad(one, behind).reshape(batch, -1, one.shape[2]) for one in (states, turns))

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
