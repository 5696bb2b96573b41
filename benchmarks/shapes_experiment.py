"""What PLADIS, GAG, temperature and a choice of layers do to how well the shapes pipeline follows its prompts.

    python benchmarks/shapes_experiment.py explore --out work --workers 2
    python benchmarks/shapes_experiment.py confirm --out work --workers 2 --set '{operator: pladis, scale: 0.5}'
    python benchmarks/shapes_experiment.py show --out work --results docs/shapes_experiment.json --plot docs/curve.png

`explore` scores every cell of GRIDS on shapes-dev, an image a prompt, on the same prompts and seeds as the base;
`confirm` scores what is given on shapes-test, whose texts explore does not use, two images a prompt; `show`
gathers both. All of it is `surgery sweep`: a run that is stopped goes on where it was, and a base's images are drawn
once. --pipeline NAME=FOLDER takes another pipeline than recipes/shapes, such as one of train.py --exchanged.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import yaml

from surgery.artifact.manifest import write_json
from surgery.nn.operators import OPERATORS
from surgery.validate import Drawing, sweep
from surgery.validate.report.pictures import new_figure, png

CONTEXTS = {  # name -> (guidance scale, steps)
    "guidance 4, 25 steps": (4.0, 25),
    "no guidance, 25 steps": (1.0, 25),
    "guidance 4, 4 steps": (4.0, 4),
    "no guidance, 4 steps": (1.0, 4),
}
MAIN = "guidance 4, 25 steps"
SCALES = [-0.5, 0.25, 0.5, 1.0, 1.5, 2.0]
GRIDS = {  # name -> (the operation, the axes); those of pladis in every context, the others in the main one
    **{f"pladis {a:g}": ({"operator": "pladis", "alpha": a}, {"scale": SCALES}) for a in (1.5, 1.25, 2.0)},
    "gag": ({"operator": "gag"}, {"scale": [0.0, 1.0, 3.0, 10.0]}),
    "temperature": ({"operator": "pladis"}, {"temperature": [0.7, 1.2], "scale": [0.0, 1.0]}),
    "layers": ({"operator": "pladis", "scale": 1.0}, {"layers": ["down", "mid", "up", "up,down"]}),
}
LINES = {1.25: ("#1f77b4", -0.02), 1.5: ("#d62728", 0.0), 2.0: ("#2ca02c", 0.02)}  # alpha -> (colour, its bars' shift)


def score(options, context, operation, axes, name, prompts, images=1):
    """Sweep one grid, which is kept as `name`, unless it is there already."""
    path = options.out / "results" / f"{options.pipeline[0]}, {context}, {name}.json"
    if path.exists():
        print(f"{path.stem}: done before")
        return
    guidance, steps = CONTEXTS[context]
    overrides = [
        f"base.pipeline={options.pipeline[1].resolve()}",
        f"sampling.guidance_scale={guidance}",
        f"sampling.steps={steps}",
        f"operations.0.with={json.dumps(operation)}",
    ]
    given = {"prompts": prompts, "limit": options.limit, "images_per_prompt": images}
    done = sweep(
        "shapes",
        axes,
        overrides=overrides,
        given={**given, "metrics": ["shape_alignment", "ssim"]},
        out=options.out / options.pipeline[0],
        drawing=Drawing(workers=options.workers, batch=options.batch),
        announce=lambda there, lacking, batch: print(
            f"{path.stem}: {there} images there, {lacking} to draw", flush=True
        ),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [
        {"settings": {**operation, **cell.settings}, "metrics": [metric.model_dump() for metric in cell.metrics]}
        for cell in done.cells
    ]
    kept = {key: done.rows.facts[key] for key in ("date", "hardware", "versions", "prompts", "seeds", "drawing")}
    kept["sampling"] = done.bases[0].facts["sampling"]
    write_json(path, {"pipeline": options.pipeline[0], "context": context, "grid": name, **kept, "cells": cells})
    for line in _lines(cells):
        print(line, flush=True)


def explore(options):
    """Every cell of GRIDS on the first half of the prompts."""
    for context in options.contexts:
        for name, (operation, axes) in GRIDS.items():
            is_pladis = name.startswith("pladis")
            if is_pladis and options.scales:
                axes = {"scale": options.scales}
            if name in options.grids and (is_pladis or context == MAIN):
                score(options, context, operation, axes, name, "shapes-dev")


def confirm(options):
    """The settings that are given on the other half, twice as many images; scale stands for the cell's one axis."""
    for context in options.contexts:
        for text in options.settings:
            operation = yaml.safe_load(text)
            named = OPERATORS.get(operation.get("operator"))
            scale = operation.setdefault("scale", named.defaults.get("scale", 1.0) if named else 1.0)
            score(options, context, operation, {"scale": [scale]}, f"confirmed {text}", "shapes-test", images=2)


def show(options):
    """Print all results as tables, and write them and the plot of the PLADIS grids."""
    found = [json.loads(path.read_text()) for path in sorted((options.out / "results").glob("*.json"))]
    for one in found:
        print(f"\n{one['pipeline']}, {one['context']}, {one['grid']}")
        for line in _lines(one["cells"]):
            print(line)
    if options.results:
        write_json(options.results, found)
    if options.plot:
        options.plot.write_bytes(_curves([one for one in found if one["grid"].startswith("pladis")]))


def _lines(cells):
    """A line a cell: aligned, difference and interval in points, then trained and held-out compositions, SSIM."""
    for cell in cells:
        aligned, ssim = cell["metrics"]
        low, high = aligned["interval"]
        name = ", ".join(f"{key} {value}" for key, value in cell["settings"].items())
        parts = [f"{name:48}", f"base {aligned['base']:.1%}", f"patched {aligned['patched']:.1%}"]
        parts += [f"{100 * aligned['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"]
        for side in ("base", "patched"):
            seen, unseen = compositions(aligned["categories"], side)
            parts.append(f"{side} trained {seen:.1%} held out {unseen:.1%}")
        yield "  ".join([*parts, f"ssim {ssim['patched']:.2f}"])


def compositions(categories, side):
    """The mean over the categories that have held-out compositions: (of those trained on, of those held out)."""
    by_name = {category["name"]: category[side] for category in categories}
    names = [name for name in by_name if f"{name}, held out" in by_name]
    return tuple(sum(by_name[name + ending] for name in names) / max(1, len(names)) for ending in ("", ", held out"))


def _curves(found):
    """The difference over the scale, a panel for each pipeline and context, a line for each alpha."""
    grids_of = Counter(one["pipeline"] for one in found)
    pipelines = [name for name, _ in grids_of.most_common()]
    contexts = [context for context in CONTEXTS if any(one["context"] == context for one in found)]
    figure = new_figure(max(5.0, 3.6 * len(contexts)), 3.4 * len(pipelines))
    panels = figure.subplots(len(pipelines), len(contexts), squeeze=False, sharex=True, sharey="row")
    for one in found:
        axis = panels[pipelines.index(one["pipeline"]), contexts.index(one["context"])]
        alpha = one["cells"][0]["settings"]["alpha"]
        colour, shift = LINES[alpha]
        points = [(0.0, 0.0, 0.0, 0.0)]
        for cell in one["cells"]:
            metric = cell["metrics"][0]
            ends = (100 * end for end in metric["interval"])
            points.append((cell["settings"]["scale"], 100 * metric["difference"], *ends))
        scales, means, lows, highs = zip(*sorted(points), strict=True)
        axis.plot(scales, means, color=colour, label=f"alpha {alpha:g}")
        axis.vlines([scale + shift for scale in scales], lows, highs, color=colour, alpha=0.6)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.grid(alpha=0.3)
        base = one["cells"][0]["metrics"][0]["base"]
        axis.set_title(f"{one['pipeline']}: {one['context']}\nbase {base:.1%} aligned", fontsize=9)
    for axis in panels.flat:
        if not axis.lines:
            axis.set_axis_off()
    for column in panels.T:
        lowest = [axis for axis in column if axis.lines][-1]
        lowest.set_xlabel("PLADIS scale")
        lowest.tick_params(labelbottom=True)
    for axis in panels[:, 0]:
        axis.set_ylabel("points of alignment\nmore than the base")
    drawn = {}
    for axis in figure.axes:
        drawn |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    first = next(axis for axis in panels.flat if axis.lines)
    first.legend(drawn.values(), drawn.keys(), fontsize=8, loc="lower left")
    return png(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("explore", "confirm", "show"))
    parser.add_argument("--out", type=Path, required=True, help="images, values and results; 5 GB for all grids")
    parser.add_argument("--pipeline", type=_named, default=("shapes", Path("recipes/shapes")), metavar="NAME=FOLDER")
    parser.add_argument("--contexts", nargs="+", choices=CONTEXTS, default=list(CONTEXTS), metavar="CONTEXT")
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=list(GRIDS), metavar="GRID")
    parser.add_argument("--scales", nargs="+", type=float, help="those of PLADIS instead of all")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="a setting to confirm, as YAML")
    parser.add_argument("--limit", type=int, help="so many prompts only")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--results", type=Path, help="show: write them all into this JSON file")
    parser.add_argument("--plot", type=Path, help="show: draw the curves into this PNG")
    options = parser.parse_args()
    {"explore": explore, "confirm": confirm, "show": show}[options.stage](options)


def _named(text):
    name, _, folder = text.partition("=")
    return name, Path(folder)


if __name__ == "__main__":
    main()
