"""The verbs that compare images by metrics: `surgery validate` and `sweep`."""

import argparse
import json
import shlex
from typing import Any

from .arguments import checkpoints_of, fields_of
from .show import print_json, relative, table


def run_validate(arguments: argparse.Namespace) -> None:
    """Score an artifact; a run that was cut short goes on where it stopped."""
    from surgery.validate.session import Drawing
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
                metric.n,
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
    from surgery.validate.session import Drawing
    from surgery.validate.sweeping import AXES, sweep

    done = sweep(
        arguments.recipe,
        {axis: getattr(arguments, axis) for axis in AXES},
        overrides=arguments.overrides,
        given={name: getattr(arguments, name) for name in ("prompts", "limit", "seed", "metrics")},
        out=arguments.out,
        drawing=fields_of(Drawing, arguments),
        checkpoints=checkpoints_of(arguments.checkpoints),
        announce=None if arguments.json else announce,
    )
    if arguments.json:
        print_json(done.to_json())
        return
    rows = []
    for cell in done.cells:
        metric, fidelity = cell.metric(done.judged_by), cell.metric(done.fidelity)
        low, high = metric.interval
        figures = [f"{metric.patched:.4g}", f"{metric.difference:+.4g}", f"{low:+.4g} to {high:+.4g}", metric.verdict]
        rows.append([cell.name, *figures, f"{fidelity.patched:.4g}", "yes" if cell.pareto else ""])
    judged, fidelity = (done.cells[0].metric(name) for name in (done.judged_by, done.fidelity))
    title = f"{judged.n} pairs a setting; the base's {judged.title} is {judged.base:.4g}"
    columns = ["setting", judged.title, "difference", "95% interval", "verdict", fidelity.title, "Pareto front"]
    table(title, columns, rows)
    best = done.best.metric(done.judged_by)
    print(
        f"best: {done.best.name} ({best.verdict}); chosen on these prompts, so score it on others before believing it"
    )
    print(f"to have it: surgery apply {arguments.recipe} {_overrides(done, arguments.overrides)}")
    print(f"report: {relative((done.folder / 'report.html').absolute())}")


def _overrides(done, given):
    """The --set options that make the best cell of the recipe, those that were given with the sweep before them."""
    settings = dict(done.best.settings)
    layers = settings.pop("layers", None)
    texts = [
        *given,
        *(f"operations.{n}.with.{axis}={value!r}" for n in range(done.operations) for axis, value in settings.items()),
    ]
    if layers:
        texts.append(f"operations.0.layers={json.dumps(layers.split(','))}")
    return " ".join(f"--set {shlex.quote(text)}" for text in texts)
