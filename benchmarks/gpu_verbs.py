"""Sections `engine` and `verbs` of benchmarks/gpu.py: what a user types, on the trained shapes pipeline.

An AOTInductor engine is built by the command line, loaded, run and tuned beside eager; `surgery generate` and
`surgery validate` run on the device, and `--device cpu` is in float32 there.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from gpu_models import relative

import surgery

PROMPT = "a red circle to the left of a blue square"
SAMPLING = {"num_inference_steps": 8, "guidance_scale": 4.0, "height": 64, "width": 64, "output_type": "np"}


def engine(report):
    """The section `engine`."""
    with tempfile.TemporaryDirectory() as folder:
        artifact = applied(report, folder)
        built = report.attempt("export", lambda: command(report, "export", artifact, "--target", "inductor"))
        if built is None:
            return
        (made,) = json.loads(built.stdout)["engines"]
        report.row(
            what="export --target inductor",
            seconds=built.seconds,
            error=made["difference"]["relative"],
            result=f"{made['dtype']} on {made['built_on']['name']}",
        )
        report.attempt("load, run, tune", lambda: compare_with_eager(report, artifact, made["key"]))


def compare_with_eager(report, artifact, key):
    """Rows of the engine's images beside eager's, before and after a change of scale."""
    start = time.perf_counter()
    compiled = surgery.load(artifact, device=report.device, engine=key, quiet=True)
    seconds = time.perf_counter() - start
    eager = surgery.load(artifact, device=report.device, dtype=compiled.unet.dtype, quiet=True)
    report.row(what="load", seconds=seconds, result=f"{compiled.unet.dtype}")
    before = drawn(compiled)
    report.row(what="draw, 8 steps", error=relative(before, drawn(eager)))
    for pipeline in (compiled, eager):  # at a scale of 4 an image follows its last bit, and no two kernels draw one
        surgery.tune(pipeline, scale=2.0)
    after = drawn(compiled)
    changed = relative(after, before)
    report.row(what="tune", error=relative(after, drawn(eager)), result=f"the image changed by {changed:.2g}")


def verbs(report):
    """The section `verbs`."""
    with tempfile.TemporaryDirectory() as folder:
        artifact = applied(report, folder)
        image = Path(folder) / "drawn.png"
        devices = (report.device,) if report.is_tiny else (report.device, "cpu")
        for device in devices:
            report.attempt(
                f"generate --device {device}", lambda device=device: generate(report, artifact, image, device)
            )
        few = ("--prompts", "shapes", "--limit", "2" if report.is_tiny else "16", "--metrics", "shape_alignment")
        report.attempt("validate", lambda: validate(report, artifact, few, Path(folder) / "validation"))


def generate(report, artifact, image, device):
    """A row of `surgery generate`: how long, and in which dtype."""
    image.unlink(missing_ok=True)
    given = ("generate", artifact, PROMPT, "--steps", "2" if report.is_tiny else "25", "--out", image)
    done = command(report, *given, device=device, as_json=False)
    dtype = next((name for name in ("bfloat16", "float16", "float32") if f"; {name}" in done.stderr), "unknown dtype")
    wanted = "float32" if device == "cpu" else "float16"
    verdict = "as it should be" if dtype == wanted else f"**{wanted} was to be**"
    size = f"{image.stat().st_size} bytes" if image.is_file() else "**no image**"
    report.row(what=f"generate --device {device}", seconds=done.seconds, result=f"{dtype}, {verdict}; {size}")


def validate(report, artifact, few, out):
    """A row of `surgery validate`."""
    done = command(report, "validate", artifact, *few, "--out", out)
    metrics = json.loads(done.stdout)["metrics"]
    found = ", ".join(f"{metric['name']} {metric['base']:.3g} to {metric['patched']:.3g}" for metric in metrics)
    report.row(what=" ".join(("validate", *few)), seconds=done.seconds, result=found)


def applied(report, folder):
    """The folder of the shapes recipe's artifact, written now."""
    start = time.perf_counter()
    artifact = surgery.apply("shapes", Path(folder) / "shapes").folder
    report.row(what="apply", seconds=time.perf_counter() - start)
    return artifact


def drawn(pipeline):
    """An image as a tensor, always from the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **SAMPLING).images
    return torch.from_numpy(images)


def command(report, *arguments, device=None, as_json=True):
    """A finished `surgery ...` with the seconds that it took; RuntimeError where it failed."""
    line = [sys.executable, "-m", "surgery", *map(str, arguments), "--device", device or report.device]
    start = time.perf_counter()
    done = subprocess.run(
        [*line, *(("--json",) if as_json else ())],
        capture_output=True,
        text=True,
        timeout=max(1, report.left() - 1),
    )
    done.seconds = time.perf_counter() - start
    if done.returncode:
        last = done.stderr.strip().splitlines()[-3:]
        raise RuntimeError(f"exit {done.returncode}: {' / '.join(last)}")
    return done
