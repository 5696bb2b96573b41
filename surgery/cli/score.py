"""The verbs that compare images by metrics: `surgery validate` and `sweep`."""

import argparse
import shlex
from typing import Any

from .given import checkpoints_of, fields_of
from .show import print_json, relative, table


def run_validate(arguments: argparse.Namespace) -> None:
    """Score an artifact; a run that was cut short goes on where it stopped."""
    from surgery.validate.jobs import Drawing
    from surgery.validate.validating import validate

    done = validate(
        arguments.model,
        revision=arguments.revision,
        prompts=arguments.prompts,
        limit=arguments.limit,
        images_per_prompt=arguments.images_per_prompt,
        seed=arguments.seed,
        metrics=arguments.metrics,
        reference=arguments.reference,
        out=arguments.out,
        drawing=fields_of(Drawing, arguments),
        checkpoints=checkpoints_of(arguments.checkpoints),
        videos=arguments.videos,
        announce=None if arguments.json else announce,
    )
    if arguments.json:
        print_json(
            {
                **done.scores.model_dump(mode="json"),
                "report": done.report,
                "scores_file": done.scores_file,
                "kept": done.kept,
            }
        )
    else:
        show_scores(done)


def announce(there: int, lacking: int, batch: int) -> None:
    """Say what is about to be drawn."""
    kept = f"; {there} are there already" if there else ""
    print(f"drawing {lacking} images, {batch} at once{kept}", flush=True)


def show_scores(done: Any) -> None:
    """Print a Validation: the table of metrics, what it means, where the report is."""
    rows = []
    for metric in done.scores.metrics:
        low, high = metric.interval
        signed = "+.4g" if metric.difference is not None else ".4g"
        rows.append(
            [
                metric.title or metric.name,
                "" if metric.base is None else f"{metric.base:.4g}",
                f"{metric.patched:.4g}",
                "" if metric.difference is None else f"{metric.difference:+.4g}",
                f"{low:{signed}} to {high:{signed}}",
                "" if metric.win_rate is None else f"{100 * metric.win_rate:.1f}%",
                metric.counted,
                metric.verdict,
            ]
        )
    prompts = ", ".join(f"{part.count} of {part.name}" for part in done.scores.prompts)
    title = f"{prompts}, {done.scores.images_per_prompt} each; artifact {done.scores.artifact_hash[:12]}"
    table(title, ["metric", "base", "patched", "difference", "95% interval", "wins", "n", "verdict"], rows)
    if done.scores.excluded:
        print(f"left out: {done.scores.excluded} pairs in which a safety checker blackened an image")
    for metric in done.scores.regressions(done.scores.purpose):
        print(f"the patch makes the model significantly worse on {metric.title or metric.name}")
    if done.kept:
        print(
            f"the artifact's own scores.json was left as it is, because it measured {done.kept}: to replace it, delete "
            "it and run this again"
        )
    print(f"scores: {relative(done.scores_file.absolute())}")
    print(f"report: {relative(done.report.absolute())}")


def run_sweep(arguments: argparse.Namespace) -> None:
    """Score the grid; what is drawn already is not drawn again."""
    from surgery.validate.axes import parse_axis
    from surgery.validate.jobs import Drawing
    from surgery.validate.report.sweep import summary
    from surgery.validate.sweeping import sweep

    axes = {axis: getattr(arguments, axis) for axis in ("alpha", "scale", "temperature", "layers")}
    for axis, values in map(parse_axis, arguments.axes):
        axes[axis] = [*axes.get(axis, []), *values]
    given = ("prompts", "limit", "images_per_prompt", "seed", "metrics", "reference")
    done = sweep(
        arguments.recipe,
        axes,
        overrides=arguments.overrides,
        given={name: getattr(arguments, name) for name in given},
        out=arguments.out,
        drawing=fields_of(Drawing, arguments),
        checkpoints=checkpoints_of(arguments.checkpoints),
        announce=None if arguments.json else announce,
    )
    if arguments.json:
        print_json(done.to_json())
        return
    rows = []
    fronts = [False] * len(done.bases) + [cell.pareto for cell in done.cells]
    for row, is_on_front in zip([*done.bases, *(cell.row for cell in done.cells)], fronts, strict=True):
        metric, fidelity = row.metric(done.judged_by), row.metric(done.fidelity)
        assert metric is not None
        figures = [f"{metric.value:.4g}", "", "", ""]
        if metric.paired:
            low, high = metric.paired.interval
            figures[1:] = [f"{metric.difference:+.4g}", f"{low:+.4g} to {high:+.4g}", metric.verdict]
        rows.append([row.name, *figures, f"{fidelity.value:.4g}" if fidelity else "", "yes" if is_on_front else ""])
    judged, fidelity = (done.cells[0].metric(name) for name in (done.judged_by, done.fidelity))
    columns = ["setting", judged.title, "difference", "95% interval", "verdict", fidelity.title, "Pareto front"]
    table(f"{judged.n} pairs a setting, each beside its base", columns, rows)
    for line in summary(done):
        print(line)
    if done.best:
        overrides = [*arguments.overrides, *done.best.plan.overrides]
        sets = " ".join(f"--set {shlex.quote(text)}" for text in overrides)
        print(f"to have it: surgery apply {arguments.recipe} {sets}")
    print(f"report: {relative((done.folder / 'report.html').absolute())}")
