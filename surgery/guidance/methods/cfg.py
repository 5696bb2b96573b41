"""CFG: U + w (C - U).

Source: Ho and Salimans, arXiv 2207.12598; in an interval of steps alone, Kynkaanniemi et al., arXiv 2404.07724: outside
`steps`, `fraction` or `sigma` the output is C. Cost: two evaluations a step, U and C, in one batch. Layers: none.
"""

from .base import Method


class Cfg(Method):
    """As the module says."""

    changes_modules = False

    def __init__(self, settings, model, pipeline):
        super().__init__(settings, model, pipeline)
        self.needs_pair = bool(settings.window)
