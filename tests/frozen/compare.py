"""Draw the frozen artifacts by diffusers alone, and print how far each image is from the one that was frozen with it.

    python tests/frozen/compare.py [VERSION ...]

It needs torch, diffusers, transformers and safetensors, each of whatever release is to be tried, and not this package.
"""

import runpy
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent


def difference(version):
    """(patched modules, the largest difference of a pixel, of 1) of a version's artifact."""
    from diffusers import DiffusionPipeline
    from safetensors.torch import load_file

    folder = HERE / version
    pipeline = DiffusionPipeline.from_pretrained(folder / "artifact", trust_remote_code=True, dtype=torch.float32)
    patched = sum(hasattr(module, "pladis_alpha") for module in pipeline.unet.modules())
    drawn = runpy.run_path(str(HERE / "make.py"))["draw"](pipeline)
    return patched, (drawn - load_file(folder / "expected.safetensors")["image"]).abs().max().item()


if __name__ == "__main__":
    for version in sys.argv[1:] or sorted(path.name for path in HERE.glob("0.*")):
        patched, largest = difference(version)
        print(f"{version}: {patched} patched modules, torch {torch.__version__}, largest difference {largest:.1e} of 1")
