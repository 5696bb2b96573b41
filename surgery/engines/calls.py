"""A module's call taken apart: tensors by name, and the rest, which a compiled graph holds fixed."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

_TIMES = ("timestep",)  # a number, an integer or a float tensor, as the scheduler has it: float32 here
# Pipelines hand a VAE the latents' generator, from which its decoder draws nothing; one that did would be found out by
# the comparison with eager.
_NOT_COMPUTED_WITH = ("return_dict", "generator")
_TUPLE = "tuple:"


class Slot:
    """Where a tensor stood in a call."""

    def __init__(self, name: str) -> None:
        self.name = name


def parameter_names(module: torch.nn.Module, method: str) -> list[str]:
    """The names of a method's parameters but self, in their order, as the module's class has it."""
    return list(inspect.signature(getattr(type(module), method)).parameters)[1:]


def take_apart(
    names: Sequence[str], args: Sequence, kwargs: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]:
    """({name: tensor}, {name: bool, int, float or str}, template) of a call.

    names: the parameters' names in their order. What is None is left out, and so are return_dict and generator.
    Nested values are named by their path, "added_cond_kwargs.text_embeds". template: the keyword arguments with a Slot
    for each tensor.
    Raises TypeError for what is none of these.
    """
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    tensors, constants, template = {}, {}, {}
    for name, value in given.items():
        if name not in _NOT_COMPUTED_WITH and value is not None:
            kept = _take(name, value, tensors, constants)
            if kept is not None:
                template[name] = kept
    return tensors, constants, template


def _take(name, value, tensors, constants):
    if name in _TIMES and isinstance(value, (int, float)):
        value = torch.tensor(float(value))
    if isinstance(value, torch.Tensor):
        tensors[name] = value.float() if name in _TIMES else value
        return Slot(name)
    if isinstance(value, Mapping):
        kept = {
            key: _take(f"{name}.{key}", item, tensors, constants) for key, item in value.items() if item is not None
        }
        return kept or None
    if isinstance(value, (list, tuple)):
        return type(value)(_take(f"{name}.{i}", item, tensors, constants) for i, item in enumerate(value))
    if isinstance(value, (bool, int, float, str)):
        constants[name] = value
        return value
    raise TypeError(f"{name} is a {type(value).__name__}, which a compiled engine cannot take")


def put_together(template: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The keyword arguments of a template with tensors, {name: tensor}, in their places."""
    if isinstance(template, Slot):
        return tensors[template.name]
    if isinstance(template, dict):
        return {key: put_together(item, tensors) for key, item in template.items()}
    if isinstance(template, (list, tuple)):
        return type(template)(put_together(item, tensors) for item in template)
    return template


def take_result_apart(result: Any) -> tuple[dict[str, torch.Tensor], str]:
    """({name: tensor}, class) of what a module returned: an output object of diffusers or transformers, or a tensor.

    Tuples within are named by index, "hidden_states.3". class: "module:name"; of a tuple "tuple:" and its length, for
    it may have None among its items (the last block of SD3 gives no text); "" for a bare tensor.
    """
    if isinstance(result, torch.Tensor):
        return {"0": result}, ""
    named = result.items() if isinstance(result, Mapping) else [(str(i), item) for i, item in enumerate(result)]
    tensors = {}
    for name, value in named:
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, (list, tuple)):
            tensors |= {f"{name}.{i}": item for i, item in enumerate(value)}
        elif value is not None:
            raise TypeError(f"its result's {name} is a {type(value).__name__}, which an engine cannot give back")
    kind = type(result)
    if not isinstance(result, Mapping):
        return tensors, f"{_TUPLE}{len(result)}"
    return tensors, f"{kind.__module__}:{kind.__qualname__}"


def put_result_together(names: Sequence[str], output: str, tensors: Sequence, as_dict: bool) -> Any:
    """The inverse of take_result_apart; as_dict: an object of the class, else the tuple of its values."""
    grouped = {}
    for name, tensor in zip(names, tensors, strict=True):
        first, _, index = name.partition(".")
        if index:
            grouped.setdefault(first, []).append(tensor)
        else:
            grouped[first] = tensor
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in grouped.items()}
    if output.startswith(_TUPLE):
        return tuple(values.get(str(index)) for index in range(int(output.removeprefix(_TUPLE))))
    if not output:
        return next(iter(values.values())) if list(names) == ["0"] else tuple(values.values())
    return _class_of(output)(**values) if as_dict else tuple(values.values())


def _class_of(output):
    import importlib

    module, _, name = output.partition(":")
    if module.split(".")[0] not in ("diffusers", "transformers") or not name.isidentifier():
        raise TypeError(f"{output} is no output class of diffusers or transformers")
    return getattr(importlib.import_module(module), name)
