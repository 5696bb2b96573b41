"""Text encoders whose self-attention is softmax(tau q k), beside themselves: the second text of guidance `erg`."""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from surgery.errors import InputError, UnsupportedModelError

from .twofold import both

_FACTORS = ("scaling", "scale")  # what transformers' attention modules call the factor of q k
_CORE = "CoreAttention"  # ChatGLM's, Kolors' encoder, which has none, and is handed the queries
_NOT_TEXT = re.compile(r"(^|\.)(vision|visual|image|audio)")  # towers of an encoder that reads images too


def text_encoders(pipeline: Any) -> dict[str, nn.Module]:
    """{component: encoder} of a pipeline's text encoders that are loaded."""
    parts = pipeline.components.items()
    return {name: part for name, part in parts if name.startswith("text_encoder") and isinstance(part, nn.Module)}


def text_attention(encoder: nn.Module) -> dict[int, list[nn.Module]]:
    """{layer from 0: [modules]} of the attention among a text encoder's tokens; empty where none is known."""
    found: dict[int, list[nn.Module]] = {}
    for path, module in encoder.named_modules():
        known = type(module).__name__ == _CORE or ("Attention" in type(module).__name__ and _factor(module))
        number = re.search(r"\.(\d+)\.", path)
        if known and number and not _NOT_TEXT.search(path):
            found.setdefault(int(number[1]), []).append(module)
    return found


def _factor(module):
    """The name of the factor of q k, or None."""
    return next((name for name in _FACTORS if isinstance(getattr(module, name, None), float)), None)


def check_tempers(pipeline: Any, layers: Sequence[int | None] | None) -> None:
    """Raise UnsupportedModelError where a pipeline's encoders have no temperature, InputError for no such layers."""
    name, encoders = type(pipeline).__name__, text_encoders(pipeline)
    if not encoders:
        raise UnsupportedModelError(f"guidance: tau_c is of text encoders, and {name} has none loaded; leave it out")
    depth = 0
    for part, encoder in encoders.items():
        attention = text_attention(encoder)
        if not attention:
            raise UnsupportedModelError(
                f"guidance: tau_c: {part} of {name} is a {type(encoder).__name__}, in which no attention is known that "
                "has a factor of its scores; leave tau_c out"
            )
        depth = max(depth, len(attention))
    if layers is not None and (layers[0] or 0) >= depth:
        raise InputError(f"guidance.text_layers: [{layers[0]}, ...] begins behind the last of {depth} layers of text")


@contextmanager
def tempered(encoder: nn.Module, tau: float, layers: Sequence[int | None] | None = None) -> Iterator[None]:
    """While it lasts, an encoder's attention in layers [from, to), all without, is softmax(tau q k + what is added)."""
    first, end = layers or (0, None)
    with ExitStack() as stack:
        for number, modules in text_attention(encoder).items():
            if number < (first or 0) or (end is not None and number >= end):
                continue
            for module in modules:
                if name := _factor(module):
                    stack.callback(setattr, module, name, getattr(module, name))
                    setattr(module, name, getattr(module, name) * tau)
                else:
                    handle = module.register_forward_pre_hook(lambda _, given: (given[0] * tau, *given[1:]))
                    stack.callback(handle.remove)
        yield


@contextmanager
def second_text(pipeline: Any, tau: float, layers: Sequence[int | None] | None = None) -> Iterator[None]:
    """While it lasts, what a pipeline's text encoders give is a Twofold: as ever, and by `tempered` attention.

    The encoders run twice. Not where they write, as those do that reword a prompt: what is written stays the same.
    """

    def hear(encoder, args, kwargs, output):
        if kwargs.get("past_key_values") is not None:
            return None
        with tempered(encoder, tau, layers), torch.no_grad():
            # Not by way of the call, whose hooks, this one among them, have run.
            return both(output, encoder.forward(*args, **kwargs))

    with ExitStack() as stack:
        for encoder in text_encoders(pipeline).values():
            stack.callback(encoder.register_forward_hook(hear, with_kwargs=True).remove)
        yield
