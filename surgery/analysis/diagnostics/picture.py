"""The plot of a Diagnosis: a heat map of modules by steps for each statistic, and the lengths along the steps."""

import numpy as np

from surgery.validate.report.pictures import new_figure, png

from .diagnosing import Diagnosis
from .statistics import STATISTICS

_SHOWN = ("support", "change", "residual", "update", "bounded", "negative", "aligned", "separated")
_COLUMNS = 4
_MOST_NAMED = 40  # modules whose names fit beside a panel


def picture(found: Diagnosis, title: str) -> bytes:
    """A PNG: modules from the first to the last by denoising steps from left to right, grey where one did not run.

    Each panel goes from its lowest value (dark) to its highest (bright), which stand above it.
    Below, the means of |r| and |r~| along the steps (GAG, Fig. 3), and around that of |r| 80% of the modules.
    """
    modules = list(found.totals)
    panels = {STATISTICS[name].title: found.values(name) for name in _SHOWN}
    for way in ("dense", "sparse"):
        panels[f"E after less before, {way}"] = _difference(found, f"energy_{way}_after", f"energy_{way}")
    panels |= {f"off the words, {way}": off for way in ("dense", "sparse") if (off := _off(found, way))}
    lines = -(-len(panels) // _COLUMNS)
    height = max(2.6, 1.2 + 0.2 * min(len(modules), _MOST_NAMED))
    figure = new_figure(4.2 * _COLUMNS, height * lines + 3.2)
    figure.suptitle(title, fontsize=12, parse_math=False)
    grid = figure.add_gridspec(lines + 1, _COLUMNS, height_ratios=[height] * lines + [3.0])
    for number, (name, values) in enumerate(panels.items()):
        axis = figure.add_subplot(grid[number // _COLUMNS, number % _COLUMNS])
        axis.set_facecolor("lightgray")
        table = _table(values, modules, found.steps)
        extent = (0.5, found.steps + 0.5, len(modules) - 0.5, -0.5)
        axis.imshow(table, aspect="auto", cmap="viridis", interpolation="nearest", extent=extent)
        axis.set_title(f"{name}: {np.nanmin(table):.3g} to {np.nanmax(table):.3g}", fontsize=10)
        axis.locator_params(axis="x", integer=True)
        named = number % _COLUMNS == 0 and len(modules) <= _MOST_NAMED
        axis.set_yticks(range(len(modules)) if named else [], [_short(path) for path in modules] if named else [])
        axis.tick_params(axis="y", labelsize=7)
    axis = figure.add_subplot(grid[lines, :])
    steps = range(1, found.steps + 1)
    for name in ("residual", "update"):
        table = _table(found.values(name), modules, found.steps)
        axis.plot(steps, np.nanmean(table, 0), label=f"{STATISTICS[name].title}, mean of the modules")
        if name == "residual":
            low, high = np.nanquantile(table, [0.1, 0.9], axis=0)
            axis.fill_between(steps, low, high, alpha=0.2)
    axis.set_xlabel("denoising step")
    axis.locator_params(axis="x", integer=True)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=9)
    axis.grid(alpha=0.3)
    return png(figure)


def _table(values, modules, steps):
    """(modules, steps) float64, NaN where a module did not run."""
    table = np.full((len(modules), steps), np.nan)
    for row, path in enumerate(modules):
        for step, value in enumerate(values[path]):
            table[row, step] = np.nan if value is None else value
    return table


def _difference(found, name, other):
    first, second = found.values(name), found.values(other)
    return {path: [_minus(*pair) for pair in zip(first[path], second[path], strict=True)] for path in first}


def _minus(one, other):
    return None if one is None or other is None else one - other


def _off(found, way):
    """{module: [weight of the tokens that are no words at each step]}; {} where words are not told from others."""
    if f"{way} words" not in found.names:
        return {}
    return {path: [_minus(1.0, value) for value in steps] for path, steps in found.values(f"{way} words").items()}


def _short(path):
    """A module's path without what all of them have in it."""
    for part in ("transformer_blocks.", "attentions.", "_blocks"):
        path = path.replace(part, "")
    return path.removesuffix(".attn2").removesuffix(".attn")
