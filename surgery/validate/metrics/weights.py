"""Weights read into a network strictly, from safetensors or from PyTorch's pickles."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.compat import filled_model
from surgery.errors import BaseError, InputError
from surgery.hub.tensors import read_pickle

if TYPE_CHECKING:
    import torch
    from torch import nn

_LISTED = 5  # names that an error lists in full


def torch_checkpoint(path: Path | str) -> "dict[str, torch.Tensor]":
    """{name: tensor} of what torch.save wrote at `path`, itself or under "state_dict"; code in it is never run."""
    _require(path)
    try:
        return read_pickle(path)
    except BaseError as error:
        raise InputError(str(error)) from error


def safetensors_checkpoint(path: Path | str) -> "dict[str, torch.Tensor]":
    """{name: tensor} of a .safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _require(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def renamed(
    tensors: "Mapping[str, torch.Tensor]", names: Mapping[str, str], path: Path | str, unused: Collection[str] = ()
) -> "dict[str, torch.Tensor]":
    """{names[name]: tensor} for a checkpoint's `tensors`, whose names must be those of `names`, no fewer and no more.

    unused: names that the file may hold besides and that nothing here needs. InputError names the missing and the
    unexpected as they stand in the file at `path`.
    """
    missing = [name for name in names if name not in tensors]
    unexpected = [name for name in tensors if name not in names and name not in unused]
    if missing or unexpected:
        raise _misfit(path, missing=missing, unexpected=unexpected)
    return {model_name: tensors[name] for name, model_name in names.items()}


def filled(
    model_class: type, config: Any, tensors: "Mapping[str, torch.Tensor]", path: Path | str, **arguments: Any
) -> Any:
    """A transformers model of `config` that holds `tensors`, which are from the file `path`, in eval mode, float32
    unless the arguments have a dtype.

    Raises InputError that names the missing, the unexpected and those of another shape. A checkpoint's `position_ids`
    are a constant that transformers itself passes over.
    """
    model, found = filled_model(model_class, config, tensors, **arguments)
    missing, unexpected = found["missing_keys"], found["unexpected_keys"]
    shapes = [f"{name} {tuple(has)} instead of {tuple(wanted)}" for name, has, wanted in found["mismatched_keys"]]
    if missing or unexpected or shapes:
        raise _misfit(path, missing=missing, unexpected=unexpected, shapes=shapes)
    return model.eval()


def filled_module(module: "nn.Module", tensors: "Mapping[str, torch.Tensor]", path: Path | str) -> "nn.Module":
    """The module with `tensors` from the file `path`, in eval mode; InputError says which do not fit."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(f"{path} does not hold the weights of this metric's model; {error}") from error
    return module.eval()


def _require(path):
    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such file; fetch the metric's checkpoints again")


def _damaged(path, error):
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return InputError(f"{path} cannot be read as a checkpoint ({reason}); delete it and fetch it again")


def _misfit(path, **names):
    kinds = [f"{kind}: {listed(sorted(found))}" for kind, found in names.items() if found]
    return InputError(f"{path} does not hold the weights of this metric's model; {'; '.join(kinds)}")


def listed(names: Sequence[str]) -> str:
    """The first few names with commas between them, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def read_weights(
    path: Path | str, shapes: Mapping[str, Iterable[int]], title: str, unused: Collection[str] = frozenset()
) -> "dict[str, torch.Tensor]":
    """{name: float32 tensor} of a .pth file, read without running code from it.

    shapes: {name: shape} that the file must hold; unused: further names that it may hold. title: what the file should
    be, for the errors. Raises InputError, which names the file and what is missing, unexpected or of another shape.
    """
    tensors = torch_checkpoint(path)
    shapes = {name: tuple(shape) for name, shape in shapes.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = {
        "missing": sorted(shapes.keys() - found.keys()),
        "unexpected": sorted(map(str, found.keys() - shapes.keys() - set(unused))),
        "of another shape": [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in shapes.items()
            if found.get(name, shape) != shape
        ],
    }
    if any(problems.values()):
        told = "; ".join(f"{kind}: {listed(names)}" for kind, names in problems.items() if names)
        raise InputError(f"{path} is not {title}: {told}. Give the published file, or fetch it again")
    return {name: tensors[name].float() for name in shapes}
