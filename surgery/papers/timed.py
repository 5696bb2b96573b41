"""Seconds an image and peak memory of whole pipelines: a model's rows in one run, in turn, its base among them."""

import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from surgery.artifact import read_manifest
from surgery.errors import InputError
from surgery.machine import best_device
from surgery.runtime.timing import BASE, SideTimes, time_sides
from surgery.runtime.worker import WorkerConfig
from surgery.validate.statistics import mean_interval

from .entries import Entry
from .results import Measured
from .task import Drawn, Task, artifact_of

_SET = "time"  # what the manifests call the figures of a time table
_ROUNDS = 5


def draw_times(task: Task) -> Drawn:
    """Every row's seconds and memory; a difference is from the base of the same round, its interval over rounds.

    The shapes model's memory is not measured: on a CPU it takes a process for each side.
    """
    device = str(task.given.drawing.device or best_device())
    memory = task.given.on is None or device.startswith("cuda")
    measured: dict[str, dict[tuple[str, str], Measured]] = {}
    for model in dict.fromkeys((entry.model, entry.recipe) for entry in task.entries):
        entries = [entry for entry in task.entries if (entry.model, entry.recipe) == model]
        for entry, times in _timed(task, entries, device, memory).items():
            measured[entry] = _figures(times)
    rounds = task.given.limit or _ROUNDS
    return Drawn(measured, facts={"rounds": rounds, "images at once": task.given.drawing.batch or 1})


def _timed(task: Task, entries: list[Entry], device: str, memory: bool) -> dict[str, tuple[SideTimes, SideTimes]]:
    """{row: (its SideTimes, its base's)} of the rows of one model."""
    patched = [entry for entry in entries if entry.patched]
    if not patched or len(patched) == len(entries):
        raise InputError(f"{task.table.place} has to time {entries[0].model} without an operator and with one")
    folder = artifact_of(patched[0], task.work)
    manifest, drawing = read_manifest(folder), task.given.drawing
    config = WorkerConfig(
        model=str(folder.absolute()),
        revision=None,
        hash=manifest.hash,
        sampling=manifest.sampling,
        device=device,
        dtype=drawing.dtype,
        threads=drawing.threads,
    )
    texts = {_text(entry): entry.name for entry in patched}
    found = time_sides(config, list(texts), rounds=task.given.limit or _ROUNDS, batch=drawing.batch or 1, memory=memory)
    base = next(times for times in found if times.side.name == BASE)
    of = {texts[times.side.name]: (times, base) for times in found if times.side.name in texts}
    return {**{entry.name: (base, base) for entry in entries if not entry.patched}, **of}


def _text(entry: Entry) -> str:
    """ "pladis:alpha=1.5": a row's operator as `surgery time` takes it."""
    settings: Mapping[str, Any] = entry.recipe_file.recipe.operations[0].settings.model_dump()
    return ":".join([settings["operator"], *(f"{key}={value}" for key, value in settings.items() if key != "operator")])


def _figures(pair: tuple[SideTimes, SideTimes]) -> dict[tuple[str, str], Measured]:
    times, base = pair
    seconds = statistics.median(times.seconds)
    differences = [mine - other for mine, other in zip(times.seconds, base.seconds, strict=True)]
    count = len(differences)
    if times is base:
        found = {(_SET, "seconds"): Measured(seconds, n=count)}
    else:
        interval = mean_interval(np.array(differences), np.arange(count)) if count > 1 else None
        found = {(_SET, "seconds"): Measured(seconds, statistics.fmean(differences), interval, count)}
    if times.memory is not None:
        more = None if times is base or base.memory is None else (times.memory - base.memory) / 1e9
        found[_SET, "memory"] = Measured(times.memory / 1e9, more, n=count)
    return found
