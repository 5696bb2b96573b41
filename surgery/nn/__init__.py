"""The attention operators, the modules that hold them, and the model classes that hold the modules.

This folder imports torch, diffusers and itself only: its code is what an artifact ships (`shipped.py`).
"""

from .attention import attention
from .backbones import BACKBONES, PATCHED
from .decomposed import decompositions
from .entmax import entmax
from .joint import joint_attention
from .module import is_pladis
from .pladis import PladisAttention
from .unet import PladisUNet2DConditionModel

__all__ = [
    "BACKBONES",
    "PATCHED",
    "PladisAttention",
    "PladisUNet2DConditionModel",
    "attention",
    "decompositions",
    "entmax",
    "is_pladis",
    "joint_attention",
]
