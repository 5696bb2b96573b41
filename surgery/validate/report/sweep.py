"""The report of a sweep: a curve per setting, a map where alpha and scale vary, the Pareto front, table and images."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..axes import settings_name
from .pictures import new_figure, png
from .rows import row_sheets, write_page

if TYPE_CHECKING:
    from ..sweeping import Sweep


def write_sweep_report(sweep: "Sweep", name: str) -> Path:
    """Write curve.png, map.png (where alpha and scale both vary), pareto.png, images-1.png ... and report.html.

    They go into the sweep's folder; the page's path is returned. Raises SurgeryError where a file cannot be written.
    """
    along, lines = _lines(sweep)
    pictures = {"curve": _curve(sweep, along, lines), "map": _map(sweep), "pareto": _pareto(sweep)}
    pictures = {title: data for title, data in pictures.items() if data}
    bases = {row.name: row for row in sweep.bases}
    shown = [
        [*(bases[name] for name in dict.fromkeys(cell.row.against for cell in cells)), *(cell.row for cell in cells)]
        for cells in lines.values()
    ]
    pictures |= row_sheets(shown, sweep.rows)
    rows = [*sweep.bases, *(cell.row for cell in sweep.cells)]
    front = [cell.name for cell in sweep.cells if cell.pareto]
    return write_page(sweep.rows, f"{name}: sweep", summary(sweep), pictures, rows, front)


def summary(sweep: "Sweep") -> list[str]:
    """What came of a sweep, in sentences: what is best, if anything is."""
    judged = sweep.cells[0].metric(sweep.judged_by)
    title = judged.title or judged.name
    counted = f"{len(sweep.cells)} settings, {judged.n} pairs of images each."
    if sweep.best is None:
        return [f"{counted} Nothing here is better than the base on {title}."]
    best = sweep.best.metric(sweep.judged_by)
    low, high = best.interval
    return [
        f"{counted} The best {title} is that of {sweep.best.name}: {best.patched:.4g} against the base's "
        f"{best.base:.4g}, {best.difference:+.4g} ({low:+.4g} to {high:+.4g}).",
        "It is the best of several on these very prompts, so its own figure is too good by chance: score it on other "
        "prompts before believing it.",
    ]


def _axes(sweep):
    """{axis: its values} of the axes that take more than one value."""
    values = {}
    for cell in sweep.cells:
        for axis, value in cell.settings.items():
            found = values.setdefault(axis, [])
            found += [value] if value not in found else []
    return {axis: found for axis, found in values.items() if len(found) > 1}


def _is_numeric(values):
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _lines(sweep):
    """(the axis of most values, numeric where there is one, {settings of the others: its Cells along that axis})."""
    axes = _axes(sweep)
    along = max(axes, key=lambda axis: (_is_numeric(axes[axis]), len(axes[axis]), axis == "scale"), default="")
    lines = {}
    for cell in sweep.cells:
        rest = {axis: value for axis, value in cell.settings.items() if axis != along}
        lines.setdefault(settings_name(rest), []).append(cell)
    return along, lines


def _curve(sweep, along, lines):
    """The paired difference with its interval along a numeric axis, a line for each other setting."""
    values = _axes(sweep).get(along, ["none"])
    lines = {rest: [cell for cell in cells if along in cell.settings] for rest, cells in lines.items()}
    lines = {rest: cells for rest, cells in lines.items() if cells}
    if not _is_numeric(values):
        return None
    places = {value: value for value in values}
    if not np.isfinite(values).all():  # such as eta .inf: in their order, evenly spaced
        places = {value: at for at, value in enumerate(sorted(values))}
    figure = new_figure(8, 5)
    axis = figure.subplots()
    width = max(places.values()) - min(places.values())
    for number, (rest, cells) in enumerate(lines.items()):
        cells = sorted(cells, key=lambda cell: cell.settings[along])
        found = [cell.metric(sweep.judged_by) for cell in cells]
        aside = 0.008 * width * (number - (len(lines) - 1) / 2)  # so that intervals do not lie on each other
        positions = [places[cell.settings[along]] + aside for cell in cells]
        middle = [metric.difference for metric in found]
        below = [metric.difference - metric.interval[0] for metric in found]
        above = [metric.interval[1] - metric.difference for metric in found]
        axis.errorbar(positions, middle, yerr=np.maximum([below, above], 0), marker="o", capsize=3, label=rest or None)
    if not np.isfinite(values).all():
        axis.set_xticks(list(places.values()), [f"{value:g}" for value in places])
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xlabel(along)
    metric = sweep.cells[0].metric(sweep.judged_by)
    axis.set_ylabel(f"{metric.title or metric.name}: patched - base")
    axis.set_title("difference from the base on the same prompts and seeds, 95% intervals", fontsize=10, loc="left")
    axis.grid(alpha=0.3)
    if len(lines) > 1:
        axis.legend(prop={"size": 8})
    return png(figure)


def _map(sweep):
    """The difference over alpha and scale as a coloured grid, if both vary and nothing else does; else None."""
    axes = _axes(sweep)
    if set(axes) != {"alpha", "scale"}:
        return None
    alphas, scales = sorted(axes["alpha"]), sorted(axes["scale"])
    grid = np.full((len(alphas), len(scales)), np.nan)
    for cell in sweep.cells:
        place = alphas.index(cell.settings["alpha"]), scales.index(cell.settings["scale"])
        grid[place] = cell.metric(sweep.judged_by).difference
    higher = sweep.cells[0].metric(sweep.judged_by).higher_is_better
    limit = float(np.abs(grid).max()) or 1.0
    figure = new_figure(1.6 + 1.1 * len(scales), 1.6 + 0.8 * len(alphas))
    axis = figure.subplots()
    shown = axis.imshow(grid, cmap="RdBu" if higher else "RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axis.set_xticks(range(len(scales)), [f"{value:g}" for value in scales])
    axis.set_yticks(range(len(alphas)), [f"{value:g}" for value in alphas])
    axis.set_xlabel("scale")
    axis.set_ylabel("alpha")
    for (row, column), value in np.ndenumerate(grid):
        colour = "white" if abs(value) > 0.6 * limit else "black"
        axis.text(column, row, f"{value:+.3g}", ha="center", va="center", color=colour, fontsize=9)
    figure.colorbar(shown, label="patched - base (blue is better)")
    return png(figure)


def _pareto(sweep):
    """What each cell gains on the metric against how far it moves the images; those on the front are joined."""
    figure = new_figure(8, 5.5)
    axis = figure.subplots()
    judged, fidelity = (sweep.cells[0].metric(name) for name in (sweep.judged_by, sweep.fidelity))
    points = [(cell.metric(sweep.fidelity).patched, cell.metric(sweep.judged_by).patched) for cell in sweep.cells]
    for cell, (x, y) in zip(sweep.cells, points, strict=True):
        axis.plot([x], [y], "o", color="#0969da" if cell.pareto else "#8c959f", markersize=8 if cell.pareto else 5)
        axis.annotate(cell.name, (x, y), textcoords="offset points", xytext=(6, 4), fontsize=8, parse_math=False)
    front = sorted(point for cell, point in zip(sweep.cells, points, strict=True) if cell.pareto)
    axis.plot(*zip(*front, strict=True), color="#0969da", linewidth=1, alpha=0.6)
    for number, value in enumerate(sorted({cell.metric(sweep.judged_by).base for cell in sweep.cells})):
        axis.axhline(value, color="black", linewidth=0.8, linestyle="--", label="the base" if number == 0 else None)
    axis.set_xlabel(f"{fidelity.title or fidelity.name} to the base's own images")
    axis.set_ylabel(judged.title or judged.name)
    for direction, better in (("x", fidelity.higher_is_better), ("y", judged.higher_is_better)):
        if not better:  # better is always to the right and up
            getattr(axis, f"invert_{direction}axis")()
    axis.margins(x=0.2)
    axis.legend()
    axis.grid(alpha=0.3)
    return png(figure)
