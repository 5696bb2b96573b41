"""What a module of a patched model is told beside its arguments, as further arguments of a compiled function.

A block of one stream is told where the text is in its sequence; a model with additions, of the texts of a run.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from surgery.nn.additions import Teller, Told
from surgery.nn.backbones.processors import Text, text_told, told_text
from surgery.nn.module import is_pladis

TEXT, TEXTS = "pladis_text", "pladis_texts"  # the names of those arguments
_ENCODED = ("tokens", "mask", "more")  # of Told.encoded, beside the call's own arguments


def text_beside() -> dict[str, Any]:
    """{TEXT: where the text is} in the call of a model that goes on, {} where none is told; for `called`."""
    text = text_told()
    return {} if text is None else {TEXT: text._asdict()}


def texts_beside(module: nn.Module) -> dict[str, Any]:
    """{TEXTS: what a model, or a part of one, is told of a run's texts}, {} where it is told nothing; for `called`.

    What else encodes the texts is among it where a whole model takes them at its blocks.
    """
    teller = _teller_of(module)
    if teller is None or (not teller.told.negative and teller.told.kinds is None):
        return {}
    told = teller.told._asdict()
    tokens, mask, _, more = told.pop("encoded") or (None, None, None, ())
    whole = bool(getattr(module, "negative_blocks", ()))
    told |= {"tokens": tokens if whole else None, "more": more if whole else ()}
    told["mask"] = mask if whole or told["shown"] is not None else None
    return {TEXTS: {name: value for name, value in told.items() if value is not None and value != ()}}


def called(module: nn.Module, method: str, arguments: Mapping[str, Any]) -> Any:
    """What a module's method gives for the arguments of a call taken apart, with what it is told beside them."""
    # Such a call has no None, and some parameters have no other default.
    parameters = list(inspect.signature(getattr(type(module), method)).parameters.values())[1:]
    named = [one for one in parameters if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    given = {one.name: None for one in named if one.default is one.empty} | dict(arguments)
    text, texts = given.pop(TEXT, None), given.pop(TEXTS, None)
    with ExitStack() as stack:
        if text is not None:
            stack.enter_context(told_text(Text(**{"length": None, **text})))
        if texts is not None:
            stack.enter_context(_told(module, texts, given))
        return getattr(module, method)(**given)


@contextmanager
def _told(module: nn.Module, texts: Mapping[str, Any], call: Mapping[str, Any]) -> Iterator[None]:
    teller = _teller_of(module)
    assert teller is not None  # what it is told, it has been told
    told = {name: value for name, value in texts.items() if name not in _ENCODED}
    encoded = (texts.get("tokens"), texts.get("mask"), call, texts.get("more", ()))
    before, teller.told = teller.told, Told(**told, encoded=encoded)
    try:
        yield
    finally:
        teller.told = before


def _teller_of(module: nn.Module) -> Teller | None:
    """What the modules with additions of a model, or of a part of one, ask; None where there are none."""
    parts: Any = module.modules()
    return next((part.pladis_teller for part in parts if is_pladis(part) and part.pladis_additions), None)
