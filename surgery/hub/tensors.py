"""What is in a weight file, safetensors or a pickle of tensors alone: its layout, and its tensors one by one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from surgery.errors import BaseError

from .bounded import open_file

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
# of a weight file: {tensor name: (torch dtype, or by another name what cannot be converted, shape)}
Layout = Mapping[str, tuple[torch.dtype | str | None, Sequence[int]]]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file: dtype by the format's name, and shape."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: str | Path) -> dict[str, TensorEntry]:
    """{name: TensorEntry} of a safetensors file, in file order; BaseError where it is damaged or cut short."""
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.offset_keys()}
        return {name: TensorEntry(one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}


@contextmanager
def opened_tensors(path: str | Path) -> Iterator[tuple[Layout, Callable[[str], torch.Tensor]]]:
    """(layout, function from a tensor's name to the tensor) of a safetensors or pickled weight file, as long as open.

    What safetensors files and zipped pickles hold is mapped into memory, not read, until it is used.
    """
    if Path(path).suffix == ".safetensors":
        with _opened(path) as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            layout = {
                name: (DTYPES.get(one.get_dtype(), one.get_dtype()), one.get_shape()) for name, one in slices.items()
            }
            yield {name: (dtype, tuple(shape)) for name, (dtype, shape) in layout.items()}, file.get_tensor
    else:
        state = read_pickle(path)  # once: the old format cannot be mapped, and is read whole
        yield {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}, state.__getitem__


def layout_of(path: str | Path) -> Layout:
    """{name: (torch dtype, shape)} of a safetensors or pickled weight file."""
    with opened_tensors(path) as (layout, _):
        return layout


@contextmanager
def _opened(path):
    from safetensors import SafetensorError, safe_open

    try:
        open_file(path).close()  # neither a device nor a pipe, which would never end
        opened = safe_open(path, framework="pt")
    except (OSError, ValueError, SafetensorError) as error:
        raise BaseError(f"{path} is not a whole safetensors file: {error}; fetch it again") from error
    with opened as file:
        yield file


def read_pickle(path: str | Path) -> dict[str, torch.Tensor]:
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
