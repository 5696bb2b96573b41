"""`PladisNucleusMoEImageTransformer2DModel`: NucleusMoE-Image, whose image tokens alone ask, of image and text."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin, NucleusMoEImageTransformer2DModel  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.attention_processor import Attention
from torch import Tensor

from ..additions import placed
from ..module import warn_of_unknown
from .processors import JointAttention, JointModel, Text, rotated
from .record import ONE_STREAM, Backbone


class PladisNucleusMoEAttention(JointAttention, Attention):
    """Attention of the image to [image, text] in NucleusMoE."""

    stock = Attention
    processors = ("NucleusMoEAttnProcessor2_0",)
    text_first = False

    def text_of(self, given: Mapping[str, Any]) -> Text | None:
        """Behind the image, all the keys that no query stands for; they may come from a cache."""
        return Text(None, first=False)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        cached_txt_key: Tensor | None = None,
        cached_txt_value: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As its processor's: (batch, image tokens, channels), out as in. The text's keys may be given as they are."""
        warn_of_unknown(kwargs)
        size, (of_image, of_text) = self.inner_dim // self.heads, image_rotary_emb or (None, None)

        def made(states, project, norm=None, turns=None):
            states = project(states).unflatten(-1, (-1, size))
            states = states if norm is None else norm(states)
            return states if turns is None else rotated(states, turns[None], use_real=False)

        query = made(hidden_states, self.to_q, self.norm_q, of_image)
        key, value = made(hidden_states, self.to_k, self.norm_k, of_image), made(hidden_states, self.to_v)
        if (cached_txt_key is None or cached_txt_value is None) and encoder_hidden_states is not None:
            # a negative prompt's tokens have the places of a prompt's
            of_text = None if of_text is None else placed(self, of_text)
            cached_txt_key = made(encoder_hidden_states, self.add_k_proj, self.norm_added_k, of_text)
            cached_txt_value = made(encoder_hidden_states, self.add_v_proj)
        if cached_txt_key is not None and cached_txt_value is not None:
            key, value = torch.cat([key, cached_txt_key], dim=1), torch.cat([value, cached_txt_value], dim=1)
        assert self.to_out is not None
        output = self.to_out[0](self.attended(query, key, value, attention_mask).to(query.dtype))
        return self.to_out[1](output) if len(self.to_out) > 1 else output


class PladisNucleusMoEImageTransformer2DModel(JointModel, NucleusMoEImageTransformer2DModel):
    """NucleusMoEImageTransformer2DModel with some of its attention modules turned into PladisNucleusMoEAttention."""

    stock = NucleusMoEImageTransformer2DModel
    forms = (PladisNucleusMoEAttention,)


def _grid(config: Mapping, given: Mapping) -> tuple[int, int, int]:
    shapes = given["img_shapes"]
    return tuple(shapes[0] if isinstance(shapes, list) else shapes)


BACKBONE = Backbone(
    patched=PladisNucleusMoEImageTransformer2DModel,
    attention="attn",
    grid=_grid,
    text_first=False,
    batches_cfg=False,
    one_stream=True,
    turns_complex=True,
    turns_velocity=True,
    streams={"transformer_blocks": ONE_STREAM},
    keeps_norm=True,
)
