"""How near the shapes pipeline comes to an image that it carries to noise by DDIM and back, by each operator.

    python benchmarks/inversion.py [--images 200] [--steps 25] [--batch 20] [--out out/inversion.png]

GAG's experiment (arXiv 2603.02531, Appendix I) on scenes rendered as the pipeline's training images were, each with one
of its captions, at guidance 1: dense attention inverting for all sides, as the paper starts them from one latent, and
each side for itself. The operators have their defaults. Prints a Markdown table of mean SSIM and PSNR to the image and
to the image after the autoencoder alone, with the difference from dense and its 95% interval, bootstrapped over the
images.
"""

import argparse
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import surgery
from surgery.analysis.inversion.inverting import INVERTED_BY
from surgery.analysis.inversion.pictures import sheet
from surgery.recipes.shapes.scenes import SHIPPED_HELD_OUT, captions, render, sample_scene

PIPELINE = Path(__file__).parent.parent / "recipes" / "shapes"
WAYS = {"dense": "inverted by dense attention", "same": "inverted by the side's own operator"}
COLUMNS = [(target, metric) for target in ("image", "round_trip") for metric in ("ssim", "psnr")]


def scenes(count, seed):
    """([PIL image], [caption]) of scenes that the captions of the training can say."""
    random = np.random.default_rng(seed)
    images, texts = [], []
    while len(images) < count:
        scene = sample_scene(random, SHIPPED_HELD_OUT)
        if said := captions(scene):
            images.append(Image.fromarray(render(scene.objects, scene.background)))
            texts.append(said[int(random.integers(len(said)))])
    return images, texts


def lines(found):
    """A Markdown table of Inversions by how they were inverted."""
    titles = [f"{metric.upper()} to the {target.replace('_', ' ')}" for target, metric in COLUMNS]
    yield f"| side | {' | '.join(titles)} |"
    yield "|---" * (1 + len(COLUMNS)) + "|"
    first = next(iter(found.values()))
    yield f"| VAE round trip | {' | '.join(_cell(first.round_trip, *column) for column in COLUMNS)} |"
    yield f"| dense | {' | '.join(_cell(first.sides['dense'], *column) for column in COLUMNS)} |"
    for way, inversion in found.items():
        for name, side in inversion.sides.items():
            if name != "dense":
                yield f"| {name}, {WAYS[way]} | {' | '.join(_cell(side, *column) for column in COLUMNS)} |"


def _cell(side, target, metric):
    mean = side.scores.get(target, {}).get(metric)
    if mean is None:
        return ""
    digits = 4 if metric == "ssim" else 2
    if mean.difference is None:
        return f"{mean.mean:.{digits}f}"
    low, high = mean.interval
    return f"{mean.mean:.{digits}f}, {mean.difference:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--inverted-by", nargs="+", choices=INVERTED_BY, default=list(WAYS))
    parser.add_argument("--out", type=Path, help="also write a PNG of the first images")
    options = parser.parse_args()
    images, texts = scenes(options.images, options.seed)
    pipeline = DiffusionPipeline.from_pretrained(PIPELINE, dtype=torch.float32).to(options.device)
    started, found = time.perf_counter(), {}
    for way in options.inverted_by:
        found[way] = surgery.invert(
            pipeline, images, texts, steps=options.steps, inverted_by=way, batch=options.batch, keep=4
        )
        print(f"{WAYS[way]}: done after {time.perf_counter() - started:.0f} s", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        sheet(next(iter(found.values()))).save(options.out)
    machine = f"{os.cpu_count()} CPU cores" if options.device == "cpu" else torch.cuda.get_device_name()
    print(
        f"{options.images} images, {options.steps} steps; {machine}, {platform.system()}, torch {torch.__version__}\n"
    )
    print("\n".join(lines(found)))


if __name__ == "__main__":
    main()
