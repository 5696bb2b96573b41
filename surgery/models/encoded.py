"""Which token each row of a denoiser's text is of, seen and not known: what the text encoders read and gave.

A row of the text that a denoiser is given begins with a row of hidden states of one of the encoders, and that row's
token is known. So templates, what is cut off before or behind, several encoders one behind the other and padding left
out are followed without knowing the pipeline.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from surgery.nn.additions import PADDING, START, WORD

from .twofold import plain_of

_NEAR = 1e-3  # of a row's largest number: what is between a row and the same one in another order of sums
_CHANNELS = 64  # of a row are compared first: no two tokens agree in so many
_CLIP = 77


class Read(NamedTuple):
    """A text encoder's call: its name, the ids and hidden states, (tokens, channels) each, of one entry."""

    encoder: str
    ids: list[int]
    states: list[Tensor]


class Encoded(NamedTuple):
    """What a text encoder read, and which of its tokens became the keys of a model.

    ids: of the tokens. keys: {place among the ids: place among the keys}.
    """

    tokenizer: Any
    ids: Sequence[int]
    keys: Mapping[int, int]


@contextmanager
def reading(pipeline: Any) -> Iterator[list[Read]]:
    """A list that gets what the pipeline's text encoders read while this lasts."""
    reads: list[Read] = []
    with ExitStack() as stack:
        for name, part in pipeline.components.items():
            if name.startswith("text_encoder") and isinstance(part, nn.Module):
                hook = part.register_forward_hook(_reader(name, reads), with_kwargs=True)
                stack.callback(hook.remove)
        yield reads


def _reader(name, reads):
    def read(module, arguments, keywords, output):
        ids = keywords.get("input_ids", arguments[0] if arguments else None)
        output = plain_of(output)
        states = [getattr(output, "last_hidden_state", None), *(getattr(output, "hidden_states", None) or ())]
        states = [each for each in states if isinstance(each, Tensor) and each.ndim == 3]
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            return
        for entry, row in enumerate(ids.tolist()):
            reads.append(Read(name, row, [each[entry] for each in states if each.shape[:2] == ids.shape]))

    return read


def tokenizer_of(pipeline: Any, encoder: str) -> Any:
    """The tokenizer beside an encoder, out of a processor where it stands in one."""
    name = encoder.replace("text_encoder", "tokenizer")
    part = getattr(pipeline, name, None) or getattr(pipeline, "processor", None)
    return getattr(part, "tokenizer", part)


def places_in(read: Read, text: Tensor, by_token: bool = False) -> dict[int, int]:
    """{token: row} of what an encoder read, in a text, (rows, channels), by the states of it that are most there.

    by_token: a row a token, for CLIP's states behind another norm, as clip_skip has it.
    """
    if by_token:
        return {place: place for place in range(len(text))} if len(read.ids) == len(text) == _CLIP else {}
    return max((_places(states, text) for states in read.states), key=len, default={})


def _places(states, text):
    """{token: row}: which rows of a text begin with a token's hidden states, each token and row once, in order."""
    channels = min(states.shape[1], text.shape[1], _CHANNELS)
    rows, states = text[:, :channels].float(), states[:, :channels].to(text.device).float()
    apart = torch.cdist(rows[None], states[None], p=float("inf"))[0]  # (rows, tokens)
    size = rows.abs().amax(1)
    places, behind = {}, 0
    for row in range(len(rows)):
        if size[row] == 0 or behind == len(states):
            continue
        distance, token = apart[row, behind:].min(0)
        if distance <= _NEAR * size[row]:
            behind += int(token) + 1
            places[behind - 1] = row
    return places


def kinds_of(pipeline: Any, reads: Sequence[Read], text: Tensor) -> list[int] | None:
    """START, WORD or PADDING (surgery/nn/additions.py) of each row of a text, (rows, channels).

    Padding is what no encoder read, and special tokens but the first. None where no encoder's states are in it. A text
    without words, an empty prompt's, is words alone: there is nothing to tell apart.
    """
    kinds = [PADDING] * len(text)
    taken: set[int] = set()
    for by_token in (False, True):
        for encoder in dict.fromkeys(read.encoder for read in reads):
            found = [(places_in(read, text, by_token), read.ids) for read in reads if read.encoder == encoder]
            places, ids = max(found, key=lambda one: len(one[0]))
            special, first = set(tokenizer_of(pipeline, encoder).all_special_ids), min(places, default=0)
            for place, row in places.items():
                if row in taken:
                    continue
                taken.add(row)
                if ids[place] not in special:
                    kinds[row] = WORD
                elif place == first == 0 and ids[place] == tokenizer_of(pipeline, encoder).bos_token_id:
                    kinds[row] = START
        if taken:
            return kinds if WORD in kinds else [WORD] * len(kinds)
    return None
