"""How often the detector behind `shape_alignment` finds exactly what a scene holds.

    python benchmarks/shape_detector.py [--rendered 6000] [--reconstructed 3000] [--seed 77]

Scenes of one to four objects, as the shapes pipeline was trained on, rendered, and encoded and decoded by its
autoencoder. Prints JSON: the share of images in which the (colour, shape) of all objects are found and nothing else, in
all and by the number of objects, and the milliseconds that an image takes.
"""

import argparse
import json
import os
import platform
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from surgery.recipes.shapes.scenes import detect, render, sample_scene

VAE = Path(__file__).parent.parent / "recipes" / "shapes" / "vae"


def reconstructed(images, batch=20):
    """uint8 images (n, 64, 64, 3) through the autoencoder."""
    autoencoder = AutoencoderKL.from_pretrained(VAE, dtype=torch.float32)
    decoded = []
    for start in range(0, len(images), batch):
        pixels = torch.from_numpy(images[start : start + batch]).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            some = autoencoder.decode(autoencoder.encode(pixels).latent_dist.mean).sample
        decoded.append(((some.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(decoded)


def figures(scenes, images):
    """The shares of images that are read right, and how long that takes."""
    started = time.perf_counter()
    found = [Counter((one.colour, one.shape) for one in detect(image)) for image in images]
    took = time.perf_counter() - started
    drawn = [Counter((one.colour, one.shape) for one in scene.objects) for scene in scenes]
    right = np.array([a == b for a, b in zip(found, drawn, strict=True)])
    sizes = np.array([len(scene.objects) for scene in scenes])
    return {
        "images": len(images),
        "right": round(float(right.mean()), 5),
        "by_number_of_objects": {str(size): round(float(right[sizes == size].mean()), 5) for size in np.unique(sizes)},
        "milliseconds_an_image": round(1000 * took / len(images), 2),
    }


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rendered", type=int, default=6000)
    parser.add_argument("--reconstructed", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=77)
    arguments = parser.parse_args()
    random = np.random.default_rng(arguments.seed)
    scenes = [sample_scene(random) for _ in range(max(arguments.rendered, arguments.reconstructed))]
    images = np.stack([render(scene.objects, scene.background) for scene in scenes])
    detect(images[0])  # makes the templates
    some = arguments.reconstructed
    machine = f"{os.cpu_count()} CPUs, {platform.platform()}, torch {torch.__version__}"
    result = {"machine": machine, "seed": arguments.seed}
    result["rendered"] = figures(scenes[: arguments.rendered], images[: arguments.rendered])
    result["reconstructed"] = figures(scenes[:some], reconstructed(images[:some]))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
