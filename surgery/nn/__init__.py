"""The attention operators, the modules that hold them, and the model classes that hold the modules.

This folder imports torch, diffusers and itself only: its code is what an artifact ships (`shipped.py`).
"""

from .attention import attention
from .entmax import entmax
from .fused import decompositions
from .pladis import PladisAttention, is_pladis
from .unet import PladisUNet2DConditionModel

__all__ = ["PladisAttention", "PladisUNet2DConditionModel", "attention", "decompositions", "entmax", "is_pladis"]
