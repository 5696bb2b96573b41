"""Weight files: what is in one, and how one is converted, added to and written, tensor by tensor."""

import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from surgery.errors import BaseError
from surgery.hub.deferred import Conversion
from surgery.hub.tensors import DTYPES, Layout, opened_tensors

Adder = Callable[[torch.Tensor], torch.Tensor]  # from a float32 weight to the fused one
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(
    path: str | Path,
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write a safetensors file from an iterable of (name, tensor) whose layout is known beforehand.

    The safetensors package writes a file from tensors that are all in memory; a 5 GB denoiser must not be.
    layout: {name: (torch dtype, shape)}; `tensors` yields exactly these, in this order. `progress(bytes)` as it goes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in layout.items():
        size = _bytes_of(dtype, shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for (name, tensor), expected in zip(tensors, layout, strict=True):
            if name != expected or (tensor.dtype, tuple(tensor.shape)) != layout[name]:
                raise ValueError(f"tensor {name} does not fit the layout at {expected}")
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
            file.write(memoryview(data))  # pyright: ignore[reportArgumentType]
            if progress:
                progress(len(data))


def _bytes_of(dtype, shape):
    return dtype.itemsize * math.prod(shape)


def check_tensors(
    layouts: Iterable[Layout], expected: Mapping[str, Sequence[int]], source: str, allow_unknown: bool = False
) -> None:
    """Raise BaseError unless the layouts of all weight files together have the model's tensors, by name and shape.

    expected: {name: shape} of the model on the meta device. allow_unknown: further tensors are no error.
    """
    found = {name: shape for layout in layouts for name, (_, shape) in layout.items()}
    missing = sorted(set(expected) - set(found))
    unknown = [] if allow_unknown else sorted(set(found) - set(expected))
    if missing or unknown:
        parts = [f"{len(missing)} tensors are missing (first: {missing[0]})"] if missing else []
        parts += [f"{len(unknown)} are unknown to the model (first: {unknown[0]})"] if unknown else []
        raise BaseError(
            f"{source} does not hold this model's weights: {', '.join(parts)}. It must be a state dict of "
            "diffusers' own class"
        )
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise BaseError(f"{source}: {name} has shape {tuple(found[name])}, the model needs {tuple(shape)}")


def write_converted(
    source: str | Path,
    target: str | Path,
    deltas: Mapping[str, Adder],
    progress: Callable[[int], object] | None = None,
    conversion: Conversion | None = None,
) -> None:
    """Write the tensors of a weight file as safetensors, each plus its LoRA delta, in the dtype it had.

    deltas: {tensor name: function from the float32 weight to the float32 fused one}. conversion: by which the file's
    tensors become those that are written; as they are without one.
    """
    with opened_tensors(source) as (layout, get):
        if conversion is not None:
            layout, get = conversion.layout, partial(conversion.tensor, get=get)
        unwritable = [name for name, (dtype, _) in layout.items() if dtype not in DTYPES.values()]
        if unwritable:
            raise BaseError(f"{source}: {unwritable[0]} has dtype {layout[unwritable[0]][0]}, which cannot be written")

        def fused(name):
            tensor = get(name)
            if name not in deltas:
                return tensor
            fused = deltas[name](tensor.float()).to(tensor.dtype)
            if not fused.isfinite().all():
                raise BaseError(f"with the LoRA fused in, {name} overflows {tensor.dtype}; use a smaller scale")
            return fused

        write_tensors(target, layout, ((name, fused(name)) for name in layout), progress)  # pyright: ignore[reportArgumentType]


def buffer_shard_name(weight_names: Sequence[str]) -> str:
    """The name of the shard that holds the buffers, beside weight files of these names (without folder).

    diffusers fetches from the Hub only what looks like a shard of the same variant, so the count goes one up:
    diffusion_pytorch_model.fp16.safetensors -> diffusion_pytorch_model.fp16-00002-of-00002.safetensors.
    """
    stem, variant = _stem_and_variant(weight_names[0])
    number = len(weight_names) + 1
    return f"{stem}{variant}-{number:05d}-of-{number:05d}.safetensors"


def index_name(weight_names: Sequence[str]) -> str:
    """The name of the index beside these weight files: diffusion_pytorch_model.safetensors.index[.fp16].json."""
    stem, variant = _stem_and_variant(weight_names[0])
    return f"{stem}.safetensors.index{variant}.json"


def _stem_and_variant(name):
    stem, _, rest = re.sub(r"-\d{5}-of-\d{5}", "", name).removesuffix(".safetensors").partition(".")
    return stem, f".{rest}" if rest else ""


def write_buffers(path: Path, operations: Iterable[Mapping]) -> list[str]:
    """Write the shard of float32 buffers for these operations, each operator's own, and return their names."""
    from surgery.nn.operators import OPERATIONS

    buffers = {
        f"{layer}.pladis_{name}": torch.tensor(float(operation[name]), dtype=torch.float32)
        for operation in operations
        for layer in operation["layers"]
        for name in OPERATIONS[operation["operator"]].defaults
    }
    write_tensors(path, {name: (tensor.dtype, tensor.shape) for name, tensor in buffers.items()}, buffers.items())
    return list(buffers)


def index_text(files: Mapping[str, tuple[Iterable[str], int]]) -> str:
    """The JSON of a diffusers weight index: {file name: tensor names} and the total size in bytes."""
    weight_map = {tensor: file for file, (tensors, _) in files.items() for tensor in tensors}
    total = sum(size for _, size in files.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=1)
