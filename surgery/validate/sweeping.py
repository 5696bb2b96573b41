"""A grid of settings over one base: each cell scored against it on the same seeds, and what pays for what."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surgery.applying import kept_artifact
from surgery.artifact.manifest import write_json
from surgery.artifact.scores import Metric
from surgery.errors import InputError
from surgery.models.selection import select_sites
from surgery.recipe.metric_names import FIDELITY_METRICS
from surgery.recipe.plan import make_plan

from .jobs import Drawing, base_side, identity_of, operator_code, patched_side
from .report.sweep import write_sweep_report
from .scoring import score
from .session import SessionConfig, open_session
from .store import locked

AXES = ("alpha", "scale", "temperature", "layers")
_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Cell:
    """One setting of the grid, and its metrics against the base. pareto: no other cell is better in both."""

    settings: dict  # axis -> value
    metrics: tuple[Metric, ...]
    pareto: bool = False

    @property
    def name(self) -> str:
        """ "alpha 1.5, scale 2"."""
        return ", ".join(
            f"{axis} {value:g}" if axis != "layers" else f"layers {value}" for axis, value in self.settings.items()
        )

    def metric(self, name: str) -> Metric:
        """Its Metric of that name."""
        return next(metric for metric in self.metrics if metric.name == name)


@dataclass(frozen=True)
class Sweep:
    """What a sweep came to. judged_by: the metric that `best` is best in; fidelity: the one it is set against.

    Where several are best, `best` is the one that stays nearest to the base's images.
    """

    folder: Path
    cells: tuple[Cell, ...]
    best: Cell
    judged_by: str
    fidelity: str
    operations: int  # of the recipe, each of which has the cell's values
    facts: dict

    def to_json(self) -> dict[str, Any]:
        """Plain data: the facts of the run, every cell with its metrics, the front, the best."""
        facts = {
            key: value.model_dump() if hasattr(value, "model_dump") else value for key, value in self.facts.items()
        }
        facts["prompts"] = [prompts.model_dump() for prompts in self.facts["prompts"]]
        cells = [{**asdict(cell), "metrics": [metric.model_dump() for metric in cell.metrics]} for cell in self.cells]
        named = {"judged_by": self.judged_by, "fidelity": self.fidelity, "best": self.best.settings}
        return {**facts, "schema_version": _SCHEMA_VERSION, **named, "cells": cells}


def sweep(
    recipe: Path | str,
    axes: Mapping[str, Sequence[Any]],
    *,
    overrides: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
    out: Path | str | None = None,
    drawing: Drawing | None = None,
    checkpoints: Mapping[str, Path | str] | None = None,
    announce: Callable[[int, int, int], object] | None = None,
) -> Sweep:
    """Score every combination of `axes` ({axis: values}, of AXES) of a recipe against the base; returns the Sweep.

    given: prompts, limit, seed and metrics in place of the recipe's; a fidelity metric (ssim) is added where none is
    named. out: the work folder, out/<recipe's name>-sweep unless given; what it holds is not drawn again.
    Raises InputError for axes that the recipe's operator does not have, values out of range, layers that hit nothing.
    """
    planned = make_plan(recipe, overrides)
    cells = _cells(planned.plan, axes)
    work = Path(out) if out else Path("out") / f"{planned.plan.name}-sweep"
    with locked(work):
        session = open_session(
            SessionConfig(
                kept_artifact(planned, work),
                work,
                given or {},
                section=planned.recipe_file.recipe.validation,
                drawing=drawing,
                checkpoints=checkpoints,
                recipe_folder=planned.recipe_file.folder,
                with_fidelity=True,
            )
        )
        judged_by, fidelity = _judges(session.settings)
        identity = identity_of(session.manifest, session.folder, session.environment)
        base = base_side(identity)
        code = operator_code(session.manifest, session.folder)
        sides = [patched_side(_file_name(number, cell), *cell[1:], identity, code) for number, cell in enumerate(cells)]
        drawn = session.draw(work, [base, *sides], announce)
        measured = []
        for (settings, _), side in zip(cells, sides, strict=True):
            images = drawn.paired(base, side)
            measured.append(Cell(settings, tuple(score(scorer, work, images).metric for scorer in session.scorers)))
        facts = session.facts(drawn)
        done = _judged(work, measured, judged_by, fidelity, len(planned.plan.operations), facts)
        write_json(work / "sweep.json", done.to_json())
        write_sweep_report(done, session.manifest.name)
    return done


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (x, y), the larger the better, whether no other point is as good in both and better in one."""
    return [not any(a >= x and b >= y and (a > x or b > y) for a, b in points) for x, y in points]


def _judged(work, cells, judged_by, fidelity, operations, facts):
    points = [(_gain(cell.metric(fidelity)), _gain(cell.metric(judged_by))) for cell in cells]
    front = pareto_front(points)
    cells = tuple(Cell(cell.settings, cell.metrics, on) for cell, on in zip(cells, front, strict=True))
    best = max(cells, key=lambda cell: (_gain(cell.metric(judged_by)), _gain(cell.metric(fidelity))))
    return Sweep(work, cells, best, judged_by, fidelity, operations, facts)


def _gain(metric):
    return metric.patched if metric.higher_is_better else -metric.patched


def _judges(settings):
    judged = [name for name in settings.purpose if name not in FIDELITY_METRICS]
    judged = judged or [name for name in settings.metrics if name not in FIDELITY_METRICS]
    fidelity = [name for name in settings.metrics if name in FIDELITY_METRICS]
    if not judged:
        raise InputError("a sweep needs a metric with a value for each side, such as clip_score, beside the fidelity")
    return judged[0], fidelity[0]


def _cells(plan, axes):
    """[(settings, operations)] of the grid, each operation with the cell's values in place of the recipe's."""
    axes = {axis: list(dict.fromkeys(values)) for axis, values in axes.items() if values}
    if not axes:
        raise InputError(
            f"give at least one of {', '.join('--' + axis for axis in AXES)}, each with one or more values"
        )
    cells = []
    for values in itertools.product(*axes.values()):
        settings = dict(zip(axes, values, strict=True))
        cells.append((settings, _operations(plan, settings)))
    return cells


def _operations(plan, settings):
    from surgery.models.patching import check_numbers

    operations = [dict(operation) for operation in plan.operations]
    numbers = {axis: value for axis, value in settings.items() if axis != "layers"}
    for operation in operations:
        for axis in numbers:
            if axis not in operation:
                raise InputError(f"--{axis}: the recipe's operator {operation['operator']} has no {axis}")
            if axis in operation.get("schedule", {}):
                raise InputError(f"--{axis}: the recipe's schedule sets {axis} over the steps; take that out first")
        operation.update(check_numbers(numbers))
    if "layers" in settings:
        if len(operations) > 1:
            raise InputError(f"--layers is for recipes of one operation; this one has {len(operations)}")
        paths, complaints = select_sites(plan.sites, settings["layers"].split(","))
        if complaints or not paths:
            reasons = "; ".join(message for _, message, _ in complaints) or "nothing is selected"
            raise InputError(f"--layers {settings['layers']}: {reasons}")
        operations[0]["layers"] = paths
    return [{**operation, "layers": list(operation["layers"])} for operation in operations]


def _file_name(number, cell):
    """The name of a cell's Side; its number keeps apart what is alike once it is shortened."""
    text = ",".join(f"{axis}{value}" for axis, value in cell[0].items())
    return f"{number:03}-" + re.sub(r"[^A-Za-z0-9.,-]+", "-", text)[:60]
