"""The attention operators as one function over query, key, value.

`reference` is plain torch in float32 and defines what every faster implementation must compute. `entmax` is the same
formula with the entmax package's sort-based (bisecting, for other alphas) functions: the papers' own arithmetic, kept
to reproduce and to compare.
"""

import importlib

import torch

from .entmax import entmax_of_shifted, shift_by_row_max, softmax_of_shifted

OPERATORS = ("pladis",)
IMPLEMENTATIONS = ("reference", "entmax")


def attention(
    query,
    key,
    value,
    *,
    operator="pladis",
    alpha=1.5,
    scale=2.0,
    temperature=1.0,
    mask=None,
    qk_scale=None,
    implementation="reference",
):
    """PLADIS: `((1 - scale) softmax(z) + scale entmax_alpha(z)) value`, z = query key^T qk_scale / temperature.

    query: (batch, heads, queries, head_dim); key, value: (batch, heads, keys, head_dim); any floating dtype. Scores,
        both maps and their combination are float32 (float64 for float64 input); the product with `value` is taken once,
        in value's dtype.
    operator: "pladis" (PLADIS, arXiv 2503.07677, eq. 15).
    alpha: in [1, 2]. scale: the paper's lambda; 0 is dense attention, 1 purely sparse, above 1 extrapolates, so that
        weights may be negative. temperature: > 0, divides the scores of both maps (eq. 36). Each is a number or a
        tensor of one element; a tensor's value is not read, so changing it never recompiles a graph.
    mask: boolean (True keeps a key) or additive, broadcastable to (batch, heads, queries, keys). A query whose keys
        are all masked gets zeros.
    qk_scale: 1/sqrt(head_dim) unless given.
    Returns (batch, heads, queries, head_dim) in value's dtype. Raises ValueError for numbers out of range, an unknown
    operator or implementation; ImportError when implementation="entmax" and that package is missing.
    """
    if operator not in OPERATORS:
        raise ValueError(f"unknown operator {operator!r}; there is {', '.join(OPERATORS)}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}")
    _check_numbers(alpha, temperature)
    shifted = shift_by_row_max(attention_scores(query, key, temperature, mask, qk_scale))
    dense = softmax_of_shifted(shifted)
    if implementation == "entmax":
        sparse = _entmax_by_package(shifted, alpha)
    else:
        sparse = entmax_of_shifted(shifted, _as_tensor(alpha, shifted))
    # Not (1 - scale) * dense + scale * sparse: this form leaves dense untouched at scale 0.
    weights = dense + _as_tensor(scale, shifted) * (sparse - dense)
    return torch.matmul(weights.to(value.dtype), value)


def attention_scores(query, key, temperature=1.0, mask=None, qk_scale=None):
    """`query key^T qk_scale / temperature`, masked: (batch, heads, queries, keys) in float32 (float64 for float64).

    The product is taken in float32: half-precision scores are off by a percent of a weight, and SD 2.1's overflow.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    qk_scale = query.shape[-1] ** -0.5 if qk_scale is None else qk_scale
    scores = torch.matmul(query.to(dtype) * qk_scale, key.to(dtype).transpose(-1, -2))
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask must be boolean (True keeps a key) or additive floating, not {mask.dtype}")
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask.to(dtype)
    return scores / _as_tensor(temperature, scores)


def _check_numbers(alpha, temperature):
    if not isinstance(alpha, torch.Tensor) and not 1.0 <= alpha <= 2.0:
        raise ValueError(f"alpha must lie in [1, 2] (1 is softmax, 2 is sparsemax), not {alpha}")
    if not isinstance(temperature, torch.Tensor) and not 1e-30 <= temperature <= 1e30:
        raise ValueError(f"temperature must be above 0 (1e-30 to 1e30), not {temperature}")


def _as_tensor(number, like):
    if isinstance(number, torch.Tensor):
        return number.to(like.dtype)
    return torch.full((), float(number), dtype=like.dtype, device=like.device)


def _entmax_by_package(shifted, alpha):
    """alpha-entmax by the entmax package, zeros for masked rows. Reads alpha's value, so it breaks graphs."""
    try:
        package = importlib.import_module("entmax")
    except ImportError as error:
        raise ImportError('implementation="entmax" needs the entmax package: pip install entmax') from error
    alpha = float(alpha)
    # The package's cumulative sums turn -inf into NaN. Below -1e4 every alpha > 1.0001 gives zero anyway.
    finite = shifted.clamp_min(-1.0e4)
    if alpha == 1.0:
        sparse = torch.softmax(finite, dim=-1)
    elif alpha == 1.5:
        sparse = package.entmax15(finite, dim=-1)
    elif alpha == 2.0:
        sparse = package.sparsemax(finite, dim=-1)
    else:
        sparse = package.entmax_bisect(finite, alpha=alpha, dim=-1)
    return sparse.masked_fill(shifted == float("-inf"), 0.0)
