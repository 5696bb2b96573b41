"""How a prompt's tokens reach a denoiser: the pipeline is run up to its denoiser's first call (models/encoded.py)."""

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

from surgery.errors import UnsupportedModelError
from surgery.models.anatomy import record_of
from surgery.models.encoded import Encoded, places_in, reading, tokenizer_of
from surgery.models.patching import denoiser
from surgery.nn.hooks import arguments_of
from surgery.runtime.draw import draw

from .tokens import prompt_tokens

_LIST, _TENSOR = "cap_feats", "encoder_hidden_states"  # of Z-Image, of everyone else


class TextKeys(NamedTuple):
    """encoded: what each encoder read. length: how many rows of text there are. entry: which of the batch has it."""

    encoded: tuple[Encoded, ...]
    length: int
    entry: int


class _Reached(Exception):
    pass


def text_keys(pipeline: Any, prompt: str, sampling: Mapping[str, Any] | None = None) -> TextKeys:
    """How the tokens of a prompt come to a pipeline's denoiser. sampling: as in `draw`.

    Raises UnsupportedModelError where they cannot be found there again.
    """
    model, given = denoiser(pipeline), {}

    def reached(module, arguments, keywords):
        given.update(arguments_of(type(module).forward, arguments, keywords))
        raise _Reached

    with ExitStack() as stack:
        reads = stack.enter_context(reading(pipeline))
        stack.callback(model.register_forward_pre_hook(reached, with_kwargs=True).remove)
        with suppress(_Reached):
            draw(pipeline, [(prompt, 0)], sampling)
    texts = given.get(_LIST, given.get(_TENSOR))
    if texts is None or record_of(model) is None:
        raise UnsupportedModelError(f"{type(model).__name__} is given no text, so words have no tokens to show")
    for by_token in (False, True):
        found = [_found(pipeline, prompt, reads, text, by_token) for text in texts]
        # where two have as much of it, the second: diffusers stacks [unconditional, conditional]
        entry = max(range(len(found)), key=lambda each: (found[each][0], each))
        if found[entry][1]:
            return TextKeys(tuple(found[entry][1]), len(texts[entry]), entry)
    raise UnsupportedModelError(
        f"what {type(model).__name__} is given as text is no output of {type(pipeline).__name__}'s text encoders, so "
        "which of it belongs to a word is not known"
    )


def _found(pipeline, prompt, reads, text, by_token):
    """(how many of the prompt's tokens, [Encoded]) of calls whose states are rows of a text, (rows, channels)."""
    taken, found, total = set(), [], 0
    for read in reads:
        tokenizer = tokenizer_of(pipeline, read.encoder)
        try:
            start, _, count = prompt_tokens(tokenizer, read.ids, prompt)
        except (UnsupportedModelError, AttributeError, TypeError):
            continue
        keys = {place: key for place, key in places_in(read, text, by_token).items() if key not in taken}
        if any(start <= place < start + count for place in keys) or (keys and not count):
            taken.update(keys.values())
            found.append(Encoded(tokenizer, read.ids, keys))
            total += count
    return total, found
