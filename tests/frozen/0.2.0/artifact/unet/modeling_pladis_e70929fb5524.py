"""PLADIS cross-attention for a diffusers UNet (arXiv 2503.07677), in one file. Apache-2.0.

Joined mechanically from the surgery/nn folder of the pladis-surgery package; the name carries the hash of the content.
Needs torch and diffusers alone:

    DiffusionPipeline.from_pretrained(this_model, trust_remote_code=True)
"""

MODULE_NAME = __name__.rpartition(".")[2]


def shipped_source():
    """This file's own text, for models saved again."""
    with open(__file__, encoding="utf-8") as file:
        return file.read()


# -------------------- entmax.py --------------------------------------------------------------------------------------

# alpha-entmax without a sort: Newton's method on the norm of the positive part.
#
# `p = [(alpha-1) z - tau]_+^(1/(alpha-1))` with tau such that p sums to one (Peters et al. 2019, arXiv 1905.05702,
# eq. 10). With r = 1/(alpha-1) the sum is one exactly where `||relu(x - t)||_r = 1`, x = (alpha-1)(z - max z). That norm
# is convex and decreasing in t, so Newton's iterates rise monotonically from t = -1 to the root: a small fixed number
# of steps serves every alpha, with only elementwise operations and row sums.
#
# Two choices make it hold over the whole of [1, 2] in float32. The threshold is carried as `lift = t + 1`, and powers
# are taken as exp(r log1p(.)): near alpha = 1, where r is huge and relu(x - t) is close to one, the plain power would
# lose every digit, while this form goes over into softmax. And alpha is data, never a branch, so that a compiled graph
# serves every alpha.

import torch

# The smallest alpha - 1 that is solved; below it (that is, at alpha = 1 in float32) entmax is softmax to rounding.
_SMALLEST_ALPHA_MINUS_ONE = 2.0**-23
# log1p(-1) is -inf, and 0 * -inf is NaN at alpha = 2; values outside the support are masked to zero afterwards.
_ABOVE_MINUS_ONE = -1.0 + 2.0**-24


def newton_steps(keys):
    """Steps that reach float32 rounding for rows of `keys` scores, at any alpha and any spread of the scores.

    Found by searching for the slowest rows; `tests/nn/test_entmax.py` holds them to the float64 oracle.
    """
    return 6 if keys <= 128 else 8 if keys <= 1024 else 10


def shift_by_row_max(scores):
    """Scores less the largest of their row, in float32 at least; a row that is masked whole stays -inf."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if scores.shape[-1] == 0:
        return scores
    row_max = scores.amax(dim=-1, keepdim=True)
    # -inf - -inf is NaN: a row without any key keeps its -inf and comes out as zeros.
    return scores - torch.where(row_max == float("-inf"), torch.zeros_like(row_max), row_max)


def softmax_of_shifted(shifted):
    """Softmax over the last dimension of max-shifted scores; zeros where every key is masked."""
    weights = shifted.exp()
    # The largest score of a row contributes exp(0) = 1, so only a row without keys has a sum below one.
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(1.0)


def entmax_of_shifted(shifted, alpha):
    """alpha-entmax over the last dimension of max-shifted scores; zeros where every key is masked.

    `alpha` is a tensor that broadcasts against `shifted`.
    """
    alpha_minus_one = (alpha.to(shifted.dtype) - 1.0).clamp_min(_SMALLEST_ALPHA_MINUS_ONE)
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
    power = torch.exp((r - 1.0) * torch.log1p(depth.clamp_min(_ABOVE_MINUS_ONE)))
    outside = depth <= -1.0
    return power.masked_fill(outside, 0.0), (1.0 + depth).masked_fill(outside, 0.0)


def entmax(scores, alpha, dim=-1):
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
        if not 1.0 <= alpha <= 2.0:
            raise ValueError(f"alpha must lie in [1, 2] (1 is softmax, 2 is sparsemax), not {alpha}")
        alpha = torch.tensor(float(alpha), dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32)
    shifted = shift_by_row_max(scores.movedim(dim, -1))
    return entmax_of_shifted(shifted, alpha.to(shifted.device)).movedim(-1, dim).to(scores.dtype)


# -------------------- operators.py -----------------------------------------------------------------------------------

# The attention operators: their hyperparameters, and what each makes of the dense and the sparse attention map.
#
# With p the dense map (softmax), s_a the alpha-entmax map, T_d = p V and T_s = s V (all of the same scores):
#
#     pladis    T_d + scale (T_s - T_d)                                      PLADIS, arXiv 2503.07677, eq. 15
#     sparse    T_s                                                          PLADIS at scale 1
#     gag       T_s + scale min(1, eta / |r~|) r~,  r = T_s - T_d,           GAG, arXiv 2603.02531, eq. 11-13
#               r~ = r_par + zeta r_orth, split along T_s
#     anderson  scale T_alpha + scale_low T_alpha_low + (1 - scale - scale_low) T_d      GAG, Appendix F, m = 2
#
# GAG's base is T_s, so at zeta = 1 and eta = infinity it is PLADIS with a scale one larger. The paper does not say over
# which dimensions it projects: `unit` is "head" (each head's own channels) or "token" (the channels of all heads
# together). It does not give the weights of the Anderson surrogate either: ours share PLADIS's scale of 2 evenly.

import math

import torch

# Each operator's hyperparameters with their defaults, in the order in which the fused operator takes them.
OPERATORS = {
    "pladis": {"alpha": 1.5, "scale": 2.0, "temperature": 1.0},
    "sparse": {"alpha": 1.5, "temperature": 1.0},
    "gag": {"alpha": 1.5, "scale": 10.0, "temperature": 1.0, "zeta": 0.0, "eta": 15.0},
    "anderson": {"alpha": 1.5, "scale": 1.0, "temperature": 1.0, "alpha_low": 1.25, "scale_low": 1.0},
}
UNITS = ("head", "token")

LARGEST = 1e30  # what eta = infinity is stored as: JSON has no infinity, and no step is as long
# What a hyperparameter may be: lowest, highest, in words. float32 holds all of it.
RANGES = {
    "alpha": (1.0, 2.0, "lie in [1, 2] (1 is softmax, 2 is sparsemax)"),
    "alpha_low": (1.0, 2.0, "lie in [1, 2] (1 is softmax, 2 is sparsemax)"),
    "scale": (-1e30, 1e30, "be a finite number"),
    "scale_low": (-1e30, 1e30, "be a finite number"),
    "temperature": (1e-30, 1e30, "be above 0 (1e-30 to 1e30)"),
    "zeta": (-1e30, 1e30, "be a finite number"),
    "eta": (0.0, math.inf, "be 0 or above"),
}
ALL_HYPERPARAMETERS = tuple(RANGES)


def is_in_range(name, value):
    """Whether a hyperparameter's value is a number that its operator is defined for, as float32."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    low, high, _ = RANGES[name]
    return low <= value <= high


def off_values(operator):
    """The hyperparameters at which an operator is dense attention: what a schedule sets outside its window."""
    zeros = {name: 0.0 for name in OPERATORS[operator] if name.startswith("scale")}
    # gag at scale 0 is T_s, and sparse has no scale: there alpha has to make the sparse map the dense one.
    return zeros if operator in ("pladis", "anderson") else {**zeros, "alpha": 1.0}


def geometry_aware(sparse, residual, settings, unit):
    """GAG, eq. 11-13: sparse + scale min(1, eta/|r~|) r~, r~ = r_par + zeta r_orth, r split along `sparse`.

    sparse: T_s, (batch, heads, queries, head_dim) in float32 or float64; residual: T_s - T_d, the same.
    No quantity is squared before it is divided by the largest of its unit, so nothing overflows or vanishes.
    """
    dims = (-1,) if unit == "head" else (1, 3)
    direction = sparse / _at_least_tiny(sparse.abs().amax(dims, keepdim=True))
    length = (direction * direction).sum(dims, keepdim=True)  # at least 1, or the output is zero
    parallel = (residual * direction).sum(dims, keepdim=True) / length.clamp_min(1.0) * direction
    update = parallel + settings["zeta"] * (residual - parallel)
    largest = _at_least_tiny(update.abs().amax(dims, keepdim=True))
    norm = largest * (update / largest).square().sum(dims, keepdim=True).sqrt()
    eta = settings["eta"]
    gain = torch.where(norm > eta, eta / _at_least_tiny(norm), torch.ones_like(norm))
    return sparse + settings["scale"] * gain * update


def _at_least_tiny(value):
    return value.clamp_min(torch.finfo(value.dtype).tiny)


# -------------------- reference.py -----------------------------------------------------------------------------------

# The operators in plain torch: the definition that every faster implementation is tested against.
#
# `reference` works on whole tensors and is what a graph is decomposed into. `blocked` calls it on pieces that fit a
# cache, so that long inputs never hold all their scores at once.

import importlib

import torch


BLOCK_SCORES = 1 << 20  # scores at once in a blocked pass: 4 MB in float32


def reference(
    query, key, value, settings, *, operator, unit, mask, qk_scale, with_lse=False, sparse_map=entmax_of_shifted
):
    """(output, log-sum-exp or None) of an operator; shapes and meaning as in `attention`.

    settings: the operator's hyperparameters as scalar tensors, in the order of OPERATORS. Differentiable.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    settings = {
        name: setting.to(dtype=dtype, device=query.device)
        for name, setting in zip(OPERATORS[operator], settings, strict=True)
    }
    scores = attention_scores(query, key, mask, qk_scale)
    shifted = shift_by_row_max(scores) / settings["temperature"]
    dense = softmax_of_shifted(shifted)
    lse = _log_sum_exp(scores, shifted, settings["temperature"]) if with_lse else None
    sparse = sparse_map(shifted, settings["alpha"])
    if operator == "gag":
        # In float32: what is left of T_s - T_d in half precision is mostly rounding.
        heads_value = value.to(dtype)
        sparse_output = torch.matmul(sparse, heads_value)
        residual = torch.matmul(sparse - dense, heads_value)
        return geometry_aware(sparse_output, residual, settings, unit).to(value.dtype), lse
    # dense + scale (sparse - dense), not (1 - scale) dense + ...: dense is left untouched at scale 0.
    scale = settings.get("scale")
    weights = sparse if scale is None else dense + scale * (sparse - dense)
    if operator == "anderson":
        weights = weights + settings["scale_low"] * (sparse_map(shifted, settings["alpha_low"]) - dense)
    return torch.matmul(weights.to(value.dtype), value), lse


def blocked(query, key, value, settings, *, operator, unit, mask, qk_scale, with_lse=False):
    """As `reference`, over one batch entry and as many heads and queries at a time as BLOCK_SCORES allows."""
    output, lse = empty_outputs(query, value, with_lse)
    for batch, heads, rows, block_mask in blocks(query, key, mask, whole_heads=operator == "gag" and unit == "token"):
        piece = (batch, heads, rows)
        output[piece], block_lse = reference(
            query[piece],
            key[batch, heads],
            value[batch, heads],
            settings,
            operator=operator,
            unit=unit,
            mask=block_mask,
            qk_scale=qk_scale,
            with_lse=with_lse,
        )
        if with_lse:
            lse[piece] = block_lse
    return output, lse


def blocks(query, key, mask, whole_heads=False, size=BLOCK_SCORES):
    """Slices (batch, heads, queries) that cut the scores into pieces of about `size`, each with its part of the mask.

    Each slice keeps its dimension. whole_heads: never cut between heads.
    """
    batch, heads, queries, _ = query.shape
    keys = max(1, key.shape[2])
    if mask is not None:
        mask = mask.expand(batch, heads, queries, key.shape[2])
    heads_at_once = heads if whole_heads else max(1, min(heads, size // max(1, queries * keys)))
    rows_at_once = max(1, min(queries, size // (heads_at_once * keys)))
    for entry in range(batch):
        for head in range(0, heads, heads_at_once):
            for row in range(0, queries, rows_at_once):
                piece = (
                    slice(entry, entry + 1),
                    slice(head, head + heads_at_once),
                    slice(row, row + rows_at_once),
                )
                yield (*piece, None if mask is None else mask[piece])


def empty_outputs(query, value, with_lse):
    """Uninitialised (output, log-sum-exp or None); the output lies in memory as (batch, queries, heads, head_dim).

    That is how scaled_dot_product_attention lays out its own, and what the projection behind it reads without a copy.
    """
    batch, heads, queries, _ = query.shape
    output = value.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return output, query.new_empty(batch, heads, queries, dtype=dtype) if with_lse else None


def attention_scores(query, key, mask=None, qk_scale=None):
    """`query key^T qk_scale`, masked: (batch, heads, queries, keys) in float32 (float64 for float64).

    The product is taken in float32: half-precision scores are off by a percent of a weight, and SD 2.1's overflow.
    A sum that overflows float32 upwards counts as the largest float32; -inf is a masked key.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    qk_scale = query.shape[-1] ** -0.5 if qk_scale is None else qk_scale
    scores = torch.matmul(query.to(dtype) * qk_scale, key.to(dtype).transpose(-1, -2))
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask.to(dtype)
    return scores.clamp_max(torch.finfo(dtype).max)


def entmax_by_package(shifted, alpha):
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


def empty_results(query, key, value, mask, settings, operator, unit, qk_scale, with_lse):
    """What the fused operators return in shape, dtype and layout: all that a tracing compiler needs of them."""
    output, lse = empty_outputs(query, value, with_lse)
    return output, query.new_empty(0, dtype=torch.float32) if lse is None else lse


def no_gradient(context, *gradients):
    """What the fused operators do when autograd wants their gradient: RuntimeError saying what has one."""
    raise RuntimeError(
        "the fused attention operators are for inference and have no gradient; surgery.nn.attention uses plain "
        "operations, which have one, where its inputs require gradients"
    )


def _log_sum_exp(scores, shifted, temperature):
    """log sum exp(scores / temperature) of each row: (batch, heads, queries); -inf for a row without keys."""
    if scores.shape[-1] == 0:
        return scores.new_full(scores.shape[:-1], float("-inf"))
    row_max = scores.amax(dim=-1) / temperature
    return row_max + shifted.exp().sum(dim=-1).clamp_min(1.0).log()


# -------------------- cpu_solver.py ----------------------------------------------------------------------------------

# The C++ source of the CPU kernel's solver: scores in, attention maps out, a few dozen queries at a time.
#
# Scores lie as (keys, queries), so that neighbouring queries fill a vector register and no sum runs across one. Newton's
# method (entmax.py) stops as soon as every query of a tile has converged. Where r = 1/(alpha-1) is 1, 2, 3 or 4 (alpha 2,
# 1.5, 1.25; 4/3 is not exact in float32) no power function is needed; every other r below 9 starts from the thresholds of
# the two whole ones next to it. Loops are written for the compiler to vectorise: no branch in an inner one.

CPU_SOLVER = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr float kMasked = -3.0e38f;  // at or below: a masked key
constexpr float kTiny = 1.1754944e-38f;

// Vectors of GCC and Clang: any operation on them is on all lanes, in whatever registers the machine has. A tile of
// kRows x kWide of them is what a product accumulates in registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 6;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRows = 3;
#else
constexpr int kLanes = 4, kRows = 6;
#endif
typedef float Vector __attribute__((vector_size(kLanes * 4), aligned(4)));

// exp(x) for x <= 80, to 2 ulp (Cephes' polynomial); zero below -87.7, where the exponent's bits become zero. The magic
// constant rounds to the nearest integer.
inline float exp_of(float x) {
  x = std::max(x, -88.0f);
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  float f = x - n * 0.693359375f;
  f += n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * f + 1.3981999507e-3f;
  y = y * f + 8.3334519073e-3f;
  y = y * f + 4.1665795894e-2f;
  y = y * f + 1.6666665459e-1f;
  y = y * f + 5.0000001201e-1f;
  y = y * f * f + f + 1.0f;
  const int32_t bits = ((int32_t)n + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return y * power;
}

// log(1 + d) for d > -1, to 2 ulp relative even where d is tiny (Cephes' polynomial).
inline float log1p_of(float d) {
  float u = 1.0f + d;
  u = std::max(u, 1.2e-38f);
  int32_t bits;
  std::memcpy(&bits, &u, 4);
  const int32_t e = (bits - 0x3f3504f3) >> 23;
  bits -= e << 23;
  float m;
  std::memcpy(&m, &bits, 4);
  const float f = e == 0 ? d : m - 1.0f;
  const float z = f * f, n = (float)e;
  float y = 7.0376836292e-2f;
  y = y * f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  y = y * f * z;
  y -= n * 2.12194440e-4f;
  y -= 0.5f * z;
  return f + y + n * 0.693359375f;
}

// (1 + d)^(r-1), zero for d <= -1. kWhole: r - 1 where it is 0, 1, 2 or 3; -1 for any other. Written as products, not
// as a choice: a branch would keep the compiler from vectorising.
template <int kWhole>
inline float power_of(float d, float r_minus_1) {
  const float p = std::max(1.0f + d, 0.0f);
  const float inside = std::min(p * 1.0e30f, 1.0f);  // p = 1 + d is zero or at least 6e-8
  if (kWhole == 0) return inside;
  if (kWhole == 1) return p;
  if (kWhole == 2) return p * p;
  if (kWhole == 3) return p * p * p;
  if (kWhole > 3) return 0.0f;
  return inside * exp_of(r_minus_1 * log1p_of(d));
}

// Raise `lift` (one per lane) by Newton's method on ||relu(x - t)||_r = 1, lift = t + 1, x = z / r, until the sums are
// one to `tolerance` or `steps` are done. Leaves sum p^r in `sum` and sum p^(r-1) in `slope`, both at the last lift,
// and, where a power is dear, p^(r-1) of every score in `powers`.
template <int kWhole, int W>
void newton(const float* __restrict z, int64_t keys, float r, int steps, float tolerance, float* __restrict lift,
            float* __restrict sum, float* __restrict slope, float* __restrict powers) {
  const float alpha_minus_1 = 1.0f / r, r_minus_1 = r - 1.0f;
  for (int step = 0;; step++) {
    for (int j = 0; j < W; j++) sum[j] = slope[j] = 0.0f;
    for (int64_t k = 0; k < keys; k++) {
      for (int j = 0; j < W; j++) {
        const float d = z[k * W + j] * alpha_minus_1 - lift[j];
        const float q = power_of<kWhole>(d, r_minus_1);
        if (kWhole < 0) powers[k * W + j] = q;
        slope[j] += q;
        sum[j] += q * std::max(1.0f + d, 0.0f);
      }
    }
    float worst = 0.0f;
    for (int j = 0; j < W; j++) worst = std::max(worst, std::fabs(sum[j] - 1.0f));
    if (worst <= tolerance || step == steps) return;
    for (int j = 0; j < W; j++) {
      // (N - 1) N^(r-1) / sum p^(r-1), N = sum^(1/r). From the right of the root (a guess may lie there) it steps back.
      const float s = std::max(sum[j], 1.0e-6f);
      float norm;
      if (kWhole == 0) {
        norm = s;
      } else if (kWhole == 1) {
        norm = std::sqrt(s);
      } else {
        norm = exp_of(log1p_of(s - 1.0f) * alpha_minus_1);
      }
      const float rise = (norm - 1.0f) * s / norm;
      lift[j] = std::max(0.0f, lift[j] + rise / std::max(slope[j], 1.0e-6f));
    }
  }
}

template <int W>
void whole(const float* z, int64_t keys, int r_minus_1, int steps, float tolerance, float* lift, float* sum,
           float* slope) {
  for (int j = 0; j < W; j++) lift[j] = 0.0f;
  switch (r_minus_1) {
    case 0: return newton<0, W>(z, keys, 1.0f, steps, tolerance, lift, sum, slope, nullptr);
    case 1: return newton<1, W>(z, keys, 2.0f, steps, tolerance, lift, sum, slope, nullptr);
    case 2: return newton<2, W>(z, keys, 3.0f, steps, tolerance, lift, sum, slope, nullptr);
    default: return newton<3, W>(z, keys, 4.0f, steps, tolerance, lift, sum, slope, nullptr);
  }
}

// The lift at which row-wise (1 + z/r - lift)^r sums to one.
template <int W>
int solve(const float* z, int64_t keys, float r, int steps, float* lift, float* sum, float* slope, float* powers) {
  // A step in the weights follows, which squares what is left of the residual; only keys within
  // delta = |sum - 1| / (r slope) of the threshold, slope >= 1, are off by up to delta^r.
  const float tolerance = std::min(3.0e-4f, r * std::pow(3.0e-7f, 1.0f / r));
  const int below = (int)r;
  if ((float)below == r && below <= 4) {
    whole<W>(z, keys, below - 1, steps, tolerance, lift, sum, slope);
    return below - 1;
  }
  if (r < 9.0f) {
    // The threshold in units of z is nearly linear in r between, and a little beyond, two whole ones.
    alignas(64) float upper[W];
    const int first = std::min(below, 3);
    whole<W>(z, keys, first - 1, 4, 1.0e-2f, lift, sum, slope);
    whole<W>(z, keys, first, 4, 1.0e-2f, upper, sum, slope);
    const float weight = r - (float)first;
    for (int j = 0; j < W; j++) {
      const float low = lift[j] * (float)first, high = upper[j] * (float)(first + 1);
      lift[j] = std::max(0.0f, (low + weight * (high - low)) / r);
    }
  } else {
    for (int j = 0; j < W; j++) lift[j] = 0.0f;
  }
  newton<-1, W>(z, keys, r, steps, tolerance, lift, sum, slope, powers);
  return -1;
}

constexpr int kSoftmax = 4;  // for kWhole: alpha = 1, whose map is the dense one

// The maps from the solved tile: mixed = w_dense * dense + w_sparse * sparse, and sparse alone where it is asked for.
template <int kWhole, int W>
void write_maps(const float* __restrict z, int64_t keys, float r, const float* __restrict lift,
                const float* __restrict sum, const float* __restrict slope, const float* __restrict total,
                float w_dense, float w_sparse, const float* powers, float* mixed, float* sparse_out) {
  const float alpha_minus_1 = 1.0f / r, r_minus_1 = r - 1.0f;
  alignas(64) float correction[W], inverse[W], sparse[W], both[W];
  for (int j = 0; j < W; j++) {
    inverse[j] = total[j] > 0.0f ? 1.0f / total[j] : 0.0f;
    // One more Newton step, in the weights: d weights = (1 - sum) p^(r-1) / sum p^(r-1).
    correction[j] = slope[j] > 0.0f ? (1.0f - sum[j]) / slope[j] : 0.0f;
  }
  for (int64_t k = 0; k < keys; k++) {
    for (int j = 0; j < W; j++) {
      const float score = z[k * W + j];
      const float d = score * alpha_minus_1 - lift[j];
      const float dense = exp_of(score) * inverse[j];
      const float q = kWhole < 0 ? powers[k * W + j] : power_of<kWhole>(d, r_minus_1);
      sparse[j] = kWhole == kSoftmax ? dense : std::max(q * (std::max(1.0f + d, 0.0f) + correction[j]), 0.0f);
      both[j] = w_dense * dense + w_sparse * sparse[j];
    }
    std::memcpy(mixed + k * W, both, sizeof(both));
    if (sparse_out) std::memcpy(sparse_out + k * W, sparse, sizeof(sparse));
  }
}

// Solve and write the maps of scores that are less their row's largest and over temperature; total: their sum of exp.
template <int W>
void maps_of(const float* z, int64_t keys, float alpha, int steps, const float* total, float w_dense, float w_sparse,
             float* powers, float* mixed, float* sparse) {
  alignas(64) float lift[W], sum[W], slope[W];
  const float r = 1.0f / std::max(alpha - 1.0f, 1.1920929e-7f);
  if ((w_sparse == 0.0f && !sparse) || alpha - 1.0f < 2.4e-7f) {  // dense attention alone: nothing to solve
    for (int j = 0; j < W; j++) lift[j] = sum[j] = slope[j] = 0.0f;
    return write_maps<kSoftmax, W>(z, keys, r, lift, sum, slope, total, w_dense, w_sparse, nullptr, mixed, sparse);
  }
  switch (solve<W>(z, keys, r, steps, lift, sum, slope, powers)) {
#define WRITE(whole) \
  write_maps<whole, W>(z, keys, r, lift, sum, slope, total, w_dense, w_sparse, powers, mixed, sparse)
    case 0: return WRITE(0);
    case 1: return WRITE(1);
    case 2: return WRITE(2);
    case 3: return WRITE(3);
    default: return WRITE(-1);
#undef WRITE
  }
}

}  // namespace
"""


# -------------------- cpu_source.py ----------------------------------------------------------------------------------

# The C++ source of the CPU kernel: one pass from query, key and value to the output.
#
# A tile is a few dozen queries of one head; its scores never leave the cache. Products are accumulated in registers with
# the queries along the vector, so each of them is a broadcast and a multiply-add.


CPU_SOURCE = (
    CPU_SOLVER
    + r"""
namespace {

// out[i][j] = sum over t of left(i, t) * right[t][j], W lanes j; left(i, t) = left[i * across + t * along].
template <int R, int W>
void product_rows(const float* left, int64_t across, int64_t along, int64_t length, const float* right, float* out) {
  constexpr int kWide = W / kLanes;
  Vector sum[R][kWide];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < kWide; v++) sum[r][v] = Vector{};
  for (int64_t t = 0; t < length; t++) {
    Vector row[kWide];
    for (int v = 0; v < kWide; v++) row[v] = *(const Vector*)(right + t * W + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const float factor = left[r * across + t * along];
#pragma GCC unroll 8
      for (int v = 0; v < kWide; v++) sum[r][v] += factor * row[v];
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < kWide; v++) *(Vector*)(out + r * W + v * kLanes) = sum[r][v];
}

template <int W>
void product(const float* left, int64_t across, int64_t along, int64_t rows, int64_t length, const float* right,
             float* out) {
  constexpr int R = W == 4 * kLanes ? kRows : 8;
  int64_t i = 0;
  for (; i + R <= rows; i += R) product_rows<R, W>(left + i * across, across, along, length, right, out + i * W);
  for (; i < rows; i++) product_rows<1, W>(left + i * across, across, along, length, right, out + i * W);
}

}  // namespace

enum { kPladis, kSparse, kAnderson, kGag };

// The call, as cpu_kernel.py's _Call lays it out. Strides are in elements; that of a channel is 1.
extern "C" struct Call {
  const float *query, *key, *value, *mask;
  float *output, *lse;
  int64_t batch, heads, queries, keys, channels, value_channels;
  int64_t query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n;
  int64_t mask_b, mask_h, mask_q, mask_k, output_b, output_h, output_n;
  float qk_scale, alpha, scale, temperature, zeta, eta, alpha_low, scale_low;
  int32_t kind, whole_token, steps, threads;
};

namespace {

template <int W>
struct Tile {
  const Call& call;
  std::vector<float> storage;
  float *turned, *scores, *powers, *mixed, *sparse, *t_sparse, *residual;
  alignas(64) float top[W], total[W];

  explicit Tile(const Call& c) : call(c) {
    const int64_t map = c.keys * W, heads = c.whole_token ? c.heads : 1;
    const int64_t channels = std::max(c.channels, c.value_channels);
    const bool more = c.kind == kGag || c.kind == kAnderson;
    storage.resize(channels * W + 3 * map + (more ? map : 0) + heads * 2 * c.value_channels * W + 16);
    float* at = (float*)(((uintptr_t)storage.data() + 63) & ~(uintptr_t)63);
    auto take = [&](int64_t n) { float* here = at; at += n; return here; };
    turned = take(channels * W), scores = take(map), powers = take(map), mixed = take(map);
    sparse = more ? take(map) : nullptr;
    t_sparse = take(heads * c.value_channels * W), residual = take(heads * c.value_channels * W);
  }

  // Scores over temperature less their row's largest, and what of them the maps need besides.
  void score(int64_t b, int64_t h, int64_t first, int64_t width) {
    const float* query = call.query + b * call.query_b + h * call.query_h + first * call.query_n;
    for (int64_t j = 0; j < W; j++)
      for (int64_t c = 0; c < call.channels; c++)
        turned[c * W + j] = j < width ? query[j * call.query_n + c] * call.qk_scale : 0.0f;
    product<W>(call.key + b * call.key_b + h * call.key_h, call.key_n, 1, call.keys, call.channels, turned, scores);
    if (call.mask) {
      const float* mask = call.mask + b * call.mask_b + h * call.mask_h + first * call.mask_q;
      for (int64_t k = 0; k < call.keys; k++)
        for (int64_t j = 0; j < width; j++) scores[k * W + j] += mask[j * call.mask_q + k * call.mask_k];
    }
    for (int j = 0; j < W; j++) top[j] = kMasked, total[j] = 0.0f;
    for (int64_t k = 0; k < call.keys; k++)
      for (int j = 0; j < W; j++) top[j] = scores[k * W + j] > top[j] ? scores[k * W + j] : top[j];
    for (int j = 0; j < W; j++) top[j] = top[j] < 3.4e38f ? top[j] : 3.4e38f;
    const float inverse = 1.0f / call.temperature;
    for (int64_t k = 0; k < call.keys; k++) {
      for (int j = 0; j < W; j++) {
        float score = scores[k * W + j];
        const bool masked = score <= kMasked;
        score = (std::min(score, 3.4e38f) - top[j]) * inverse;
        score = masked || score < -1.0e9f ? -1.0e9f : score;
        scores[k * W + j] = score;
        total[j] += exp_of(score);
      }
    }
    if (call.lse)
      for (int64_t j = 0; j < width; j++)
        call.lse[(b * call.heads + h) * call.queries + first + j] =
            total[j] > 0.0f ? top[j] * inverse + std::log(total[j]) : -INFINITY;
  }

  void maps(float alpha, float w_dense, float w_sparse, float* to, float* sparse_to) {
    maps_of<W>(scores, call.keys, alpha, call.steps, total, w_dense, w_sparse, powers, to, sparse_to);
  }

  // out (value_channels, W) = map (keys, W) times value
  void times_value(int64_t b, int64_t h, const float* map, float* out) {
    product<W>(call.value + b * call.value_b + h * call.value_h, 1, call.value_n, call.value_channels, call.keys, map,
               out);
  }

  void store(int64_t b, int64_t h, int64_t first, int64_t width, const float* result) {
    float* output = call.output + b * call.output_b + h * call.output_h + first * call.output_n;
    for (int64_t j = 0; j < width; j++)
      for (int64_t c = 0; c < call.value_channels; c++) output[j * call.output_n + c] = result[c * W + j];
  }

  void linear(int64_t b, int64_t h, int64_t first, int64_t width) {
    score(b, h, first, width);
    if (call.kind == kSparse) {
      maps(call.alpha, 0.0f, 1.0f, mixed, nullptr);
    } else if (call.kind == kPladis) {
      maps(call.alpha, 1.0f - call.scale, call.scale, mixed, nullptr);
    } else {
      maps(call.alpha, 1.0f - call.scale - call.scale_low, call.scale, mixed, nullptr);
      maps(call.alpha_low, 0.0f, call.scale_low, sparse, nullptr);
      for (int64_t i = 0; i < call.keys * W; i++) mixed[i] += sparse[i];
    }
    times_value(b, h, mixed, t_sparse);
    store(b, h, first, width, t_sparse);
  }

  // GAG, eq. 11-13: T_s and T_s - T_d of one head, or of all that are projected together, then their combination.
  void gag(int64_t b, int64_t h, int64_t heads, int64_t first, int64_t width) {
    const int64_t size = call.value_channels * W, rows = heads * call.value_channels;
    for (int64_t i = 0; i < heads; i++) {
      score(b, h + i, first, width);
      maps(call.alpha, -1.0f, 1.0f, mixed, sparse);
      times_value(b, h + i, sparse, t_sparse + i * size);
      times_value(b, h + i, mixed, residual + i * size);
    }
    // Divided by the largest before it is squared, so that nothing overflows or vanishes.
    alignas(64) float largest[W], length[W], along[W], norm[W], gain[W];
    for (int j = 0; j < W; j++) largest[j] = kTiny, length[j] = along[j] = norm[j] = 0.0f;
    for (int64_t i = 0; i < rows; i++)
      for (int j = 0; j < W; j++) largest[j] = std::max(largest[j], std::fabs(t_sparse[i * W + j]));
    for (int64_t i = 0; i < rows; i++) {
      for (int j = 0; j < W; j++) {
        const float direction = t_sparse[i * W + j] / largest[j];
        length[j] += direction * direction;
        along[j] += direction * residual[i * W + j];
      }
    }
    // r~ = zeta r + (1 - zeta) r_par, kept where r was
    for (int j = 0; j < W; j++) along[j] = (1.0f - call.zeta) * along[j] / std::max(length[j], 1.0f), gain[j] = kTiny;
    for (int64_t i = 0; i < rows; i++) {
      for (int j = 0; j < W; j++) {
        float update = call.zeta * residual[i * W + j] + along[j] * (t_sparse[i * W + j] / largest[j]);
        residual[i * W + j] = update;
        gain[j] = std::max(gain[j], std::fabs(update));
      }
    }
    for (int64_t i = 0; i < rows; i++) {
      for (int j = 0; j < W; j++) {
        const float scaled = residual[i * W + j] / gain[j];
        norm[j] += scaled * scaled;
      }
    }
    for (int j = 0; j < W; j++) {
      const float whole = gain[j] * std::sqrt(norm[j]);
      gain[j] = call.scale * (whole > call.eta ? call.eta / whole : 1.0f);
    }
    for (int64_t i = 0; i < rows; i++)
      for (int j = 0; j < W; j++) t_sparse[i * W + j] += gain[j] * residual[i * W + j];
    for (int64_t i = 0; i < heads; i++) store(b, h + i, first, width, t_sparse + i * size);
  }
};

template <int W>
void run(const Call& call) {
  const int64_t across = (call.queries + W - 1) / W, together = call.whole_token ? call.heads : 1;
  const int64_t groups = call.heads / together, tiles = call.batch * groups * across;
#pragma omp parallel num_threads(call.threads)
  {
    Tile<W> tile(call);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < tiles; i++) {
      const int64_t first = i % across * W, width = std::min<int64_t>(W, call.queries - first);
      const int64_t b = i / across / groups, h = i / across % groups * together;
      if (call.kind == kGag)
        tile.gag(b, h, together, first, width);
      else
        tile.linear(b, h, first, width);
    }
  }
}

}  // namespace

extern "C" void pladis_attention(const Call* call) {
  // A tile stays in the second-level cache.
  call->keys <= 1024 ? run<4 * kLanes>(*call) : run<kLanes>(*call);
}
"""
)


# -------------------- cpu_kernel.py ----------------------------------------------------------------------------------

# The fused operators on CPUs: one C++ kernel from query, key and value to the output.
#
# Its source (cpu_source.py) is compiled once by the machine's own C++ compiler through torch, which keeps the result on
# disk. Where there is none, `compiler_is_available` is False and the blocked torch form is used.

import ctypes
import functools
import platform
import warnings

import torch


WORTH_COMPILING = 1 << 16  # scores in a call: SD1.5's smallest layer has more; plain torch takes milliseconds for them


@functools.cache
def compiler_is_available():
    """Whether the kernel compiles and loads here; tries it, once a process. Says why not in a warning."""
    try:
        _library()
    except Exception as error:  # whatever a missing or broken tool chain raises
        reason = str(error).strip().splitlines()
        warnings.warn(
            f"the C++ attention kernel cannot be built ({type(error).__name__}: {reason[0] if reason else 'no message'}"
            "); using the slower torch form. A C++ compiler such as g++ is what it needs",
            stacklevel=2,
        )
        return False
    return True


@functools.cache
def _library():
    # torch's own compile cache, which inductor uses for its CPU code: keyed by source, flags and machine.
    from torch._inductor.codecache import CppCodeCache

    flags = []
    if platform.system() != "Windows":
        # inductor vectorises by hand and tells the compiler not to; this source is written for the compiler to do it.
        flags = ["-ftree-loop-vectorize", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
        if platform.machine() in ("x86_64", "AMD64"):
            flags.append("-mprefer-vector-width=512")
    library = CppCodeCache.load(CPU_SOURCE, extra_flags=tuple(flags))
    library.pladis_attention.argtypes = [ctypes.c_void_p]
    library.pladis_attention.restype = None
    return library


class _Call(ctypes.Structure):
    """The C++ source's struct Call."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "mask", "output", "lse")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "queries", "keys", "channels", "value_channels")),
        *((f"{tensor}_{dim}", ctypes.c_int64) for tensor in ("query", "key", "value") for dim in "bhn"),
        *((f"mask_{dim}", ctypes.c_int64) for dim in "bhqk"),
        *((f"output_{dim}", ctypes.c_int64) for dim in "bhn"),
        ("qk_scale", ctypes.c_float),
        *((n, ctypes.c_float) for n in ("alpha", "scale", "temperature", "zeta", "eta", "alpha_low", "scale_low")),
        *((name, ctypes.c_int32) for name in ("kind", "whole_token", "steps", "threads")),
    ]


_KINDS_IN_C = ("pladis", "sparse", "anderson", "gag")


def fused_on_cpu(query, key, value, settings, *, operator, unit, mask, qk_scale, with_lse=False):
    """As `reference`, with nothing beyond the output in memory. float32; float16 and bfloat16 by way of float32."""
    numbers = {name: float(setting) for name, setting in zip(OPERATORS[operator], settings, strict=True)}
    output, lse = empty_outputs(query, value, with_lse)
    batch, heads, queries, channels = query.shape
    if output.numel() == 0 or key.shape[2] == 0:
        return output.zero_(), None if lse is None else lse.fill_(-torch.inf)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        mask = mask.float().expand(batch, heads, queries, key.shape[2])
    # A batch entry at a time where a dtype has to be converted, so that a copy of a part is all that is held.
    entries = [slice(None)] if query.dtype == torch.float32 else [slice(i, i + 1) for i in range(batch)]
    for entry in entries:
        parts = [_with_channels_last(tensor[entry].float()) for tensor in (query, key, value)]
        part = output[entry] if output.dtype == torch.float32 else empty_outputs(parts[0], parts[2], False)[0]
        call = _Call(
            *(tensor.data_ptr() for tensor in parts),
            None if mask is None else mask[entry].data_ptr(),
            part.data_ptr(),
            None if lse is None else lse[entry].data_ptr(),
            *(part.shape[0], heads, queries, key.shape[2], channels, value.shape[3]),
            *(stride for tensor in parts for stride in tensor.stride()[:3]),
            *((0, 0, 0, 0) if mask is None else mask.stride()),
            *part.stride()[:3],
            qk_scale,
            *(numbers.get(name, 0.0) for name in ("alpha", "scale", "temperature", "zeta", "eta")),
            *(numbers.get(name, 0.0) for name in ("alpha_low", "scale_low")),
            kind=_KINDS_IN_C.index(operator),
            whole_token=operator == "gag" and unit == "token",
            steps=newton_steps(key.shape[2]),
            threads=torch.get_num_threads(),
        )
        _library().pladis_attention(ctypes.byref(call))
        if part.dtype != output.dtype:
            output[entry] = part
    return output, lse


def _with_channels_last(tensor):
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


# -------------------- triton_kernel.py -------------------------------------------------------------------------------

# The fused operators on GPUs: one Triton kernel from query, key and value to the output.
#
# A program holds one block of queries of one head: it reads Q, K and V, keeps the scores in registers, solves for the
# entmax threshold by Newton's method on them (entmax.py; alpha is read from memory, so one compiled kernel serves every
# alpha), combines the maps, multiplies with V and writes the output alone. All keys are one tile, up to
# 512 of them; a longer text takes the blocked form.
#
# Triton is imported at the first call, not before. TRITON_INTERPRET=1 runs the same code without a GPU.

import functools
import importlib
import importlib.util
import os
import types
from collections.abc import Sequence

import torch
from torch import Tensor


# Stands for triton.language until the first call puts that here; the kernels below need no more of it when defined.
tl = types.SimpleNamespace(constexpr="constexpr")

MOST_KEYS = 512
MOST_CHANNELS = 256
_KINDS = {"pladis": 0, "sparse": 1, "anderson": 2, "gag": 3}
_GAG_SUMS, _GAG_ROWS = 4, 5  # gag over whole tokens: first the sums of each head, then the output
_find_spec = functools.cache(importlib.util.find_spec)  # a search of the disk where it fails; asked at every call


def triton_refusal(query, key, value):
    """Why the kernel cannot take these tensors, as one sentence; None if it can."""
    keys, channels = key.shape[2], query.shape[3]
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{query.dtype} is not float32, float16 or bfloat16"
    if not query.dtype == key.dtype == value.dtype:
        return "query, key and value differ in dtype"
    if not 1 <= keys <= MOST_KEYS:
        return f"{keys} keys are not 1 to {MOST_KEYS}"
    if channels > MOST_CHANNELS or value.shape[3] != channels:
        return f"head_dim {channels} and {value.shape[3]} are not the same number up to {MOST_CHANNELS}"
    if not query.is_cuda and not _is_interpreted():
        return f"the tensors are on {query.device}, not on a GPU"
    if not triton_is_ready():
        return "Triton is not installed"
    return None


def tile_sizes(keys, head_dim, dtype):
    """(queries, keys, channels at a time, warps) of a program for this many keys and channels.

    A thread holds 16 scores, 32 beyond 256 keys: the solver keeps four or five numbers for each in registers, and more
    would spill (benchmarks/triton_registers.py shows what the compiler makes of each configuration).
    """
    keys = max(16, 1 << (keys - 1).bit_length())  # tl.dot needs powers of two of at least 16
    rows = 16 if keys > 256 else 32 if keys > 128 or dtype == torch.float32 else 64
    warps = 8 if keys > 256 else min(16, max(4, rows * keys // 512))
    most_channels = 32 if dtype == torch.float32 else 64
    return rows, keys, min(most_channels, max(16, 1 << (head_dim - 1).bit_length())), warps


def fused_by_triton(query, key, value, settings, *, operator, unit, mask, qk_scale, with_lse=False):
    """As `reference`, by the kernel."""
    arguments = (query, key, value, mask, list(settings), operator, unit, qk_scale, with_lse)
    output, lse = torch.ops.pladis.attention_triton_v1(*arguments)
    return output, lse if with_lse else None


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    settings: Sequence[Tensor],
    operator: str,
    unit: str,
    qk_scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    kernel = torch.library.wrap_triton(_jitted())
    batch, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    rows, columns, channels, warps = tile_sizes(keys, head_dim, query.dtype)
    output, lse = empty_outputs(query, value, with_lse)
    lse = query.new_empty(0, dtype=torch.float32) if lse is None else lse
    values = {
        name: setting.to(device=query.device, dtype=torch.float32)
        for name, setting in zip(OPERATORS[operator], settings, strict=True)
    }
    more = {"gag": ("zeta", "eta"), "anderson": ("alpha_low", "scale_low")}
    first, second = more.get(operator, ("alpha", "alpha"))  # the others have no more; the pointers are not read
    boolean = mask is not None and mask.dtype == torch.bool
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys)
        mask = mask.view(torch.uint8) if boolean else mask

    def run(kind, row_sums, row_sparse, row_residual):
        kernel[(batch * heads * -(-queries // rows),)](
            query,
            key,
            value,
            query if mask is None else mask,
            output,
            lse,
            row_sums,
            row_sparse,
            row_residual,
            values["alpha"],
            values.get("scale", values["alpha"]),
            values["temperature"],
            values[first],
            values[second],
            *query.stride(),
            *key.stride(),
            *value.stride(),
            *((0, 0, 0, 0) if mask is None else mask.stride()),
            *output.stride(),
            heads,
            queries,
            keys,
            head_dim,
            qk_scale,
            KIND=kind,
            HAS_MASK=mask is not None,
            BOOLEAN_MASK=boolean,
            HAS_LSE=with_lse,
            STEPS=newton_steps(keys),
            ROWS=rows,
            COLUMNS=columns,
            CHANNELS=channels,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            WIDEN=query.dtype == torch.bfloat16 and _is_interpreted(),
            num_warps=warps,
            num_stages=1,
        )

    if operator != "gag" or unit == "head":
        run(_KINDS[operator], query, query, query)
        return output, lse
    sums = query.new_empty(3, batch, heads, queries, dtype=torch.float32)
    run(_GAG_SUMS, sums, query, query)
    run(_GAG_ROWS, query, *_row_weights(sums.sum(2), values))
    return output, lse


def _row_weights(sums, values):
    """GAG's output is a T_s + b (T_s - T_d) with a and b of each token: (batch, queries) each.

    sums: (3, batch, queries), <r, T_s>, |T_s|^2 and |r|^2 over a whole token. r~ = zeta r + (1 - zeta) c T_s with
    c = <r, T_s> / |T_s|^2, and its parts are orthogonal.
    """
    along, length, square = sums
    share = along / torch.where(length > 0, length, torch.ones_like(length))
    parallel = share * along
    norm = (parallel + values["zeta"] ** 2 * (square - parallel).clamp_min(0.0)).clamp_min(0.0).sqrt()
    gain = values["scale"] * torch.where(norm > values["eta"], values["eta"] / norm, torch.ones_like(norm))
    return (1.0 + gain * share * (1.0 - values["zeta"])).contiguous(), (gain * values["zeta"]).contiguous()


def _attention_tile(
    query,
    key,
    value,
    mask,
    output,
    lse,
    row_sums,
    row_sparse,
    row_residual,
    alpha_pointer,
    scale_pointer,
    temperature_pointer,
    first_pointer,
    second_pointer,
    query_b,
    query_h,
    query_n,
    query_d,
    key_b,
    key_h,
    key_n,
    key_d,
    value_b,
    value_h,
    value_n,
    value_d,
    mask_b,
    mask_h,
    mask_q,
    mask_k,
    output_b,
    output_h,
    output_n,
    output_d,
    heads,
    queries,
    keys,
    head_dim,
    qk_scale,
    KIND: tl.constexpr,  # noqa: N803  Triton's own spelling for what is fixed at compile time
    HAS_MASK: tl.constexpr,  # noqa: N803
    BOOLEAN_MASK: tl.constexpr,  # noqa: N803
    HAS_LSE: tl.constexpr,  # noqa: N803
    STEPS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    CHANNELS: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
    WIDEN: tl.constexpr,  # noqa: N803
):
    row_blocks = tl.cdiv(queries, ROWS)
    program = tl.program_id(0)
    head_index = program // row_blocks
    batch = (head_index // heads).to(tl.int64)
    head = (head_index % heads).to(tl.int64)
    rows = (program % row_blocks) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    is_row = rows < queries
    is_key = columns < keys
    row_index = head_index.to(tl.int64) * queries + rows  # of (batch, heads, queries)
    long_rows = rows.to(tl.int64)
    query_rows = query + batch * query_b + head * query_h + long_rows[:, None] * query_n
    key_rows = key + batch * key_b + head * key_h + columns[None, :] * key_n
    value_rows = value + batch * value_b + head * value_h + columns[:, None] * value_n
    output_rows = output + batch * output_b + head * output_h + long_rows[:, None] * output_n

    scores = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, head_dim, CHANNELS):
        channels = start + tl.arange(0, CHANNELS)
        is_channel = channels < head_dim
        q = tl.load(query_rows + channels[None, :] * query_d, mask=is_row[:, None] & is_channel[None, :], other=0.0)
        k = tl.load(key_rows + channels[:, None] * key_d, mask=is_channel[:, None] & is_key[None, :], other=0.0)
        scores += _product_tile(q, k, PRECISION, WIDEN)
    scores = scores * qk_scale
    if HAS_MASK:
        masking = tl.load(
            mask + batch * mask_b + head * mask_h + long_rows[:, None] * mask_q + columns[None, :] * mask_k,
            mask=is_row[:, None] & is_key[None, :],
            other=0,
        )
        if BOOLEAN_MASK:  # noqa: SIM108
            scores = tl.where(masking != 0, scores, float("-inf"))
        else:
            scores = scores + masking.to(tl.float32)
    # What overflows upwards counts as the largest float32, so that inf - inf never makes a NaN.
    scores = tl.where(is_key[None, :], tl.minimum(scores, 3.4028234e38), float("-inf"))
    top = tl.max(scores, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    temperature = tl.load(temperature_pointer)
    scores = (scores - top[:, None]) / temperature
    dense = tl.exp(scores)
    total = tl.sum(dense, 1)
    dense = dense / tl.maximum(total, 1.0)[:, None]
    if HAS_LSE:
        row_lse = tl.where(total > 0.0, top / temperature + tl.log(tl.maximum(total, 1.0)), float("-inf"))
        tl.store(lse + row_index, row_lse, mask=is_row)
    sparse = _entmax_tile(scores, tl.load(alpha_pointer), STEPS)

    if KIND == 1:
        weights = sparse
    elif KIND >= 3:
        residual = sparse - dense  # GAG works with T_s and T_s - T_d
        if KIND == 5:
            at = batch * queries + rows
            of_sparse = tl.load(row_sparse + at, mask=is_row, other=0.0)
            of_residual = tl.load(row_residual + at, mask=is_row, other=0.0)
        else:
            along = tl.zeros((ROWS,), dtype=tl.float32)
            length = tl.zeros((ROWS,), dtype=tl.float32)
            square = tl.zeros((ROWS,), dtype=tl.float32)
            for start in range(0, head_dim, CHANNELS):
                channels = start + tl.arange(0, CHANNELS)
                is_channel = channels < head_dim
                v = tl.load(
                    value_rows + channels[None, :] * value_d, mask=is_key[:, None] & is_channel[None, :], other=0.0
                )
                t_sparse = _product_tile(sparse.to(v.dtype), v, PRECISION, WIDEN)
                t_residual = _product_tile(residual.to(v.dtype), v, PRECISION, WIDEN)
                along += tl.sum(t_sparse * t_residual, 1)
                length += tl.sum(t_sparse * t_sparse, 1)
                square += tl.sum(t_residual * t_residual, 1)
            if KIND == 4:
                plane = tl.num_programs(0).to(tl.int64) // row_blocks * queries
                tl.store(row_sums + row_index, along, mask=is_row)
                tl.store(row_sums + plane + row_index, length, mask=is_row)
                tl.store(row_sums + 2 * plane + row_index, square, mask=is_row)
            else:
                # As _row_weights: the output is of_sparse T_s + of_residual (T_s - T_d).
                share = along / tl.where(length > 0.0, length, 1.0)
                zeta = tl.load(first_pointer)
                parallel = share * along
                norm = tl.sqrt(tl.maximum(parallel + zeta * zeta * tl.maximum(square - parallel, 0.0), 0.0))
                eta = tl.load(second_pointer)
                gain = tl.load(scale_pointer) * tl.where(norm > eta, eta / tl.where(norm > eta, norm, 1.0), 1.0)
                of_sparse = 1.0 + gain * share * (1.0 - zeta)
                of_residual = gain * zeta
        if KIND != 4:
            weights = of_sparse[:, None] * sparse + of_residual[:, None] * residual
    else:
        weights = dense + tl.load(scale_pointer) * (sparse - dense)
        if KIND == 2:
            low = _entmax_tile(scores, tl.load(first_pointer), STEPS)
            weights = weights + tl.load(second_pointer) * (low - dense)

    if KIND != 4:
        for start in range(0, head_dim, CHANNELS):
            channels = start + tl.arange(0, CHANNELS)
            is_channel = channels < head_dim
            v = tl.load(value_rows + channels[None, :] * value_d, mask=is_key[:, None] & is_channel[None, :], other=0.0)
            result = _product_tile(weights.to(v.dtype), v, PRECISION, WIDEN)
            tl.store(
                output_rows + channels[None, :] * output_d,
                result.to(output.dtype.element_ty),
                mask=is_row[:, None] & is_channel[None, :],
            )


def _product_tile(left, right, PRECISION: tl.constexpr, WIDEN: tl.constexpr):  # noqa: N803
    """left @ right in float32. WIDEN: through float32 operands, since Triton's interpreter cannot multiply bfloat16."""
    if WIDEN:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, input_precision=PRECISION)


def _entmax_tile(shifted, alpha, STEPS: tl.constexpr):  # noqa: N803
    """entmax.py's solver on a tile (rows, keys) of max-shifted scores in registers."""
    alpha_minus_1 = tl.maximum(alpha - 1.0, 1.1920929e-07)
    r = 1.0 / alpha_minus_1
    x = shifted * alpha_minus_1
    lift = tl.zeros_like(tl.max(x, 1))
    for _ in range(STEPS):
        depth = x - lift[:, None]
        power = _power_tile(depth, r - 1.0)
        total = tl.maximum(tl.sum(power * tl.maximum(1.0 + depth, 0.0), 1), 1.0)
        norm = tl.exp(tl.log(total) * alpha_minus_1)
        lift = lift + (norm - 1.0) * total / norm / tl.maximum(tl.sum(power, 1), 1.0)
    depth = x - lift[:, None]
    power = _power_tile(depth, r - 1.0)
    base = tl.maximum(1.0 + depth, 0.0)
    slope = tl.sum(power, 1)
    # The last Newton step is taken in the weights: what is left of the residual is the threshold's own rounding.
    correction = (1.0 - tl.sum(power * base, 1)) / tl.where(slope > 0.0, slope, 1.0)
    return tl.maximum(power * (base + correction[:, None]), 0.0)


def _power_tile(depth, r_minus_1):
    """`(1 + depth)^(r-1)`, zero where depth <= -1; whole exponents without the power function."""
    base = tl.maximum(1.0 + depth, 0.0)
    if r_minus_1 == 1.0:  # alpha = 1.5
        power = base
    elif r_minus_1 == 0.0:  # alpha = 2
        power = tl.where(base > 0.0, 1.0, 0.0)
    elif r_minus_1 == 3.0:  # alpha = 1.25
        power = base * base * base
    else:
        # log1p(depth): what rounding lost in 1 + depth is put back to first order, or alpha near 1 would lose all.
        inside = tl.maximum(base, 1.1754944e-38)
        lost = tl.where(base > 0.0, depth - (inside - 1.0), 0.0)
        power = tl.where(base > 0.0, tl.exp(r_minus_1 * (tl.log(inside) + lost * (2.0 - inside))), 0.0)
    return power


def triton_is_ready():
    """Whether Triton is installed; if so, the operator is registered from here on.

    torch.compile and AOTInductor take the kernel out of that operator, torch.export keeps it whole. Not at import:
    torch.library.triton_op imports torch's compiler and Triton, which takes seconds.
    """
    if _find_spec("triton") is None:
        return False
    if not hasattr(torch.ops.pladis, "attention_triton_v1"):  # another copy of this file may have registered it
        operator = torch.library.triton_op("pladis::attention_triton_v1", _launch, mutates_args=())
        operator.register_fake(empty_results)
        operator.register_autograd(no_gradient)
    return True


# What torch.compiler.assume_constant_result sets; that function itself would import the compiler here and now.
triton_is_ready._dynamo_marked_constant = True


def _is_interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _jitted():
    """The kernel, compiled by Triton at its first launch for a shape."""
    triton = importlib.import_module("triton")
    names = globals()
    names["tl"] = importlib.import_module("triton.language")
    for name in ("_power_tile", "_entmax_tile", "_product_tile"):  # the kernel finds these under their names
        names[name] = triton.jit(names[name])
    return triton.jit(_attention_tile)


# -------------------- fused.py ---------------------------------------------------------------------------------------

# `torch.ops.pladis.attention_v1`: the operators as one node of a graph, and which code computes it where.
#
# torch.compile, torch.export and AOTInductor see this one node (on a GPU attention_triton_v1, the kernel's own) and need
# not trace the solver; `decompositions` turns it into plain operations for a backend that does not know it (TensorRT,
# ONNX, a C++ program without Python). Its version is part of its name: a graph that was exported with it finds what it
# was made for, or nothing.

from collections.abc import Sequence

import torch
from torch import Tensor


# "auto" is the fused operator; the others are for comparison, or for a backend that wants plain operations.
IMPLEMENTATIONS = ("auto", "reference", "entmax", "blocked", "cpp", "triton")

_NAME = "pladis::attention_v1"


def choice_problem(operator, unit, implementation):
    """What is wrong with these names, as one sentence; None if they are all known."""
    for kind, name, known in (
        ("operator", operator, OPERATORS),
        ("unit", unit, UNITS),
        ("implementation", implementation, IMPLEMENTATIONS),
    ):
        if name not in known:
            return f"unknown {kind} {name!r}; there are {', '.join(known)}"
    return None


def attention_by(implementation, query, key, value, settings, *, operator, unit, mask, qk_scale, with_lse):
    """(output, log-sum-exp or None) by one of IMPLEMENTATIONS; settings as scalar tensors in the order of OPERATORS."""
    how = {"operator": operator, "unit": unit, "mask": mask, "qk_scale": qk_scale, "with_lse": with_lse}
    arguments = (query, key, value, settings)
    tracks_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value, *settings))
    if implementation == "reference" or (implementation == "auto" and tracks_gradient):
        return reference(*arguments, **how)  # plain operations, which autograd follows
    if implementation == "entmax":
        return reference(*arguments, **how, sparse_map=entmax_by_package)
    if tracks_gradient:
        raise RuntimeError(f"implementation={implementation!r} has no gradient; use 'reference' or 'auto' for training")
    if implementation == "auto" and query.is_cuda and triton_refusal(query, key, value) is None:
        return fused_by_triton(*arguments, **how)
    if implementation == "auto":
        output, lse = torch.ops.pladis.attention_v1(
            query, key, value, mask, settings, operator, unit, qk_scale, with_lse
        )
        return output, lse if with_lse else None
    return {"blocked": blocked, "cpp": _on_cpu, "triton": _on_triton}[implementation](*arguments, **how)


def choose_implementation(query, key, value):
    """What "auto" runs for these tensors: "triton", "cpp", "blocked" or "reference"."""
    batch, heads, queries, _ = query.shape
    scores = batch * heads * queries * key.shape[2]
    if query.is_cuda and triton_refusal(query, key, value) is None:
        return "triton"
    if query.device.type == "cpu" and scores >= WORTH_COMPILING and _dtype_is_fused(query, value):
        return "cpp" if compiler_is_available() else "blocked"
    # One pass over small inputs; pieces where all the scores at once would be the largest thing in memory.
    return "reference" if scores <= WORTH_COMPILING else "blocked"


def decompositions():
    """{operator: plain torch function}, for `exported_program.run_decompositions` and the like.

    Everything but the fused operator stays as it is; merge it into a backend's own table.
    """
    fused = [torch.ops.pladis.attention_v1]
    if triton_is_ready():
        fused.append(torch.ops.pladis.attention_triton_v1)
    return {operator.default: _decomposed for operator in fused}


def _on_cpu(query, key, value, settings, **how):
    if query.device.type != "cpu" or not _dtype_is_fused(query, value):
        raise ValueError(f"implementation='cpp' is for float32, float16 and bfloat16 on a CPU, not {query.dtype}")
    if not compiler_is_available():
        raise RuntimeError("implementation='cpp' needs a C++ compiler, such as g++")
    return fused_on_cpu(query, key, value, settings, **how)


def _on_triton(query, key, value, settings, **how):
    reason = triton_refusal(query, key, value)
    if reason:
        raise ValueError(f"implementation='triton' cannot take this: {reason}")
    return fused_by_triton(query, key, value, settings, **how)


def _dtype_is_fused(query, value):
    return query.dtype in (torch.float32, torch.float16, torch.bfloat16) and query.dtype == value.dtype


def _dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    settings: Sequence[Tensor],
    operator: str,
    unit: str,
    qk_scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    chosen = {"reference": reference, "blocked": blocked, "cpp": fused_on_cpu, "triton": fused_by_triton}[
        choose_implementation(query, key, value)
    ]
    output, lse = chosen(
        query,
        key,
        value,
        list(settings),
        operator=operator,
        unit=unit,
        mask=mask,
        qk_scale=qk_scale,
        with_lse=with_lse,
    )
    wanted, wanted_lse = empty_results(query, key, value, mask, settings, operator, unit, qk_scale, with_lse)
    if output.stride() != wanted.stride():  # what the compiler was told to expect
        output = wanted.copy_(output)
    return output, wanted_lse if lse is None else lse.contiguous()


def _decomposed(query, key, value, mask, settings, operator, unit, qk_scale, with_lse):
    output, lse = reference(
        query,
        key,
        value,
        settings,
        operator=operator,
        unit=unit,
        mask=mask,
        qk_scale=qk_scale,
        with_lse=with_lse,
    )
    return output, query.new_empty(0, dtype=torch.float32) if lse is None else lse


# A process may hold several copies of this file; the first one registers.
if not hasattr(torch.ops.pladis, "attention_v1"):
    _operator = torch.library.custom_op(_NAME, _dispatch, mutates_args=())
    _operator.register_fake(empty_results)
    _operator.register_autograd(no_gradient)


# -------------------- attention.py -----------------------------------------------------------------------------------

# The attention operators as one function over query, key, value.

import torch



def attention(
    query,
    key,
    value,
    *,
    operator="pladis",
    alpha=None,
    scale=None,
    temperature=None,
    zeta=None,
    eta=None,
    unit="head",
    alpha_low=None,
    scale_low=None,
    mask=None,
    qk_scale=None,
    implementation="auto",
    return_lse=False,
):
    """Attention by one of OPERATORS (`operators.py` has their formulas), on the scores `query key^T qk_scale`.

    query: (batch, heads, queries, head_dim); key, value: (batch, heads, keys, head_dim); any floating dtype. Scores,
        both maps and their combination are float32 whatever the inputs (float64 for float64 input).
    operator: "pladis" (PLADIS, arXiv 2503.07677, eq. 15), "sparse" (PLADIS at scale 1), "gag" (GAG, arXiv
        2603.02531, eq. 11-13) or "anderson" (its Appendix F).
    alpha: of the sparse map, in [1, 2]; 1.5 unless given. scale: the papers' lambda; 2 unless given (gag: 10,
        anderson: 1). 0 is dense attention for pladis; above 1 it extrapolates and weights may be negative. temperature:
        > 0, divides the scores of every map (PLADIS eq. 36). zeta, eta, unit: gag's share of the orthogonal part, its
        bound on the step and whether it projects per "head" or "token"; 0, 15, "head" unless given. alpha_low,
        scale_low: anderson's second sparse map; 1.25 and 1 unless given. Each is a number or a tensor of one element; a
        tensor's value is not checked, and changing it never recompiles a graph. What an operator does not have is not
        read.
    mask: boolean (True keeps a key) or additive, broadcastable to (batch, heads, queries, keys). A query whose keys
        are all masked gets zeros.
    qk_scale: 1/sqrt(head_dim) unless given.
    implementation: "auto" picks by device and shape and is one operator in a compiled or exported graph. "reference" is
        plain torch, "blocked" the same in pieces, "entmax" the entmax package's functions, the papers' own arithmetic;
        "cpp" and "triton" are the kernels for CPUs and GPUs. Where gradients are wanted "auto" is "reference".
    Returns (batch, heads, queries, head_dim) in value's dtype; with return_lse also the log-sum-exp of the scores over
    temperature, (batch, heads, queries) in float32, -inf where every key is masked.
    Raises ValueError for numbers out of range, an unknown operator, unit or implementation, shapes that do not fit, or
    tensors that the named kernel does not take; TypeError for dtypes; ImportError or RuntimeError when a named
    implementation needs a package or compiler that is missing, or has no gradient.
    """
    problem = choice_problem(operator, unit, implementation)
    if problem:
        raise ValueError(problem)
    _check_tensors(query, key, value, mask)
    if key.shape[:2] != query.shape[:2]:
        key, value = (tensor.expand(*query.shape[:2], -1, -1) for tensor in (key, value))
    given = {
        "alpha": alpha,
        "scale": scale,
        "temperature": temperature,
        "zeta": zeta,
        "eta": eta,
        "alpha_low": alpha_low,
        "scale_low": scale_low,
    }
    settings = [
        _as_tensor(name, default if given[name] is None else given[name], query)
        for name, default in OPERATORS[operator].items()
    ]
    output, lse = attention_by(
        implementation,
        query,
        key,
        value,
        settings,
        operator=operator,
        unit=unit,
        mask=mask,
        qk_scale=query.shape[-1] ** -0.5 if qk_scale is None else float(qk_scale),
        with_lse=return_lse,
    )
    return (output, lse) if return_lse else output


def _check_tensors(query, key, value, mask):
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating, not {tensor.dtype}")
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be (batch, heads, length, head_dim), not {tuple(tensor.shape)}")
    wanted = (*query.shape[:2], key.shape[2], query.shape[3])
    if not _broadcasts(key.shape, wanted) or key.shape[2:] != wanted[2:]:
        raise ValueError(f"key {tuple(key.shape)} does not fit query {tuple(query.shape)}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value {tuple(value.shape)} does not fit key {tuple(key.shape)}")
    if mask is not None and not _broadcasts(mask.shape, (*query.shape[:3], key.shape[2])):
        raise ValueError(f"mask {tuple(mask.shape)} does not broadcast to {(*query.shape[:3], key.shape[2])}")
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask must be boolean (True keeps a key) or additive floating, not {mask.dtype}")


def _broadcasts(shape, wanted):
    return len(shape) <= len(wanted) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(wanted), strict=False)
    )


def _as_tensor(name, number, query):
    """The hyperparameter as a scalar tensor on query's device, float32 (float64 for float64 queries)."""
    if isinstance(number, torch.Tensor):
        if number.numel() != 1:
            raise ValueError(f"{name} must have one element, not {number.numel()}; give each layer its own module")
        return number if number.ndim == 0 else number.reshape(())
    if not is_in_range(name, number):
        raise ValueError(f"{name} must {RANGES[name][2]}, not {number}")
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return torch.full((), float(number), dtype=dtype, device=query.device)


# -------------------- ip_adapter.py ----------------------------------------------------------------------------------

# What an IP-Adapter adds to a cross-attention: dense attention from the same queries to the image tokens.
#
# The image tokens come beside the text as `(text, [tokens of each adapter])`, and their projections live in the module's
# processor (`to_k_ip`, `to_v_ip`, `scale`), where diffusers' loader puts them. PLADIS is defined on text keys, so these
# branches stay dense.

import torch.nn.functional as F
from diffusers.image_processor import IPAdapterMaskProcessor


def split_image_tokens(processor, encoder_hidden_states):
    """(text, image tokens of each adapter, (batch, images, tokens, dim)); the list is empty without adapter."""
    if isinstance(encoder_hidden_states, tuple):
        return encoder_hidden_states[0], list(encoder_hidden_states[1])
    if not hasattr(processor, "to_k_ip") or encoder_hidden_states is None:
        return encoder_hidden_states, []
    # diffusers' older calling convention: the image tokens are the last keys of one tensor.
    text_keys = encoder_hidden_states.shape[1] - processor.num_tokens[0]
    return encoder_hidden_states[:, :text_keys], [encoder_hidden_states[:, text_keys:]]


def image_attention(processor, query, image_tokens, masks=None):
    """The sum over adapters of `scale * attention(query, image keys)`, shaped as `query`: (batch, heads, queries, dim).

    masks: None, or for each adapter None or (1, images, height, width), as `cross_attention_kwargs["ip_adapter_masks"]`
    brings them. Raises ValueError where masks and adapters do not fit together.
    """
    scales = processor.scale
    if masks is None:
        masks = [None] * len(scales)
    elif not isinstance(masks, list):
        masks = list(masks.unsqueeze(1))
    if not len(masks) == len(scales) == len(image_tokens):
        raise ValueError(
            f"{len(masks)} ip_adapter_masks, {len(scales)} adapter scales and {len(image_tokens)} image embeddings "
            "must be as many: give one of each for every loaded IP-Adapter"
        )
    total = 0.0
    for tokens, scale, mask, to_key, to_value in zip(
        image_tokens, scales, masks, processor.to_k_ip, processor.to_v_ip, strict=True
    ):
        if mask is not None:
            total = total + _masked_adapter(query, tokens, scale, mask, to_key, to_value)
        elif isinstance(scale, list) and any(scale):
            raise ValueError("an IP-Adapter with one scale per image needs ip_adapter_masks in cross_attention_kwargs")
        elif not isinstance(scale, list) and scale != 0:
            total = total + scale * _dense(query, to_key(tokens), to_value(tokens))
    return total


def _masked_adapter(query, tokens, scale, mask, to_key, to_value):
    images = mask.shape[1]
    scale = scale if isinstance(scale, list) else [scale] * images
    if mask.ndim != 4 or images != tokens.shape[1] or images != len(scale):
        raise ValueError(
            f"an ip_adapter_mask of shape {tuple(mask.shape)} does not fit {tokens.shape[1]} images and {len(scale)} "
            "scales: make it (1, images, height, width) with IPAdapterMaskProcessor.preprocess"
        )
    batch, heads, queries, head_dim = query.shape
    total = 0.0
    for index in range(images):
        image = tokens[:, index]
        output = _dense(query, to_key(image), to_value(image))
        region = IPAdapterMaskProcessor.downsample(mask[:, index], batch, queries, heads * head_dim)
        region = region.view(batch, queries, heads, head_dim).transpose(1, 2)
        total = total + scale[index] * output * region.to(dtype=query.dtype, device=query.device)
    return total


def _dense(query, key, value):
    batch, heads, _, head_dim = query.shape
    key = key.reshape(batch, -1, heads, head_dim).transpose(1, 2)
    value = value.reshape(batch, -1, heads, head_dim).transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value)


# -------------------- schedule.py ------------------------------------------------------------------------------------

# Hyperparameters that change from one denoising step to the next, as a pipeline's `callback_on_step_end`.
#
# A schedule is plain data beside an operation, {"steps": [5, 20]} and the like:
#
#     steps     [first, end]   the operator acts from step `first` up to, not including, step `end` (null: to the last)
#     fraction  [from, to]     the same as parts of the run: step i of n lies in it if from <= i/n < to
#     sigma     [low, high]    the operator acts while the noise level of the step lies in [low, high]
#     <name>    [v0, v1, ...]  values of a hyperparameter: one for each step, or stretched evenly over any number of steps
#
# A step must lie in every window that is named; outside, attention is dense. Values are written into the modules'
# buffers between two calls of the model, so a compiled graph stays whole and is not compiled again.

import copy
import math


WINDOWS = ("steps", "fraction", "sigma")


def schedule_problems(schedule, operator):
    """What is wrong with a schedule for an operator: [(key or None, message)]; empty if nothing is."""
    if not isinstance(schedule, dict) or not schedule:
        return [(None, f"must name {', '.join(WINDOWS)} or a hyperparameter, with a list each")]
    problems = []
    for key, values in schedule.items():
        if key not in WINDOWS and key not in OPERATORS[operator]:
            known = ", ".join((*WINDOWS, *OPERATORS[operator]))
            problems.append((key, f"is no window and no hyperparameter of {operator}; there are {known}"))
        elif not isinstance(values, (list, tuple)) or not values:
            problems.append((key, f"must be a list, not {values!r}"))
        elif key in WINDOWS:
            problems += [(key, message) for message in _window_problems(key, values)]
        else:
            wrong = [value for value in values if not is_in_range(key, value)]
            problems += [(key, f"must {RANGES[key][2]}, not {value!r}") for value in wrong[:1]]
    return problems


def stored_schedule(schedule):
    """A copy of a schedule as a config holds it: lists, and the largest number in place of infinity."""
    return {
        key: [LARGEST if value is not None and value > LARGEST else value for value in values]
        for key, values in schedule.items()
    }


def _window_problems(key, values):
    if len(values) != 2:
        return [f"must be two numbers, from and to, not {len(values)}"]
    low, high = values
    if key == "steps":
        if not _is_count(low) or not (high is None or _is_count(high)):
            return [f"must be two step numbers of 0 or above (the second may be null), not {list(values)!r}"]
        return [] if high is None or low < high else [f"must rise: {low} to {high} holds no step"]
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return [f"must be two numbers, not {list(values)!r}"]
    if not 0 <= low < high or math.isinf(low) or (key == "fraction" and high > 1):
        return [f"must rise from 0 or above{' to at most 1' if key == 'fraction' else ''}, not {list(values)!r}"]
    return []


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def step_values(schedule, operator, step, steps, sigma=None):
    """The hyperparameters that a schedule sets at `step` (from 0) of `steps`: {name: float}; others stay as they are.

    sigma: the step's noise level; needed where the schedule has a window of it.
    """
    inside = True
    for key in WINDOWS:
        if key in schedule:
            low, high = schedule[key]
            position = {"steps": step, "fraction": step / steps, "sigma": sigma}[key]
            # An end that was infinite is stored as LARGEST, and pure noise is an infinite level.
            below_end = position <= high or high >= LARGEST if key == "sigma" else high is None or position < high
            inside = inside and low <= position and below_end
    if not inside:
        return off_values(operator)
    lists = {name: values for name, values in schedule.items() if name not in WINDOWS}
    return {name: float(values[step * len(values) // steps]) for name, values in lists.items()}


class StepSchedule:
    """Carries out the schedules of a model's modules in one run of its pipeline, as `callback_on_step_end`.

        with StepSchedule(pipe, pipe.unet, steps=25) as callback:
            pipe(prompt, num_inference_steps=25, callback_on_step_end=callback)

    The first step's values are set when it is made. After the last step, or on leaving the block, every buffer is as it
    was. steps, timesteps: the run's own, from which the first step's noise level follows; without them it is taken to
    be the scheduler's largest. Needed only for a window of sigma. then: another callback_on_step_end to call after it.
    Raises ValueError where no module has a schedule, the buffers are offloaded to the meta device, or a window of sigma
    meets a scheduler that tells no noise level.
    """

    def __init__(self, pipeline, model, steps=None, then=None, timesteps=None):
        self._modules = [module for module in model.modules() if getattr(module, "pladis_schedule", None)]
        self._then = then
        if not self._modules:
            raise ValueError("no module of this model has a schedule")
        if any(module.pladis_alpha.is_meta for module in self._modules):
            raise ValueError(
                "a schedule cannot change buffers that are offloaded to the meta device; use "
                "enable_model_cpu_offload() instead of sequential or group offload of buffers"
            )
        self._needs_sigma = any("sigma" in module.pladis_schedule for module in self._modules)
        sigma = _first_sigma(pipeline.scheduler, steps, timesteps) if self._needs_sigma else None
        self._before = [module.hyperparameters() for module in self._modules]
        self._set(0, steps or len(timesteps or [0]), sigma)

    def __call__(self, pipeline, step, timestep, tensors):
        """Set the values of the step after `step`; returns `tensors`, as diffusers wants."""
        timesteps = len(pipeline.scheduler.timesteps)
        # A run that starts late, from an image of some strength, has fewer steps than the scheduler.
        steps = getattr(pipeline, "num_timesteps", None) or timesteps
        if step + 1 < steps:
            sigma = _sigma_at(pipeline.scheduler, timesteps - steps + step + 1) if self._needs_sigma else None
            self._set(step + 1, steps, sigma)
        else:
            self.restore()
        return self._then(pipeline, step, timestep, tensors) if self._then else tensors

    def restore(self):
        """Put back the hyperparameters that the modules had before."""
        for module, values in zip(self._modules, self._before, strict=True):
            module.set_hyperparameters(values)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.restore()

    def _set(self, step, steps, sigma):
        for module, before in zip(self._modules, self._before, strict=True):
            changed = step_values(module.pladis_schedule, module.pladis_operator, step, steps, sigma)
            module.set_hyperparameters({**before, **changed})


def _first_sigma(scheduler, steps, timesteps):
    trial = copy.deepcopy(scheduler)
    try:
        if timesteps is not None:
            trial.set_timesteps(timesteps=list(timesteps))
        elif steps is not None:
            trial.set_timesteps(steps)
        else:
            return _largest_sigma(scheduler)
    except (ValueError, TypeError):  # wants what only the pipeline knows, such as a flow's shift
        return _largest_sigma(scheduler)
    return _sigma_at(trial, 0)


def _largest_sigma(scheduler):
    if hasattr(scheduler, "alphas_cumprod"):
        return _sigma_of_alpha(float(scheduler.alphas_cumprod[-1]))
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None or len(sigmas) == 0:
        raise ValueError(
            f"{type(scheduler).__name__} tells no noise level before its timesteps are set; give steps=, or use a "
            "window of steps or fraction instead"
        )
    return float(max(sigmas))


def _sigma_at(scheduler, step):
    """The noise level at a step, noise over signal: of the sigmas where the scheduler has them, else of its alphas."""
    sigmas = getattr(scheduler, "sigmas", None)
    timesteps = scheduler.timesteps
    if sigmas is not None and len(sigmas) in (len(timesteps), len(timesteps) + 1):
        return float(sigmas[step])
    if hasattr(scheduler, "alphas_cumprod"):
        return _sigma_of_alpha(float(scheduler.alphas_cumprod[int(timesteps[step])]))
    raise ValueError(f"{type(scheduler).__name__} tells no noise level; use a window of steps or fraction instead")


def _sigma_of_alpha(alpha_cumprod):
    return math.sqrt(max(0.0, 1.0 - alpha_cumprod) / alpha_cumprod) if alpha_cumprod > 0.0 else math.inf


# -------------------- pladis.py --------------------------------------------------------------------------------------

# `PladisAttention`: diffusers' cross-attention module with one of our operators in place of its softmax.
#
# It is made from a live `Attention` by changing the class of that very object and registering float32 buffers.
# So nothing that holds the module loses it: parents, LoRA layers, quantised Linears, IP-Adapter processors, offload
# and forward hooks, compiled blocks. Taking the buffers away and setting the class back is the exact inverse.

import types

import torch
from diffusers.models.attention_processor import Attention
from diffusers.utils import logging


BUFFERS = tuple(f"pladis_{name}" for name in ALL_HYPERPARAMETERS)  # "scale" alone would clash with Attention.scale

# Processors that compute plain attention, or that add an IP-Adapter to it: forward() below computes what they would.
KNOWN_PROCESSORS = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnProcessorNPU",
    "FusedAttnProcessor2_0",
    "IPAdapterAttnProcessor",
    "IPAdapterAttnProcessor2_0",
    "IPAdapterXFormersAttnProcessor",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
)


class PladisAttention(Attention):
    """Cross-attention by PLADIS (arXiv 2503.07677, eq. 15), GAG, or another of OPERATORS, hyperparameters as buffers.

    Buffers `pladis_alpha`, `pladis_temperature` and those that the operator has besides (`pladis_scale`, the papers'
    lambda, and so on): float32 scalars that stay float32 under .half(), .to(dtype) and
    from_pretrained(torch_dtype=...). Change them in place (`fill_`, `surgery.tune`): a compiled graph need not be
    compiled again. `pladis_schedule`: how they change over the denoising steps (schedule.py), or None.
    """

    @classmethod
    def convert(
        cls, module, operator="pladis", *, unit="head", schedule=None, implementation="auto", **hyperparameters
    ):
        """Turn a live `Attention` into a PladisAttention in place and return it; its parameters are not touched.

        hyperparameters: the operator's own; what is left out takes its default.
        Raises ValueError for a module that `refusal` names a reason against, an unknown operator, unit, hyperparameter
        or implementation.
        """
        reason = cls.refusal(module)
        if reason:
            raise ValueError(reason)
        problem = choice_problem(operator, unit, implementation)
        if problem:
            raise ValueError(problem)
        unknown = sorted(set(hyperparameters) - set(OPERATORS[operator]))
        if unknown:
            raise ValueError(f"{operator} has no {unknown[0]}; it has {', '.join(OPERATORS[operator])}")
        if unit != "head" and operator != "gag":
            raise ValueError(f"unit is gag's; {operator} projects nothing")
        if schedule is not None:
            for key, message in schedule_problems(schedule, operator):
                raise ValueError(f"schedule{f'.{key}' if key else ''} {message}")
        device = next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))
        module.__class__ = cls
        module.pladis_operator, module.pladis_unit = operator, unit
        module.pladis_schedule = None if schedule is None else stored_schedule(schedule)
        module.pladis_implementation = implementation
        for name, default in OPERATORS[operator].items():
            value = min(float(hyperparameters.get(name, default)), LARGEST)
            # No device given on the meta device's behalf: diffusers builds models there and loads the buffers after.
            module.register_buffer(f"pladis_{name}", torch.tensor(value, dtype=torch.float32, device=device))
        _rebind_hooked_forward(module)
        return module

    @staticmethod
    def refusal(module):
        """Why `module` cannot be converted, as one sentence; None if it can."""
        if type(module) is not Attention:
            return f"{type(module).__name__} is not diffusers' Attention class; there is no PLADIS form of it yet"
        if not module.is_cross_attention:
            return "it is self-attention; sparsifying it destroys the image, so it stays dense"
        if module.added_kv_proj_dim is not None or module.to_k is None:
            return "it attends to image and text in one softmax (added key/value projections); not supported yet"
        if module.to_out is None or module.context_pre_only is not None:
            return "it is joint attention without an output of its own; not supported yet"
        processor = type(module.processor).__name__
        if processor not in KNOWN_PROCESSORS:
            return (
                f"its processor {processor} computes attention in its own way, which PLADIS would replace; "
                "call set_default_attn_processor() first"
            )
        hooks = [name for name in ("_diffusers_hook",) if getattr(module, name, None) is not None]
        if hooks and "forward" in module.__dict__:
            return "a diffusers hook (a cache such as PAB or FasterCache) is on it; patch first, enable the hook after"
        return None

    def revert(self):
        """Turn this very object back into the `Attention` that it was, and return it."""
        for name in OPERATORS[self.pladis_operator]:
            del self._buffers[f"pladis_{name}"]
        del self.pladis_operator, self.pladis_unit, self.pladis_schedule, self.pladis_implementation
        self.__class__ = Attention
        if type(self.processor).__name__ == "FusedAttnProcessor2_0" and not hasattr(self, "to_kv"):
            self.fuse_projections()  # asked for while this class ignored it
        _rebind_hooked_forward(self)
        return self

    def hyperparameters(self):
        """{name: float} of the operator's hyperparameters, each the shortest float for its float32 value."""
        return {name: shortest_float(self._buffers[f"pladis_{name}"]) for name in OPERATORS[self.pladis_operator]}

    def set_hyperparameters(self, values):
        """Write hyperparameters, {name: float}, into the buffers in place."""
        for name, value in values.items():
            self._buffers[f"pladis_{name}"].fill_(min(float(value), LARGEST))

    def setting(self):
        """All that the operator is, as a config says it: operator, hyperparameters, gag's unit, schedule if any."""
        setting = {"operator": self.pladis_operator, **self.hyperparameters()}
        if self.pladis_operator == "gag":
            setting["unit"] = self.pladis_unit
        return setting if self.pladis_schedule is None else {**setting, "schedule": self.pladis_schedule}

    def set_processor(self, processor):
        """As `Attention.set_processor`, but a processor with an attention of its own is refused, not ignored."""
        name = type(processor).__name__
        if name not in KNOWN_PROCESSORS:
            raise ValueError(
                f"PladisAttention computes attention itself and cannot run {name}; call surgery.unpatch(pipe) first"
            )
        super().set_processor(processor)

    def fuse_projections(self, fuse=True):
        """Nothing: a fused to_kv goes stale when it is unfused, and forward() reads to_k and to_v."""

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **kwargs):
        """As `Attention.forward`: (batch, queries, channels) or (batch, channels, height, width), out as in.

        encoder_hidden_states: (batch, keys, cross_attention_dim), or IP-Adapter's (text, [image tokens]).
        attention_mask: additive, (batch, 1 or queries, keys). `ip_adapter_masks` is taken from the keyword arguments.
        """
        masks = kwargs.pop("ip_adapter_masks", None)
        kwargs.pop("scale", None)  # the LoRA scale; peft has applied it before the call
        if kwargs:
            unknown = ", ".join(sorted(kwargs))
            logging.get_logger(__name__).warning(f"cross_attention_kwargs {unknown} mean nothing here; ignored")
        text, image_tokens = split_image_tokens(self.processor, encoder_hidden_states)

        residual = hidden_states
        if self.spatial_norm is not None:
            hidden_states = self.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # (batch, height * width, channels)
        if self.group_norm is not None:
            hidden_states = self.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if text is None:
            text = hidden_states
        elif self.norm_cross is not None:
            text = self.norm_encoder_hidden_states(text)

        query = self._split_heads(self.to_q(hidden_states))
        key = self._split_heads(self.to_k(text))
        value = self._split_heads(self.to_v(text))
        query = query if self.norm_q is None else self.norm_q(query)
        key = key if self.norm_k is None else self.norm_k(key)
        output = attention(
            query,
            key,
            value,
            operator=self.pladis_operator,
            unit=self.pladis_unit,
            **{name: self._buffers[f"pladis_{name}"] for name in OPERATORS[self.pladis_operator]},
            mask=self._mask_per_head(attention_mask, text),
            qk_scale=self.scale,
            implementation=self.pladis_implementation,
        )
        if image_tokens:
            output = output + image_attention(self.processor, query, image_tokens, masks)
        output = output.transpose(1, 2).flatten(2).to(query.dtype)  # (batch, queries, heads * head_dim)

        output = self.to_out[1](self.to_out[0](output))
        if image_shape is not None:
            output = output.transpose(-1, -2).reshape(image_shape)
        if self.residual_connection:
            output = output + residual
        return output / self.rescale_output_factor

    def _split_heads(self, projected):
        batch, length, _ = projected.shape
        return projected.view(batch, length, self.heads, -1).transpose(1, 2)  # (batch, heads, length, head_dim)

    def _mask_per_head(self, attention_mask, text):
        if attention_mask is None:
            return None
        batch, keys, _ = text.shape
        attention_mask = self.prepare_attention_mask(attention_mask, keys, batch)
        return attention_mask.view(batch, self.heads, -1, attention_mask.shape[-1])

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args, **kwargs):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        for name in BUFFERS:  # load_state_dict(assign=True) takes the dtype of what it is given
            if name in self._buffers:
                self._buffers[name] = self._buffers[name].float()

    def _apply(self, fn, recurse=True):
        before = {name: self._buffers[name] for name in BUFFERS if name in self._buffers}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new.dtype != old.dtype:  # follow the device, not the dtype: bf16 would turn 1.3 into 1.296875
                meta = "meta" in (new.device.type, old.device.type)
                self._buffers[name] = torch.empty_like(old, device=new.device) if meta else old.to(new.device)
        return self


def is_pladis(module):
    """Whether `module` is a PladisAttention, of this file or of any other copy of it.

    By its buffers: diffusers runs a shipped file anew at every load, and each time makes classes of the same name.
    """
    return "pladis_alpha" in module._buffers and "pladis_temperature" in module._buffers


def shortest_float(tensor):
    """The float32 scalar as the Python float of fewest digits that rounds to it: 1.3, not 1.2999999523162842."""
    value = tensor.float()
    for digits in range(1, 10):
        candidate = float(f"{value.item():.{digits}g}")
        if torch.tensor(candidate, dtype=torch.float32) == value.cpu():
            return candidate
    return value.item()


def _rebind_hooked_forward(module):
    """Point an accelerate hook at the present class's forward: it keeps the bound method that it found."""
    if "_old_forward" in module.__dict__:
        module._old_forward = types.MethodType(type(module).forward, module)


# -------------------- unet.py ----------------------------------------------------------------------------------------

# `PladisUNet2DConditionModel`: the UNet whose config says which of its modules are PladisAttention.
#
# The class exists so that a patched model is saved, loaded and shared as such: a folder whose model_index.json names it
# either loads patched or is refused. Config and buffers say the same thing twice on purpose; loading compares them.

import inspect
import json
import os
import sys

import torch
from diffusers import ModelMixin, UNet2DConditionModel  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.utils import is_accelerate_available


# Behind a saved config's mid_block_type, so that the stock class, which ignores keys it does not know and would run the
# model unpatched, stops with "unknown mid_block_type: ..." and these words.
STOCK_CLASS_REFUSAL = " patched with PLADIS: load with surgery.load or trust_remote_code=True"


class PladisUNet2DConditionModel(UNet2DConditionModel):
    """UNet2DConditionModel with some of its cross-attention modules turned into PladisAttention.

    Config key `pladis`: a list of operations, each {"operator", its hyperparameters, "layers": [module paths]}, for
    "gag" with its "unit", where wanted with a "schedule" (schedule.py). Raises ValueError where the config names no
    layer, an unknown operator or a module that is not there, and where a checkpoint's buffers are missing or disagree
    with the config.
    """

    _keep_in_fp32_modules = list(BUFFERS)  # from_pretrained(torch_dtype=...) would round them

    def __init__(self, *args, pladis=None, **kwargs):
        if "mid_block_type" in kwargs:
            kwargs["mid_block_type"] = (kwargs["mid_block_type"] or "").removesuffix(STOCK_CLASS_REFUSAL) or None
        super().__init__(*args, **kwargs)
        for operation in check_operations(pladis):
            for path in operation["layers"]:
                PladisAttention.convert(module_at(self, path), **_without_layers(operation))
        self.register_to_config(pladis=pladis)

    @classmethod
    def convert(cls, unet, operations, implementation="auto"):
        """Turn a live UNet2DConditionModel into this class in place, and its named modules into PladisAttention."""
        operations = check_operations(operations)
        modules = [(module_at(unet, path), operation) for operation in operations for path in operation["layers"]]
        for module, _ in modules:  # all or none
            reason = PladisAttention.refusal(module)
            if reason:
                raise ValueError(reason)
        for module, operation in modules:
            PladisAttention.convert(module, **_without_layers(operation), implementation=implementation)
        unet.__class__ = cls
        unet.update_config()
        return unet

    def revert(self):
        """Turn this very object back into the UNet2DConditionModel that it was, and return it."""
        for module in self.modules():
            if is_pladis(module):
                module.revert()
        self.__class__ = UNet2DConditionModel
        _set_config(self, {key: value for key, value in self.config.items() if key != "pladis"})
        return self

    def update_config(self):
        """Write the live buffers' values into the config."""
        _set_config(self, {**self.config, "pladis": self.pladis_operations()})

    def pladis_operations(self):
        """The operations as the live buffers have them, for the config: one per setting, layers in model order."""
        by_setting = {}
        for path, module in self.named_modules():
            if is_pladis(module):
                setting = module.setting()
                by_setting.setdefault(json.dumps(setting), (setting, []))[1].append(path)
        return [{**setting, "layers": layers} for setting, layers in by_setting.values()]

    def scheduled(self, pipeline, steps=None, then=None, timesteps=None):
        """A StepSchedule that carries out the operations' schedules in one run of `pipeline`.

        with pipe.unet.scheduled(pipe, steps=25) as callback:
            pipe(prompt, num_inference_steps=25, callback_on_step_end=callback)
        """
        return StepSchedule(pipeline, self, steps, then, timesteps)

    def save_config(self, save_directory, *args, **kwargs):
        """Also writes the code of this class beside the config, so that what is saved can be loaded."""
        # Hooked here because a save_pretrained(*args, **kwargs) of ours would hide variant= and max_shard_size= from
        # the pipeline, which looks for them in its signature.
        manifest = os.path.join(os.path.dirname(os.path.abspath(save_directory)), "surgery.json")
        if os.path.exists(manifest):
            raise ValueError(f"{manifest} describes an artifact, which saving into it would break; save elsewhere")
        self.update_config()
        super().save_config(save_directory, *args, **kwargs)
        with open(os.path.join(save_directory, MODULE_NAME + ".py"), "w", encoding="utf-8") as file:
            file.write(shipped_source())

    def to_json_string(self):
        """The config as it is saved: marked so that the stock class refuses it."""
        return json.dumps(refused_by_stock_class(json.loads(super().to_json_string())), indent=2) + "\n"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As diffusers' from_pretrained; raises ValueError where buffers are missing or disagree with the config."""
        with_info = kwargs.pop("output_loading_info", False)
        low_memory = kwargs.get("low_cpu_mem_usage", True) and is_accelerate_available()
        if low_memory:
            model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        else:
            # diffusers refuses _keep_in_fp32_modules on this path, so load in the file's own precision and cast after:
            # .to() leaves the buffers float32.
            dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
            kwargs.pop("torch_dtype", None)
            plain = type(cls.__name__, (cls,), {"_keep_in_fp32_modules": None, "__module__": cls.__module__})
            load = super(PladisUNet2DConditionModel, plain).from_pretrained
            model, info = load(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
            model.__class__ = cls
            model = model if dtype is None else model.to(dtype)
        _compare_buffers_with_config(model, info, pretrained_model_name_or_path)
        return (model, info) if with_info else model


def refused_by_stock_class(config):
    """A UNet config that UNet2DConditionModel cannot load; PladisUNet2DConditionModel reads it as before."""
    middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn") or ""
    return {**config, "mid_block_type": middle.removesuffix(STOCK_CLASS_REFUSAL) + STOCK_CLASS_REFUSAL}


def check_operations(operations):
    """The config's list of operations, or ValueError saying what is wrong with it."""
    if operations and not (isinstance(operations, (list, tuple)) and all(isinstance(o, dict) for o in operations)):
        raise ValueError("the config's `pladis` must be a list of operations")
    if not operations:
        raise ValueError("the config's `pladis` names no layer; an unpatched UNet is a plain UNet2DConditionModel")
    seen = set()
    for index, operation in enumerate(operations):
        operator = operation.get("operator")
        if operator not in OPERATORS:
            raise ValueError(f"the config's pladis[{index}].operator is {operator!r}, unknown to this code")
        names = (*OPERATORS[operator], *(["unit"] if operator == "gag" else []), "layers")
        missing = [key for key in names if key not in operation]
        if missing:
            raise ValueError(f"the config's pladis[{index}] lacks {', '.join(missing)}")
        unknown = sorted(set(operation) - {"operator", "schedule", *names})
        if unknown:
            raise ValueError(f"the config's pladis[{index}] has {unknown[0]}, unknown to this code for {operator}")
        for name in OPERATORS[operator]:
            if not is_in_range(name, operation[name]):
                raise ValueError(f"the config's pladis[{index}].{name} is {operation[name]!r}, which is out of range")
        unit = operation.get("unit", "head")
        if unit not in UNITS:
            raise ValueError(f"the config's pladis[{index}].unit is {unit!r}; there are {', '.join(UNITS)}")
        if "schedule" in operation:
            for key, message in schedule_problems(operation["schedule"], operator):
                raise ValueError(f"the config's pladis[{index}].schedule{f'.{key}' if key else ''} {message}")
        twice = seen.intersection(operation["layers"])
        if twice:
            raise ValueError(f"the config's pladis[{index}] names {sorted(twice)[0]} a second time")
        seen.update(operation["layers"])
    return operations


def module_at(model, path):
    """The module of `model` at a dotted path; ValueError naming the path where there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"this model has no module {path}") from None


def _without_layers(operation):
    return {key: value for key, value in operation.items() if key != "layers"}


def _set_config(model, values):
    """Replace a model's config; unlike register_to_config, keeping what was set on it as an attribute alone.

    diffusers' IP-Adapter loader marks the UNet so (config.encoder_hid_dim_type), and the adapter goes without that.
    """
    old = model.config
    model._internal_dict = type(old)(values)
    for name, value in vars(old).items():
        if name in values and value is not old[name]:
            setattr(model._internal_dict, name, value)


def _compare_buffers_with_config(model, info, source):
    missing, unnamed = (
        sorted(key for key in info[kind] if key.rpartition(".")[2] in BUFFERS)
        for kind in ("missing_keys", "unexpected_keys")
    )
    if unnamed:
        raise ValueError(
            f"{source}: the weights hold {unnamed[0]}, but the config names no operation there that has it; the config "
            "was edited: fetch or build the model again"
        )
    if missing:
        raise ValueError(
            f"{source}: {len(missing)} PLADIS buffers are not in the weights, the first {missing[0]}; the shard that "
            "holds them, or its index, is missing or damaged: fetch or build the model again"
        )
    for index, operation in enumerate(model.config.pladis):
        for path in operation["layers"]:
            for name in OPERATORS[operation["operator"]]:
                buffer = f"pladis_{name}"
                found = module_at(model, path)._buffers[buffer]
                wanted = torch.tensor(float(operation[name]), dtype=torch.float32)
                if found.device.type != "meta" and not torch.equal(found.detach().cpu(), wanted):
                    raise ValueError(
                        f"{source}: the config says {name} {operation[name]} (pladis[{index}]) but {path}.{buffer} "
                        f"holds {found.item()}; one of the two was edited: fetch or build the model again"
                    )


# ConfigMixin reads the constructor's signature to know which config keys are its own.
_parameters = dict(inspect.signature(UNet2DConditionModel.__init__).parameters)
_parameters["pladis"] = inspect.Parameter("pladis", inspect.Parameter.KEYWORD_ONLY, default=None)
PladisUNet2DConditionModel.__init__.__signature__ = inspect.Signature(list(_parameters.values()))
# model_index.json names a component by its class's module: the shipped file, wherever this code was imported from.
PladisUNet2DConditionModel.__module__ = MODULE_NAME
sys.modules.setdefault(MODULE_NAME, sys.modules[__name__])  # so that pickle and diffusers find the class under it
