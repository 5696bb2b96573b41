"""Calls of live modules, kept as an engine is built from them and held against."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from surgery.engines.calls import parameter_names, take_apart, take_result_apart
from surgery.engines.compiling import repeated_blocks
from surgery.engines.told import text_beside, texts_beside
from surgery.errors import InputError
from surgery.nn.backbones.processors import asked_text


@dataclass
class RecordedCall:
    """A call of a module, taken apart, and what it returned. form: the names given by place, and by keyword."""

    tensors: dict
    constants: dict
    template: dict
    results: dict
    output: str
    form: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))


@dataclass
class Recorded:
    """Calls of one module by corner, {"usual": [...], "low": ..., ...}: the profile's, and those of PROMPTS."""

    method: str = "forward"
    calls: dict[str, list[RecordedCall]] = field(default_factory=dict)

    @property
    def first(self) -> RecordedCall:
        """The first call of the usual size."""
        return self.calls["usual"][0]

    @property
    def first_calls(self) -> dict[str, RecordedCall]:
        """{corner: its first call}"""
        return {corner: calls[0] for corner, calls in self.calls.items()}


@dataclass
class Captured:
    """A component in memory, alone, and its calls; blocks: those of its repeated blocks, {path: {corner: call}}."""

    module: torch.nn.Module
    recorded: Recorded
    blocks: dict[str, dict[str, RecordedCall]] = field(default_factory=dict)


class Stop(Exception):
    """Enough was seen of a run."""


@contextmanager
def stand_in(module: torch.nn.Module, method: str, function: Callable) -> Iterator[None]:
    """While it lasts, `function` is called in place of a module's method."""
    before = module.__dict__.get(method)
    setattr(module, method, function)
    try:
        yield
    finally:
        if before is None:
            del module.__dict__[method]
        else:
            setattr(module, method, before)


@contextmanager
def recorded(
    module: torch.nn.Module, method: str = "forward", limit: int | None = None
) -> Iterator[list[RecordedCall]]:
    """Yield a list to which each call of a module's method is added; `limit` calls end the run."""
    whole, names = getattr(module, method), parameter_names(module, method)
    calls = []

    def record(*args, **kwargs):
        tensors, constants, template = take_apart(names, args, kwargs | texts_beside(module))
        given = dict(zip(names, args, strict=False)) | kwargs
        has_choice = "return_dict" in names
        result = whole(*args, **{**kwargs, "return_dict": True}) if has_choice else whole(*args, **kwargs)
        results, output = take_result_apart(result)
        kept = [{name: tensor.detach().clone() for name, tensor in group.items()} for group in (tensors, results)]
        calls.append(RecordedCall(kept[0], constants, template, kept[1], output))
        if limit and len(calls) == limit:
            raise Stop
        return tuple(result.values()) if has_choice and given.get("return_dict") is False else result

    with stand_in(module, method, record):
        yield calls


def replayed(module: torch.nn.Module, results: Iterable) -> AbstractContextManager[None]:
    """Have a hollow module give back `results`, one after the other, while it lasts."""
    left = iter(results)
    return stand_in(module, "forward", lambda *args, **kwargs: next(left))


@contextmanager
def results_of(module: torch.nn.Module) -> Iterator[list]:
    """Yield a list to which what each call of a module returns is added."""
    whole, seen = module.forward, []

    def keep(*args, **kwargs):
        seen.append(whole(*args, **kwargs))
        return seen[-1]

    with stand_in(module, "forward", keep):
        yield seen


def capture_calls(model: torch.nn.Module, calls: Sequence[Mapping[str, Any]], regional: bool) -> Captured:
    """The Captured of a denoiser by the arguments of its calls, all of one size, where no pipeline makes them."""
    captured = Captured(model, Recorded())
    with torch.no_grad(), ExitStack() as stack:
        captured.recorded.calls["usual"] = stack.enter_context(recorded(model))
        if regional:
            stack.enter_context(watched(repeated_blocks(model), captured.blocks, "usual"))
        for arguments in calls:
            model(**arguments)
    return captured


@contextmanager
def stopped(module):
    """Yield a dictionary; a call of the module puts its tensors' shapes there, by name, and ends the run.

    Raises InputError for a call with what an engine cannot take.
    """
    names, shapes = parameter_names(module, "forward"), {}

    def stop(*args, **kwargs):
        try:
            tensors, _, _ = take_apart(names, args, kwargs | texts_beside(module))
        except TypeError as error:
            raise InputError(f"no engine can be built of {type(module).__name__}: {error}") from error
        shapes.update({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        raise Stop

    with stand_in(module, "forward", stop):
        yield shapes


@contextmanager
def watched(
    blocks: Mapping[str, torch.nn.Module], found: dict[str, dict[str, RecordedCall]], corner: str
) -> Iterator[None]:
    """While it lasts, the first call of each block is put into `found`, {path: {corner: call}}."""

    def before(module, args, kwargs):
        asked_text()  # what others asked

    def hook_of(path, module):
        names = parameter_names(module, "forward")

        def hook(module, args, kwargs, result):
            calls = found.setdefault(path, {})
            if corner in calls:
                return
            told = texts_beside(module) | (text_beside() if asked_text() else {})
            tensors, constants, template = take_apart(names, args, kwargs | told)
            results, output = take_result_apart(result)
            if corner != "usual":  # the shapes are enough
                tensors = {name: tensor.to("meta") for name, tensor in tensors.items()}
            results = {name: tensor.to("meta") for name, tensor in results.items()}
            form = names[: len(args)], list(kwargs)
            calls[corner] = RecordedCall(tensors, constants, template, results, output, form)

        return hook

    hooks = [module.register_forward_hook(hook_of(path, module), with_kwargs=True) for path, module in blocks.items()]
    hooks += [module.register_forward_pre_hook(before, with_kwargs=True) for module in blocks.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
