"""An artifact of a tiny SDXL with engines, built once for all tests and worker processes."""

import shutil
import socket

import numpy as np
import torch
from filelock import FileLock

import surgery
from surgery.engines.record import parse_profile
from surgery.export.engines.build import Wanted, build_engine
from surgery.runtime.draw import draw

from ..tiny import tiny_sdxl

RECIPE = """schema: 1
name: tiny-pladis
base: {pipeline: ./base}
operations:
  - replace: cross-attention
    with: {operator: pladis, alpha: 1.5, scale: 2.0}
sampling: {steps: 2, guidance_scale: 4.0, height: 64, width: 64}
"""
REGIONAL = Wanted(target="inductor", regional=True, profile=parse_profile("1..2x64..128x64..128"), device="cpu")
ONNX = Wanted(target="onnx", device="cpu")
JOBS = [("a cat", 3)]
SAMPLING = {"steps": 2, "guidance_scale": 4.0, "height": 64, "width": 64}


def built_once(folder):
    """The folder of an artifact with two engines of its UNet, regional inductor and ONNX; tests copy it."""
    out = folder / "engines-artifact"
    with FileLock(folder / "engines-artifact.lock"):
        if not (folder / "engines-artifact.done").exists():
            shutil.rmtree(out, ignore_errors=True)
            write_artifact(folder, out)
            for wanted in (REGIONAL, ONNX):
                with one_package():
                    build_engine(out, wanted)
            (folder / "engines-artifact.done").touch()
    return out


def one_package():
    """Torch's headers are not compiled ahead, which pays where many packages are built after one another."""
    from torch._inductor import config

    return config.patch({"aot_inductor.precompile_headers": False})


def write_artifact(folder, out):
    """Write the tiny base, its recipe and the artifact into `out`."""
    if not (folder / "base").exists():
        tiny_sdxl(blocks=1, up=False)[0].save_pretrained(folder / "base")
    (folder / "recipe.yaml").write_text(RECIPE)
    surgery.apply(folder / "recipe.yaml", out)
    return out


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def key_of(artifact, backend):
    return next(path.parent.name for path in artifact.glob("engines/*/engine.json") if backend in path.parent.name)


def load(artifact, **arguments):
    return surgery.load(artifact, quiet=True, **arguments)


def image(pipeline, **sampling):
    """uint8 pixels as floats of one image, and its latents' seed is always the same."""
    return torch.from_numpy(np.asarray(draw(pipeline, JOBS, {**SAMPLING, **sampling})[0]).astype("float32"))


def assert_same_image(one, other):
    assert one.shape == other.shape and (one - other).abs().max() <= 2
