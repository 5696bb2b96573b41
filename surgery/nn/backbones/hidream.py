"""`PladisHiDreamImageTransformer2DModel`: HiDream-I1, whose joint attention has the image first, then the text."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import HiDreamImageTransformer2DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.transformers.transformer_hidream_image import HiDreamAttention, HiDreamAttnProcessor

from ..additions import Teller
from ..further_text import FurtherTexts
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
    text = "encoder_hidden_states_t5"
    negative_blocks = joint_blocks

    def encoded(self, pipeline: Any, result: Any) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, ...]]:
        """As PladisModel's, with Llama's, (batch, layers, tokens, channels)."""
        return result[0], None, (result[2].transpose(0, 1),)

    def around_negative(self, tokens: int, given: Mapping[str, Any]) -> tuple[int, int]:
        """As PladisModel's: twice Llama's tokens behind T5's."""
        return 0, 2 * tokens

    def negative_words(self, words: torch.Tensor, given: Mapping[str, Any]) -> torch.Tensor:
        """As PladisModel's."""
        return words.repeat(1, 3)

    def kinds_of_text(self, kinds: torch.Tensor, given: Mapping[str, Any]) -> torch.Tensor:
        """As PladisModel's: a prompt's tokens of Llama are taken to be of the kinds that T5's are of."""
        return kinds.repeat(1, 3)

    def with_negative(self, given: dict[str, Any], texts: FurtherTexts) -> dict[str, Any]:
        """The same arguments: `at_block` puts the text in. more: Llama's, (batch, layers, tokens, channels)."""
        if len(texts.more) != 1 or texts.more[0].shape[2] != texts.tokens.shape[1]:
            raise ValueError("HiDream: a negative prompt needs as many tokens of Llama, of all its layers, as of T5")
        return given

    def at_block(self, teller: Teller, given: dict[str, Any], first: bool) -> dict[str, Any]:
        """As PladisModel's: behind all else a text as the block's own, with the layer of Llama that is the block's.

        teller.kept: how many blocks have run, the text's tokens that go on from block to block, and Llama's projected.
        """
        if first:
            tokens, _, _, (llama,) = teller.told.encoded
            layers = zip(self.caption_projection, self.config.llama_layers, strict=False)
            shape = len(teller.told.lengths), -1  # each text's tokens apart
            projected = [project(llama[:, layer]).unflatten(1, shape) for project, layer in layers]
            first_text = self.caption_projection[-1](tokens).unflatten(1, shape)
            teller.kept = 0, torch.cat([first_text, projected[-1]], dim=2), projected
        block, lasting, projected = teller.kept
        name = "hidden_states" if given.get("encoder_hidden_states") is None else "encoder_hidden_states"
        states, turns = given[name], given["image_rotary_emb"]
        own = torch.cat([lasting, projected[block]], dim=2).flatten(1, 2).to(states)
        further = turns[:, -1:].expand(-1, own.shape[1], *turns.shape[2:])  # all text stands in one place
        changed = {name: torch.cat([states, own], dim=1), "image_rotary_emb": torch.cat([turns, further], dim=1)}
        if name == "hidden_states" and given.get("hidden_states_masks") is not None:
            changed["hidden_states_masks"] = F.pad(given["hidden_states_masks"], (0, own.shape[1]), value=1)
        return {**given, **changed}

    def behind_block(self, teller: Teller, output: Any) -> Any:
        """As PladisModel's, without the text, of which what goes on is kept."""
        block, lasting, projected = teller.kept
        states = output[-1] if isinstance(output, tuple) else output
        begin = states.shape[1] - teller.told.negative
        texts = states[:, begin:].unflatten(1, (lasting.shape[1], -1))
        teller.kept = block + 1, texts[:, :, : lasting.shape[2]], projected
        return (*output[:-1], states[:, :begin]) if isinstance(output, tuple) else states[:, :begin]

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
