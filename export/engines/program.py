"""A component as a function of tensors alone, and torch.export's program of it."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Any

import torch

from surgery.engines.calls import put_together, take_result_apart
from surgery.engines.record import Region, Tensor
from surgery.engines.told import called
from surgery.errors import InputError
from surgery.nn import decompositions
from surgery.nn.module import is_pladis

if TYPE_CHECKING:
    from .recording import RecordedCall

_NEAR_ZERO = 0.25  # beyond it the plain formula loses less than two bits
_TAKEN_FOR_ZERO = 1e-8
_SCALE = 2.0**60  # exact in float32, where sums up to 1e20 stay finite


def log1p(x: torch.Tensor) -> torch.Tensor:
    """log(1 + x) of a float tensor; around zero 2 artanh(x / (2 + x)), by its series."""
    y = x / (x + 2.0)
    square = y * y
    series = y * (2.0 + square * (2.0 / 3.0 + square * (2.0 / 5.0 + square * (2.0 / 7.0))))
    return torch.where(x.abs() < _NEAR_ZERO, series, (x + 1.0).log())


def expm1(x: torch.Tensor) -> torch.Tensor:
    """exp(x) - 1 of a float tensor, as tanh(x / 2) (exp(x) + 1), of which no digit cancels."""
    return (x * 0.5).tanh() * (x.exp() + 1.0)


def add(x: torch.Tensor, other: torch.Tensor | float, *, alpha: float = 1) -> Any:
    """x + other; a constant under 1e-8, such as SANA's 1e-15 in a denominator, is added to a scaled x.

    The optimiser of ONNX graphs takes it for a zero, and what was kept from 0 / 0 is NaN then.
    """
    if alpha != 1 or not isinstance(other, float) or x.dtype != torch.float32 or not 0.0 < abs(other) < _TAKEN_FOR_ZERO:
        return NotImplemented
    return (x * _SCALE + other * _SCALE) / _SCALE


def squeeze(x: torch.Tensor, dim: int) -> torch.Tensor:
    """x without an axis of length 1; an axis that is longer stays, where ONNX's Squeeze fails (PixArt has one)."""
    dim %= x.ndim
    if x.shape[dim] != 1:
        return x.clone()
    return x.reshape([size for axis, size in enumerate(x.shape) if axis != dim])


def masked_fill(x: torch.Tensor, mask: torch.Tensor, value: float) -> Any:
    """x with `value` where mask is true; for booleans (HunyuanVideo's mask), which ONNX Runtime's Where lacks."""
    if x.dtype != torch.bool:
        return NotImplemented
    return x | mask if value else x & ~mask


def elementary_decompositions() -> dict[Any, Callable[..., Any]]:
    """{operator: plain torch function}, for `exported_program.run_decompositions`."""
    aten = torch.ops.aten
    return {
        aten.log1p.default: log1p,
        aten.expm1.default: expm1,
        aten.add.Tensor: add,
        aten.squeeze.dim: squeeze,
        aten.masked_fill.Scalar: masked_fill,
    }


class Flat(torch.nn.Module):
    """forward(*tensors) -> tuple of tensors; the tensors of a call in their order, then vectors of hyperparameters.

    hyperparameters: {"pladis_scale": buffers' names}: those that are inputs, not constants of the program. A program of
    it names its inputs as `graph_names` does.
    """

    def __init__(
        self, module: torch.nn.Module, method: str, call: "RecordedCall", hyperparameters: Mapping[str, list[str]]
    ) -> None:
        super().__init__()
        self.module = module
        self._method, self._template, self._names = method, call.template, list(call.tensors)
        self._hyperparameters = hyperparameters
        # a block's tuple is what it gives anyway
        self._return_dict = call.output.startswith(("diffusers", "transformers"))

        def forward(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self._called(tensors)

        # torch.export names a program's inputs by it, and torch-tensorrt an engine's by those.
        named = [Parameter(name, Parameter.POSITIONAL_ONLY) for name in graph_names(call, hyperparameters)[0]]
        forward.__signature__ = Signature(named)  # pyright: ignore[reportFunctionMemberAccess]
        self.forward = forward

    def _called(self, tensors):
        count = len(self._names)
        arguments = put_together(self._template, dict(zip(self._names, tensors[:count], strict=True)))
        if self._return_dict and self.module.__class__.__module__.startswith("diffusers"):
            arguments["return_dict"] = True
        buffers = {
            f"module.{name}": vector[i]
            for vector, names in zip(tensors[count:], self._hyperparameters.values(), strict=True)
            for i, name in enumerate(names)
        }
        if buffers:
            result = torch.func.functional_call(_Method(self.module, self._method), buffers, (), arguments)
        else:
            result = called(self.module, self._method, arguments)
        return tuple(take_result_apart(result)[0].values())


class _Method(torch.nn.Module):
    """A method of a module as a module's forward, which functional_call asks for."""

    def __init__(self, module: torch.nn.Module, method: str) -> None:
        super().__init__()
        self.module, self._name = module, method

    def forward(self, **arguments: Any) -> Any:
        return called(self.module, self._name, arguments)


def export_program(
    module: torch.nn.Module,
    method: str,
    calls: "Mapping[str, RecordedCall]",
    hyperparameters: Mapping[str, list[str]] | None = None,
    decompose: bool = False,
) -> torch.export.ExportedProgram:
    """torch.export's program of a module's method, its dimensions ranged where the corners' calls differ in them.

    calls: {corner: call}, of which "usual" has its tensors. decompose: the attention operator as plain operations.
    """
    call, hyperparameters = calls["usual"], hyperparameters or {}
    flat = Flat(module, method, call, hyperparameters).eval()
    vectors = [torch.stack([module.get_buffer(name) for name in names]) for names in hyperparameters.values()]
    shapes = [
        {axis: torch.export.Dim.AUTO(min=low, max=high) for axis, (low, high) in enumerate(bounds) if low != high}
        for bounds in (input.shape for input in inputs_of(calls))
    ]
    shapes = (*shapes, *({} for _ in vectors)) if any(shapes) else None
    with torch.no_grad():
        tensors = [
            example_of(tensor, input.shape)
            for tensor, input in zip(call.tensors.values(), inputs_of(calls), strict=True)
        ]
        program = torch.export.export(flat, (*tensors, *vectors), dynamic_shapes=shapes, strict=False)
        return program.run_decompositions(decompositions()) if decompose else program  # pyright: ignore[reportArgumentType]


class ChangingConstants(InputError):
    """A model is told by a number what a range of sizes would change."""


def refuse_changing_tensors(module: torch.nn.Module, calls: "Mapping[str, RecordedCall]") -> None:
    """Raise ChangingConstants where calls at corners have other tensors, such as one for each image (Z-Image)."""
    usual = calls["usual"].tensors
    for call in calls.values():
        if other := sorted(set(usual) ^ set(call.tensors)):
            raise ChangingConstants(
                f"{type(module).__name__} is given {other[0]} for some of this range's sizes alone, and a compiled "
                "function takes the same tensors always; give one size in --shapes"
            )


def refuse_changing_constants(module: torch.nn.Module, calls: "Mapping[str, RecordedCall]") -> None:
    """Raise ChangingConstants where calls at corners differ in what is no tensor, which a program holds fixed."""
    usual = calls["usual"].constants
    for call in calls.values():
        for name in {**usual, **call.constants}:
            if usual.get(name) != call.constants.get(name):
                raise ChangingConstants(
                    f"{type(module).__name__} is told its size by a number, {name} ({usual.get(name)} or "
                    f"{call.constants.get(name)} in this range), which a compiled function holds fixed; give one size "
                    "in --shapes, or compile by --target inductor --regional"
                )


def export_portable_program(
    module: torch.nn.Module, method: str, calls: "Mapping[str, RecordedCall]", hyperparameters: Mapping[str, list[str]]
) -> torch.export.ExportedProgram:
    """As export_program, in operations that other runtimes than torch have, and have alike: elementary.py."""
    program = export_program(module, method, calls, hyperparameters)
    return program.run_decompositions({**decompositions(), **elementary_decompositions()})  # pyright: ignore[reportArgumentType]


def example_of(tensor: torch.Tensor, bounds: list[list[int]]) -> torch.Tensor:
    """The tensor, contiguous, and twice along every ranged axis with one element: torch.export takes a 1 for fixed."""
    for axis, (low, high) in enumerate(bounds):
        if low != high and tensor.shape[axis] == 1:
            tensor = torch.cat([tensor, tensor], axis)
    return tensor.contiguous()


def inputs_of(calls: "Mapping[str, RecordedCall]") -> list[Tensor]:
    """The `Tensor` records of a module's inputs, from its calls at the corners of a profile."""
    inputs = []
    for name, tensor in calls["usual"].tensors.items():
        sizes = [call.tensors[name].shape for call in calls.values()]
        bounds = [[min(axis), max(axis)] for axis in zip(*sizes, strict=True)]
        inputs.append(Tensor(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=bounds))
    return inputs


def region_of(
    file: str,
    modules: list[str],
    method: Any,
    calls: "Mapping[str, RecordedCall]",
    hyperparameters: dict[str, list[str]] | None = None,
    values: dict[str, list[float]] | None = None,
) -> Region:
    """The Region record of a compiled function."""
    call = calls["usual"]
    names, results = graph_names(call, hyperparameters or {})
    return Region(
        file=file,
        modules=modules,
        method=method,
        inputs=inputs_of(calls),
        constants=call.constants,
        outputs=list(call.results),
        output=call.output,
        hyperparameters=hyperparameters or {},
        values=values or {},
        input_names=names,
        output_names=results,
    )


def graph_names(call: "RecordedCall", hyperparameters: Mapping[str, list[str]]) -> tuple[list[str], list[str]]:
    """(names of the inputs, of the outputs) of a compiled function, in their order: a call's dots are underscores."""
    inputs = [name.replace(".", "_") for name in (*call.tensors, *hyperparameters)]
    return inputs, [f"output_{name}".replace(".", "_") for name in call.results]


def values_of(module: torch.nn.Module, hyperparameters: Mapping[str, list[str]]) -> dict[str, list[float]]:
    """{"pladis_scale": the values of its buffers} of what `hyperparameter_buffers` found."""
    return {name: [module.get_buffer(one).item() for one in names] for name, names in hyperparameters.items()}


def hyperparameter_buffers(module: torch.nn.Module) -> dict[str, list[str]]:
    """{"pladis_scale": ["down_blocks.1...attn2.pladis_scale", ...]} of a module's patched attention."""
    found = defaultdict(list)
    for path, part in module.named_modules():
        if is_pladis(part):
            for name in part._buffers:
                if name.startswith("pladis_"):
                    found[name].append(f"{path}.{name}")
    return dict(found)


def groups_of(model: torch.nn.Module, blocks: "Mapping[str, Mapping[str, RecordedCall]]") -> list[list[str]]:
    """[paths]: the blocks that one compiled function serves, by class, tensors, settings and the calls' shapes."""
    groups = defaultdict(list)
    for path, calls in blocks.items():
        block = model.get_submodule(path)
        told = [type(block).__name__, *((name, tuple(t.shape)) for name, t in block.state_dict(keep_vars=True).items())]
        told += [(part.pladis_operator, part.pladis_unit) for part in block.modules() if is_pladis(part)]
        told += [
            (corner, [(n, tuple(t.shape)) for n, t in call.tensors.items()], call.constants, call.output)
            for corner, call in sorted(calls.items())
        ]
        groups[repr(told)].append(path)
    return list(groups.values())
