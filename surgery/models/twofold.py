"""A tensor that is two at once: as a pipeline makes it, and as it would be from another text.

Whatever a pipeline does to the text between its encoders and its denoiser (it stacks, repeats, cuts, casts, projects)
is done to both, so that both come to the denoiser in the same places without anybody knowing the pipeline.
"""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from surgery.errors import UnsupportedModelError

# Of a tensor these take only size, dtype and place: once is enough, and twice would draw twice.
_BY_SHAPE = {torch.rand_like, torch.randn_like, torch.randint_like, torch.zeros_like, torch.ones_like, torch.empty_like}
_WRITING = {"__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "and", "or", "xor"))}


class Twofold(Tensor):
    """The tensor `plain` to whoever looks; `other` beside it has gone through the same functions."""

    plain: Tensor
    other: Tensor

    @classmethod
    def of(cls, plain: Tensor, other: Tensor) -> Self:
        """Of two tensors."""
        made = plain.as_subclass(cls)
        made.plain, made.other = plain, other
        return made

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """What a function makes of each of both."""
        given = (args, kwargs or {})
        if (_writes(func) and not isinstance(args[0], cls)) or "out" in given[1]:
            raise UnsupportedModelError(
                f"guidance: tau_c: this pipeline writes its text into a tensor of its own ({func.__name__}), where a "
                "second text cannot follow; leave tau_c out"
            )
        positional, named = plain_of(given)
        found = func(*positional, **named)
        if func in _BY_SHAPE:
            return found
        positional, named = other_of(given)
        return both(found, func(*positional, **named))  # of a number, a size or a truth the plain one's


def _writes(func):
    """Whether a function changes its first argument."""
    name = func.__name__
    return (name.endswith("_") and not name.endswith("__")) or name in _WRITING


def both(plain: Any, other: Any) -> Any:
    """Two values of one shape, as a function or a model gave them, with every pair of tensors as a Twofold."""
    if isinstance(plain, Tensor):
        return Twofold.of(plain, other) if isinstance(other, Tensor) else plain
    return _rebuilt(plain, lambda name, part: both(part, other[name]))


def plain_of(value: Any) -> Any:
    """A value as it is, with the plain tensors."""
    return value.plain if isinstance(value, Twofold) else _rebuilt(value, lambda _, part: plain_of(part))


def other_of(value: Any) -> Any:
    """The same with the other tensors where there are such."""
    return value.other if isinstance(value, Twofold) else _rebuilt(value, lambda _, part: other_of(part))


def is_twofold(value: Any) -> bool:
    """Whether there is a Twofold in a value."""
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return isinstance(value, Twofold) or any(is_twofold(part) for part in parts)


def _rebuilt(value, change):
    """A list, tuple or mapping with every part changed, (its key, the part); all else as it is."""
    if isinstance(value, Mapping):
        changed = {name: change(name, part) for name, part in value.items()}
        return changed if type(value) is dict else type(value)(**changed)  # a model's output, of its fields
    if not isinstance(value, (list, tuple)):
        return value
    parts = [change(place, part) for place, part in enumerate(value)]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
