"""`PladisLumina2Transformer2DModel`: Lumina-Image 2.0 and Neta, one stream of text and then image.

Each entry of a batch has as many tokens of text as its prompt, and its padding last.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import Lumina2Transformer2DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.attention_processor import Attention
from torch import Tensor

from ..additions import Teller
from ..further_text import FurtherTexts
from ..module import warn_of_unknown
from .processors import JointAttention, JointModel, Text, rotated
from .record import ONE_STREAM, Backbone, image_grid


class PladisLumina2Attention(JointAttention, Attention):
    """Joint attention of Lumina 2, whose padding stands behind text and image; 24 heads of queries share 8 of keys."""

    stock = Attention
    processors = ("Lumina2AttnProcessor2_0",)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As its processor's: (batch, length, channels), out as in. Both are the same sequence."""
        warn_of_unknown(kwargs)
        assert self.to_k is not None and self.to_v is not None
        query, key, value = self.to_q(hidden_states), self.to_k(encoder_hidden_states), self.to_v(encoder_hidden_states)
        size, dtype = query.shape[-1] // self.heads, query.dtype
        query, key, value = (states.unflatten(-1, (-1, size)) for states in (query, key, value))
        query = query if self.norm_q is None else self.norm_q(query)
        key = key if self.norm_k is None else self.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (rotated(states, image_rotary_emb, use_real=False) for states in (query, key))
        output = self.attended(query.to(dtype), key.to(dtype), value, attention_mask)
        assert self.to_out is not None
        return self.to_out[1](self.to_out[0](output.to(dtype)))

    def text_of(self, given: Mapping[str, Any]) -> Text | None:
        """As JointAttention's; what the module is given as text is its whole sequence."""
        return super().text_of({})


class PladisLumina2Transformer2DModel(JointModel, Lumina2Transformer2DModel):
    """Lumina2Transformer2DModel with some of its attention modules turned into PladisLumina2Attention."""

    stock = Lumina2Transformer2DModel
    timestep_rises = True
    forms = (PladisLumina2Attention,)
    joint_blocks = ("layers",)
    hides_negative = True
    negative_blocks = ("layers",)

    def with_negative(self, given: dict[str, Any], texts: FurtherTexts) -> dict[str, Any]:
        """The same arguments: `at_block` puts the texts in."""
        return given

    def at_block(self, teller: Teller, given: dict[str, Any], first: bool) -> dict[str, Any]:
        """As PladisModel's: the texts, as the model refines a prompt, behind image and padding."""
        stream, turns = given["hidden_states"], given["image_rotary_emb"]
        if first:
            teller.kept = self._refined(*teller.told.encoded[:2], len(teller.told.lengths))
            stream = torch.cat([stream, teller.kept[0].to(stream)], dim=1)
        own = teller.kept[1]
        whole = {**given, "hidden_states": stream, "image_rotary_emb": torch.cat([turns, own], dim=1)}
        if given["attention_mask"] is not None:
            whole["attention_mask"] = F.pad(given["attention_mask"], (0, own.shape[1]), value=True)
        return whole

    def _refined(self, tokens, mask, texts):
        """(states, turns) of texts, (batch, tokens, channels) each, as forward() makes a prompt's."""
        batch, length = tokens.shape[0], tokens.shape[1] // texts
        tokens = tokens.reshape(batch * texts, length, -1)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask
        mask = mask.reshape(batch * texts, length)
        states = self.time_caption_embed.caption_embedder(tokens)
        places = torch.zeros(*tokens.shape[:2], 3, dtype=torch.int32, device=tokens.device)
        places[..., 0] = torch.arange(tokens.shape[1], device=tokens.device)
        turns = self.rope_embedder._get_freqs_cis(places)
        for layer in self.context_refiner:
            states = layer(states, mask, turns)
        return tuple(one.reshape(batch, texts * length, -1) for one in (states, turns))

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
    reads_lengths=True,
)
