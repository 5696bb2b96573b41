"""Every guidance on the shapes pipeline: alone, with PLADIS and with GAG; and what it costs.

    python benchmarks/guidance.py score --out work --workers 2 --limit 320 --images 2
    python benchmarks/guidance.py time
    python benchmarks/guidance.py table --out work --results docs/guidance.json

`score` draws and scores every cell on the same prompts and seeds, so that all comparisons are paired: each method alone
with classifier-free guidance alone, and each operator within a method with the method alone. A run that is stopped goes
on where it was. `time` measures, in one run, seconds an image and evaluations of the denoiser as ratios to CFG.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import surgery
from surgery.artifact.manifest import write_json
from surgery.guidance import guided
from surgery.models.patching import denoiser
from surgery.nn.operators import OPERATORS
from surgery.runtime.draw import draw
from surgery.validate.jobs import base_side, identity_of, operator_code, patched_side
from surgery.validate.scoring import score
from surgery.validate.session import Drawing, SessionConfig, hardware, open_session

GUIDANCE = {  # name -> a recipe's `guidance`
    "CFG": None,
    "APG": {"method": "apg"},
    "TCFG": {"method": "tcfg"},
    "FDG": {"method": "fdg"},
    "FreSca": {"method": "fresca"},
    "MAMBO-G": {"method": "mambo-g"},
    "Momentum": {"method": "momentum"},
    "SMC-CFG": {"method": "smc-cfg"},
    "SWG": {"method": "swg"},
    "TPG": {"method": "tpg"},
    "ERG": {"method": "erg"},
    "PAG": {"method": "pag"},
    "PAG, all layers": {"method": "pag", "layers": ["all"]},
    "SEG, all layers": {"method": "seg", "layers": ["all"]},
    "OSEG, all layers": {"method": "oseg", "layers": ["all"]},
    "SEG": {"method": "seg"},
    "OSEG": {"method": "oseg"},
    "SAG": {"method": "sag"},
    "SLG": {"method": "slg"},
    "AutoGuidance": {"method": "autoguidance"},
    "TSG": {"method": "tsg"},
    "CFG-Zero*": {"method": "cfg-zero"},
    "NAG": {"method": "nag"},
}
SURGERY = {  # name -> the operator and its settings
    "PLADIS, scale 1": {"operator": "pladis", "scale": 1.0},
    "GAG, scale 1": {"operator": "gag", "scale": 1.0},
}
SAMPLING = {"steps": 12, "guidance_scale": 4.0, "height": 64, "width": 64}
PROMPTS = "shapes-dev"


def run_scores(options):
    """Draw and score every cell."""
    options.out.mkdir(parents=True, exist_ok=True)
    _, (unguided, *_), of_reference = drawn(options, "CFG", alone=options.alone or "CFG" not in options.methods)
    reference = replace(unguided, name="reference")
    for name in options.methods:
        session, (base, *sides), images = drawn(options, name, options.alone)
        scorer = session.scorers[0]
        images = replace(images, paths={**images.paths, "reference": of_reference.paths["base"]})
        rows = {"alone": row(scorer, options.out, images.paired(reference, base))}
        rows |= {side.name: row(scorer, options.out, images.paired(base, side)) for side in sides}
        facts = {"hardware": hardware("cpu"), "n": len(images.jobs), "prompts": PROMPTS, "sampling": SAMPLING}
        result = {"guidance": name, "settings": GUIDANCE[name], **facts, "rows": rows}
        write_json(options.out / "results" / f"{name}.json", result)
        print_rows(result)


def drawn(options, name, alone):
    """(session, sides, DrawnImages) of one method: the base and, unless alone, every surgery of it."""
    guidance = [f"guidance={json.dumps(GUIDANCE[name])}"] if GUIDANCE[name] else []
    overrides = [*(f"sampling.{key}={value}" for key, value in SAMPLING.items()), *guidance]
    folder = surgery.apply(
        "shapes", options.out / f"artifact-{name.replace(', ', '-').replace(' ', '-')}", overrides=overrides, force=True
    ).folder
    given = {"prompts": PROMPTS, "metrics": ["shape_alignment"], "limit": options.limit}
    section = {"images_per_prompt": options.images}
    drawing = Drawing(workers=options.workers, batch=options.batch)
    session = open_session(
        SessionConfig(folder, options.out, given, validation(section), drawing=drawing, recipe_folder=Path("recipes"))
    )
    identity = identity_of(session.manifest, session.folder, session.environment)
    code = operator_code(session.manifest, session.folder)
    layers = list(session.manifest.operations[0].layers)
    sides = [base_side(identity)]
    for label, settings in () if alone else SURGERY.items():
        operation = {**OPERATORS[settings["operator"]].defaults, **settings, "layers": layers}
        if settings["operator"] == "gag":
            operation["unit"] = "head"
        sides.append(patched_side(label, [operation], identity, code))

    def announce(there, lacking, batch):
        print(f"{name}: {there} images there, {lacking} to draw", flush=True)

    return session, sides, session.draw(options.out, sides, announce)


def validation(section):
    """A recipe's `validate`."""
    from surgery.recipe.schema import Validate

    return Validate.model_validate(section)


def row(scorer, folder, images):
    """What the second side scores, and its difference from the first with its interval."""
    metric = score(scorer, folder, images).metric
    return {"aligned": metric.patched, "difference": metric.difference, "interval": list(metric.interval)}


def print_rows(result):
    """A line a row."""
    for label, found in result["rows"].items():
        print(f"  {result['guidance']:14s} {label:12s} {cell(found)}", flush=True)


def cell(found):
    """ "80.1% (-1.2: -3.0 to +0.6)"."""
    if found is None:
        return "not run"
    low, high = (100 * end for end in found["interval"])
    return f"{found['aligned']:.1%} ({100 * found['difference']:+.1f}: {low:+.1f} to {high:+.1f})"


def run_times(options):
    """Seconds an image and evaluations of each method, interleaved, as ratios to CFG; unpatched, then with PLADIS."""
    from diffusers import DiffusionPipeline

    torch.set_num_threads(options.threads)
    pipeline = DiffusionPipeline.from_pretrained("recipes/shapes", dtype=torch.float32)
    jobs = [("a red circle to the left of a blue square", seed) for seed in range(options.batch or 8)]
    times = {name: [] for name in GUIDANCE}
    evaluations = {}
    for done in range(options.rounds + 1):  # the first is not counted
        for name, guidance in GUIDANCE.items():
            with guided(pipeline, guidance or {"method": "cfg"}) as driver:
                started = time.perf_counter()
                draw(pipeline, jobs, SAMPLING)
                seconds = time.perf_counter() - started
                evaluations[name] = driver.evaluations / len(jobs) / SAMPLING["steps"]
            if done:
                times[name].append(seconds)
        print(f"\r  round {done} of {options.rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    rows = {
        name: {"evaluations": evaluations[name], "ratio": seconds / medians["CFG"], "seconds": seconds / len(jobs)}
        for name, seconds in medians.items()
    }
    result = {"hardware": hardware("cpu"), "threads": options.threads, "rounds": options.rounds, "rows": rows}
    write_json(options.out / "results" / "times.json", {**result, "model": type(denoiser(pipeline)).__name__})
    for name, found in rows.items():
        print(f"  {name:14s} {found['evaluations']:.2f} evaluations a step, {found['ratio']:.2f}x the time of CFG")


def run_table(options):
    """The table of docs/guidance.md from what was measured."""
    results = [
        json.loads(path.read_text()) for name in GUIDANCE if (path := options.out / "results" / f"{name}.json").exists()
    ]
    times_path = options.out / "results" / "times.json"
    times = json.loads(times_path.read_text()) if times_path.exists() else {"rows": {}}
    labels = ["alone", *SURGERY]
    print(f"| guidance | evaluations a step | time | {' | '.join(labels)} |")
    print("|---" * (3 + len(labels)) + "|")
    for result in results:
        cost = times["rows"].get(result["guidance"])
        costs = [f"{cost['evaluations']:.2g}", f"{cost['ratio']:.2f}x"] if cost else ["not run", "not run"]
        print(f"| {' | '.join([result['guidance'], *costs, *(cell(result['rows'].get(one)) for one in labels)])} |")
    if options.results:
        write_json(options.results, {"times": times, "scores": results})


def main():
    """Carry out one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("score", "time", "table"))
    parser.add_argument("--out", type=Path, default=Path("work"), help="images, values and results")
    parser.add_argument("--methods", nargs="+", choices=GUIDANCE, default=list(GUIDANCE), metavar="METHOD")
    parser.add_argument("--limit", type=int, default=320, help="prompts, evenly spaced")
    parser.add_argument("--images", type=int, default=2, help="images for each prompt")
    parser.add_argument("--alone", action="store_true", help="score: without operators")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, help="table: write everything into this JSON file too")
    options = parser.parse_args()
    (options.out / "results").mkdir(parents=True, exist_ok=True)
    {"score": run_scores, "time": run_times, "table": run_table}[options.stage](options)


if __name__ == "__main__":
    main()
