"""Whole pipelines beside each other in one run: unpatched eager, patched eager, compiled, and as an engine.

    python benchmarks/engines.py                       # the shapes pipeline, on the device that is there
    python benchmarks/engines.py --model sdxl-small    # SDXL's UNet at a quarter of its width, random weights
    python benchmarks/engines.py --model sdxl --dtype bf16 --size 1024 --images 1     # on a GPU

Builds the artifact and its engines in a temporary folder, or in --out, where engines that are there are used again.
Every variant draws the same images once a round; prints images a second, medians, and their ratio to unpatched eager.
Compile and build times are told apart.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from sdxl_folder import FULL, SMALL, write_folder

import surgery
from surgery.cli.given import dtype_of
from surgery.console import quiet_bars, quiet_notices
from surgery.engines.compiling import call_times
from surgery.engines.record import Profile
from surgery.export.engines.build import Wanted, build_engine
from surgery.machine import best_device
from surgery.runtime.draw import draw

RECIPE = """schema: 1
name: benchmark
base: {{pipeline: {base}}}
operations:
  - replace: cross-attention
    with: {{operator: pladis, alpha: 1.5, scale: 2.0}}
sampling: {{steps: {steps}, guidance_scale: 4.0, height: {size}, width: {size}}}
"""
TARGETS = ["inductor", "inductor-weights", "inductor-weights-vae", "inductor-regional"]
PROMPT = "a red circle to the left of a blue square"


def write_artifact(folder, model, size, steps):
    """The artifact's folder of a model, written where it is not there yet."""
    if not (folder / "artifact" / "surgery.json").exists():
        if model != "shapes":
            write_folder(folder / "base", SMALL if model == "sdxl-small" else FULL)
        base = "shapes" if model == "shapes" else "base"
        if model == "shapes":
            (folder / "shapes").symlink_to(Path(__file__).parent.parent / "recipes" / "shapes")
        (folder / "recipe.yaml").write_text(RECIPE.format(base=f"./{base}", steps=steps, size=size))
        surgery.apply(folder / "recipe.yaml", folder / "artifact")
    return folder / "artifact"


def variants(artifact, dtype, device, engines, modes):
    """{label: pipeline}, each loaded of its own; engines: lists of those that one pipeline has."""

    def load(**arguments):
        return surgery.load(artifact, dtype=dtype, quiet=True, **arguments).to(device)

    made = {"unpatched": surgery.unpatch(load()), "patched": load()}
    for mode in modes:
        made[f"unpatched, torch.compile {mode}"] = surgery.unpatch(load(compile=mode))
        made[f"patched, torch.compile {mode}"] = load(compile=mode)
    for first, *further in engines:
        kind = "regional" if first.options["regional"] else "whole"
        kind += ", own weights" if first.backend == "inductor" and first.weights == "engine" else ""
        kind += "".join(f", and {engine.component}" for engine in further)
        name = {"inductor": "AOTInductor", "onnx": "ONNX Runtime", "tensorrt": "TensorRT"}[first.backend]
        keys = ",".join(engine.key for engine in (first, *further))
        made[f"patched, {name} {kind}"] = load(engine=keys, device=device)
    return made


def measure(pipelines, images, sampling, rounds, device):
    """{label: [seconds of a draw]}, after one round that compiles and warms up."""
    jobs = [(PROMPT, seed) for seed in range(images)]
    times = {label: [] for label in pipelines}
    for done in range(-1, rounds):
        for label, pipeline in pipelines.items():
            started = time.perf_counter()
            draw(pipeline, jobs, sampling)
            if device == "cuda":
                torch.cuda.synchronize()
            if done >= 0:
                times[label].append(time.perf_counter() - started)
        print(f"\r  round {done + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    print("\r" + " " * 30 + "\r", end="", file=sys.stderr)
    return times


def main():
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("shapes", "sdxl-small", "sdxl"), default="shapes")
    parser.add_argument("--device", default=best_device())
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--size", type=int, help="pixels; the model's own unless given")
    parser.add_argument("--images", type=int, default=2, help="drawn at once (%(default)s)")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compile", nargs="*", default=["regional"], choices=("regional", "full", "max-autotune"))
    parser.add_argument("--targets", nargs="*", default=TARGETS, help="%(default)s")
    parser.add_argument("--out", type=Path, help="where artifact and engines stay")
    options = parser.parse_args()
    quiet_notices()
    quiet_bars()
    torch.set_grad_enabled(False)
    size = options.size or {"shapes": 64, "sdxl-small": 256, "sdxl": 1024}[options.model]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        artifact = write_artifact(folder, options.model, size, options.steps)
        dtype, device = dtype_of(options.dtype), options.device
        engines = []

        def say(text):
            print(f"  {text}", file=sys.stderr)

        for target in options.targets:
            backend, *kinds = target.split("-")
            wanted = Wanted(
                target=backend,
                profile=Profile.of(options.images, size, size),
                dtype=dtype,
                device=device,
                regional="regional" in kinds,
                weights="engine" if "weights" in kinds else "artifact",
            )
            parts = [replace(wanted, component=part) for part in (None, *(["vae"] if "vae" in kinds else []))]
            engines.append([build_engine(artifact, part, say)[0] for part in parts])
        pipelines = variants(artifact, dtype, device, engines, options.compile)
        sampling = {"steps": options.steps, "guidance_scale": 4.0, "height": size, "width": size}
        times = measure(pipelines, options.images, sampling, options.rounds, device)
        name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        print(
            f"{options.model}, {size} x {size}, {options.images} images at once, {options.steps} steps, "
            f"{options.dtype}, {name}, torch {torch.__version__}, medians of {options.rounds} rounds"
        )
        first = statistics.median(times["unpatched"])
        for label, seconds in times.items():
            middle = statistics.median(seconds)
            report = call_times(pipelines[label].unet)
            took = f"  (first call {report.report()['first_call_seconds']:.0f} s)" if report else ""
            print(f"  {label:48s} {options.images / middle:9.3f} images/s {first / middle:7.2f}x{took}")
        for engine in {engine.key: engine for together in engines for engine in together}.values():
            size = sum(file.size for file in engine.files.values())
            print(
                f"  {engine.key}: built in {sum(engine.seconds.values()):.0f} s, {size / 1e6:.1f} MB, relative "
                f"difference {engine.difference.relative:.1g}"
            )


if __name__ == "__main__":
    sys.exit(main())
