"""alpha-entmax without a sort: Newton's method on the norm of the positive part.

`p = [(alpha-1) z - tau]_+^(1/(alpha-1))` with tau such that p sums to one (Peters et al. 2019, arXiv 1905.05702,
eq. 10). With r = 1/(alpha-1) the sum is one exactly where `||relu(x - t)||_r = 1`, x = (alpha-1)(z - max z). That norm
is convex and decreasing in t, so Newton's iterates rise monotonically from t = -1 to the root: a small fixed number
of steps serves every alpha, with only elementwise operations and row sums.

Two choices make it hold over the whole of [1, 2] in float32. The threshold is carried as `lift = t + 1`, and powers
are taken as exp(r log1p(.)): near alpha = 1, where r is huge and relu(x - t) is close to one, the plain power would
lose every digit, while this form goes over into softmax. And alpha is data, never a branch, so that a compiled graph
serves every alpha.
"""

import torch
from torch import Tensor

from ..operators import value_problem


def newton_steps(keys: int) -> int:
    """Steps that reach float32 rounding for rows of `keys` scores, at any alpha and any spread of the scores.

    Found by searching for the slowest rows; `tests/nn/test_entmax.py` holds them to the float64 oracle.
    """
    if isinstance(keys, torch.SymInt):  # a graph for any number of keys; a comparison would fix it to a range
        return 10
    return 6 if keys <= 128 else 8 if keys <= 1024 else 10


def shift_by_row_max(scores: Tensor) -> Tensor:
    """Scores less the largest of their row, in float32 at least; a row that is masked whole stays -inf."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if scores.shape[-1] == 0:
        return scores
    row_max = scores.amax(dim=-1, keepdim=True)
    # -inf - -inf is NaN: a row without any key keeps its -inf and comes out as zeros.
    return scores - torch.where(row_max == float("-inf"), torch.zeros_like(row_max), row_max)


def softmax_of_shifted(shifted: Tensor) -> Tensor:
    """Softmax over the last dimension of max-shifted scores; zeros where every key is masked."""
    weights = shifted.exp()
    # The largest score of a row contributes exp(0) = 1, so only a row without keys has a sum below one.
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(1.0)


def entmax_of_shifted(shifted: Tensor, alpha: Tensor) -> Tensor:
    """alpha-entmax over the last dimension of max-shifted scores; zeros where every key is masked.

    `alpha` is a tensor that broadcasts against `shifted`.
    """
    # At the smallest alpha - 1 that the dtype can tell from zero, entmax is softmax to rounding.
    alpha_minus_one = (alpha.to(shifted.dtype) - 1.0).clamp_min(torch.finfo(shifted.dtype).eps)
    r = 1.0 / alpha_minus_one
    x = shifted * alpha_minus_one
    lift = torch.zeros_like(x[..., :1])
    for _ in range(newton_steps(shifted.shape[-1])):
        power_r_minus_1, base = _powers(x - lift, r)
        norm_r = (power_r_minus_1 * base).sum(dim=-1, keepdim=True).clamp_min(1.0)  # ||.||_r ** r, at least 1 here
        log_norm = norm_r.log() / r
        # (N - 1) N^(r-1) / sum p^(r-1), with N = norm_r ** (1/r)
        step = torch.expm1(log_norm) * torch.exp((r - 1.0) * log_norm)
        lift = lift + step / power_r_minus_1.sum(dim=-1, keepdim=True).clamp_min(1.0)
    power_r_minus_1, base = _powers(x - lift, r)
    weights = power_r_minus_1 * base
    # What is left of the residual is float32's resolution of the threshold, times the number of keys. One more Newton
    # step in the weights instead of the threshold removes it: d weights = (1 - sum) p^(r-1) / sum p^(r-1).
    total_slope = power_r_minus_1.sum(dim=-1, keepdim=True)
    residual = 1.0 - weights.sum(dim=-1, keepdim=True)
    correction = residual / torch.where(total_slope > 0, total_slope, torch.ones_like(total_slope))
    return torch.addcmul(weights, correction, power_r_minus_1).clamp_min(0.0)


def _powers(depth, r):
    """`(1 + depth)^(r-1)` and `1 + depth` where depth > -1, zero elsewhere; NaN stays NaN."""
    # log1p(-1) is -inf, and 0 * -inf is NaN at alpha = 2; what lies outside the support is masked to zero below.
    above_minus_one = -1.0 + torch.finfo(depth.dtype).eps / 2
    power = torch.exp((r - 1.0) * torch.log1p(depth.clamp_min(above_minus_one)))
    outside = depth <= -1.0
    return power.masked_fill(outside, 0.0), (1.0 + depth).masked_fill(outside, 0.0)


def entmax(scores: Tensor, alpha: float | Tensor, dim: int = -1) -> Tensor:
    """alpha-entmax of `scores` along `dim`: softmax at alpha = 1, sparsemax at alpha = 2.

    scores: any shape, any floating dtype; solved in float32 (float64 input in float64) and returned in its own dtype.
        A score of -inf is a masked key; a row of nothing else comes out as zeros.
    alpha: a number in [1, 2], or a tensor that broadcasts against `scores` with `dim` moved last (its values are the
        caller's to check: reading them would stop the device).
    Raises ValueError for a number outside [1, 2], TypeError for scores that are not floating. Source: Peters et al.
    2019 for the definition; the solver is ours.
    """
    if scores.ndim == 0:
        return torch.ones_like(scores)
    if not scores.is_floating_point():
        raise TypeError(f"entmax needs floating scores, not {scores.dtype}")
    if not isinstance(alpha, torch.Tensor):
        if problem := value_problem("alpha", float(alpha)):
            raise ValueError(f"alpha {problem}")
        alpha = torch.tensor(float(alpha), dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32)
    shifted = shift_by_row_max(scores.movedim(dim, -1))
    return entmax_of_shifted(shifted, alpha.to(shifted.device)).movedim(-1, dim).to(scores.dtype)
