"""CFG-Zero*: U scaled so that it lies closest to C, and no output at all at the first steps, for flow models.

    s U + w (C - s U),  s = <C, U> / |U|^2

Source: Fan et al., arXiv 2503.18886; s by diffusers (`ClassifierFreeZeroStarGuidance`). Default: zero_init 1. Cost: as
CFG. Layers: none.
"""

import torch
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale

from .base import Method


class CfgZero(Method):
    """As the module says."""

    needs_pair, changes_modules = True, False

    def combined(self, plain, unguided, weight, moment):
        """As the module says."""
        if moment.step < self.settings.zero_init:
            return torch.zeros_like(plain)
        scale = cfg_zero_star_scale(plain.flatten(1), unguided.flatten(1)).view(-1, *[1] * (plain.ndim - 1))
        return scale * unguided + weight * (plain - scale * unguided)
