"""Training-free surgery on diffusers pipelines: PLADIS cross-attention, as an artifact that anyone can load.

    pipe = surgery.patch(pipe, operator="pladis", alpha=1.5, scale=2.0, layers="all")
    surgery.tune(pipe, scale=1.5)
    surgery.unpatch(pipe)
    artifact = surgery.apply("recipes/sdxl_dmd2.yaml", out="out/sdxl-dmd2-pladis")
    pipe = surgery.load("out/sdxl-dmd2-pladis")
    surgery.push("out/sdxl-dmd2-pladis", "owner/sdxl-dmd2-pladis")

Importing the package imports nothing heavy; torch and diffusers come with the first use.
"""

import importlib

# The modules are not named after their functions: importing surgery.patch would put the module in the function's place.
_HOMES = {
    "apply": "surgery.applying",
    "guide": "surgery.guidance",
    "invert": "surgery.analysis.inversion.inverting",
    "load": "surgery.runtime.load",
    "patch": "surgery.models.patching",
    "push": "surgery.export.publish",
    "tune": "surgery.models.patching",
    "unguide": "surgery.guidance",
    "unpatch": "surgery.models.patching",
    "verify": "surgery.artifact.verify",
}

__all__ = ["apply", "guide", "invert", "load", "nn", "patch", "push", "tune", "unguide", "unpatch", "verify"]


def __getattr__(name):
    if name == "nn":
        return importlib.import_module("surgery.nn")
    if name not in _HOMES:
        raise AttributeError(f"module 'surgery' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
    return sorted([*globals(), *__all__])
