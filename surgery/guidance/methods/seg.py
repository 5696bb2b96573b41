"""Smoothed energy guidance: CFG + scale (C - W), where in W the queries of some self-attention are blurred.

Over the tokens' grid, each frame of a video by itself; an infinite `blur` gives every query the mean. Source: Hong,
arXiv 2408.00760, and its code for the kernel. Defaults: scale 3, blur infinite, the middle block's modules. Cost: one
evaluation more a step. Layers: modules of self-attention, and the image's queries in joint attention. Queries are
blurred as they come from their projection, before any norm and rotary embedding, which the paper's UNets do not have.
(diffusers' guider of that name, as of 0.42, never applies its hook.)
"""

from .queries import BlurredQueries, ByQueries


class Seg(ByQueries):
    """As the module says."""

    def queries(self, attention):
        """As ByQueries'."""
        return BlurredQueries(attention.to_q, self.settings.blur)
