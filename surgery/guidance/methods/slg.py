"""Skip-layer guidance: CFG + scale (C - W), where W skips whole transformer blocks.

Source: Stability AI's code for Stable Diffusion 3.5 (github.com/Stability-AI/sd3.5), there blocks 7, 8 and 9 of
SD3.5-medium and steps from 0.01 to 0.2 of the run: layers [transformer_blocks.7, ...], fraction [0.01, 0.2]. Defaults:
scale 2.8, the middle block, all steps. Cost: one evaluation more a step, without those blocks. Layers: blocks, of both
kinds of stream. (diffusers' hook gives back text and image in the wrong order for blocks whose text comes first.)
"""

from .base import Method
from .blocks import SkippedBlock, replaced_blocks


class Slg(Method):
    """As the module says."""

    def __init__(self, settings, model, pipeline):
        super().__init__(settings, model, pipeline)
        self.replacements = replaced_blocks(model, settings.layers, SkippedBlock)
