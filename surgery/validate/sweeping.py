"""A grid of settings, each scored beside its untouched base on the same prompts and seeds, and what pays for what."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.artifact.manifest import write_json
from surgery.artifact.scores import Metric
from surgery.recipe.metric_names import FIDELITY_METRICS

from .axes import CellPlan, cells_of, settings_name
from .jobs import Drawing
from .report.sweep import write_sweep_report
from .rows import Row, RowResult, RowsResult, planned_row, score_rows

_SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Cell:
    """One setting of the grid beside its base. pareto: no other cell is better in both the metric and the fidelity."""

    plan: CellPlan
    row: RowResult
    pareto: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """{axis: value}."""
        return self.plan.settings

    @property
    def name(self) -> str:
        """ "alpha 1.5, scale 2"."""
        return self.plan.name

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Its metrics, each beside the base's."""
        return tuple(metric.measured for metric in self.row.metrics)

    def metric(self, name: str) -> Metric:
        """Its Metric of that name."""
        return next(metric for metric in self.metrics if metric.name == name)


@dataclass(frozen=True)
class Sweep:
    """What a sweep came to. judged_by: the metric that `best` is best in; fidelity: the one it is set against.

    bases: a row for each base, which is one unless an axis changes the sampling or the guidance; those behind the first
    are compared with it. best: the cell of the best value among those whose verdict is "better", of several the one
    that stays nearest to the base's images; None where nothing is better than its base.
    """

    folder: Path
    rows: RowsResult
    bases: tuple[RowResult, ...]
    cells: tuple[Cell, ...]
    best: Cell | None
    judged_by: str
    fidelity: str

    def to_json(self) -> dict[str, Any]:
        """Plain data: the facts of the run, the bases, every cell with its metrics, the best."""
        named = {"judged_by": self.judged_by, "fidelity": self.fidelity}
        named |= {"best": self.best.settings if self.best else None}
        bases = [
            {"name": row.name, "against": row.against, "metrics": [metric.to_json() for metric in row.metrics]}
            for row in self.bases
        ]
        cells = [
            {
                "settings": cell.settings,
                "overrides": cell.plan.overrides,
                "base": cell.row.against,
                "metrics": [{**metric.model_dump(), "verdict": metric.verdict} for metric in cell.metrics],
                "pareto": cell.pareto,
            }
            for cell in self.cells
        ]
        return {"schema_version": _SCHEMA_VERSION, **self.rows.facts, **named, "bases": bases, "cells": cells}


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
    """Score every combination of `axes` ({axis: values}, see axes.py) of a recipe beside its base; returns the Sweep.

    given: prompts, limit, images_per_prompt, seed, metrics and reference in place of the recipe's; a fidelity metric
    (ssim) is added where none is named. out: the work folder, out/<recipe's name>-sweep unless given; what it holds is
    not drawn again. sweep.json, rows.json, report.html and its pictures go there.
    Raises InputError for axes that the recipe's operator does not have, values out of range, layers that hit nothing.
    """
    _, planned = planned_row(Row("", recipe, tuple(overrides)))
    plans = cells_of(planned.plan, axes)
    work = Path(out) if out else Path("out") / f"{planned.plan.name}-sweep"
    bases, rows = {}, []
    for plan in plans:
        name = ", ".join(filter(None, ["base", settings_name(plan.base_settings)]))
        base = Row(name, recipe, (*overrides, *plan.base_overrides), patched=False)
        bases.setdefault(name, base if not bases else Row(**{**vars(base), "against": next(iter(bases))}))
        rows.append(Row(plan.name, recipe, (*overrides, *plan.overrides), against=name))
    options = {"drawing": drawing, "checkpoints": checkpoints, "announce": announce, "for_sweep": True}
    result = score_rows([*bases.values(), *rows], out=work, **{**(given or {}), **options})
    done = _judged(result, len(bases), plans)
    write_json(work / "sweep.json", done.to_json())
    write_sweep_report(done, planned.plan.name)
    return done


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (x, y), the larger the better, whether no other point is as good in both and better in one."""
    return [not any(a >= x and b >= y and (a > x or b > y) for a, b in points) for x, y in points]


def _judged(result, count, plans):
    settings = result.settings
    named = [*settings.purpose, *settings.metrics]
    judged_by = next(name for name in named if name not in FIDELITY_METRICS)
    fidelity = next(name for name in named if name in FIDELITY_METRICS)
    bases, rows = result.rows[:count], result.rows[count:]
    points = [tuple(_gain(row.metric(name)) for name in (fidelity, judged_by)) for row in rows]
    front = pareto_front(points)
    cells = tuple(Cell(*each) for each in zip(plans, rows, front, strict=True))
    better = [
        (gain, nearness, cell)
        for (nearness, gain), cell in zip(points, cells, strict=True)
        if cell.metric(judged_by).verdict == "better"
    ]
    best = max(better, key=lambda each: each[:2])[2] if better else None
    return Sweep(result.folder, result, bases, cells, best, judged_by, fidelity)


def _gain(metric):
    return metric.value if metric.measured.higher_is_better else -metric.value
