"""Orthogonal smoothed energy guidance: SEG that blurs only what drives the curvature of attention's energy.

Per head and token the query splits into q_par along the key of the same token and the rest, q_orth; W uses q_par +
blur(q_orth). Output: CFG + scale (C - W). Source: Saqib, oseg-guidance.github.io; the released code (repository
saqibnazmus/OSEG) drops q_par: `keep_parallel: false`. Defaults: scale 3, blur 5, the middle block's modules. Cost: one
evaluation more a step, and the keys' projection of those modules once more. Layers: as SEG's; of models that norm their
queries and keys or turn them by place, the projections before that.
"""

from surgery.errors import UnsupportedModelError

from .queries import BlurredQueries, ByQueries


class Oseg(ByQueries):
    """As the module says."""

    def queries(self, attention):
        """As ByQueries'."""
        if attention.to_k.out_features != attention.to_q.out_features:
            raise UnsupportedModelError("guidance: oseg needs as many heads of keys as of queries")
        return BlurredQueries(
            attention.to_q, self.settings.blur, attention.to_k, attention.heads, self.settings.keep_parallel
        )
