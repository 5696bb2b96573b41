"""Seconds an image and peak memory of a whole pipeline: the base beside operators, in one run (PLADIS Table 5, GAG
Table 2).

All sides draw with the same weights in memory, in turn: base, one operator, the other, and back the next round, so that
what a machine does besides meets them alike. A ratio is of two neighbours of one round. What is drawn first, in two
steps, warms up and is not counted; compiled sides are compiled then.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from surgery.console import progress_bar
from surgery.engines.compiling import compile_model
from surgery.errors import InputError, nearest
from surgery.models.patching import (
    attachment,
    denoiser,
    denoisers,
    operate,
    operations_of,
    patch,
    patched_modules,
    unpatch,
)
from surgery.nn.operators import OPERATORS as ATTENTION
from surgery.nn.operators import standing
from surgery.recipe.schema import OPERATORS

from .draw import number_of_steps
from .peak import cuda_peak, process_peak
from .worker import ImageRequest, Worker, WorkerConfig

BASE = "base"
EAGER = "eager"
_WARM_STEPS = 2
_COMPILATIONS = 256  # of one function


@dataclass(frozen=True)
class TimedSide:
    """What is timed under a name. operations: as the model's config has them, None for the untouched base."""

    name: str
    operations: list[dict] | None


@dataclass(frozen=True)
class SideTimes:
    """A side in one mode, "eager" or how it was compiled.

    seconds: an image, one figure a round. ratios: to the base's of the same round and mode. memory: bytes, None where
    it was not measured; how: the key of `surgery.runtime.peak.HOW`. compile_seconds: of the first call, None of eager.
    """

    side: TimedSide
    mode: str
    seconds: tuple[float, ...]
    ratios: tuple[float, ...]
    memory: int | None = None
    how: str | None = None
    compile_seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain data, with medians."""
        return {
            "side": self.side.name,
            "operations": self.side.operations,
            "mode": self.mode,
            "median_seconds": statistics.median(self.seconds),
            "median_ratio": statistics.median(self.ratios),
            "seconds": self.seconds,
            "ratios": self.ratios,
            "peak_memory_bytes": self.memory,
            "compile_seconds": self.compile_seconds,
        }


def timed_sides(pipeline: Any, operators: Sequence[str]) -> list[TimedSide]:
    """The base and a TimedSide for each text, "pladis" or "pladis:alpha=2:scale=1.5"; the model's own without any.

    Where an operation of the pipeline has the operator, the side has its settings, else the operator's defaults on that
    operation's layers; a pipeline without a patch has them on all layers. Raises InputError for what is no operator, no
    setting of it, or named twice, and for a model that runs a compiled engine.
    """
    if any(map(attachment, denoisers(pipeline).values())):
        raise InputError("the model runs a compiled engine, which computes one operator alone; leave --engine out")
    own = _own_operations(pipeline)
    if not operators:
        operators = list(dict.fromkeys(operation["operator"] for operation in own))
        return [TimedSide(BASE, None), TimedSide("+".join(operators), own)]
    if len(set(operators)) != len(operators):
        raise InputError(f"an operator is named twice: {', '.join(operators)}")
    own = [operation for operation in own if operation["operator"] in ATTENTION]
    sides = [TimedSide(text, standing(_by(text, one) for one in own)) for text in operators if text != BASE]
    return [TimedSide(BASE, None), *sides]


def _own_operations(pipeline):
    """The pipeline's own operations; those of `surgery.patch` where it has none."""
    if patched_modules(pipeline):
        return operations_of(pipeline)
    patch(pipeline)
    try:
        return operations_of(pipeline)
    finally:
        unpatch(pipeline)


def _by(text, operation):
    name, *settings = text.split(":")
    if name not in OPERATORS:
        near = nearest(name, OPERATORS)
        hint = f"; did you mean {near}?" if near else ""
        raise InputError(f"--operators {text}: there is no operator {name!r}{hint} There are: {', '.join(OPERATORS)}")
    own = dict(operation) if operation["operator"] == name else {"operator": name, "layers": operation["layers"]}
    layers, schedule = own.pop("layers"), own.pop("schedule", None)
    try:
        checked = OPERATORS[name].model_validate({**own, **dict(map(_setting, settings))})
    except (ValidationError, ValueError) as error:
        found = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = f"{'.'.join(map(str, found['loc']))}: {found['msg']}" if found else str(error)
        raise InputError(f"--operators {text}: {reason}; write {name}:KEY=VALUE") from error
    return {**checked.model_dump(), **({"schedule": schedule} if schedule else {}), "layers": layers}


def _setting(text):
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} has no value")
    try:
        return key, float(value)
    except ValueError:
        return key, value


def time_sides(
    config: WorkerConfig,
    operators: Sequence[str] = (),
    prompts: Sequence[str] = ("a photo of a cat",),
    *,
    rounds: int = 5,
    batch: int = 1,
    sampling: Mapping[str, Any] | None = None,
    compile: str | None = None,
    memory: bool = True,
) -> list[SideTimes]:
    """[SideTimes] of the base and of `operators` (as `timed_sides` takes them), eager, and with `compile` that too.

    prompts: taken in turn, `batch` of them a round. sampling: in place of the config's. memory: measure the peak, on a
    GPU of every round, on a CPU of a process for each side. Raises InputError for numbers under 1 and operators that
    there are not, SurgeryError where memory does not suffice.
    """
    for name, value in (("limit", rounds), ("batch", batch)):
        if value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}")
    config = replace(config, sampling={**config.sampling, **(sampling or {})})
    worker = Worker(config)
    sides = timed_sides(worker.pipeline, operators)
    modes = [EAGER, *([compile] if compile else [])]
    steps = number_of_steps(config.sampling) * batch * (rounds + bool(memory))
    with progress_bar("timing", steps * len(sides) * len(modes), "image steps") as advance, _compiling(compile):
        found = []
        for mode in modes:
            if mode != EAGER:
                for model in denoisers(worker.pipeline).values():
                    compile_model(model, mode)
            found += _in_turn(worker, sides, mode, _batches(prompts, batch, rounds), memory, lambda: advance(batch))
    return found


def _compiling(mode):
    """What keeps torch.compile from giving up: each side's module classes compile every block anew."""
    import torch.compiler

    if not mode:
        return nullcontext()
    # torch gives its modules of settings this method when they are imported
    return torch.compiler.config.patch(recompile_limit=_COMPILATIONS)  # pyright: ignore[reportAttributeAccessIssue]


def _batches(prompts, batch, rounds):
    """The ImageRequests of each round."""
    return [
        [ImageRequest(prompts[number % len(prompts)], number) for number in range(start, start + batch)]
        for start in range(0, batch * rounds, batch)
    ]


def _in_turn(worker, sides, mode, batches, memory, on_step) -> list[SideTimes]:
    """The SideTimes of every side in one mode."""
    on_gpu = denoiser(worker.pipeline).device.type == "cuda"
    warm = _warm(worker.config.sampling)
    first = {}
    for side in sides:
        operate(worker.pipeline, side.operations)
        first[side.name] = _seconds(worker, lambda: worker.draw(batches[0], warm))
    seconds = {side.name: [] for side in sides}
    peaks = {side.name: 0 for side in sides}
    for number, requests in enumerate(batches):
        for side in sides if number % 2 == 0 else reversed(sides):
            operate(worker.pipeline, side.operations)

            def draw(requests=requests):
                worker.draw(requests, dict(worker.config.sampling), on_step=on_step)

            if on_gpu and memory:
                took = []
                peak = cuda_peak(lambda draw=draw, took=took: took.append(_seconds(worker, draw)))
                peaks[side.name] = max(peaks[side.name], peak)
                seconds[side.name] += [took[0] / len(requests)]
            else:
                seconds[side.name].append(_seconds(worker, draw) / len(requests))
    rows = []
    for side in sides:
        ratios = [mine / base for mine, base in zip(seconds[side.name], seconds[BASE], strict=True)]
        made = SideTimes(side, mode, tuple(seconds[side.name]), tuple(ratios))
        if mode != EAGER:
            made = replace(made, compile_seconds=first[side.name])
        if memory and on_gpu:
            made = replace(made, memory=peaks[side.name], how="cuda")
        elif memory and denoiser(worker.pipeline).device.type == "cpu":
            config = replace(worker.config, compile=None if mode == EAGER else mode)
            most, how = process_peak(config, side.operations, batches[0], config.sampling, warm)
            made = replace(made, memory=most, how=how)
            for _ in range(number_of_steps(config.sampling)):
                on_step()
        rows.append(made)
    return rows


def _warm(sampling) -> dict[str, Any]:
    """The sampling in as few steps as warm up."""
    if sampling.get("timesteps"):
        return dict(sampling)
    return {**sampling, "steps": min(_WARM_STEPS, number_of_steps(sampling))}


def _seconds(worker, act: Callable[[], object]) -> float:
    """Wall time of a call, the device's work included."""
    device = denoiser(worker.pipeline).device
    _wait(device)
    started = time.perf_counter()
    act()
    _wait(device)
    return time.perf_counter() - started


def _wait(device):
    import torch

    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
