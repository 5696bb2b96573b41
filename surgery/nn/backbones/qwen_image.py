"""`PladisQwenImageTransformer2DModel`: Qwen-Image and its editing models, whose joint attention has the text first."""

from typing import Any

import torch
from diffusers import (  # noqa: F401  diffusers looks for ModelMixin in this module
    ModelMixin,
    QwenImageTransformer2DModel,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

from ..joint import attend_jointly
from ..model import PladisModel
from ..module import PladisModule, warn_of_unknown
from .record import OTHER_IMAGES, Backbone


class PladisQwenImageAttention(PladisModule, Attention):
    """Joint attention of text and image as in Qwen-Image, the image's attention to the text by one of OPERATORS.

    The processor's choice of attention backend is ignored: the operator has kernels of its own.
    """

    stock = Attention
    kind = "joint"
    processors = ("QwenDoubleStreamAttnProcessor2_0",)

    @classmethod
    def own_refusal(cls, module):
        """As PladisModule's: what is not joint attention of two streams."""
        if module.added_kv_proj_dim is None or module.to_add_out is None or module.to_out is None:
            return "it is not joint attention as in Qwen-Image: text or image lacks projections of its own"
        return None

    def forward(
        self: Any,
        hidden_states,
        encoder_hidden_states,
        encoder_hidden_states_mask=None,
        attention_mask=None,
        image_rotary_emb=None,
        **kwargs,
    ):
        """As `QwenDoubleStreamAttnProcessor2_0`: (image, text) of the shapes that came in, (batch, tokens, channels).

        encoder_hidden_states_mask: bool, (batch, text tokens), False for padding. image_rotary_emb: complex
        frequencies of (image, text), (tokens, head_dim / 2) each. Raises ValueError for an attention_mask, as that
        processor does, and where context parallelism was switched on.
        """
        warn_of_unknown(kwargs)
        if attention_mask is not None:
            raise ValueError("Qwen-Image takes no attention_mask; encoder_hidden_states_mask says what is padding")
        # Heads are counted from the projection: under tensor parallelism a module holds a part of them.
        head_dim = self.inner_dim // self.heads
        image = [to(hidden_states).unflatten(-1, (-1, head_dim)) for to in (self.to_q, self.to_k, self.to_v)]
        text = [
            to(encoder_hidden_states).unflatten(-1, (-1, head_dim))
            for to in (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        ]
        image_turns, text_turns = (None, None) if image_rotary_emb is None else image_rotary_emb
        query = torch.cat(
            [_normed(self.norm_added_q, text[0], text_turns), _normed(self.norm_q, image[0], image_turns)], dim=1
        )
        key = torch.cat(
            [_normed(self.norm_added_k, text[1], text_turns), _normed(self.norm_k, image[1], image_turns)], dim=1
        )
        value = torch.cat([text[2], image[2]], dim=1)  # (batch, text and image tokens, heads, head_dim)

        text_length = encoder_hidden_states.shape[1]
        output = attend_jointly(
            self,
            *(tensor.transpose(1, 2) for tensor in (query, key, value)),
            text_length,
            text_first=True,
            mask=_joint_mask(encoder_hidden_states_mask, hidden_states),
            only_text_is_masked=True,
        )
        output = self._merge_heads(output, query)
        image = self.to_out[0](output[:, text_length:].contiguous())
        if len(self.to_out) > 1:
            image = self.to_out[1](image)
        return image, self.to_add_out(output[:, :text_length].contiguous())


def _normed(norm, projected, turns) -> Any:  # one tensor, which diffusers does not say
    """Queries or keys, (batch, tokens, heads, head_dim), normed and then turned by their place."""
    projected = projected if norm is None else norm(projected)
    return projected if turns is None else apply_rotary_emb_qwen(projected, turns, use_real=False)


def _joint_mask(text_mask, hidden_states):
    """(batch, 1, 1, text and image tokens), or None: no image token is padding."""
    if text_mask is None:
        return None
    image_mask = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
    return torch.cat([text_mask, image_mask], dim=1)[:, None, None]


class PladisQwenImageTransformer2DModel(PladisModel, QwenImageTransformer2DModel):
    """QwenImageTransformer2DModel with some of its attention modules turned into PladisQwenImageAttention."""

    stock = QwenImageTransformer2DModel
    forms = (PladisQwenImageAttention,)


def _grid(config, given):
    shapes = given["img_shapes"][0]
    if isinstance(shapes, list) and len(shapes) > 1:
        raise ValueError(OTHER_IMAGES)
    return tuple(shapes[0] if isinstance(shapes, list) else shapes)


BACKBONE = Backbone(
    patched=PladisQwenImageTransformer2DModel,
    attention="attn",
    grid=_grid,
    batches_cfg=False,
    embeds_guidance=True,
    turns_complex=True,
)
