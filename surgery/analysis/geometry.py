"""GAG's step from three inner products of each head and query (GAG, arXiv 2603.02531, eq. 12 and 13)."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from surgery.nn.operators import Unit

_DIMS = {"head": (), "token": (1,), "image": (1, 2)}  # of (batch, heads, queries), over which a unit's are summed


class Projection(NamedTuple):
    """r = T_s - T_d split along T_s: r_par = along T_s. (batch, heads or 1, queries or 1), float64 where there is.

    product: <r, T_s>. sparse, residual: the squares of |T_s| and |r|.
    """

    product: Tensor
    sparse: Tensor
    residual: Tensor

    @classmethod
    def of(cls, sparse: Tensor, residual: Tensor) -> Self:
        """Of T_s and r, (batch, heads, queries, channels) each, for each head and query."""
        pairs = ((residual, sparse), (sparse, sparse), (residual, residual))
        exact = torch.float32 if sparse.device.type == "mps" else torch.float64
        return cls(*((one * other).sum(-1).to(exact) for one, other in pairs))

    def over(self, unit: Unit) -> Self:
        """Over the channels that a unit of GAG's projects together."""
        dims = _DIMS[unit]
        return type(self)(*(each.sum(dims, keepdim=True) for each in self)) if dims else self

    @property
    def along(self) -> Tensor:
        """<r, T_s> / |T_s|^2, 0 where T_s is 0."""
        return self.product / self.sparse.clamp_min(torch.finfo(self.sparse.dtype).tiny)

    def length(self, zeta: float | Tensor, parallel: float | Tensor) -> Tensor:
        """|r~|, of r~ = parallel r_par + zeta r_orth."""
        on_it = self.along * self.product
        return (parallel**2 * on_it + zeta**2 * (self.residual - on_it).clamp_min(0.0)).sqrt()
