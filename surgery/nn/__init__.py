"""The attention operators, the modules that hold them, and the model classes that hold the modules.

This folder imports torch, diffusers and itself only: its code is what an artifact ships (`shipped.py`). torch comes
with the first use, so that the tables of operators and backbones can be read without it.
"""

import importlib
from typing import TYPE_CHECKING

from .backbones import BACKBONES, PATCHED, backbone_of

if TYPE_CHECKING:
    from .backbones.cross import PladisAttention
    from .backbones.unet import PladisUNet2DConditionModel
    from .functional import attention
    from .joint import decompositions, joint_attention
    from .kernels.entmax import entmax
    from .module import is_pladis

# No module here is named after its function: importing it would put the module in the function's place.
_HOMES = {
    "PladisAttention": ".backbones.cross",
    "PladisUNet2DConditionModel": ".backbones.unet",
    "attention": ".functional",
    "decompositions": ".joint",
    "entmax": ".kernels.entmax",
    "is_pladis": ".module",
    "joint_attention": ".joint",
}

__all__ = [
    "BACKBONES",
    "PATCHED",
    "PladisAttention",
    "PladisUNet2DConditionModel",
    "attention",
    "backbone_of",
    "decompositions",
    "entmax",
    "is_pladis",
    "joint_attention",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
