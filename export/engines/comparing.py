"""An engine held against eager: on real calls, and after a change of the hyperparameters."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from surgery.engines.calls import put_together, take_result_apart
from surgery.engines.record import Difference, Engine
from surgery.engines.running import attach
from surgery.engines.told import called
from surgery.errors import SurgeryError
from surgery.models.patching import detach, read_hyperparameters, write_hyperparameters

from .recording import Captured, RecordedCall


def compare(engine: Engine, folder: Path, captured: Captured, tolerance: float) -> Difference:
    """The Difference of an engine, in `folder`, from eager on all of a component's recorded calls.

    Raises SurgeryError where it is larger than the tolerance, or where a change of the hyperparameters does not show.
    """
    model, adjustable = captured.module, engine.hyperparameters == "adjustable"
    return compare_attached(
        captured, tolerance, adjustable, lambda: attach(model, engine, folder), lambda: detach(model)
    )


def compare_attached(
    captured: Captured,
    tolerance: float,
    adjustable: bool,
    attached: Callable[[], object],
    detached: Callable[[], object],
) -> Difference:
    """As compare, of what one function puts into the model's place and the other takes away, twice if need be."""
    model, recorded = captured.module, captured.recorded
    calls = [call for corner in recorded.calls.values() for call in corner]
    attached()
    try:
        differences = [_difference(_call(model, recorded.method, call), call.results) for call in calls]
        changed, moved = None, 0.0
        if adjustable:
            first = recorded.first
            with _changed(model):
                by_engine = _call(model, recorded.method, first)
                detached()
                by_eager = _call(model, recorded.method, first)
            changed = _difference(by_engine, by_eager)[2]
            moved = _difference(by_eager, first.results)[2]
    finally:
        detached()
    largest, mean, relative = (max(values) for values in zip(*differences, strict=True))
    if not relative <= tolerance:
        raise SurgeryError(
            f"the engine differs from eager by {relative:.2g} of the output's root mean square, more than {tolerance:g}"
            "; it was not kept. Try another dtype, or --tolerance where that is what you want"
        )
    if changed is not None and not changed <= tolerance:
        raise SurgeryError(
            f"after a change of its hyperparameters, which moves eager's output by {moved:.2g}, the engine differs "
            f"from eager by {changed:.2g}, more than {tolerance:g}; it was not kept"
        )
    return Difference(
        largest=largest, mean=mean, relative=relative, tolerance=tolerance, after_change=changed, calls=len(calls)
    )


def _call(model: nn.Module, method: str, call: RecordedCall) -> dict[str, torch.Tensor]:
    arguments = put_together(call.template, call.tensors)
    if call.output.startswith("diffusers"):
        arguments["return_dict"] = True
    with torch.no_grad():
        return take_result_apart(called(model, method, arguments))[0]


def _difference(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> tuple[float, ...]:
    """(largest, mean, largest over wanted's root mean square), of the worst of the tensors."""
    worst = (0.0, 0.0, 0.0)
    for name, tensor in wanted.items():
        apart = (found[name].double() - tensor.double()).abs()
        size = tensor.double().square().mean().sqrt().item()
        largest = apart.max().item()
        relative = largest / size if size else largest
        worst = tuple(max(a, b) for a, b in zip(worst, (largest, apart.mean().item(), relative), strict=True))
        if not torch.isfinite(found[name]).all():
            return (float("inf"),) * 3
    return worst


@contextlib.contextmanager
def _changed(model: nn.Module) -> Iterator[None]:
    """The hyperparameters of every patched module changed in place, and put back after."""
    before = read_hyperparameters(model)
    changed = {}
    factors = {"scale": 0.25, "alpha": 0.8, "temperature": 1.25, "alpha_low": 0.9, "scale_low": 0.5}
    factors |= dict.fromkeys(("phi", "flip", "base", "gamma", "held", "gain"), 0.5)
    for index, (path, values) in enumerate(before.items()):
        factors["alpha"] = 0.8 if index % 2 else 0.0  # every other one to 1, dense attention, which is hard on rounding
        changed[path] = {
            name: max(1.0, values[name] * f) if name.startswith("alpha") else values[name] * f
            for name, f in factors.items()
            if name in values
        }
    write_hyperparameters(model, changed)
    try:
        yield
    finally:
        write_hyperparameters(model, before)
