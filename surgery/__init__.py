"""Training-free surgery on diffusers pipelines: PLADIS cross-attention, as an artifact that anyone can load.

    pipe = surgery.patch(pipe, operator="pladis", alpha=1.5, scale=2.0, layers="all")
    surgery.tune(pipe, scale=1.5)
    surgery.unpatch(pipe)
    artifact = surgery.apply("recipes/sdxl_dmd2.yaml", out="out/sdxl-dmd2-pladis")
    pipe = surgery.load("out/sdxl-dmd2-pladis")
    surgery.push("out/sdxl-dmd2-pladis", "owner/sdxl-dmd2-pladis")

Scores are in surgery.validate, engines and the server in surgery.export, the operators themselves in surgery.nn.
Importing the package imports nothing heavy; torch and diffusers come with the first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    ArtifactError,
    BaseError,
    BaseNotFoundError,
    InputError,
    Problem,
    PublishError,
    RecipeError,
    SurgeryError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from . import export, nn, validate
    from .analysis.diagnostics import diagnose
    from .analysis.inversion.inverting import invert
    from .applying import apply
    from .artifact.verify import verify
    from .export.publish import push
    from .export.serve import serve
    from .guidance import guide, unguide
    from .models.inspecting import inspect_model as inspect
    from .models.negative import negative, regions
    from .models.patching import patch, tune, unpatch
    from .papers.reproducing import reproduce
    from .recipe.plan import make_plan as plan
    from .runtime.draw import generate
    from .runtime.load import load

    __version__: str

# The modules are not named after their functions: importing surgery.patch would put the module in the function's place.
_HOMES = {
    "apply": "surgery.applying:apply",
    "diagnose": "surgery.analysis.diagnostics:diagnose",
    "generate": "surgery.runtime.draw:generate",
    "guide": "surgery.guidance:guide",
    "inspect": "surgery.models.inspecting:inspect_model",
    "invert": "surgery.analysis.inversion.inverting:invert",
    "load": "surgery.runtime.load:load",
    "negative": "surgery.models.negative:negative",
    "regions": "surgery.models.negative:regions",
    "patch": "surgery.models.patching:patch",
    "plan": "surgery.recipe.plan:make_plan",
    "push": "surgery.export.publish:push",
    "reproduce": "surgery.papers.reproducing:reproduce",
    "serve": "surgery.export.serve:serve",
    "tune": "surgery.models.patching:tune",
    "unguide": "surgery.guidance:unguide",
    "unpatch": "surgery.models.patching:unpatch",
    "verify": "surgery.artifact.verify:verify",
}
_ROOMS = ("export", "nn", "validate")

__all__ = [
    "ArtifactError",
    "BaseError",
    "BaseNotFoundError",
    "InputError",
    "Problem",
    "PublishError",
    "RecipeError",
    "SurgeryError",
    "UnsupportedModelError",
    "__version__",
    "apply",
    "diagnose",
    "export",
    "generate",
    "guide",
    "inspect",
    "invert",
    "load",
    "negative",
    "nn",
    "patch",
    "plan",
    "push",
    "regions",
    "reproduce",
    "serve",
    "tune",
    "unguide",
    "unpatch",
    "validate",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("pladis-surgery")
    if name in _ROOMS:
        return importlib.import_module(f"surgery.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'surgery' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
