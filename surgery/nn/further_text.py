"""What a patched model does with a text beside the prompt's: a negative prompt's, or those of regions.

Its tokens go behind the prompt's where the model is called, so that whatever the model makes of its text it makes of
them. Where text attends to text before it meets the image, each text does so by itself (`apart`, prompts.py); a model
that mixes texts, places and padding on its way to its blocks is given the further text at those (`at_block`).
"""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .additions import PADDING, Teller


class FurtherTexts(NamedTuple):
    """What a model is given beside the prompt.

    tokens: (batch, tokens, channels) as the prompt's are, of all texts; mask: (batch, tokens), nonzero keeps one, or
    None where none is padding. more: what else encodes the same texts. lengths: of each, in tokens.
    """

    tokens: Tensor
    mask: Tensor | None
    more: tuple[Tensor, ...]
    lengths: tuple[int, ...]


class TakesFurtherText:
    """The part of PladisModel that knows how its model takes text.

    A class has: `text`, the argument of forward() with the text's tokens, in dimension `text_dim`; `text_masks`, those
    with its mask; `hides_negative`, that forward() is told that a further text is padding, and the attention modules
    know better; `apart`, {pattern of paths of modules that work on text alone: {argument: its dimension of tokens}},
    which run for each text by itself; `negative_blocks`, stacks whose blocks are called with what `at_block` makes of
    their arguments.
    """

    stock: Any
    backbone: Any  # its record (backbones/record.py)
    text = "encoder_hidden_states"
    text_dim = 1
    text_masks: tuple[str, ...] = ("encoder_attention_mask", "encoder_hidden_states_mask")
    hides_negative = False
    apart: Mapping[str, Mapping[str, int]] = {}
    negative_blocks: tuple[str, ...] = ()

    def encoded(self, pipeline: Any, result: Any) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]] | None:
        """(tokens, mask, more) of a text, as `with_negative` takes them, in what a pipeline's encode_prompt gives back.

        None where there are no tokens in it.
        """
        parts = [part for part in (result if isinstance(result, (list, tuple)) else [result]) if part is not None]
        texts = parts if parts and isinstance(parts[0], Tensor) else next(iter(parts), None)
        if isinstance(texts, (list, tuple)) and texts and all(isinstance(t, Tensor) and t.ndim == 2 for t in texts):
            lengths = torch.tensor([len(text) for text in texts], device=texts[0].device)
            tokens = pad_sequence(list(texts), batch_first=True)
            return tokens, torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None], ()
        tensors = [part for part in parts if isinstance(part, Tensor)]
        tokens = next((part for part in tensors if part.ndim >= 3), None)
        if tokens is None:
            return None
        size = tokens.shape[0], tokens.shape[self.text_dim]
        return tokens, next((part for part in tensors if part.shape == size), None), ()

    def around_negative(self, tokens: int, given: Mapping[str, Any]) -> tuple[int, int]:
        """How many tokens of its own the model has before and behind a further text of so many, in a call."""
        return 0, 0

    def negative_shown(self, mask: torch.Tensor, given: Mapping[str, Any]) -> torch.Tensor:
        """Which tokens of a further text are attended to, with those around it, by (batch, tokens) bool of its mask."""
        return F.pad(mask, self.around_negative(mask.shape[1], given), value=True)

    def with_negative(self, given: dict[str, Any], texts: FurtherTexts) -> dict[str, Any]:
        """The arguments of a call, {name: value}, with the tokens of further texts behind the prompt's."""
        tokens, mask, _, lengths = texts
        text, dim = given[self.text], self.text_dim
        changed: dict[str, Any] = {self.text: torch.cat([text, tokens.to(text)], dim=dim)}
        if given.get("txt_ids") is not None:  # it has the places of a prompt
            ids = given["txt_ids"]
            changed["txt_ids"] = torch.cat([ids, *(_first_places(ids, length, -2) for length in lengths)], dim=-2)
        for name in self.text_masks:
            if name not in inspect.signature(self.stock.forward).parameters:
                continue
            own = given.get(name)
            if own is None and mask is None and not self.hides_negative:
                continue
            if own is None:
                own = torch.ones(text.shape[0], text.shape[dim], dtype=torch.bool, device=text.device)
                own = own if mask is None else own.to(mask.dtype)
            changed[name] = torch.cat([own, self._mask_of_negative(own, tokens, mask)], dim=1)
        return {**given, **changed}

    def _mask_of_negative(self, own, tokens, mask):
        if self.hides_negative:
            return own.new_zeros(own.shape[0], tokens.shape[self.text_dim])
        return own.new_ones(tokens.shape[:2]) if mask is None else mask.to(own)

    def negative_words(self, words: torch.Tensor, given: Mapping[str, Any]) -> torch.Tensor:
        """Which tokens of a further text are no padding, with those around it, by (batch, tokens) bool of its own."""
        return F.pad(words, self.around_negative(words.shape[1], given))

    def kinds_of_text(self, kinds: torch.Tensor, given: Mapping[str, Any]) -> torch.Tensor:
        """Of what kind each token of a text is, with those around it, by (batch, tokens) of its own."""
        return F.pad(kinds, self.around_negative(kinds.shape[1], given), value=PADDING)

    def at_block(self, teller: Teller, given: dict[str, Any], first: bool) -> dict[str, Any]:
        """The arguments of a block of `negative_blocks` with further texts; first: that it is its stack's first."""
        return given

    def behind_block(self, teller: Teller, output: Any) -> Any:
        """What such a block gives back."""
        return output


def _first_places(places, length, dim):
    """The places of a prompt's first tokens, for those of a further text; ValueError where it has fewer."""
    if length > places.shape[dim]:
        raise ValueError(f"a negative prompt of {length} tokens is longer than the prompt's {places.shape[dim]}")
    return places.narrow(dim, 0, length)
