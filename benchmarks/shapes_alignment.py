"""How PLADIS changes the prompt alignment of the tiny shapes pipeline: dense beside several scales, same seeds.

    python benchmarks/shapes_alignment.py [--per-category 100] [--scales 0.5 1 2]

One image per prompt. Per setting: the share of prompts whose image shows what it says, with its standard error, the
paired difference from dense with a 95% bootstrap interval over prompts, and the share per category. Prints JSON.
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

import surgery
from surgery.validate.shapes import detect, is_satisfied, shapes_prompts
from surgery.validate.shapes.prompts import CATEGORIES

SHAPES = Path(__file__).parent.parent / "recipes" / "shapes"


def satisfied(pipeline, prompts, batch=25):
    """For each prompt, whether its image (seeded by the prompt's number) satisfies it."""
    results = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        seeds = [torch.Generator().manual_seed(5000 + start + offset) for offset in range(len(some))]
        images = pipeline(
            [prompt.text for prompt in some],
            generator=seeds,
            num_inference_steps=20,
            guidance_scale=4.0,
            height=64,
            width=64,
            output_type="np",
        ).images
        images = (images * 255).round().astype(np.uint8)
        results += [is_satisfied(prompt.facts, detect(image)) for prompt, image in zip(some, images, strict=True)]
        print(f"{start + len(some)}/{len(prompts)}", end="\r", file=sys.stderr)
    return np.array(results, float)


def row(results, dense, prompts, random):
    """The figures of one setting."""
    difference = results - dense
    draws = random.integers(len(results), size=(2000, len(results)))
    low, high = np.percentile(difference[draws].mean(1), [2.5, 97.5])
    return {
        "aligned": round(results.mean(), 3),
        "standard_error": round(results.std(ddof=1) / len(results) ** 0.5, 3),
        "difference_from_dense": round(difference.mean(), 3),
        "interval_95": [round(low, 3), round(high, 3)],
        "by_category": {
            category: round(np.mean([r for r, p in zip(results, prompts, strict=True) if p.category == category]), 2)
            for category in CATEGORIES
        },
    }


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-category", type=int, default=100)
    parser.add_argument("--scales", type=float, nargs="*", default=[0.5, 1.0, 2.0])
    parser.add_argument("--alpha", type=float, default=1.5)
    arguments = parser.parse_args()
    prompts = shapes_prompts(arguments.per_category).prompts
    pipeline = DiffusionPipeline.from_pretrained(SHAPES, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    random = np.random.default_rng(0)
    dense = satisfied(pipeline, prompts)
    settings = {"dense": row(dense, dense, prompts, random)}
    surgery.patch(pipeline, alpha=arguments.alpha)
    for scale in arguments.scales:
        surgery.tune(pipeline, scale=scale)
        settings[f"scale {scale:g}"] = row(satisfied(pipeline, prompts), dense, prompts, random)
    machine = f"{os.cpu_count()} CPUs, {platform.platform()}, torch {torch.__version__}"
    print(json.dumps({"machine": machine, "prompts": len(prompts), "alpha": arguments.alpha, **settings}, indent=2))


if __name__ == "__main__":
    main()
