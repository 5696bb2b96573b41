"""The kinds whose rows are drawn from the same prompts and seeds: scores with their curves, and rows of images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from surgery.artifact.manifest import replace_file, write_json
from surgery.recipe.metric_names import DISTANCE_METRICS, FIDELITY_METRICS
from surgery.validate.prompts import open_prompts
from surgery.validate.report.pictures import new_figure, png
from surgery.validate.report.rows import row_sheets
from surgery.validate.rows import Row, RowMetric, RowsResult, score_rows
from surgery.validate.scoring import prepare_scorers

from .entries import Entry
from .manifest import PromptsOf
from .results import Measured
from .task import Drawn, Task

_CHEAP = FIDELITY_METRICS[0]  # what rows of images are measured by, where nothing has to be


def draw_scores(task: Task) -> Drawn:
    """Every row scored on every prompt set, with a plot of each series over its values."""
    measured: dict[str, dict[tuple[str, str], Measured]] = {entry.name: {} for entry in task.entries}
    files, notes, facts = {}, [], {}
    for name, part in task.sets.items():  # what a later set lacks is told before the first is drawn
        open_prompts(task.given.prompts or name, limit=2)
        prepare_scorers(_metrics(task, part), task.given.drawing.device, task.checkpoints(_metrics(task, part)))
    for name, part in task.sets.items():
        metrics = _metrics(task, part)
        if left_out := [metric for metric in part.metrics if metric not in metrics]:
            notes.append(
                f"{', '.join(left_out)} was left out: it compares with real images; give them as --reference FOLDER"
            )
        result = rows_of(task, name, part, metrics)
        for row in result.rows:
            measured[row.name] |= {(name, metric.name): _measured(metric, row.n) for metric in row.metrics}
        write_json(task.folder / f"rows-{name}.json", result.to_json())
        files[f"every figure on {name}"] = Path(f"rows-{name}.json")
        facts[f"images of a row, {name}"] = result.rows[0].n
    if any(entry.value is not None for entry in task.entries):
        replace_file(task.folder / "curves.png", _curves(task.entries, measured))
        files["curves"] = Path("curves.png")
    return Drawn(measured, files, tuple(notes), facts)


def _metrics(task: Task, part: PromptsOf) -> list[str]:
    """What is measured on a prompt set: what the table names, less what needs real images where none are given."""
    return [metric for metric in part.metrics if metric not in DISTANCE_METRICS or task.given.reference]


def draw_images(task: Task) -> Drawn:
    """Every row's images of the same prompts and seeds beside each other."""
    files, facts = {}, {}
    for name, part in task.sets.items():
        result = rows_of(task, name, part, part.metrics)
        for title, data in row_sheets([result.rows], result).items():
            path = Path(f"{name}-{title.replace(' ', '-')}.png")
            replace_file(task.folder / path, data)
            files[f"{name}, {title}"] = path
        facts[f"seeds, {name}"] = ", ".join(str(job.seed) for job in result.jobs)
    return Drawn(files=files, facts=facts)


def rows_of(task: Task, name: str, part: PromptsOf, metrics: Sequence[str]) -> RowsResult:
    """The RowsResult of a table's rows on one prompt set; what is drawn already is not drawn again."""
    given = task.given
    return score_rows(
        [Row(entry.name, entry.recipe, entry.overrides, entry.patched) for entry in task.entries],
        out=task.work,
        prompts=given.prompts or name,
        limit=task.limit(part),
        images_per_prompt=part.images_per_prompt,
        seed=task.table.seed,
        metrics=metrics or [_CHEAP],
        reference=given.reference if set(metrics) & set(DISTANCE_METRICS) else None,
        drawing=given.drawing,
        checkpoints=task.checkpoints(metrics),
        announce=given.announce,
        against=task.table.against,
    )


def _measured(metric: RowMetric, count: int) -> Measured:
    paired = metric.paired
    if paired is None or metric.difference is None:
        return Measured(metric.value, None, (metric.interval[0], metric.interval[1]), count)
    low, high = paired.interval
    return Measured(metric.value, metric.difference, (low, high), count)


def _curves(entries: Sequence[Entry], measured: Mapping[str, Mapping[tuple[str, str], Measured]]) -> bytes:
    """A PNG with an axis for each metric: every series over its values, rows that have none as level lines."""
    places = list(dict.fromkeys(place for of in measured.values() for place in of))
    figure = new_figure(5.5 * len(places), 4.2)
    for axis, place in zip(figure.subplots(1, len(places), squeeze=False)[0], places, strict=True):
        for series in dict.fromkeys(entry.series for entry in entries):
            members = [entry for entry in entries if entry.series == series and place in measured[entry.name]]
            points = sorted((entry.value, measured[entry.name][place].value) for entry in members if _is_finite(entry))
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=series)
                axis.set_xlabel(members[0].name.removeprefix(f"{series}, ").rpartition(" ")[0])
            for entry in members:
                if not _is_finite(entry):
                    height = measured[entry.name][place].value
                    axis.axhline(height, label=entry.name, color="black", linewidth=0.8, linestyle="--")
        axis.set_title(", ".join(reversed(place)), loc="left", fontsize=10, parse_math=False)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return png(figure)


def _is_finite(entry: Entry) -> bool:
    return entry.value is not None and entry.value < float("inf")
