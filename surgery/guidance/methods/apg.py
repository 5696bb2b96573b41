"""Adaptive projected guidance: CFG whose difference C - U is averaged over steps, bounded, and stripped of its part
along C.

    d = (C - U) + momentum d_before;  d *= min(1, rescale / |d|);  C + (w - 1) (d_orthogonal + eta d_parallel)

norm and projection over all dimensions but the batch. Source: Sadat et al., arXiv 2410.02416, there on the predicted
image, here on the model's output, as in diffusers, whose arithmetic it is (`AdaptiveProjectedGuidance`). Defaults: eta
0, momentum -0.5, rescale 15. Cost: as CFG. Layers: none.
"""

from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

from .base import Method


class Apg(Method):
    """As the module says."""

    needs_pair, changes_modules = True, False

    def begin(self):
        """As Method's."""
        self._momentum = MomentumBuffer(self.settings.momentum)

    def combined(self, plain, unguided, weight, moment):
        """As the module says."""
        return normalized_guidance(
            plain,
            unguided,
            weight - 1,
            self._momentum if self.settings.momentum else None,
            self.settings.eta,
            self.settings.rescale,
            use_original_formulation=True,  # C + (w - 1) d, which is CFG where d is C - U
        )
