"""What one call of attention says about the papers' claims, as sums that add up over calls.

With beta the scale of the scores, x a query, k_i its keys and v_i their values, p the dense and p_s the sparse weights:
T_d = sum p_i v_i, T_s = sum p_s,i v_i and r = T_s - T_d. The dominant pattern xi is the value of the highest score. The
energies are those of a Hopfield network that has stored the keys, as PLADIS writes them, whose retrieval is T with keys
in the values' place; attention itself goes on to the values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from surgery.nn import entmax
from surgery.nn.kernels.reference import attention_scores, blocks
from surgery.nn.operators import OPERATORS, Unit

from ..geometry import Projection
from ..observing import AttentionCall

_MASKED = -1000.0  # diffusers masks keys by adding -10,000 or a dtype's least number


class Statistic(NamedTuple):
    """title: in a table and above a plot. meaning: what it is, with its source. kind: how calls come together."""

    title: str
    meaning: str
    kind: str = "mean"  # over heads and queries, or over GAG's units; "largest"; "least"


STATISTICS = {
    "support": Statistic("support", "share of the keys that have weight in the sparse map"),
    "change": Statistic("change", "|r| over |T_d|, each the root mean square over the places", "ratio"),
    "residual": Statistic("|r|", "length of r = T_s - T_d, of each of GAG's units (GAG, eq. 8, Fig. 3)"),
    "update": Statistic("|r~|", "length of r~ = r_par + zeta r_orth, before the bound (GAG, eq. 13)"),
    "largest_update": Statistic("largest |r~|", "the same, the largest", "largest"),
    "bounded": Statistic("bounded", "share of units whose |r~| exceeds eta (GAG, eq. 13)"),
    "negative": Statistic("<r,T_s><0", "share of units in which r points against T_s (GAG, eq. 12)"),
    "nearer": Statistic("nearer", "share of queries with |T_s - xi| <= |T_d - xi| (GAG, eq. 9)"),
    "aligned": Statistic("aligned", "share of queries with <r, xi - T_d> >= 0 (GAG, eq. 10)"),
    "separated": Statistic(
        "beta ok", "share of queries with beta above the bound that eq. 10 is proved for (GAG, Appendix C)"
    ),
    "margin": Statistic(
        "margin", "right less left side of the sparse retrieval's error bound, over its m (GAG, eq. 25 and 26)"
    ),
    "least_margin": Statistic("least margin", "the same, the least", "least"),
    "energy_dense": Statistic("E dense", "E(x), dense (PLADIS, eq. 6)"),
    "energy_dense_after": Statistic("E dense after", "E of what is retrieved from x, dense (PLADIS, eq. 6 and 7)"),
    "energy_sparse": Statistic("E sparse", "E_alpha(x) (PLADIS, eq. 8)"),
    "energy_sparse_after": Statistic("E sparse after", "E_alpha of what is retrieved from x (PLADIS, eq. 8 and 9)"),
}


class Total(NamedTuple):
    """A sum and what it is divided by; of a largest or least value that value, and 1."""

    value: float
    count: float

    def with_(self, other: "Total", kind: str) -> "Total":
        """Both together."""
        if kind in ("largest", "least"):
            return Total((max if kind == "largest" else min)(self.value, other.value), 1.0)
        return Total(self.value + other.value, self.count + other.count)


_GAG = OPERATORS["gag"].defaults


@dataclass(frozen=True)
class Measured:
    """The settings that a call is measured with: of the operator where it has them, else GAG's defaults."""

    alpha: float
    temperature: float = _GAG["temperature"]
    sparse_temperature: float = _GAG["sparse_temperature"]
    zeta: float = _GAG["zeta"]
    eta: float = _GAG["eta"]
    parallel: float = _GAG["parallel"]
    unit: Unit = "head"


@torch.no_grad()
def statistics_of(
    call: AttentionCall, measured: Measured, kinds: dict[str, list[int]] | None = None
) -> dict[str, Total]:
    """{name of STATISTICS: Total} of a call, in float32.

    kinds: {kind of token: its places among the keys}; each adds "dense KIND" and "sparse KIND", the weight that these
    have. Queries whose keys are all masked count nowhere. Takes about BLOCK_SCORES scores at a time.
    """
    values, keys = call.value[0].float(), call.key[0].float()  # (heads, keys, channels)
    totals, products = {}, []
    with torch.autocast(values.device.type, enabled=False):
        bounds = _Bounds(values, _kept(call))
        for _, heads, rows, mask in blocks(call.query, call.key, call.mask):
            piece = _Piece(call.query[0, heads, rows].float(), keys[heads], values[heads], mask, call, measured)
            found, split = _of_piece(piece, bounds.of(heads), kinds or {})
            add(totals, found)
            if not products:  # of all heads and queries, for units that span several pieces
                products = [torch.zeros(call.query.shape[:3], dtype=each.dtype, device=each.device) for each in split]
            for whole, each in zip(products, split, strict=True):
                whole[0, heads, rows] = each
    valid, *products = products
    return {**totals, **_of_units(Projection(*products), valid, measured)}


def add(totals: dict[str, Total], found: Mapping[str, Total]) -> None:
    """Add Totals to those of the same names, in place."""
    for name, total in found.items():
        kind = STATISTICS[name].kind if name in STATISTICS else "mean"
        totals[name] = totals[name].with_(total, kind) if name in totals else total


def _kept(call):
    """Which keys any query has: (keys,) bool."""
    if call.mask is None:
        return torch.ones(call.key.shape[2], dtype=torch.bool, device=call.key.device)
    kept = call.mask if call.mask.dtype == torch.bool else call.mask > _MASKED
    return kept.expand(*call.mask.shape[:-1], call.key.shape[2]).flatten(0, -2).any(0)


class _Piece:
    """Scores and weights of some heads and queries: (heads, queries, keys), queries (heads, queries, channels)."""

    def __init__(self, query, keys, values, mask, call, measured):
        self.query, self.keys, self.values, self.measured = query, keys, values, measured
        self.beta = call.qk_scale / measured.temperature
        self.sparse_beta = self.beta / measured.sparse_temperature
        self.bias = 0.0
        if mask is not None:
            kept = mask[0] if mask.dtype == torch.bool else mask[0] > _MASKED
            added = 0.0 if mask.dtype == torch.bool else mask[0].float() / measured.temperature
            self.bias = torch.where(kept, added, float("-inf"))
        self.scores = self.scored(query, self.beta)
        self.kept = (self.scores > float("-inf")).sum(-1)  # (heads, queries)
        self.dense = self.scores.softmax(-1).nan_to_num(0.0)
        self.sparse_scores = self.scores / measured.sparse_temperature
        same = measured.alpha == measured.sparse_temperature == 1.0  # then r is 0, not what two roundings leave
        self.sparse = self.dense if same else entmax(self.sparse_scores, measured.alpha)

    def scored(self, query, beta):
        """The scores of queries at a beta."""
        return attention_scores(query[None], self.keys[None], None, beta)[0] + self.bias


class _Bounds:
    """What GAG's bounds take of the patterns: m = max |v_i|, (heads,), and for each of them rho, (heads, keys)."""

    def __init__(self, values, kept):
        gram = values @ values.transpose(-1, -2)
        square = gram.diagonal(dim1=-2, dim2=-1)
        self.longest = square.masked_fill(~kept, 0.0).amax(-1).sqrt()
        others = gram.masked_fill(~kept.unsqueeze(-1), float("-inf"))
        others.diagonal(dim1=-2, dim2=-1).fill_(float("-inf"))
        self.rho = square - others.amax(-2)  # min over j of <v_mu, v_mu> - <v_j, v_mu>

    def of(self, heads):
        """(m, rho) of some heads."""
        return self.longest[heads], self.rho[heads]


def _of_piece(piece, bounds, kinds):
    valid = piece.kept > 0
    count = float(valid.sum())

    def mean(each):  # over valid queries; each: (heads, queries)
        return Total(float(each[valid].cpu().double().sum()), count)

    sparse_output, dense_output = piece.sparse @ piece.values, piece.dense @ piece.values
    residual = (piece.sparse - piece.dense) @ piece.values
    support = (piece.sparse > 0).sum(-1)
    found = {
        "support": mean(support / piece.kept.clamp_min(1)),
        "change": Total(*(float(each.square().sum()) for each in (residual, dense_output))),
    }
    found |= _of_bounds(piece, bounds, sparse_output, dense_output, residual, support, valid, mean)
    found |= {name: mean(each) for name, each in _energies(piece).items()}
    for kind, places in kinds.items():
        found |= {f"{way} {kind}": mean(getattr(piece, way)[..., places].sum(-1)) for way in ("dense", "sparse")}
    return found, (valid, *Projection.of(sparse_output, residual))


def _of_bounds(piece, bounds, sparse_output, dense_output, residual, support, valid, mean):
    longest, rho = bounds
    longest = longest.unsqueeze(-1)  # (heads, 1)
    chosen = piece.scores.argmax(-1)
    dominant = torch.take_along_dim(piece.values, chosen.unsqueeze(-1), -2)  # xi, (heads, queries, channels)
    sparse_error, dense_error = ((output - dominant).norm(dim=-1) for output in (sparse_output, dense_output))
    ordered = piece.scores.sort(dim=-1, descending=True).values
    gap = ordered[..., 0] - ordered[..., 1] if ordered.shape[-1] > 1 else torch.full_like(sparse_error, float("inf"))
    needed = (4 * longest * (piece.kept - 1) / rho.gather(-1, chosen).clamp_min(0.0)).log()  # infinite where rho <= 0
    margin = (_error_bound(piece, support, ordered) * longest - sparse_error) / longest.clamp_min(1e-30)
    return {
        "nearer": mean(sparse_error <= dense_error),
        "aligned": mean((residual * (dominant - dense_output)).sum(-1) >= 0),
        "separated": mean(gap > needed),
        "margin": mean(margin),
        "least_margin": Total(float(margin[valid].min()) if valid.any() else float("inf"), 1.0),
    }


def _error_bound(piece, support, ordered):
    """GAG, eq. 26, over m: 1 + kappa [(alpha - 1)(z_1 - z_(kappa + 1))]^(1 / (alpha - 1)); eq. 25 at alpha 1.

    z: the scores, beta included, from the highest on; kappa: how many have weight. Where all M have, the paper takes
    z_(M + 1) = z_M - M^(1 - alpha) / (alpha - 1), which holds of scores with beta in them, as here, and not without.
    """
    alpha, spread = piece.measured.alpha, 1.0 / piece.measured.sparse_temperature
    if alpha == 1:
        return 2 * (piece.kept - 1) * (-(ordered[..., 0] - ordered[..., 1]) * spread).exp()
    last = torch.minimum(support, piece.kept - 1).clamp_min(0)
    gap = (ordered[..., 0] - ordered.gather(-1, last.unsqueeze(-1)).squeeze(-1)) * (alpha - 1) * spread
    gap = torch.where(support >= piece.kept, gap + piece.kept.clamp_min(1).float() ** (1 - alpha), gap)
    return 1 + support * gap ** (1 / (alpha - 1))


def _energies(piece):
    """E before and after a retrieval, {name: (heads, queries)}.

    PLADIS, eq. 6: -log sum exp(beta k_i x) / beta + |x|^2 / 2; eq. 8 with the conjugate of alpha's Tsallis entropy,
    (1 / beta) max over p of beta <p, K x> + H(p), H(p) = (1 - sum p^alpha) / (alpha (alpha - 1)), in its place.
    """

    def dense(query, scores):
        return -scores.logsumexp(-1) / piece.beta + query.square().sum(-1) / 2

    def sparse(query, scores, weights):
        alpha = piece.measured.alpha
        taken = torch.where(weights > 0, weights * scores, 0.0).sum(-1)
        powers = torch.special.entr(weights) if alpha == 1 else (weights - weights**alpha) / (alpha * (alpha - 1))
        return -(taken + powers.sum(-1)) / piece.sparse_beta + query.square().sum(-1) / 2

    retrieved, sparsely = piece.dense @ piece.keys, piece.sparse @ piece.keys
    scores = piece.scored(sparsely, piece.beta) / piece.measured.sparse_temperature
    return {
        "energy_dense": dense(piece.query, piece.scores),
        "energy_dense_after": dense(retrieved, piece.scored(retrieved, piece.beta)),
        "energy_sparse": sparse(piece.query, piece.sparse_scores, piece.sparse),
        "energy_sparse_after": sparse(sparsely, scores, entmax(scores, piece.measured.alpha)),
    }


def _of_units(split, valid, measured):
    """What is of GAG's units. split: a Projection of each head and query; valid: those that have keys."""
    split, valid = split.over(measured.unit), Projection(valid, valid, valid).over(measured.unit).product > 0
    lengths = split.length(measured.zeta, measured.parallel)[valid]
    each = {
        "residual": split.residual[valid].sqrt(),
        "update": lengths,
        "bounded": lengths > measured.eta,
        "negative": split.product[valid] < 0,
    }
    count = float(valid.sum())
    found = {name: Total(float(values.cpu().double().sum()), count) for name, values in each.items()}
    return found | {"largest_update": Total(float(lengths.max()) if count else 0.0, 1.0)}
