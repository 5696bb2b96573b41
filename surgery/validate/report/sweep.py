"""The report of a sweep: a curve per setting, a map where two axes vary, the Pareto front, the page with the table."""

from html import escape
from pathlib import Path

import numpy as np

from surgery.artifact.manifest import replace_file
from surgery.errors import SurgeryError

from .page import html_page, html_table, picture
from .pictures import new_figure, png


def write_sweep_report(sweep, name):
    """Write curve.png, map.png (where alpha and scale both vary), pareto.png and report.html into the sweep's folder.

    sweep: a Sweep. Raises SurgeryError where a file cannot be written.
    """
    pictures = {"curve.png": _curve(sweep), "map.png": _map(sweep), "pareto.png": _pareto(sweep)}
    pictures = {file: data for file, data in pictures.items() if data}
    files = {**pictures, "report.html": _page(sweep, name, pictures).encode("utf-8")}
    for file, data in files.items():
        path = Path(sweep.folder) / file
        try:
            replace_file(path, data)
        except OSError as error:
            raise SurgeryError(f"cannot write {path}: {error.strerror or error}; run the same command again") from error


def _axes(sweep):
    """{axis: its values} of the axes that take more than one value."""
    values = {}
    for cell in sweep.cells:
        for axis, value in cell.settings.items():
            values.setdefault(axis, dict.fromkeys([]))[value] = None
    return {axis: list(found) for axis, found in values.items() if len(found) > 1}


def _curve(sweep):
    """The paired difference with its interval along the numeric axis of most values, a line for each other setting."""
    axes = {axis: values for axis, values in _axes(sweep).items() if axis != "layers"}
    if not axes:
        return None
    along = max(axes, key=lambda axis: (len(axes[axis]), axis == "scale"))
    lines = {}
    for cell in sweep.cells:
        rest = {axis: value for axis, value in cell.settings.items() if axis != along}
        lines.setdefault(tuple(rest.items()), []).append(cell)
    figure = new_figure(8, 5)
    axis = figure.subplots()
    width = max(axes[along]) - min(axes[along])
    for number, (rest, cells) in enumerate(lines.items()):
        cells = sorted(cells, key=lambda cell: cell.settings[along])
        found = [cell.metric(sweep.judged_by) for cell in cells]
        aside = 0.008 * width * (number - (len(lines) - 1) / 2)  # so that intervals do not lie on each other
        positions = [cell.settings[along] + aside for cell in cells]
        middle = [metric.difference for metric in found]
        below = [metric.difference - metric.interval[0] for metric in found]
        above = [metric.interval[1] - metric.difference for metric in found]
        label = ", ".join(f"{name} {value}" for name, value in rest)
        axis.errorbar(positions, middle, yerr=np.maximum([below, above], 0), marker="o", capsize=3, label=label or None)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xlabel(along)
    metric = sweep.cells[0].metric(sweep.judged_by)
    axis.set_ylabel(f"{metric.title or metric.name}: patched - base")
    axis.set_title("difference from the base on the same prompts and seeds, 95% intervals", fontsize=10, loc="left")
    axis.grid(alpha=0.3)
    if len(lines) > 1:
        axis.legend()
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
    axis.axhline(judged.base, color="black", linewidth=0.8, linestyle="--", label="the base")
    axis.set_xlabel(f"{fidelity.title or fidelity.name} to the base's own images")
    axis.set_ylabel(judged.title or judged.name)
    for direction, better in (("x", fidelity.higher_is_better), ("y", judged.higher_is_better)):
        if not better:  # better is always to the right and up
            getattr(axis, f"invert_{direction}axis")()
    axis.margins(x=0.2)
    axis.legend()
    axis.grid(alpha=0.3)
    return png(figure)


def _page(sweep, name, pictures):
    judged = sweep.cells[0].metric(sweep.judged_by)
    best = sweep.best.metric(sweep.judged_by)
    parts = [
        f"<p>{len(sweep.cells)} settings, {best.n} pairs of images each. The best {escape(best.title or best.name)} "
        f"is that of <b>{escape(sweep.best.name)}</b>: {best.patched:.4g} against the base's {best.base:.4g}, "
        f"<span class='{best.verdict}'>{best.verdict}</span>.</p>",
        "<p>It is the best of several on these very prompts, so its own figure is too good by chance: score it on "
        "other prompts (<code>surgery validate</code>) before believing it.</p>",
        *(picture(data, file) for file, data in pictures.items()),
    ]
    columns = ["setting", "on the front", judged.title or judged.name, "difference", "95% interval", "verdict"]
    rows = []
    for cell in sweep.cells:
        metric = cell.metric(sweep.judged_by)
        low, high = metric.interval
        figures = [f"{metric.patched:.4g}", f"{metric.difference:+.4g}", f"{low:+.4g} to {high:+.4g}"]
        cells = [cell.name, "yes" if cell.pareto else "", *((text, "number") for text in figures)]
        rows.append(("", [*cells, (metric.verdict, metric.verdict), *_others(sweep, cell)]))
    others = [metric.title or metric.name for metric in sweep.cells[0].metrics if metric.name != sweep.judged_by]
    base = ["the base", "", (f"{judged.base:.4g}", "number"), "", "", "", *[""] * len(others)]
    parts += [html_table([*columns, *others], [("", base), *rows])]
    prompts = sweep.facts["prompts"][0]
    parts.append(
        f"<p>{prompts.count} prompts of {escape(prompts.name)} (sha256 {escape(str(prompts.sha256))}), "
        f"{sweep.facts['images_per_prompt']} images each; {escape(sweep.facts['date'])} on "
        f"{escape(sweep.facts['hardware'])}.</p>"
    )
    return html_page(f"{name}: sweep", "\n".join(parts))


def _others(sweep, cell):
    return [(f"{metric.patched:.4g}", "number") for metric in cell.metrics if metric.name != sweep.judged_by]
