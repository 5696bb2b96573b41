"""What the attention of FLUX.1 and FLUX.2 shares: [text, image] in one sequence, in blocks of two streams and of one.

A block of one stream concatenates text and image before its attention module, which so cannot see where the text ends.
The number travels to it as one of the joint_attention_kwargs, which every block hands on to its attention module: it
belongs to the call, so calls in several threads keep apart, and it follows a compiled graph's dynamic shapes. Forward
pre-hooks put it in or take it out, for diffusers knows a block by its class (caches, offloading, regional compiling).
"""

from collections.abc import Mapping

import torch
from diffusers.models.embeddings import apply_rotary_emb

from ..joint import attend_jointly
from ..module import PladisModule
from .record import OTHER_IMAGES

TEXT_LENGTH = "pladis_text_length"


class FluxStreams(PladisModule):
    """The part that FLUX's patched attention modules share.

    The backend that `set_attention_backend` names and context parallelism mean nothing here.
    """

    kind = "joint"

    def two_streams(self, hidden_states, encoder_hidden_states):
        """(query, key, value) of text and image, each projected by its own, as `one_stream` gives them.

        hidden_states: (batch, image tokens, channels), encoder_hidden_states: (batch, text tokens, channels).
        """
        query = self.norm_q(self._split_heads(self.to_q(hidden_states)))
        key = self.norm_k(self._split_heads(self.to_k(hidden_states)))
        text_query = self.norm_added_q(self._split_heads(self.add_q_proj(encoder_hidden_states)))
        text_key = self.norm_added_k(self._split_heads(self.add_k_proj(encoder_hidden_states)))
        value = torch.cat([self.add_v_proj(encoder_hidden_states), self.to_v(hidden_states)], dim=1)
        return (
            torch.cat([text_query, query], dim=1),
            torch.cat([text_key, key], dim=1),
            self._split_heads(value),
        )

    def one_stream(self, query, key, value):
        """Projections (batch, length, channels) normed and split: (batch, length, heads, head_dim) each."""
        query, key = self.norm_q(self._split_heads(query)), self.norm_k(self._split_heads(key))
        return query, key, self._split_heads(value)

    def attended(self, query, key, value, text_length, attention_mask, image_rotary_emb):
        """Joint attention of [text, image] tokens, (batch, length, heads, head_dim): (batch, length, channels).

        attention_mask: boolean or additive, (batch, length) or broadcastable to (batch, heads, length, length).
        image_rotary_emb: (cos, sin) of text and image, (length, head_dim) each.
        """
        if text_length is None:
            raise ValueError(
                "this block of one stream was not told how many of its tokens are text: something replaced the "
                "forward() of the model; take that out, or patch the double blocks alone"
            )
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(states, image_rotary_emb, sequence_dim=1) for states in (query, key))
        if attention_mask is not None and attention_mask.shape == (key.shape[0], key.shape[1]):
            attention_mask = attention_mask[:, None, None]  # of keys alone, as diffusers' native backend takes it
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        output = attend_jointly(self, query, key, value, text_length, text_first=True, mask=attention_mask)
        return self._merge_heads(output, query)

    def _split_heads(self, projected):
        return projected.unflatten(-1, (-1, self.head_dim))  # (batch, length, heads, head_dim)


def with_text_length(joint_attention_kwargs: dict | None, encoder_hidden_states: torch.Tensor) -> dict:
    """joint_attention_kwargs that also tell how many tokens encoder_hidden_states, (batch, tokens, channels), has."""
    return {**(joint_attention_kwargs or {}), TEXT_LENGTH: encoder_hidden_states.shape[1]}


def forget_text_length(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A forward pre-hook for a stock attention module, which would warn of a keyword that it does not know."""
    return args, {name: value for name, value in kwargs.items() if name != TEXT_LENGTH}


def grid_by_ids(config: Mapping, given: Mapping) -> tuple[int, int, int]:
    """`grid` of a model whose tokens come with their places, `img_ids`, (tokens, 3 or more) or with a batch before."""
    ids = given["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    _, height, width = (ids.amax(dim=0) - ids.amin(dim=0) + 1)[:3].tolist()
    if len(given["hidden_states"][0]) != height * width:
        raise ValueError(OTHER_IMAGES)
    return 1, int(height), int(width)
