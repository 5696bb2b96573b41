"""safetensors files read and written one tensor at a time, so that memory stays at the size of the largest tensor.

The safetensors package writes a whole file from tensors in memory; a 5 GB denoiser must not be. The format is an
8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, and the bytes.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import torch

from surgery.errors import BaseError
from surgery.hub.bounded import open_file, parse_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 100 << 20  # bytes, as the safetensors package allows


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file: dtype by the format's name, shape, and its bytes' place in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def read_header(path):
    """{name: TensorEntry} of a safetensors file, in file order; BaseError where it is damaged or cut short."""
    path = Path(path)
    try:
        total = path.stat().st_size
        with open_file(path) as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(total - 8, _LARGEST_HEADER):
                raise ValueError("its header is longer than the file")
            header = parse_json(file.read(length))
        header.pop("__metadata__", None)
        entries = {
            name: TensorEntry(
                value["dtype"],
                tuple(value["shape"]),
                8 + length + value["data_offsets"][0],
                value["data_offsets"][1] - value["data_offsets"][0],
            )
            for name, value in header.items()
        }
        end = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
            if entry.start != end or (
                entry.dtype in DTYPES and entry.size != _bytes_of(DTYPES[entry.dtype], entry.shape)
            ):
                raise ValueError(f"the place of {name} does not fit its shape")
            end += entry.size
        if end != total:
            raise ValueError(f"its header does not account for its {total} bytes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, struct.error) as error:
        raise BaseError(f"{path} is not a whole safetensors file: {error}; fetch it again") from error
    return dict(sorted(entries.items(), key=lambda item: item[1].start))


def read_tensors(path):
    """Yield (name, tensor) of a safetensors file one after another, each in memory of its own."""
    with open(path, "rb") as file:
        for name, entry in read_header(path).items():
            if entry.dtype not in DTYPES:
                raise BaseError(f"{path}: {name} has dtype {entry.dtype}, which cannot be converted here")
            file.seek(entry.start)
            data = bytearray(file.read(entry.size))
            tensor = torch.frombuffer(data, dtype=DTYPES[entry.dtype]) if data else torch.empty(0)
            yield name, tensor.to(DTYPES[entry.dtype]).reshape(entry.shape)


def write_tensors(path, layout, tensors, progress=None):
    """Write a safetensors file from an iterable of (name, tensor) whose layout is known beforehand.

    layout: {name: (torch dtype, shape)}; `tensors` yields exactly these, in this order. `progress(bytes)` as it goes.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
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
            file.write(memoryview(data))
            if progress:
                progress(len(data))


def _bytes_of(dtype, shape):
    return torch.empty((), dtype=dtype).element_size() * math.prod(shape)


def read_pickle(path):
    """The state dict of a .bin/.pt/.ckpt file, memory-mapped where the format allows; weights_only, so no code runs.

    Raises BaseError for anything that holds more than tensors.
    """
    import pickle

    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the old, non-zip format cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BaseError(
            f"{path} holds more than tensors, so reading it could run code: {str(error).splitlines()[0]} "
            "Ask its author for a safetensors file"
        ) from error
    except Exception as error:  # changed bytes may set off anything within the pickle
        reason = (str(error) or "it is empty or cut short").splitlines()[0]
        raise BaseError(f"{path} cannot be read: {reason}; fetch it again") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise BaseError(f"{path} is not a plain state dict of tensors")
    return loaded
