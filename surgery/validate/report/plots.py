"""The plots of a report, drawn by matplotlib as PNG."""

import io

from surgery.errors import InputError

COLOURS = {
    "better": "#1a7f37",
    "worse": "#b3261e",
    "no difference": "#57606a",
    "too few prompts": "#57606a",
    "": "#57606a",
}


def new_figure(width, height):
    """A matplotlib Figure without any global state; InputError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the report's plots need matplotlib: pip install 'pladis-surgery[validate]'") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def png(figure):
    """The PNG (bytes) of a Figure."""
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def difference_plot(scores):
    """Each metric's paired difference with its 95% interval, each on its own axis, its categories below it; or None."""
    shown = [metric for metric in scores.metrics if metric.difference is not None]
    if not shown:
        return None
    heights = [1 + len(metric.categories) for metric in shown]
    figure = new_figure(8, 0.9 * len(shown) + 0.3 * sum(heights))
    axes = figure.subplots(len(shown), 1, gridspec_kw={"height_ratios": heights}, squeeze=False)[:, 0]
    for axis, metric in zip(axes, shown, strict=True):
        rows = [("all", metric.difference, metric.interval), *_category_rows(metric)]
        for place, (name, difference, (low, high)) in enumerate(rows):
            colour = COLOURS[metric.verdict] if name == "all" else "#8c959f"
            axis.plot([low, high], [place, place], color=colour, linewidth=3 if name == "all" else 2)
            axis.plot([difference], [place], "o", color=colour, markersize=7 if name == "all" else 5)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(rows)), [name for name, *_ in rows], parse_math=False)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        better = "higher" if metric.higher_is_better else "lower"
        axis.set_title(f"{metric.title or metric.name}: patched - base ({better} is better)", loc="left", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    return png(figure)


def _category_rows(metric):
    return [(category.name, category.difference, category.interval) for category in metric.categories]
