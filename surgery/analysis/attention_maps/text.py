"""How a prompt's tokens reach a denoiser, seen and not known: what its text encoders read and gave, found again in it.

The pipeline is run up to its denoiser's first call. A row of the text that the denoiser is given begins with a row of
hidden states of one of the encoders, and that row's token is known. So templates, what is cut off before or behind,
several encoders one behind the other and padding left out are followed without knowing the pipeline.
"""

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from surgery.errors import UnsupportedModelError
from surgery.models.anatomy import record_of
from surgery.models.patching import denoiser
from surgery.nn.hooks import arguments_of
from surgery.runtime.draw import draw

from .tokens import Encoded, prompt_tokens

_NEAR = 1e-3  # of a row's largest number: what is between a row and the same one in another order of sums
_LIST, _TENSOR = "cap_feats", "encoder_hidden_states"  # of Z-Image, of everyone else


class TextKeys(NamedTuple):
    """encoded: what each encoder read. length: how many rows of text there are. entry: which of the batch has it."""

    encoded: tuple[Encoded, ...]
    length: int
    entry: int


class _Read(NamedTuple):
    """A text encoder's call: its name, the ids and hidden states, (tokens, channels) each, of one entry."""

    encoder: str
    ids: list[int]
    states: list[Tensor]


class _Reached(Exception):
    pass


def text_keys(pipeline: Any, prompt: str, sampling: Mapping[str, Any] | None = None) -> TextKeys:
    """How the tokens of a prompt come to a pipeline's denoiser. sampling: as in `draw`.

    Raises UnsupportedModelError where they cannot be found there again.
    """
    model, reads, given = denoiser(pipeline), [], {}

    def reached(module, arguments, keywords):
        given.update(arguments_of(type(module).forward, arguments, keywords))
        raise _Reached

    with ExitStack() as stack:
        for name, part in pipeline.components.items():
            if name.startswith("text_encoder") and isinstance(part, nn.Module):
                hook = part.register_forward_hook(_reader(name, reads), with_kwargs=True)
                stack.callback(hook.remove)
        stack.callback(model.register_forward_pre_hook(reached, with_kwargs=True).remove)
        with suppress(_Reached):
            draw(pipeline, [(prompt, 0)], sampling)
    texts = given.get(_LIST, given.get(_TENSOR))
    if texts is None or record_of(model) is None:
        raise UnsupportedModelError(f"{type(model).__name__} is given no text, so words have no tokens to show")
    for places_in in (_places, _token_by_token):
        found = [_found(pipeline, prompt, reads, text, places_in) for text in texts]
        # where two have as much of it, the second: diffusers stacks [unconditional, conditional]
        entry = max(range(len(found)), key=lambda each: (found[each][0], each))
        if found[entry][1]:
            return TextKeys(tuple(found[entry][1]), len(texts[entry]), entry)
    raise UnsupportedModelError(
        f"what {type(model).__name__} is given as text is no output of {type(pipeline).__name__}'s text encoders, so "
        "which of it belongs to a word is not known"
    )


def _reader(name, reads):
    def read(module, arguments, keywords, output):
        ids = keywords.get("input_ids", arguments[0] if arguments else None)
        states = [getattr(output, "last_hidden_state", None), *(getattr(output, "hidden_states", None) or ())]
        states = [each for each in states if isinstance(each, Tensor) and each.ndim == 3]
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            return
        for entry, row in enumerate(ids.tolist()):
            reads.append(_Read(name, row, [each[entry] for each in states if each.shape[:2] == ids.shape]))

    return read


def _found(pipeline, prompt, reads, text, places_in):
    """(how many of the prompt's tokens, [Encoded]) of calls whose states are rows of a text, (rows, channels)."""
    taken, found, total = set(), [], 0
    for read in reads:
        tokenizer = _tokenizer_of(pipeline, read.encoder)
        try:
            start, _, count = prompt_tokens(tokenizer, read.ids, prompt)
        except (UnsupportedModelError, AttributeError, TypeError):
            continue
        keys = max((places_in(read, states, text) for states in read.states), key=len, default={})
        keys = {place: key for place, key in keys.items() if key not in taken}
        if any(start <= place < start + count for place in keys) or (keys and not count):
            taken.update(keys.values())
            found.append(Encoded(tokenizer, read.ids, keys))
            total += count
    return total, found


def _tokenizer_of(pipeline, encoder):
    """The tokenizer beside an encoder, out of a processor where it stands in one."""
    name = encoder.replace("text_encoder", "tokenizer")
    part = getattr(pipeline, name, None) or getattr(pipeline, "processor", None)
    return getattr(part, "tokenizer", part)


def _token_by_token(read, states, text):
    """A row a token, for CLIP's states behind another norm, as clip_skip has it."""
    is_clip = len(read.ids) == len(text) == 77
    return {place: place for place in range(len(text))} if is_clip else {}


def _places(read, states, text):
    """{token: row}: which rows of a text begin with a token's hidden states, each token and row once, in order."""
    channels = min(states.shape[1], text.shape[1])
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
