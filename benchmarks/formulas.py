"""What the papers' formulas do to the shapes pipeline, every row on the same prompts and seeds, beside plain CFG.

    python benchmarks/formulas.py --out work --workers 2                  # 320 prompts, 2 images each
    python benchmarks/formulas.py --out work --results docs/formulas.json --page docs/formulas.md

The rows are those of `surgery.validate.score_rows`: a run that was stopped goes on where it was.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from surgery.artifact.manifest import write_json
from surgery.validate import Drawing, Row, score_rows

SAMPLING = {"steps": 12, "guidance_scale": 4.0}
GUIDANCE = {  # name -> a recipe's `guidance`, of the unpatched model
    "OSEG, U and C weakened (the slides)": {"method": "oseg", "layers": "all"},
    "OSEG, C alone weakened": {"method": "oseg", "layers": "all", "unconditional": "plain"},
}
OPERATORS = {  # name -> an operation's `with`
    "PLADIS, scale 1": {"operator": "pladis", "scale": 1.0},
    "the same, sparse temperature 0.5": {"operator": "pladis", "scale": 1.0, "sparse_temperature": 0.5},
    "the same, sparse temperature 2": {"operator": "pladis", "scale": 1.0, "sparse_temperature": 2.0},
    "Anderson, fixed weights": {"operator": "anderson"},
    "Anderson, least squares": {"operator": "anderson_least_squares"},
    "Anderson, history": {"operator": "anderson_history"},
}


def rows() -> list[Row]:
    """The rows, plain CFG first."""
    sampling = tuple(f"sampling.{key}={value}" for key, value in SAMPLING.items())
    guided = [
        Row(name, "shapes", (*sampling, f"guidance={json.dumps(given)}"), patched=False)
        for name, given in GUIDANCE.items()
    ]
    patched = [
        Row(name, "shapes", (*sampling, f"operations.0.with={json.dumps(given)}")) for name, given in OPERATORS.items()
    ]
    return [Row("CFG", "shapes", sampling, patched=False), *guided, *patched]


def page(found: dict[str, Any]) -> str:
    """The results as a page of the documentation."""
    lines = [
        "# The papers' formulas on the shapes model",
        "",
        f"`python benchmarks/formulas.py --out work --workers 2`: {found['n']} images a row on shapes-dev, "
        f"{SAMPLING['steps']} steps, guidance_scale {SAMPLING['guidance_scale']:g}, all on the same prompts and seeds; "
        f"{found['machine']}. Aligned is the share of images that show what their prompt says; the difference is from "
        "CFG alone, in points, with its 95% interval over the prompts. [formulas.json](formulas.json) has it all; the "
        "formulas are in [operators](operators.md) and [guidance](guidance.md).",
        "",
        "| row | aligned | difference | verdict |",
        "|---|---|---|---|",
    ]
    for row in found["rows"]:
        low, high = (100 * end for end in row["interval"] or (0, 0))
        difference = "" if row["difference"] is None else f"{100 * row['difference']:+.1f} ({low:+.1f} to {high:+.1f})"
        lines.append(f"| {row['name']} | {row['aligned']:.1%} | {difference} | {row['verdict']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Draw, score and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the work folder")
    parser.add_argument("--limit", type=int, default=320, help="prompts")
    parser.add_argument("--images", type=int, default=2, help="of each prompt")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--results", type=Path, help="a JSON file to write")
    parser.add_argument("--page", type=Path, help="a Markdown file to write")
    options = parser.parse_args()
    done = score_rows(
        rows(),
        out=options.out,
        prompts="shapes-dev",
        limit=options.limit,
        images_per_prompt=options.images,
        metrics=["shape_alignment"],
        drawing=Drawing(workers=options.workers),
        announce=lambda there, lacking, batch: print(f"{there} images there, {lacking} to draw", flush=True),
        against="CFG",
    )
    found = {"n": len(done.jobs), "machine": "2 CPU cores, torch 2.13", "rows": []}
    for row in done.rows:
        metric = row.metric("shape_alignment")
        assert metric is not None
        interval = list(metric.paired.interval) if metric.paired else None
        named = {"difference": metric.difference, "interval": interval, "verdict": metric.verdict}
        found["rows"].append({"name": row.name, "aligned": metric.value, **named})
    print(page(found))
    if options.results:
        write_json(options.results, found)
    if options.page:
        options.page.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
