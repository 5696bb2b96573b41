"""Spatio-temporal guidance of video: CFG + scale (C - W), where W skips self-attention in some layers.

mode "residual" (STG-R) skips the layer's whole block, "attention" (STG-A) makes its map the identity, as PAG does.
Source: Hyung et al., arXiv 2411.18664. Defaults: scale 1, residual, the middle block; the authors take block 19 of
LTX-Video's 28, 35 of Mochi's 48, 22 of HunyuanVideo's. Cost: one evaluation more a step. Layers: blocks, or modules of
self-attention.
"""

from .base import Method
from .blocks import SkippedBlock, replaced_blocks
from .pag import Pag


class Stg(Method):
    """As the module says."""

    def __init__(self, settings, model, pipeline):
        super().__init__(settings, model, pipeline)
        if settings.mode == "attention":
            self.replacements = Pag(settings, model, pipeline).replacements
        else:
            self.replacements = replaced_blocks(model, settings.layers, SkippedBlock)
