"""What negative prompts in attention, and operations on the text's keys, do to the shapes pipeline.

    python benchmarks/negative.py --out work --workers 2
    python benchmarks/negative.py --out work --results docs/negative.json
    python benchmarks/negative.py --tables docs/negative.json

Each set of prompts has one negative prompt. "Shown" is the share of images in which something of it is found: of its
colour or of its shape; "kept" the share that still shows the rest of what the prompt asks for. Rows of one set are
drawn from the same prompts and seeds, and each is compared with the row that its kind starts from, by intervals over
the prompts. A run that was stopped goes on where it was. The cost of a step is taken side by side, in turns.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import surgery
from surgery.artifact.manifest import write_json
from surgery.recipes.shapes.scenes.detecting import detect
from surgery.recipes.shapes.scenes.judging import is_satisfied
from surgery.recipes.shapes.scenes.vocabulary import SHAPES, noun
from surgery.validate import Drawing, Row, score_rows
from surgery.validate.statistics import paired

NEGATIVE = {"NAG": {"operator": "nag"}, "VSF": {"operator": "vsf"}}
STRONG = {
    "NAG, blend 0.5": {"operator": "nag", "blend": 0.5},
    "VSF, flip 1": {"operator": "vsf", "flip": 1.0},
}
PLADIS = {"replace": "cross-attention", "with": {"operator": "pladis", "scale": 1.0}}
TEXT = {  # name -> operations, beside plain CFG
    "PLADIS, scale 1": [PLADIS],
    "words alone": [{"replace": "cross-attention", "with": {"operator": "words"}}],
    "PLADIS and words": [PLADIS, {"replace": "cross-attention", "with": {"operator": "words"}}],
    "PLADIS and words, kept 0.5": [PLADIS, {"replace": "cross-attention", "with": {"operator": "words", "kept": 0.5}}],
    "PLADIS and shares": [PLADIS, {"replace": "cross-attention", "with": {"operator": "shares"}}],
}


def sets() -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """{name: (negative prompt, prompts with what is asked for and with what is left of it without the negative)}."""
    plain = [_prompt(noun(None, shape), (None, shape)) for shape in SHAPES]
    red = [_prompt(noun("red", shape), (None, shape)) for shape in SHAPES]
    others = [shape for shape in SHAPES if shape != "circle"]
    both = [_prompt(f"{noun(None, 'circle')} and {noun(None, shape)}", (None, shape)) for shape in others]
    return {"a shape": ("red", plain), "a red shape": ("red", red), "a circle and a shape": ("a circle", both)}


def _prompt(text, kept):
    return {"prompt": text, "category": "negative", "objects": [list(kept)], "relation": None}


def rows(negative: str, steps: int) -> list[Row]:
    """The rows of a set: without CFG, and with it."""

    def row(name, scale, operation, prompt=None, against=None):
        said = [f"sampling.steps={steps}", f"sampling.guidance_scale={scale}"]
        said += [f"sampling.negative_prompt={json.dumps(prompt)}"] if prompt else []
        said += [f"operations.0.with={json.dumps(operation)}"] if operation else []
        return Row(name, "shapes", tuple(said), patched=operation is not None, against=against)

    found = [row("no CFG", 1.0, None), row("CFG", 4.0, None), row("CFG's own", 4.0, None, negative, "CFG")]
    found += [row(name, 1.0, one, negative, "no CFG") for name, one in {**NEGATIVE, **STRONG}.items()]
    found += [row(f"CFG's own and {name}", 4.0, one, negative, "CFG's own") for name, one in NEGATIVE.items()]
    return found


def shown(path: Path, negative: str) -> bool:
    """Whether an image shows something of the negative prompt's colour, or its shape."""
    objects = detect(np.asarray(Image.open(path).convert("RGB")))
    return any(negative in (one.colour, one.shape and noun(None, one.shape)) for one in objects)


def kept(path: Path, facts: dict[str, Any]) -> bool:
    """Whether an image shows what the prompt asks for without the negative."""
    objects = detect(np.asarray(Image.open(path).convert("RGB")))
    wanted = [shape for _, shape in facts["objects"]]
    return is_satisfied(facts, objects) or all(any(one.shape == shape for one in objects) for shape in wanted)


def measured(name: str, negative: str, prompts: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """One set: each row's shares, and its differences with intervals."""
    work = options.out / name.replace(" ", "-")
    work.mkdir(parents=True, exist_ok=True)
    file = work / "prompts.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in prompts), encoding="utf-8")
    done = score_rows(
        rows(negative, options.steps),
        out=work / "rows",
        prompts=file,
        images_per_prompt=options.images,
        metrics=["shape_alignment"],
        drawing=Drawing(batch=options.batch, workers=options.workers),
        announce=lambda there, lacking, batch: print(f"{name}: {there} there, {lacking} to draw", flush=True),
    )
    facts = {one["prompt"]: {"objects": one["objects"], "relation": None} for one in prompts}
    groups = [list(facts).index(job.prompt.text) for job in done.jobs]
    values = {
        row.name: {
            "shown": [shown(path, negative) for path in row.images],
            "kept": [kept(path, facts[job.prompt.text]) for path, job in zip(row.images, done.jobs, strict=True)],
        }
        for row in done.rows
    }
    found = []
    for row in done.rows:
        own, entry = values[row.name], {"name": row.name, "against": row.row.against}
        for key in ("shown", "kept"):
            entry[key] = float(np.mean(own[key]))
            if row.row.against:
                pair = paired(np.asarray(values[row.row.against][key], float), np.asarray(own[key], float), groups)
                entry[f"{key}_difference"], entry[f"{key}_interval"] = pair.difference, list(pair.interval)
        found.append(entry)
    return {"set": name, "negative": negative, "n": len(done.jobs), "prompts": len(prompts), "rows": found}


def text_rows(options: argparse.Namespace) -> dict[str, Any]:
    """`words` and `shares` beside CFG on prompts of every kind."""
    sampling = (f"sampling.steps={options.steps}", "sampling.guidance_scale=4.0")
    found = [Row("CFG", "shapes", sampling, patched=False)]
    found += [Row(name, "shapes", (*sampling, f"operations={json.dumps(given)}")) for name, given in TEXT.items()]
    done = score_rows(
        found,
        out=options.out / "text",
        prompts="shapes-dev",
        limit=options.limit,
        images_per_prompt=1,
        metrics=["shape_alignment"],
        drawing=Drawing(batch=options.batch, workers=options.workers),
        announce=lambda there, lacking, batch: print(f"text: {there} there, {lacking} to draw", flush=True),
        against="CFG",
    )
    out = []
    for row in done.rows:
        metric = row.metric("shape_alignment")
        assert metric is not None
        interval = list(metric.paired.interval) if metric.paired else None
        out.append({"name": row.name, "aligned": metric.value, "difference": metric.difference, "interval": interval})
    return {"n": len(done.jobs), "rows": out}


COSTS = {  # name -> (operations, what is told)
    "plain": (None, None),
    "dense, patched": ({"operator": "pladis", "scale": 0.0}, None),
    **{name: (one, lambda pipeline: surgery.negative(pipeline, "red")) for name, one in NEGATIVE.items()},
    "regions, two": ({"operator": "regions"}, lambda pipeline: surgery.regions(pipeline, HALVES)),
    "words": ({"operator": "words"}, None),
    "diversity": ({"operator": "diversity"}, None),
}
HALVES = [
    {"prompt": "a red circle", "box": [0, 0, 0.5, 1]},
    {"prompt": "a blue star", "box": [0.5, 0, 1, 1]},
]


def costs(rounds: int, steps: int, compiled: bool) -> dict[str, float]:
    """{row: CPU seconds of an image over the plain model's, the median of as many rounds in turns}; one has CFG.

    compiled: the blocks with attention by torch.compile. The first run of each, which compiles, is left out.
    """
    import torch

    torch._dynamo.config.recompile_limit = 100  # of a function, which all these pipelines share
    rows: dict[str, Any] = {**COSTS, "CFG with a negative prompt": (None, None)}
    pipelines = {name: _pipeline(operation, told, compiled) for name, (operation, told) in rows.items()}
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds + 1):
        for name, pipeline in pipelines.items():
            scale = 4.0 if name.startswith("CFG") else 1.0
            begun = time.process_time()
            pipeline(
                "a circle",
                negative_prompt="red" if scale > 1 else None,
                num_inference_steps=steps,
                guidance_scale=scale,
                height=64,
                width=64,
                generator=torch.Generator().manual_seed(0),
            )
            seconds[name].append(time.process_time() - begun)
    medians = {name: statistics.median(own[1:]) for name, own in seconds.items()}
    return {name: own / medians["plain"] for name, own in medians.items()}


def _pipeline(operation, told, compiled):
    """A shapes pipeline with an operation."""
    import diffusers
    import torch

    from surgery.models.patching import operate
    from surgery.recipe.plan import make_plan
    from surgery.recipe.reading import shipped_recipes

    folder = shipped_recipes()["shapes"].parent / "shapes"
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=torch.float32)
    pipeline: Any = loaded
    pipeline.set_progress_bar_config(disable=True)
    if operation is not None:
        operate(pipeline, make_plan("shapes", [f"operations.0.with={json.dumps(operation)}"]).plan.carried)
    if told is not None:
        told(pipeline)
    if compiled:
        pipeline.unet.compile_repeated_blocks(fullgraph=True)  # the blocks with attention
    return pipeline


def _costs(options):
    found = {}
    for name in ("eager", "compiled"):
        found[name] = costs(options.rounds, options.steps, name == "compiled")
        print(name, found[name], flush=True)
    return found


def tables(found: dict[str, Any]) -> str:
    """The tables of docs/negative.md: shares in percent, differences in points with their 95% intervals."""

    def change(row, key):
        low, high = row[f"{key}_interval"]
        points = [f"{round(100 * value):+d}" for value in (row[f"{key}_difference"], low, high)]
        return "{} ({} to {})".format(*points)

    lines = ["| prompts, negative prompt | | shown | kept | against | shown | kept |", "|---|---|---|---|---|---|---|"]
    for one in found["sets"]:
        title = f'{one["set"]}, "{one["negative"]}" ({one["n"]} images of {one["prompts"]} prompts)'
        for row in one["rows"]:
            cells = [title, row["name"], f"{100 * row['shown']:.0f}%", f"{100 * row['kept']:.0f}%"]
            against = row["against"]
            cells += [against, change(row, "shown"), change(row, "kept")] if against else ["", "", ""]
            lines.append("| " + " | ".join(cells) + " |")
            title = ""
    lines += ["", "| CFG 4 | aligned | difference |", "|---|---|---|"]
    for row in found["text"]["rows"]:
        low, high = row["interval"] or (None, None)
        moved = "" if low is None else f"{100 * row['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        lines.append(f"| {row['name']} | {100 * row['aligned']:.1f}% | {moved} |")
    return "\n".join(lines)


def main() -> None:
    """Draw, score and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/negative"), help="the work folder (%(default)s)")
    parser.add_argument("--costs", action="store_true", help="take and print the costs alone")
    parser.add_argument("--images", type=int, default=16, help="of each prompt of the sets with a negative prompt")
    parser.add_argument("--limit", type=int, default=120, help="prompts for words and shares")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9, help="of the timing")
    parser.add_argument("--batch", type=int, default=16, help="images drawn at once (%(default)s)")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--results", type=Path, help="a JSON file to write")
    parser.add_argument("--tables", type=Path, help="print the tables of such a file, and nothing else")
    options = parser.parse_args()
    if options.tables:
        print(tables(json.loads(options.tables.read_text(encoding="utf-8"))))
        return
    found: dict[str, Any] = {"machine": "2 CPU cores, torch 2.13", "steps": options.steps}
    if options.costs:
        print(json.dumps(_costs(options), indent=1))
        return
    parts = {
        "sets": lambda: [measured(name, *given, options) for name, given in sets().items()],
        "text": lambda: text_rows(options),
        "costs": lambda: _costs(options),
    }
    for name, part in parts.items():
        found[name] = part()
        if options.results:  # what is measured is kept, whatever becomes of the rest
            write_json(options.results, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
