"""What of alpha-entmax does what: its shares of kinds of tokens, or its choice of tokens within a kind, alone.

alpha-entmax changes softmax's weights in two ways: how much goes to each kind of token (the start token, the words, the
end with the padding), and which tokens within a kind have it. A pipeline draws with either change alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from surgery.models.patching import denoiser
from surgery.nn import entmax
from surgery.nn.operators import OPERATORS

VARIANTS = {  # name -> (between the kinds, within a kind)
    "softmax": ("softmax", "softmax"),
    "entmax": ("entmax", "entmax"),
    "entmax between the kinds, softmax within": ("entmax", "softmax"),
    "softmax between the kinds, entmax within": ("softmax", "entmax"),
}
_NOTHING = 1e-6  # a share that counts as none


@contextmanager
def mixed_attention(
    pipeline: Any, variant: str, prompts: Sequence[str], alpha: float = OPERATORS["pladis"].defaults["alpha"]
) -> Iterator[None]:
    """The pipeline, an unpatched UNet's, with one of VARIANTS in all its cross-attention until the block is left.

    prompts: those that are then drawn, as one batch with classifier-free guidance and without a negative prompt. Its
    tokenizer pads on the right, and the UNet sees no mask.
    """
    model: Any = denoiser(pipeline)
    before = model.attn_processors
    mixture = _Mixture(variant, alpha, kinds_of(pipeline.tokenizer, prompts).to(model.device))
    model.set_attn_processor({name: mixture if ".attn2." in name else processor for name, processor in before.items()})
    try:
        yield
    finally:
        model.set_attn_processor(before)


def mixture_of(between: Tensor, within: Tensor, kinds: Tensor) -> Tensor:
    """Weights (batch, heads, queries, keys) with each kind's share of the map `between` and its inside of `within`.

    kinds: (batch, kinds, keys), 1.0 where a token is of a kind. Where `within` gives a kind nothing, the weights of
    `between` in it stand.
    """

    def share(weights):  # of the kind that a token is of
        return torch.einsum("bhqk,bgk->bhqg", weights, kinds) @ kinds.unsqueeze(1)

    inside = share(within)
    wanted = within * (share(between) / inside.clamp_min(_NOTHING))
    return torch.where(inside > _NOTHING, wanted, between)


def kinds_of(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """(2 n, 3, tokens): start, words, end and padding, of n empty prompts and of the prompts."""
    length = tokenizer.model_max_length
    kinds = torch.zeros(2 * len(prompts), 3, length)
    for row, prompt in zip(kinds, [""] * len(prompts) + list(prompts), strict=True):
        end = len(tokenizer(prompt, truncation=True).input_ids) - 1
        row[0, :1] = row[1, 1:end] = row[2, end:] = 1.0
    return kinds


class _Mixture:
    """A diffusers attention processor whose weights between and within the kinds of tokens come from either map."""

    def __init__(self, variant: str, alpha: float, kinds: Tensor) -> None:
        self.between, self.within = VARIANTS[variant]
        self.alpha, self.kinds = alpha, kinds

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        """(batch, place, channel), as diffusers' AttnProcessor."""
        projected = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        query, key, value = (one.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for one in projected)
        scores = query @ key.transpose(-1, -2) * attn.scale
        weights = self._map(self.between, scores)
        if self.between != self.within:
            weights = mixture_of(weights, self._map(self.within, scores), self.kinds.to(weights.dtype))
        return attn.to_out[1](attn.to_out[0]((weights @ value).transpose(1, 2).flatten(-2)))

    def _map(self, name, scores):
        return scores.softmax(-1) if name == "softmax" else entmax(scores, alpha=self.alpha)
