"""AutoGuidance: CFG + scale (C - W), where W is a bad version of the model: this one, some of its activations dropped.

With `guidance_scale` 1 it is the paper's W + (1 + scale) (C - W). Source: Karras et al., arXiv 2406.02507, whose W is a
smaller model or one trained less, which few have; with dropout on the model itself as in diffusers' guider. Defaults:
scale 1, dropout 0.1, all blocks. Cost: one evaluation more a step. Layers: transformer blocks.
"""

from .base import Method
from .blocks import DroppedBlock, replaced_blocks


class AutoGuidance(Method):
    """As the module says."""

    def __init__(self, settings, model, pipeline):
        super().__init__(settings, model, pipeline)

        def dropped(block):
            return DroppedBlock(block, settings.dropout, settings.seed)

        self.replacements = replaced_blocks(model, settings.layers, dropped)

    def weakened(self, moment):
        """As Method's."""
        for number, (_, _, block) in enumerate(self.replacements):
            block.step = moment.step * len(self.replacements) + number
        return super().weakened(moment)
