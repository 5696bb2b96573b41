"""`surgery sweep`: a grid of settings of a recipe, each scored against the base on the same seeds."""

import json
import shlex

from .show import print_json, relative, table
from .validate import announce, checkpoints_of, drawing_of


def run(arguments):
    """Score the grid; what is drawn already is not drawn again."""
    from surgery.validate.sweeping import AXES, sweep

    done = sweep(
        arguments.recipe,
        {axis: getattr(arguments, axis) for axis in AXES},
        overrides=arguments.overrides,
        given={name: getattr(arguments, name) for name in ("prompts", "limit", "seed", "metrics")},
        out=arguments.out,
        drawing=drawing_of(arguments),
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
