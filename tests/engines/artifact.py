"""An artifact of a tiny SDXL with engines, built once for all tests and worker processes."""

import shutil

from filelock import FileLock

import surgery
from surgery.engines.record import parse_profile
from surgery.export.engines.build import Wanted, build_engine

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


def built_once(folder):
    """The folder of an artifact with two engines of its UNet, regional inductor and ONNX; tests copy it."""
    out = folder / "engines-artifact"
    with FileLock(folder / "engines-artifact.lock"):
        if not (folder / "engines-artifact.done").exists():
            shutil.rmtree(out, ignore_errors=True)
            write_artifact(folder, out)
            for wanted in (REGIONAL, ONNX):
                build_engine(out, wanted)
            (folder / "engines-artifact.done").touch()
    return out


def write_artifact(folder, out):
    """Write the tiny base, its recipe and the artifact into `out`."""
    if not (folder / "base").exists():
        tiny_sdxl(blocks=1, up=False)[0].save_pretrained(folder / "base")
    (folder / "recipe.yaml").write_text(RECIPE)
    surgery.apply(folder / "recipe.yaml", out)
    return out
