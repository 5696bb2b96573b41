"""A weight file in another layout, without its content: converters run over tensors that only note what is done.

What diffusers' converters of single-file checkpoints do (rename, split, join, transpose) is noted on tensors without
content, so that shapes and sizes are known from a file's header, and each tensor is computed when it is written: one of
them is in memory at a time, where the converters themselves would hold the whole model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .tensors import Layout


class Deferred(torch.Tensor):
    """A tensor with shape and dtype, and what it takes to compute it: a file's tensor, or an operation upon others."""

    key: str | None  # of the file's tensor that it is
    step: tuple[Callable, tuple, dict, int | None] | None  # function, its arguments, and which of several outputs
    like: torch.Tensor  # on the meta device

    # so that torch hands operations to __torch_dispatch__
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]  as torch has it

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            raise TypeError(f"{func} writes into a tensor of the file, which is only read")
        made = func(*_map(_like, args), **_map(_like, kwargs))
        if isinstance(made, torch.Tensor):
            return _made(made, step=(func, args, kwargs, None))
        return type(made)(_made(one, step=(func, args, kwargs, index)) for index, one in enumerate(made))

    def compute(self, get: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Its value; get(name) gives the file's tensors."""
        if self.step is None:
            assert self.key is not None
            return get(self.key)
        func, args, kwargs, index = self.step

        def value(one):
            return one.compute(get) if isinstance(one, Deferred) else one

        made = func(*_map(value, args), **_map(value, kwargs))
        return made if index is None else made[index]


def _made(like, key=None, step=None) -> Deferred:
    strides, offset, device = like.stride(), like.storage_offset(), torch.device("meta")
    made = torch.Tensor._make_wrapper_subclass(
        Deferred, like.shape, strides=strides, storage_offset=offset, dtype=like.dtype, device=device
    )
    made.like, made.key, made.step = like, key, step
    return made


def _like(one):
    return one.like if isinstance(one, Deferred) else one


def _map(function, value):
    """`value` with the function applied to all that is neither list, tuple nor dict in it."""
    if isinstance(value, (list, tuple)):
        return type(value)(_map(function, one) for one in value)
    if isinstance(value, dict):
        return {key: _map(function, one) for key, one in value.items()}
    return function(value)


def deferred(layout: Layout) -> dict[str, torch.Tensor]:
    """{name: Deferred} of a weight file with that layout."""
    return {
        name: _made(torch.empty(tuple(shape), dtype=dtype, device="meta"), name)
        for name, (dtype, shape) in layout.items()
        if isinstance(dtype, torch.dtype)
    }


@dataclass(frozen=True)
class Conversion:
    """The tensors of a weight file as those of one component: what a file of the artifact is made of.

    source, revision, path: the weight file's, as an Origin has them.
    """

    source: str
    revision: str | None
    path: str
    tensors: Mapping[str, torch.Tensor]

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """{name: (dtype, shape)} of what it gives."""
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()}

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.dtype.itemsize * tensor.numel() for tensor in self.tensors.values())

    def tensor(self, name: str, get: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """A tensor of it; get(name) gives the weight file's."""
        tensor = self.tensors[name]
        with torch.no_grad():
            return tensor.compute(get) if isinstance(tensor, Deferred) else tensor
