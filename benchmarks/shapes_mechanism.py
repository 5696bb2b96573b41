"""Which part of alpha-entmax costs the shapes pipeline its second object.

    python benchmarks/shapes_mechanism.py --out docs

The images of the same prompts and seeds are drawn with each of the two changes that alpha-entmax makes to softmax's
weights (surgery/analysis/mechanism.py) and judged as `surgery validate` does. Writes shapes_mechanism.json into --out
and prints a line for each variant.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from surgery.analysis.mechanism import VARIANTS, mixed_attention
from surgery.artifact.manifest import write_json
from surgery.console import progress_bar, quiet_bars
from surgery.runtime.draw import draw
from surgery.runtime.load import open_model
from surgery.validate.jobs import jobs_of
from surgery.validate.metrics.shape_alignment import ShapeAlignment
from surgery.validate.prompts import open_prompts
from surgery.validate.session import hardware
from surgery.validate.statistics import paired

SAMPLING = {"steps": 25, "guidance_scale": 4.0, "height": 64, "width": 64}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=400, help="prompts of shapes-dev (default: %(default)s)")
    parser.add_argument("--alpha", type=float, default=1.5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    quiet_bars()
    pipeline, _, _ = open_model("recipes/shapes")
    chosen = open_prompts("shapes-dev", limit=options.limit)
    jobs = jobs_of(chosen)
    scorer = ShapeAlignment({}, None)
    verdicts = {name: [] for name in VARIANTS}
    with progress_bar("drawing", len(jobs) * len(VARIANTS), "images") as advance, torch.no_grad():
        for start in range(0, len(jobs), options.batch):
            part = jobs[start : start + options.batch]
            prompts = [job.prompt.text for job in part]
            for name, found in verdicts.items():
                with mixed_attention(pipeline, name, prompts, options.alpha):
                    images = draw(pipeline, [(job.prompt.text, job.seed) for job in part], SAMPLING)
                found += list(scorer.score(images, [job.prompt for job in part]))
                advance(len(part))
    results = summary(verdicts, chosen.prompts)
    options.out.mkdir(parents=True, exist_ok=True)
    facts = {"prompts": "shapes-dev", "count": len(jobs), "alpha": options.alpha, "sampling": SAMPLING}
    write_json(options.out / "shapes_mechanism.json", {**facts, "hardware": hardware("cpu"), "variants": results})
    for name, groups in results.items():
        for group, figures in groups.items():
            ends = " to ".join(f"{100 * end:+.1f}" for end in figures["interval"])
            print(
                f"{name:42} {group:14} n {figures['n']:4}  {figures['aligned']:.1%}  "
                f"{100 * figures['difference']:+.1f} ({ends})"
            )


def summary(verdicts, prompts):
    """{variant: {"all" or "two_objects": share aligned, and the paired difference from softmax}}."""
    group = np.unique([prompt.text for prompt in prompts], return_inverse=True)[1]
    two_objects = np.array([prompt.category == "two_objects" for prompt in prompts])
    verdicts = {name: np.array(found) for name, found in verdicts.items()}
    results = {}
    for name, found in verdicts.items():
        results[name] = {}
        for subset, chosen in {"all": np.ones_like(two_objects), "two_objects": two_objects}.items():
            pair = paired(verdicts["softmax"][chosen], found[chosen], group[chosen])
            results[name][subset] = {
                "n": pair.n,
                "aligned": pair.patched,
                "difference": pair.difference,
                "interval": list(pair.interval),
            }
    return results


if __name__ == "__main__":
    main()
