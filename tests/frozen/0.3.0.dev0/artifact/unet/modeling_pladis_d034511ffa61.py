"""PLADIS attention for a diffusers model (arXiv 2503.07677), in one file. Apache-2.0.

Joined mechanically from the surgery/nn folder of the pladis-surgery package; the name carries the hash of the content.
Needs torch and diffusers alone:

    DiffusionPipeline.from_pretrained(this_model, trust_remote_code=True)
"""

def module_name(model_class):
    """This file's own name, for models saved again."""
    return __name__.rpartition(".")[2]


def shipped_source(model_class):
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


def newton_steps(keys):
    """Steps that reach float32 rounding for rows of `keys` scores, at any alpha and any spread of the scores.

    Found by searching for the slowest rows; `tests/nn/test_entmax.py` holds them to the float64 oracle.
    """
    if isinstance(keys, torch.SymInt):  # a graph for any number of keys; a comparison would fix it to a range
        return 10
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

import functools
import importlib

import torch


BLOCK_SCORES = 1 << 20  # scores at once in a blocked pass: 4 MB in float32


def is_autocast(query):
    """Whether torch.autocast is on for the tensor's device."""
    return query.device.type != "meta" and torch.is_autocast_enabled(query.device.type)


def of_one_dtype(query, key, value):
    """The three as they are; under autocast those that differ in dtype, as after a norm in float32, in autocast's own.

    As scaled_dot_product_attention has it, which takes no tensors of different dtypes otherwise.
    """
    if query.dtype == key.dtype == value.dtype or not is_autocast(query):
        return query, key, value
    dtype = torch.get_autocast_dtype(query.device.type)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def without_autocast(function):
    """`function`, whose first argument is a tensor, with autocast off, under which matmul makes halves of float32."""

    @functools.wraps(function)
    def computed(tensor, *more, **how):
        if not is_autocast(tensor):
            return function(tensor, *more, **how)
        with torch.autocast(tensor.device.type, enabled=False):
            return function(tensor, *more, **how)

    return computed


@without_autocast
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
    lse = _log_sum_exp(scores) if with_lse else None
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


@without_autocast
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
    -inf is a masked key; a row with a score of inf, or that is no number, is no number, as in dense attention.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    qk_scale = query.shape[-1] ** -0.5 if qk_scale is None else qk_scale
    scores = torch.matmul(query.to(dtype) * qk_scale, key.to(dtype).transpose(-1, -2))
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask.to(dtype)
    return scores


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


def _log_sum_exp(scores):
    """log sum exp(scores) of each row: (batch, heads, queries); -inf for a row without keys."""
    if scores.shape[-1] == 0:
        return scores.new_full(scores.shape[:-1], float("-inf"))
    return scores.logsumexp(dim=-1)


# -------------------- cpu_solver.py ----------------------------------------------------------------------------------

# The C++ source of the CPU kernel's arithmetic: products, and the solver from scores to attention maps.
#
# Products are summed in registers, by a broadcast and multiply-adds. Scores lie as (keys, queries), so that neighbouring
# queries fill a register and no sum runs across one. Newton's method on the norm (entmax.py), sped up by inverse cubics,
# stops when the queries of two registers have converged. Where r, that is 1/(alpha-1), is 1, 2, 3 or 4 (4/3 is not exact
# in float32) no power function is needed. Any other starts from the thresholds of the two next to it, or from a bound.

CPU_SOLVER = r"""
#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

// Vectors of GCC and Clang: any operation on them is on all lanes, in whatever registers the machine has. MAX and MIN
// (b where either is NaN) are written out where GCC makes no single instruction of a comparison. IN_REGISTER keeps it
// from reading a vector from memory at each use: two loads a cycle are fewer than the multiply-adds.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kAccumulators = 24;
#define MAX(a, b) _mm512_max_ps(a, b)
#define MIN(a, b) _mm512_min_ps(a, b)
#define IN_REGISTER(x) asm("" : "+v"(x))
#elif defined(__AVX__)
constexpr int kLanes = 8, kAccumulators = 12;
#define MAX(a, b) _mm256_max_ps(a, b)
#define MIN(a, b) _mm256_min_ps(a, b)
#define IN_REGISTER(x) asm("" : "+x"(x))
#else
constexpr int kLanes = 4, kAccumulators = 12;
#define MAX(a, b) a > b ? a : b
#define MIN(a, b) a < b ? a : b
#define IN_REGISTER(x)
#endif
typedef float Vector __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(kLanes * 4), aligned(4)));

constexpr float kLn2 = 0.693147181f, kLog2e = 1.44269504f;
constexpr float kFar = -1.0e9f;  // scores are at least this far below their row's largest: nothing, at any alpha

inline Vector all(float x) { return Vector{} + x; }
inline Vector load(const float* p) { return *(const Vector*)p; }
inline void store(float* p, Vector x) { *(Vector*)p = x; }
inline Vector larger(Vector a, Vector b) { return MAX(a, b); }
inline Vector smaller(Vector a, Vector b) { return MIN(a, b); }

// out[i][j] = sum over t of left[i * across + t * along] * right[t * right_n + j], of R rows i and V vectors j; added
// to what is there if `more`. R x V sums stay in registers.
template <int R, int V>
inline void product_tile(const float* left, int64_t across, int64_t along, int64_t length, const float* right,
                         int64_t right_n, float* out, int64_t out_n, bool more) {
  Vector sum[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sum[r][v] = more ? load(out + r * out_n + v * kLanes) : Vector{};
  for (int64_t t = 0; t < length; t++) {
    // The fewer of the factors and vectors are held in registers, and one of the others.
    if constexpr (R <= V) {
      Vector factor[R];
#pragma GCC unroll 24
      for (int r = 0; r < R; r++) factor[r] = all(left[r * across + t * along]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        Vector row = load(right + t * right_n + v * kLanes);
        IN_REGISTER(row);
#pragma GCC unroll 24
        for (int r = 0; r < R; r++) sum[r][v] += factor[r] * row;
      }
    } else {
      Vector row[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        row[v] = load(right + t * right_n + v * kLanes);
        IN_REGISTER(row[v]);
      }
#pragma GCC unroll 24
      for (int r = 0; r < R; r++) {
        const Vector factor = all(left[r * across + t * along]);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[r][v] += factor * row[v];
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(out + r * out_n + v * kLanes, sum[r][v]);
}

template <int V>
void product_columns(const float* left, int64_t across, int64_t along, int64_t rows, int64_t length, const float* right,
                     int64_t right_n, float* out, int64_t out_n, bool more) {
  constexpr int R = std::min(kAccumulators / V, 12);
  int64_t i = 0;
  for (; i + R <= rows; i += R)
    product_tile<R, V>(left + i * across, across, along, length, right, right_n, out + i * out_n, out_n, more);
  for (; i + 2 <= rows; i += 2)
    product_tile<2, V>(left + i * across, across, along, length, right, right_n, out + i * out_n, out_n, more);
  if (i < rows)
    product_tile<1, V>(left + i * across, across, along, length, right, right_n, out + i * out_n, out_n, more);
}

// As product_tile, of `rows` rows and `columns` vectors.
void product(const float* left, int64_t across, int64_t along, int64_t rows, int64_t length, const float* right,
             int64_t right_n, int64_t columns, float* out, int64_t out_n, bool more) {
  for (int64_t width; columns > 0; columns -= width, right += width * kLanes, out += width * kLanes) {
    width = columns == 5 ? 3 : std::min<int64_t>(columns, 4);
    if (width == 1) product_columns<1>(left, across, along, rows, length, right, right_n, out, out_n, more);
    if (width == 2) product_columns<2>(left, across, along, rows, length, right, right_n, out, out_n, more);
    if (width == 3) product_columns<3>(left, across, along, rows, length, right, right_n, out, out_n, more);
    if (width == 4) product_columns<4>(left, across, along, rows, length, right, right_n, out, out_n, more);
  }
}

// to[c * to_n + j] = from[j * from_n + c] * scale of 8 rows and columns.
inline void transpose(const float* from, int64_t from_n, float scale, float* to, int64_t to_n) {
#if defined(__AVX__)
  __m256 m[8], n[8];
  for (int j = 0; j < 8; j++) m[j] = _mm256_loadu_ps(from + j * from_n) * _mm256_set1_ps(scale);
  for (int j = 0; j < 8; j += 2)
    n[j] = _mm256_unpacklo_ps(m[j], m[j + 1]), n[j + 1] = _mm256_unpackhi_ps(m[j], m[j + 1]);
  for (int j = 0; j < 8; j += 4) {
    for (int i = 0; i < 2; i++) {
      m[j + 2 * i] = _mm256_shuffle_ps(n[j + i], n[j + i + 2], 0x44);
      m[j + 2 * i + 1] = _mm256_shuffle_ps(n[j + i], n[j + i + 2], 0xee);
    }
  }
  for (int c = 0; c < 4; c++) {
    _mm256_storeu_ps(to + c * to_n, _mm256_permute2f128_ps(m[c], m[c + 4], 0x20));
    _mm256_storeu_ps(to + (c + 4) * to_n, _mm256_permute2f128_ps(m[c], m[c + 4], 0x31));
  }
#else
  for (int c = 0; c < 8; c++)
    for (int j = 0; j < 8; j++) to[c * to_n + j] = from[j * from_n + c] * scale;
#endif
}

// Steps of V vectors at once, side by side: each step has to wait for the one before it.
#define EACH(v) _Pragma("GCC unroll 4") for (int v = 0; v < V; v++)

// 2^x for x <= 120, to 2 ulp; zero below -126.5, NaN for NaN. The magic constant rounds to the nearest integer.
template <int V>
inline void to_exp2(Vector (&x)[V]) {
  Vector y[V], power[V];
  EACH(v) {
    x[v] = larger(all(-127.0f), x[v]);
    const Vector shifted = x[v] + 12582912.0f;
    x[v] = x[v] - (shifted - 12582912.0f);
    power[v] = (Vector)(((Integers)shifted + 127) << 23);
  }
  EACH(v) y[v] = x[v] * 1.3276476e-3f + 9.6755419e-3f;
  EACH(v) y[v] = y[v] * x[v] + 5.5507131e-2f;
  EACH(v) y[v] = y[v] * x[v] + 2.40221202e-1f;
  EACH(v) y[v] = y[v] * x[v] + 6.93146944e-1f;
  EACH(v) y[v] = y[v] * x[v] + 1.00000012f;
  EACH(v) x[v] = y[v] * power[v];
}

// log2(x) in place of d = x - 1, to 2e-7 of itself even where d is tiny; some number for x <= 0.
template <int V>
inline void to_log2(const Vector (&x)[V], Vector (&d)[V]) {
  Vector y[V], exponent[V];
  EACH(v) {
    const Integers bits = (Integers)x[v], e = (bits - 0x3f3504f3) >> 23;
    const Vector f = (Vector)(bits - (e << 23)) - 1.0f;
    d[v] = e == 0 ? d[v] : f;
    exponent[v] = __builtin_convertvector(e, Vector);
  }
  EACH(v) y[v] = d[v] * -1.45811588e-1f + 2.34042421e-1f;
  EACH(v) y[v] = y[v] * d[v] - 2.48876914e-1f;
  EACH(v) y[v] = y[v] * d[v] + 2.87098706e-1f;
  EACH(v) y[v] = y[v] * d[v] - 3.60239625e-1f;
  EACH(v) y[v] = y[v] * d[v] + 4.80923235e-1f;
  EACH(v) y[v] = y[v] * d[v] - 7.21352816e-1f;
  EACH(v) y[v] = y[v] * d[v] + 1.4426949f;
  EACH(v) d[v] = y[v] * d[v] + exponent[v];
}

inline Vector exp2_of(Vector x) {
  Vector one[1] = {x};
  return to_exp2<1>(one), one[0];
}
inline Vector log2_of(Vector x) {
  Vector one[1] = {x}, less[1] = {x - 1.0f};
  return to_log2<1>(one, less), less[0];
}

// The thresholds of kLanes x V rows, and of each the sums of p^r and p^(r-1) there: p = z c + height where positive,
// c = ln 2 / r, z scores in units of log2 less their row's largest. The largest p is the height, and all are small in a
// flat row: it is what has to be exact. A large r takes all of them near one, and is solved for height - 1.
template <int V>
struct Rows {
  Vector height[V], sum[V], slope[V];
};

constexpr int kSmall = -1, kLarge = -2;  // any r under, and over, 4

// p^(r-1) where r - 1 = kWhole is 0, 1, 2 or 3.
template <int kWhole>
inline Vector power_of(Vector p) {
  if constexpr (kWhole == 0) return p > 0.0f ? all(1.0f) : Vector{};
  return kWhole == 1 ? p : kWhole == 2 ? p * p : p * p * p;
}

constexpr int64_t kSummedAtOnce = 32;

// kWhole: as above, or kSmall or kLarge for any other r.
template <int kWhole, int W, int V>
inline void evaluate(const float* z, int64_t keys, float r, Rows<V>& rows, float* powers) {
  const float c = kLn2 / r, r_minus_1 = r - 1.0f;
  Vector height[V];
  for (int v = 0; v < V; v++) height[v] = rows.height[v], rows.sum[v] = rows.slope[v] = Vector{};
  for (int64_t k = 0; k < keys;) {
    Vector sum[V]{}, slope[V]{};  // of a few keys: added to the whole one at a time, small terms would lose digits
    for (const int64_t end = std::min(k + kSummedAtOnce, keys); k < end; k++) {
      Vector d[V], p[V], q[V];
      EACH(v) d[v] = load(z + k * W + v * kLanes) * c + height[v];
      EACH(v) p[v] = larger(kWhole == kLarge ? d[v] + 1.0f : d[v], Vector{});
      if constexpr (kWhole < 0) {
        if constexpr (kWhole == kSmall)
          EACH(v) d[v] = p[v] - 1.0f;
        to_log2<V>(p, d);
        EACH(v) d[v] *= r_minus_1;
        to_exp2<V>(d);
        EACH(v) store(powers + k * W + v * kLanes, q[v] = p[v] > 0.0f ? d[v] : Vector{});
      } else {
        EACH(v) q[v] = power_of<kWhole>(p[v]);
      }
      EACH(v) slope[v] += q[v];
      EACH(v) sum[v] += q[v] * p[v];
    }
    for (int v = 0; v < V; v++) rows.sum[v] += sum[v], rows.slope[v] += slope[v];
  }
}

inline float largest_of(Vector x) {
  for (int l = 1; l < kLanes; l++) x[0] = std::max(x[0], x[l]);
  return x[0];
}

// total^(-1/r), or that less 1 where r > 4, of the sum `total` of a row's exp: no height is smaller, and none larger
// where all scores are equal. A little less, to be so in spite of rounding; as a series where digits would be lost.
inline Vector lowest_of(float r, Vector log_total) {
  const Vector x = log_total * (1.0f / r);
  if (r >= 64.0f) return -x * (1.0f - x * (1.0f / 2) * (1.0f - x * (1.0f / 3) * (1.0f - x * (1.0f / 4))));
  return r > 4.0f ? exp2_of(x * -kLog2e) - 1.000001f : exp2_of(x * -kLog2e) * 0.999999f;
}

// Newton's method on N = ||relu(z c + height)||_r = 1, until every sum is one to `tolerance`, or as nearly as a float32
// height can make it, or `steps` are done. N is convex: a step ends above its root wherever it starts. Later ones
// go below that by what the inverse cubic through the last two norms and slopes says, at most as far again. Where many
// keys leave the support at once the slope jumps: this can lead far below the root, from there a step far above it, and
// so for ever. So no height is above an earlier end, or below one that was too small: two steps gain what one of plain
// Newton would. From an end that is too low, by rounding, the next goes back by a quarter of its step.
template <int kWhole, int W, int V>
void newton(const float* z, int64_t keys, float r, int steps, float tolerance, const Vector* log_total, Rows<V>& rows,
            float* powers) {
  const Vector highest = all(kWhole == kLarge ? 0.0f : 1.0f);
  // Height, N - 1 and d height / d N of the last step; the least height, the largest too small, and the lowest end.
  Vector before[V], off_before[V]{}, inverse_before[V]{}, lowest[V], least[V], most[V];
  for (int v = 0; v < V; v++) {
    before[v] = lowest[v] = least[v] = lowest_of(r, log_total[v]), most[v] = highest;
    rows.height[v] = larger(rows.height[v], lowest[v]);
  }
  for (int step = 0;; step++) {
    evaluate<kWhole, W, V>(z, keys, r, rows, powers);
    Vector worst{};
    for (int v = 0; v < V; v++) {
      const Vector off = rows.sum[v] - 1.0f, resolved = kWhole == kLarge ? all(1.0f) : rows.height[v];
      const Vector left = larger(off, -off) - larger(all(tolerance), rows.slope[v] * resolved * (r * 1.5e-7f));
      worst = larger(rows.slope[v] > 0.0f ? left : Vector{}, worst);
    }
    if (step == steps || !(largest_of(worst) > 0.0f)) return;
    for (int v = 0; v < V; v++) {
      const Vector s = larger(rows.sum[v], all(1.0e-6f));
      const Vector norm = kWhole == 0 ? s : exp2_of(log2_of(s) * (1.0f / r));
      const Vector off = norm - 1.0f, inverse = s / (norm * larger(rows.slope[v], all(1.0e-6f)));
      const Vector height = rows.height[v], fall = off * inverse, end = height - fall;
      Vector beyond{};
      if (step > 0) {
        const Vector apart = off_before[v] - off;
        const Vector i = apart * apart > 1.0e-8f ? 1.0f / apart : Vector{};
        const Vector secant = (before[v] - height) * i;
        beyond = off * off * i * (inverse - secant - off_before[v] * i * (2.0f * secant - inverse - inverse_before[v]));
        beyond = larger(smaller(beyond, larger(fall, -fall)), Vector{});
      }
      const Vector back = height + larger(height, -height) * 1.0e-7f + (before[v] - height) * 0.25f;
      const Vector again = smaller(end, before[v] > height ? back : highest);
      most[v] = off < 0.0f & height >= most[v] ? again : smaller(end, most[v]);
      least[v] = off < 0.0f ? larger(height, least[v]) : least[v];
      before[v] = height, off_before[v] = off, inverse_before[v] = inverse;
      rows.height[v] = smaller(larger(end - (end - beyond > least[v] ? beyond : Vector{}), lowest[v]), most[v]);
    }
  }
}

template <int W, int V>
void whole(const float* z, int64_t keys, int r_minus_1, int steps, float tolerance, const Vector* log_total,
           Rows<V>& rows) {
  const auto few = r_minus_1 == 0 ? newton<0, W, V> : newton<1, W, V>;
  const auto many = r_minus_1 == 2 ? newton<2, W, V> : newton<3, W, V>;
  (r_minus_1 < 2 ? few : many)(z, keys, r_minus_1 + 1.0f, steps, tolerance, log_total, rows, nullptr);
}

// Find the heights. Returns r - 1 if 0, 1, 2 or 3; else kSmall or kLarge, with p^(r-1) of every score in `powers`.
template <int W, int V>
int solve(const float* z, int64_t keys, float r, int steps, const Vector* log_total, Rows<V>& rows, float* powers) {
  // A step in the weights follows, which squares what is left of the residual; only keys within
  // delta = |sum - 1| / (r slope) of the threshold, slope >= 1, are off by up to delta^r. Sums are exact to about 1e-6.
  const float exact = r * std::pow(5.0e-6f / (float)keys, 1.0f / r), tolerance = std::clamp(exact, 1.0e-6f, 3.0e-4f);
  const int below = (int)r;
  for (int v = 0; v < V; v++) rows.height[v] = all(1.0f);
  if ((float)below == r && below <= 4) {
    whole<W, V>(z, keys, below - 1, steps, tolerance, log_total, rows);
    return below - 1;
  }
  if (r > 4.0f) {  // starts from the lowest
    for (int v = 0; v < V; v++) rows.height[v] = all(-1.0f);
    newton<kLarge, W, V>(z, keys, r, steps, tolerance, log_total, rows, powers);
    return kLarge;
  }
  // The threshold in units of z is nearly linear in r between two whole ones.
  Rows<V> upper = rows;
  whole<W, V>(z, keys, below - 1, 3, 1.0e-2f, log_total, rows);
  whole<W, V>(z, keys, below, 3, 1.0e-2f, log_total, upper);
  for (int v = 0; v < V; v++) {
    const Vector low = (1.0f - rows.height[v]) * (float)below, high = (1.0f - upper.height[v]) * (float)(below + 1);
    rows.height[v] = smaller(1.0f - (low + (r - (float)below) * (high - low)) / r, all(1.0f));
  }
  newton<kSmall, W, V>(z, keys, r, steps, tolerance, log_total, rows, powers);
  return kSmall;
}

// to = to * w_to + w_sparse * sparse map; the sparse map alone in sparse_to where that is asked for.
template <int kWhole, int W, int V>
void write_maps(const float* z, int64_t keys, float r, const Rows<V>& rows, const Vector* w_to, const Vector* w_sparse,
                const Vector* w_alone, const float* powers, float* to, float* sparse_to) {
  const float c = kLn2 / r;
  Vector correction[V];
  // One more Newton step, in the weights: d weights = (1 - sum) p^(r-1) / sum p^(r-1).
  for (int v = 0; v < V; v++) correction[v] = rows.slope[v] > 0.0f ? (1.0f - rows.sum[v]) / rows.slope[v] : Vector{};
  for (int64_t k = 0; k < keys; k++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const int64_t at = k * W + v * kLanes;
      const Vector d = load(z + at) * c + rows.height[v];
      const Vector p = larger(kWhole == kLarge ? d + 1.0f : d, Vector{});
      const Vector q = kWhole < 0 ? load(powers + at) : power_of<kWhole>(p);
      const Vector sparse = larger(q * (p + correction[v]), Vector{});
      store(to + at, load(to + at) * w_to[v] + w_sparse[v] * sparse);
      if (sparse_to) store(sparse_to + at, sparse * w_alone[v]);
    }
  }
}

// `to` holds each score's exp on entry, and weights of the values on return: if `divide`, w_dense of what it held over
// its sum `total`, else just that, plus w_sparse of the sparse map. That alone goes to sparse_to where it is asked for;
// sparse_to may be z.
template <int W, int V>
void maps_of(const float* z, int64_t keys, float alpha, int steps, const float* total, float w_dense, float w_sparse,
             bool divide, float* powers, float* to, float* sparse_to) {
  Rows<V> rows;
  Vector inverse[V], w_to[V], w_alone[V], w_s[V], log_total[V];
  const float r = 1.0f / std::max(alpha - 1.0f, 1.1920929e-7f);
  const bool dense = (w_sparse == 0.0f && !sparse_to) || alpha - 1.0f < 2.4e-7f;
  for (int v = 0; v < V; v++) {
    const Vector t = load(total + v * kLanes);
    inverse[v] = t == 0.0f ? Vector{} : 1.0f / t;  // a row without keys is zeros, one with a NaN is NaN
    log_total[v] = log2_of(larger(t, all(1.0f))) * kLn2;
    w_to[v] = divide ? inverse[v] * (dense ? w_dense + w_sparse : w_dense) : all(1.0f);
    w_alone[v] = inverse[v] * 0.0f + 1.0f;
    w_s[v] = w_alone[v] * w_sparse;
  }
  if (dense) {
    for (int64_t k = 0; k < keys; k++)
      for (int64_t v = 0, at = k * W; v < V; v++, at += kLanes) {
        if (sparse_to) store(sparse_to + at, load(to + at) * inverse[v]);
        store(to + at, load(to + at) * w_to[v]);
      }
    return;
  }
  switch (solve<W, V>(z, keys, r, steps, log_total, rows, powers)) {
#define WRITE(whole) return write_maps<whole, W, V>(z, keys, r, rows, w_to, w_s, w_alone, powers, to, sparse_to)
    case 0: WRITE(0);
    case 1: WRITE(1);
    case 2: WRITE(2);
    case 3: WRITE(3);
    case kSmall: WRITE(kSmall);
    default: WRITE(kLarge);
#undef WRITE
  }
}

}  // namespace
"""


# -------------------- cpu_source.py ----------------------------------------------------------------------------------

# The C++ source of the CPU kernel: one pass from query, key and value to the output.
#
# A tile is a few dozen queries of one head; its scores never leave the cache. They lie as (keys, queries), the output as
# (queries, channels), so only the queries have to be turned.


CPU_SOURCE = (
    CPU_SOLVER
    + r"""
namespace {

// float16 and bfloat16, by their bits.
struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(Brain x) { return as_float((uint32_t)x.bits << 16); }
inline float to_float(Half x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, rest = (uint32_t)(x.bits & 0x7fff) << 13;
  const float number = as_float(rest) * 5.19229686e33f;  // 2^112; takes in the subnormal ones
  return as_float(sign | (rest >= 0x0f800000 ? rest | 0x7f800000 : as_bits(number)));
}
inline void from_float(float x, float* to) { *to = x; }
inline void from_float(float x, Brain* to) {
  const uint32_t bits = as_bits(x);
  to->bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline void from_float(float x, Half* to) {
  const uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  uint32_t half;
  if (size >= 0x47800000)
    half = size > 0x7f800000 ? 0x7e00 : 0x7c00;  // NaN, or too large
  else if (size < 0x38800000)
    half = as_bits(as_float(size) + 0.5f) - 0x3f000000;  // subnormal: the addition rounds
  else
    half = (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13;
  to->bits = sign | half;
}

template <class T>
void copy_rows(const T* from, int64_t from_n, int64_t rows, int64_t columns, float* to, int64_t to_n) {
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t c = 0; c < columns; c++) to[i * to_n + c] = to_float(from[i * from_n + c]);
    for (int64_t c = columns; c < to_n; c++) to[i * to_n + c] = 0.0f;
  }
}

}  // namespace

enum { kPladis, kSparse, kAnderson, kGag };
enum { kFloat, kHalf, kBrain };
enum { kNoMask, kBoolean, kAdditive };

// What a call has in common with the next of its kind, as cpu_kernel.py's _Plan lays it out. Strides are in elements;
// that of a channel is 1.
extern "C" struct Plan {
  int64_t batch, heads, queries, keys, channels, value_channels;
  int64_t query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n;
  int64_t mask_b, mask_h, mask_q, mask_k, output_b, output_h, output_n;
  float qk_scale;
  int32_t kind, whole_token, steps, threads, dtype, mask_kind;
};

namespace {

constexpr int64_t kKeysAtOnce = 96;  // of the values in a product: as many as the first cache holds beside the weights
constexpr int64_t kHeldFloats = 1 << 20;  // of all heads' keys and values that a thread keeps packed

struct Call : Plan {
  const void *query, *key, *value, *mask;
  void* output;
  float* lse;
  float alpha, scale, temperature, zeta, eta, alpha_low, scale_low;
};

inline float* aligned(std::vector<float>& storage, int64_t size) {
  if ((int64_t)storage.size() < size + 16) storage.resize(size + 16);
  return (float*)(((uintptr_t)storage.data() + 63) & ~(uintptr_t)63);
}

// A thread's work on W queries at a time, elements of type T.
template <class T, int W>
struct Tile {
  static constexpr int kColumns = W / kLanes, kTogether = std::min(kColumns, 2);
  const Call& call;
  const int64_t padded, packs;
  const float *key, *value;
  int64_t key_n, value_n;
  float *rows, *turned, *scores, *weights, *powers, *sparse, *t_sparse, *residual, *packed;
  std::vector<int64_t> held;
  alignas(64) float total[W];

  static int64_t padded_of(int64_t channels) { return (channels + kLanes - 1) / kLanes * kLanes; }

  Tile(const Call& c, std::vector<float>& storage)
      : call(c), padded(padded_of(c.value_channels)), packs(packs_of(c)), held(packs_of(c), -1) {
    const int64_t map = c.keys * W, results = (c.whole_token ? c.heads : 1) * padded * W;
    const bool gag = c.kind == kGag;
    float* at = aligned(storage, 2 * W * padded_of(c.channels) + 4 * map + 2 * results + packs * one_pack(c));
    auto take = [&](int64_t n) {
      float* here = at;
      at += n;
      return here;
    };
    rows = take(W * padded_of(c.channels)), turned = take(W * padded_of(c.channels));
    scores = take(map), weights = take(map), powers = take(map), sparse = scores;
    t_sparse = take(results), residual = gag ? take(results) : nullptr, packed = take(packs * one_pack(c));
  }

  static int64_t one_pack(const Call& c) { return c.keys * (padded_of(c.channels) + padded_of(c.value_channels)); }
  static int64_t packs_of(const Call& c) { return c.whole_token && c.heads * one_pack(c) <= kHeldFloats ? c.heads : 1; }

  // A head's keys and values side by side: what a product reads then stays in the cache, and has no remainder.
  void fetch(int64_t b, int64_t h) {
    const int64_t id = b * call.heads + h, slot = h % packs;
    float* keys_at = packed + slot * one_pack(call);
    float* values_at = keys_at + call.keys * padded_of(call.channels);
    const T* from = (const T*)call.key + b * call.key_b + h * call.key_h;
    const T* values_from = (const T*)call.value + b * call.value_b + h * call.value_h;
    key = keys_at, value = values_at, key_n = padded_of(call.channels), value_n = padded;
    const bool few = call.queries <= 2 * W;  // for whom a copy does not pay
    const bool key_lies = sizeof(T) == 4 && (few || call.key_n == call.channels);
    const bool value_lies =
        sizeof(T) == 4 && (few || call.value_n == call.value_channels) && call.value_channels == padded;
    if (key_lies) key = (const float*)from, key_n = call.key_n;
    if (value_lies) value = (const float*)values_from, value_n = call.value_n;
    if (held[slot] == id) return;
    held[slot] = id;
    if (!key_lies) copy_rows(from, call.key_n, call.keys, call.channels, keys_at, key_n);
    if (!value_lies) copy_rows(values_from, call.value_n, call.keys, call.value_channels, values_at, value_n);
  }

  void add_mask(int64_t b, int64_t h, int64_t first, int64_t width) {
    const int64_t start = b * call.mask_b + h * call.mask_h + first * call.mask_q;
    const uint8_t* keeps = (const uint8_t*)call.mask + start;
    const float* bias = (const float*)call.mask + start;
    for (int64_t k = 0; k < call.keys; k++) {
      for (int64_t j = 0; j < width; j++) {
        const int64_t at = j * call.mask_q + k * call.mask_k;
        float& score = scores[k * W + j];
        if (call.mask_kind == kAdditive)
          score += bias[at];
        else
          score = keeps[at] ? score : -INFINITY;
      }
    }
  }

  // Scores in units of log2, over temperature, less their row's largest; 2 to them in `weights`, its sums in `total`.
  void score(int64_t b, int64_t h, int64_t first, int64_t width) {
    fetch(b, h);
    const int64_t channels = call.channels, blocks = channels - channels % 8;
    const T* from = (const T*)call.query + b * call.query_b + h * call.query_h + first * call.query_n;
    const float* query = (const float*)from;
    int64_t query_n = call.query_n;
    if (sizeof(T) != 4 || width < W) {
      copy_rows(from, call.query_n, width, channels, rows, padded_of(channels));
      std::memset(rows + width * padded_of(channels), 0, (W - width) * padded_of(channels) * 4);
      query = rows, query_n = padded_of(channels);
    }
    for (int64_t c = 0; c < blocks; c += 8)
      for (int j = 0; j < W; j += 8) transpose(query + j * query_n + c, query_n, call.qk_scale, turned + c * W + j, W);
    for (int64_t c = blocks; c < channels; c++)
      for (int j = 0; j < W; j++) turned[c * W + j] = query[j * query_n + c] * call.qk_scale;
    product(key, key_n, 1, call.keys, channels, turned, W, kColumns, scores, W, false);
    if (call.mask_kind != kNoMask) add_mask(b, h, first, width);

    Vector top[kColumns], sum[kColumns];
    for (int v = 0; v < kColumns; v++) top[v] = all(-INFINITY);
    for (int64_t k = 0; k < call.keys; k++)
      for (int v = 0; v < kColumns; v++) top[v] = larger(load(scores + k * W + v * kLanes), top[v]);
    for (int v = 0; v < kColumns; v++) top[v] = top[v] == -INFINITY ? Vector{} : top[v];
    const bool lse_apart = call.lse && call.temperature != 1.0f;
    if (lse_apart) weigh(top, kLog2e, sum, false), write_lse(b, h, first, width, top, sum);
    weigh(top, kLog2e / call.temperature, sum, true);
    if (call.lse && !lse_apart) write_lse(b, h, first, width, top, sum);
    for (int v = 0; v < kColumns; v++) store(total + v * kLanes, sum[v]);
  }

  void weigh(const Vector* top, float unit, Vector* sum, bool keep) {
    constexpr int V = kColumns;
    EACH(v) sum[v] = Vector{};
    for (int64_t k = 0; k < call.keys; k++) {
      float *z = scores + k * W, *e = weights + k * W;
      Vector x[V];
      EACH(v) x[v] = larger(all(kFar), (load(z + v * kLanes) - top[v]) * unit);
      if (keep)
        EACH(v) store(z + v * kLanes, x[v]);
      to_exp2<V>(x);
      EACH(v) sum[v] += x[v];
      if (keep)
        EACH(v) store(e + v * kLanes, x[v]);
    }
  }

  void write_lse(int64_t b, int64_t h, int64_t first, int64_t width, const Vector* top, const Vector* sum) {
    for (int64_t j = 0; j < width; j++) {
      const float t = sum[j / kLanes][j % kLanes];
      call.lse[(b * call.heads + h) * call.queries + first + j] = top[j / kLanes][j % kLanes] + std::log(t);
    }
  }

  void maps(float alpha, float w_dense, float w_sparse, bool divide, float* sparse_to) {
    constexpr int V = kTogether;
    for (int v = 0; v < kColumns; v += V) {
      const int at = v * kLanes;
      maps_of<W, V>(scores + at, call.keys, alpha, call.steps, total + at, w_dense, w_sparse, divide, powers + at,
                    weights + at, sparse_to ? sparse_to + at : nullptr);
    }
  }

  // out (rows of `out_n`) = the map (keys, W), turned, times value
  void times_value(const float* map, int64_t width, float* out, int64_t out_n) {
    for (int64_t k = 0; k < call.keys; k += kKeysAtOnce)
      product(map + k * W, 1, W, width, std::min(kKeysAtOnce, call.keys - k), value + k * value_n, value_n,
              padded / kLanes, out, out_n, k > 0);
  }

  T* output_of(int64_t b, int64_t h, int64_t query) {
    return (T*)call.output + b * call.output_b + h * call.output_h + query * call.output_n;
  }

  void linear(int64_t b, int64_t h, int64_t first, int64_t width) {
    score(b, h, first, width);
    if (call.kind == kSparse) {
      maps(call.alpha, 0.0f, 1.0f, true, nullptr);
    } else if (call.kind == kPladis) {
      maps(call.alpha, 1.0f - call.scale, call.scale, true, nullptr);
    } else {  // a second map at alpha 1 is the dense one again
      const bool low = call.scale_low != 0.0f && call.alpha_low - 1.0f >= 2.4e-7f;
      maps(call.alpha, low ? 1.0f - call.scale - call.scale_low : 1.0f - call.scale, call.scale, true, nullptr);
      if (low) maps(call.alpha_low, 0.0f, call.scale_low, false, nullptr);
    }
    T* output = output_of(b, h, first);
    if (sizeof(T) == 4 && padded == call.value_channels)
      return times_value(weights, width, (float*)output, call.output_n);
    times_value(weights, width, t_sparse, padded);
    for (int64_t j = 0; j < width; j++)
      for (int64_t c = 0; c < call.value_channels; c++)
        from_float(t_sparse[j * padded + c], output + j * call.output_n + c);
  }

  // GAG, eq. 11-13: T_s and r = T_s - T_d of one head, or of all that are projected together, then their combination.
  void gag(int64_t b, int64_t h, int64_t heads, int64_t first, int64_t width) {
    const int64_t size = padded * W;
    for (int64_t i = 0; i < heads; i++) {
      score(b, h + i, first, width);
      maps(call.alpha, -1.0f, 1.0f, true, sparse);
      times_value(sparse, width, t_sparse + i * size, padded);
      times_value(weights, width, residual + i * size, padded);
    }
    for (int64_t j = 0; j < width; j++) {
      float along, across;  // of the output: T_s (1 + along) + r across
      combine(heads, j, &along, &across);
      for (int64_t i = 0; i < heads; i++) {
        const float *s = t_sparse + i * size + j * padded, *r = residual + i * size + j * padded;
        T* to = output_of(b, h + i, first + j);
        int64_t c = 0;
        if (sizeof(T) == 4)
          for (; c + kLanes <= call.value_channels; c += kLanes)
            store((float*)to + c, load(s + c) + (load(s + c) * along + load(r + c) * across));
        for (; c < call.value_channels; c++) from_float(s[c] + (s[c] * along + r[c] * across), to + c);
      }
    }
  }

  // r~ = zeta r + (1 - zeta) r_par, as a combination of T_s and r, times its gain.
  void combine(int64_t heads, int64_t j, float* along, float* across) {
    const int64_t size = padded * W;
    Vector ss{}, sr{}, rr{};
    for (int64_t i = 0; i < heads; i++) {
      const float *s = t_sparse + i * size + j * padded, *r = residual + i * size + j * padded;
      for (int64_t c = 0; c < padded; c += kLanes) {
        const Vector x = load(s + c), y = load(r + c);
        ss += x * x, sr += x * y, rr += y * y;
      }
    }
    const float length = sum_of(ss), dot = sum_of(sr), square = sum_of(rr), zeta = call.zeta;
    float share = (1.0f - zeta) * (dot / length);
    float norm = std::sqrt(std::max(zeta * zeta * square + 2.0f * zeta * share * dot + share * share * length, 0.0f));
    const bool safe = length > 1.0e-20f && length < 1.0e20f && square < 1.0e20f && zeta >= 0.0f && zeta <= 1.0f;
    if (!safe || !(square > 1.0e-20f || call.eta > 1.0e-8f)) return combine_wide(heads, j, along, across);
    const float gain = call.scale * (norm > call.eta ? call.eta / norm : 1.0f);
    *along = gain * share, *across = gain * zeta;
  }

  // The same in float64, where squares leave float32's range or terms cancel; r~ replaces r.
  void combine_wide(int64_t heads, int64_t j, float* along, float* across) {
    const int64_t size = padded * W;
    double length = 0.0, dot = 0.0, square = 0.0;
    const auto each = [&](auto&& visit) {
      for (int64_t i = 0; i < heads; i++)
        for (int64_t c = 0; c < padded; c++)
          visit(t_sparse[i * size + j * padded + c], residual[i * size + j * padded + c]);
    };
    each([&](double s, float r) { length += s * s, dot += s * r; });
    const double share = length <= 1.0e-75 ? 0.0 : (1.0 - call.zeta) * dot / length;
    each([&](double s, float& r) { r = (float)(call.zeta * (double)r + share * s), square += (double)r * r; });
    const double norm = std::sqrt(square);
    *along = 0.0f, *across = (float)(call.scale * (norm > call.eta ? call.eta / norm : 1.0));
  }

  static float sum_of(Vector x) {
    for (int s = kLanes / 2; s > 0; s /= 2)
      for (int l = 0; l < s; l++) x[l] += x[l + s];
    return x[0];
  }
};

// What a thread works in, kept for its next call unless it is large.
std::vector<float>& kept_storage() {
  static thread_local std::vector<float> storage;
  return storage;
}

template <class T, int W>
void work(const Call& call, int64_t tiles, int64_t across, int64_t groups, int64_t together, std::atomic<int64_t>& next,
          int64_t at_once) {
  std::vector<float>& storage = kept_storage();
  {
    Tile<T, W> tile(call, storage);
    for (int64_t start; (start = next.fetch_add(at_once)) < tiles;) {
      for (int64_t i = start; i < std::min(start + at_once, tiles); i++) {
        const int64_t first = i % across * W, width = std::min<int64_t>(W, call.queries - first);
        const int64_t b = i / across / groups, h = i / across % groups * together;
        if (call.kind == kGag)
          tile.gag(b, h, together, first, width);
        else
          tile.linear(b, h, first, width);
      }
    }
  }
  if (storage.size() > 1 << 19) std::vector<float>().swap(storage);
}

template <class T, int W>
void run(const Call& call) {
  const int64_t across = (call.queries + W - 1) / W, together = call.whole_token ? call.heads : 1;
  const int64_t groups = call.heads / together, tiles = call.batch * groups * across;
  const int threads = (int)std::min<int64_t>(call.threads, tiles);
  // Neighbouring tiles share a head's keys, so a thread takes several.
  const int64_t at_once = std::max<int64_t>(1, std::min<int64_t>(16, tiles / (threads * 8)));
  std::atomic<int64_t> next{0};
  if (threads == 1) return work<T, W>(call, tiles, across, groups, together, next, at_once);
#pragma omp parallel num_threads(threads)
  work<T, W>(call, tiles, across, groups, together, next, at_once);
}

template <class T>
void run_wide(const Call& call) {
  // A tile stays in the second-level cache.
  if (call.keys > 1024 || call.queries <= 2 * kLanes)
    run<T, std::max(kLanes, 8)>(call);
  else
    run<T, 4 * kLanes>(call);
}

}  // namespace

// The last are the hyperparameters, in the order of operators.py; those an operator does not have are null.
extern "C" void pladis_attention(const Plan* plan, const void* query, const void* key, const void* value,
                                 const void* mask, void* output, float* lse, const float* first, const float* second,
                                 const float* third, const float* fourth, const float* fifth) {
  Call call{*plan, query, key, value, mask, output, lse};
  call.alpha = *first;
  if (call.kind == kSparse) {
    call.temperature = *second;
  } else {
    call.scale = *second, call.temperature = *third;
    if (call.kind == kGag) call.zeta = *fourth, call.eta = *fifth;
    if (call.kind == kAnderson) call.alpha_low = *fourth, call.scale_low = *fifth;
  }
  switch (call.dtype) {
    case kFloat: return run_wide<float>(call);
    case kHalf: return run_wide<Half>(call);
    default: return run_wide<Brain>(call);
  }
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



@functools.cache
def compiler_is_available() -> bool:
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


def library_is_loaded() -> bool:
    """Whether the kernel has been built and loaded in this process already. Never builds it."""
    return _library.cache_info().currsize > 0


@functools.cache
def _library():
    """The C++ source's pladis_attention."""
    # torch's own compile cache, which inductor uses for its CPU code: keyed by source, flags and machine.
    from torch._inductor.codecache import CppCodeCache

    flags = []
    if platform.system() != "Windows":
        # inductor vectorises by hand and tells the compiler not to; what is left to do here is the compiler's.
        flags = ["-ftree-loop-vectorize", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
        if platform.machine() in ("x86_64", "AMD64"):
            flags.append("-mprefer-vector-width=512")
    function = CppCodeCache.load(CPU_SOURCE, extra_flags=tuple(flags)).pladis_attention
    function.argtypes = [ctypes.c_void_p] * 12
    function.restype = None
    return function


class _Plan(ctypes.Structure):
    """The C++ source's struct Plan."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "heads", "queries", "keys", "channels", "value_channels")),
        *((f"{tensor}_{dim}", ctypes.c_int64) for tensor in ("query", "key", "value") for dim in "bhn"),
        *((f"mask_{dim}", ctypes.c_int64) for dim in "bhqk"),
        *((f"output_{dim}", ctypes.c_int64) for dim in "bhn"),
        ("qk_scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("kind", "whole_token", "steps", "threads", "dtype", "mask_kind")),
    ]


_KINDS_IN_C = ("pladis", "sparse", "anderson", "gag")
_DTYPES_IN_C = (torch.float32, torch.float16, torch.bfloat16)
_MOST_PLANS = 512

# What a call has in common with the next of its kind: {everything that _planned reads: its result}. A plan is never
# changed once it is made, so threads may share it.
_plans = {}


def fused_on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    settings: list[torch.Tensor],
    *,
    operator: str,
    unit: str,
    mask: torch.Tensor | None,
    qk_scale: float,
    with_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `reference`, with nothing beyond the output in memory. float32; float16 and bfloat16, computed in float32.

    query: (batch, heads, queries, head_dim); key, value: (batch, heads, keys, head_dim). Returns (output, log-sum-exp
    or None), (batch, heads, queries, head_dim) and (batch, heads, queries).
    """
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.float()
    # Small calls take a few microseconds, of which Python should not add many: what is asked of tensors is kept.
    kind = (
        query.shape,
        query.stride(),
        key.shape,
        key.stride(),
        value.shape,
        value.stride(),
        query.dtype,
        key.dtype,
        value.dtype,
        None if mask is None else (mask.shape, mask.stride(), mask.dtype),
        operator,
        unit,
        qk_scale,
        torch.get_num_threads(),
    )
    planned = _plans.get(kind)
    if planned is None:
        planned = _planned(query, key, value, mask, operator, unit, qk_scale)
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[kind] = planned
    plan, address, shape, strides = planned
    if plan is None:
        tensors = _for_c(query, key, value)
        output, lse = fused_on_cpu(
            *tensors, settings, operator=operator, unit=unit, mask=mask, qk_scale=qk_scale, with_lse=with_lse
        )
        return output.to(value.dtype), lse
    output = torch.empty_strided(shape, strides, dtype=value.dtype)
    lse = torch.empty(shape[:3]) if with_lse else None
    if plan.keys == 0 or 0 in shape:
        return output.zero_(), None if lse is None else lse.fill_(-torch.inf)
    numbers = [s if s.dtype is torch.float32 and s.is_cpu else s.to("cpu", torch.float32) for s in settings]
    _library()(
        address,
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        None if mask is None else mask.data_ptr(),
        output.data_ptr(),
        None if lse is None else lse.data_ptr(),
        *[number.data_ptr() for number in numbers],
        *_NULLS[len(numbers)],
    )
    return output, lse


_NULLS = [(None,) * (5 - given) for given in range(6)]


def _planned(query, key, value, mask, operator, unit, qk_scale):
    """(plan, its address, output shape, output strides); a plan of None where the tensors have to be copied first."""
    if any(new is not old for new, old in zip(_for_c(query, key, value), (query, key, value), strict=True)):
        return None, None, None, None
    batch, heads, queries, channels = query.shape
    shape = (batch, heads, queries, value.shape[3])
    # As empty_outputs lays it out: (batch, queries, heads, head_dim), transposed.
    row = max(1, shape[3])
    strides = (row * max(1, heads) * max(1, queries), row, row * max(1, heads), 1)
    plan = _Plan(
        *(batch, heads, queries, key.shape[2], channels, value.shape[3]),
        *(stride for tensor in (query, key, value) for stride in tensor.stride()[:3]),
        *((0, 0, 0, 0) if mask is None else mask.expand(batch, heads, queries, key.shape[2]).stride()),
        *strides[:3],
        qk_scale,
        kind=_KINDS_IN_C.index(operator),
        whole_token=operator == "gag" and unit == "token",
        steps=4 * newton_steps(key.shape[2]),  # it stops when it is there: no row is known that needs half as many
        threads=torch.get_num_threads(),
        dtype=_DTYPES_IN_C.index(query.dtype),
        mask_kind=0 if mask is None else 1 if mask.dtype == torch.bool else 2,
    )
    return plan, ctypes.addressof(plan), shape, strides


def _for_c(*tensors):
    """The tensors in a form that the kernel reads: of one dtype, each with its channels side by side."""
    if len({tensor.dtype for tensor in tensors}) > 1:
        tensors = [tensor.float() for tensor in tensors]
    return [t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous() for t in tensors]


# -------------------- triton_tiles.py --------------------------------------------------------------------------------

# What both Triton kernels do with a tile of scores: maps in powers of two, the entmax threshold by Newton's method.
#
# A row of scores is x = log2(e) (scores / temperature - their largest), so x <= 0. Its dense weights are e = 2^x over
# their sum; its sparse ones p = max(x - tau, 0)^r over theirs, r = 1 / (alpha - 1), with tau such that the norm
# (sum p)^(1/r) is unit = r log2(e). In these units tau / unit is the usual threshold of (alpha - 1) scores (Peters et al.
# 2019, arXiv 1905.05702, eq. 10), and exp2 needs no product.
#
# The norm is convex in tau, so Newton's method rises to the root from tau = -unit, where the threshold cannot lie above
# it. Every step but the first adds what the inverse cubic through the last two norms and slopes says beyond Newton's
# step: no work for a score, and three steps then do what four did. Weights are over their own sum, so a threshold that is
# a little off loses no mass.
#
# KIND is the way that an alpha wants: 1.5 (15), 2 (20) and 1.25 (125), whose powers are products, or any other (99),
# whose power is exp2(r log2). A kernel holds all of them, reads alpha and takes the right one. Of KIND 99 the threshold
# is kept as lift = tau + unit and scores over unit, b = 1 + (x - lift) / unit: near alpha 1, where unit is huge, tau
# itself would have no digits left. EXACT is float32: its sums are of float32 weights, its logarithms to the last bit.
#
# These functions are Triton's, but not before it is imported (`triton_kernel.jitted_kernels`): an artifact imports
# neither Triton nor a compiler where it is loaded.

import types

# Stands for triton.language until that is imported; the functions need no more of it when they are defined.
tl = types.SimpleNamespace(constexpr="constexpr")
libdevice = None
INTERPRETED = False  # TRITON_INTERPRET=1, which has neither libdevice nor products of bfloat16

TILE_FUNCTIONS = []


def tile_function(function):
    """Mark a function as Triton's; it becomes so when Triton is first needed."""
    TILE_FUNCTIONS.append(function)
    return function


@tile_function
def fast_log2(x):
    """log2 of x >= 0 in one instruction, to 2^-22; of zero it is -inf. tl.log2 takes twenty."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)


@tile_function
def fast_reciprocal(x):
    """1 / x of x > 0, in two instructions; a division takes eight."""
    y = tl.rsqrt(x)
    return y * y


@tile_function
def dot_tiles(left, right, sum_so_far, TF32X3: tl.constexpr):
    """left @ right + sum_so_far in float32. TF32X3: of float32, by three products on the tensor cores."""
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    if TF32X3:
        return tl.dot(left, right, sum_so_far, input_precision="tf32x3")
    else:
        return tl.dot(left, right, sum_so_far, input_precision="ieee")


@tile_function
def sum_of_rows(tile, more, TWO: tl.constexpr):
    """Row sums over two column tiles: folded within a thread first, then across a warp once."""
    if TWO:
        folded = tl.reshape(tile, (tile.shape[0], tile.shape[1] // more.shape[1], more.shape[1]))
        return tl.sum(tl.sum(folded, 1) + more, 1)
    else:
        return tl.sum(tile, 1)


@tile_function
def max_of_rows(tile, more, TWO: tl.constexpr):
    """Row maxima over two column tiles."""
    if TWO:
        folded = tl.reshape(tile, (tile.shape[0], tile.shape[1] // more.shape[1], more.shape[1]))
        return tl.max(tl.maximum(tl.max(folded, 1), more), 1)
    else:
        return tl.max(tile, 1)


@tile_function
def sum_of_weights(tile, more, TWO: tl.constexpr, TENSOR: tl.constexpr):
    """Row sums of weights as they meet the values; TENSOR: by a product with ones, which costs the tensor cores little.

    Of weights that are rounded to half precision that is the sum of what is left of them.
    """
    if TENSOR:
        total = tl.zeros((tile.shape[0], 8), tl.float32)
        total = dot_tiles(tile, tl.full((tile.shape[1], 8), 1.0, tile.dtype), total, False)
        if TWO:
            total = dot_tiles(more, tl.full((more.shape[1], 8), 1.0, tile.dtype), total, False)
        return tl.max(total, 1)  # every column is the sum
    else:
        return sum_of_rows(tile, more, TWO)


@tile_function
def exponent_of(alpha, EXACT: tl.constexpr):
    """r = 1 / (alpha - 1), as far as the logarithms carry it: half precision sees no difference at 1000."""
    if EXACT:
        return 1.0 / tl.minimum(tl.maximum(alpha - 1.0, 1.1920929e-07), 0.999999)
    else:
        return 1.0 / tl.minimum(tl.maximum(alpha - 1.0, 1e-3), 0.99999)


@tile_function
def newton_steps_of(alpha, keys, HALF_BITS: tl.constexpr, LONG: tl.constexpr):
    """Steps after which a row's weights are right to the dtype, whatever the scores (tests/nn/test_triton_steps.py).

    HALF_BITS: 8 for bfloat16, 11 for float16, 24 for float32.
    """
    steps = 6
    if alpha <= 1.07:
        steps = 1
    elif alpha <= 1.2:
        steps = 2
    elif alpha <= 1.5:
        steps = 3
    elif alpha <= 1.75:
        steps = 4
    elif alpha <= 1.9:
        steps = 5
    if LONG:
        steps += 1
        if keys > 1024:
            steps += 1
    if HALF_BITS == 24:
        steps += 2
    elif HALF_BITS == 11:
        if alpha <= 1.07 or (alpha <= 1.5 and keys > 80):
            steps += 1
    return steps


@tile_function
def power_tiles(x, tau, r, unit, KIND: tl.constexpr, EXACT: tl.constexpr):
    """t^(r-1) and t^r of t = max(x - tau, 0); of KIND 99 b^(r-1) and b^r, which are both over their unit."""
    if KIND == 15:
        t = tl.maximum(x - tau[:, None], 0.0)
        return t, t * t
    elif KIND == 20:
        t = tl.maximum(x - tau[:, None], 0.0)
        return tl.where(t > 0.0, 1.0, 0.0), t
    elif KIND == 125:
        t = tl.maximum(x - tau[:, None], 0.0)
        square = t * t
        return square * t, square * square
    elif EXACT:
        d = (x - tau[:, None]) / unit
        b = tl.maximum(1.0 + d, 0.0)
        inside = tl.maximum(b, 1.1754944e-38)
        # log(1 + d): what rounding lost in 1 + d is put back to first order, or alpha near 1 would lose all.
        lost = tl.where(b > 0.0, d - (inside - 1.0), 0.0)
        g = tl.where(b > 0.0, tl.exp((r - 1.0) * (tl.log(inside) + lost * (2.0 - inside))), 0.0)
        return g, g * b
    else:
        over = 1.0 / unit
        b = tl.maximum(x * over + (1.0 - tau * over)[:, None], 0.0)
        g = tl.exp2((r - 1.0) * fast_log2(b))
        return g, g * b


@tile_function
def near_softmax(x, log_sum, alpha):
    """b^r up to a factor of the row, where alpha - 1 is at most 0.001, at alpha = 1 softmax. log_sum: log2 sum 2^x.

    r log(b) by its series in 1 / r, with the threshold that alpha = 1 would have, which is off by as little. At
    alpha = 1 it is 2^x to the last bit, so that GAG's residual is zero.
    """
    x = tl.maximum(x, -200.0)  # a masked score times zero would be no number
    y = x - log_sum[:, None]
    a = 0.6931471805599453 * (alpha - 1.0)
    return tl.exp2(x - a * y * y * (0.5 - a * y * (1.0 / 3.0)))


@tile_function
def power_sums(x0, x1, tau, r, unit, KIND: tl.constexpr, EXACT: tl.constexpr, TWO: tl.constexpr):
    """Row sums of both powers."""
    WIDTH: tl.constexpr = x0.shape[1] + (x1.shape[1] if TWO else 0)
    if not EXACT and (KIND == 15 or KIND == 20):
        # By max(x, tau), which saves the subtraction and costs some 1e-5; what is no key counts as tau.
        m0 = tl.maximum(x0, tau[:, None])
        m1 = tl.maximum(x1, tau[:, None])
        total = sum_of_rows(m0, m1, TWO)
        above = total - WIDTH * tau
        if KIND == 15:
            return above, sum_of_rows(m0 * m0, m1 * m1, TWO) - tau * (total + above)
        else:
            count0 = tl.where(x0 > tau[:, None], 1.0, 0.0)
            count1 = tl.where(x1 > tau[:, None], 1.0, 0.0)
            return sum_of_rows(count0, count1, TWO), above
    else:
        g0, p0 = power_tiles(x0, tau, r, unit, KIND, EXACT)
        g1, p1 = power_tiles(x1, tau, r, unit, KIND, EXACT)
        return sum_of_rows(g0, g1, TWO), sum_of_rows(p0, p1, TWO)


@tile_function
def expm1_of(y):
    """exp(y) - 1, with the digits that the difference would lose where it is small."""
    return tl.where(tl.abs(y) < 0.02, y * (1.0 + y * (0.5 + y * (1.0 / 6.0 + y / 24.0))), tl.exp(y) - 1.0)


@tile_function
def norm_of_sums(slope, total, r, unit, KIND: tl.constexpr):
    """The norm less what it shall be, and -d tau / d norm, from the row sums of t^(r-1) and t^r."""
    if KIND == 15:
        norm = total * tl.rsqrt(total)
        return norm - unit, norm * fast_reciprocal(slope)
    elif KIND == 20:
        return total - unit, fast_reciprocal(slope)
    elif KIND == 125:
        root = total * tl.rsqrt(total)
        norm = root * tl.rsqrt(root)
        return norm - unit, total * fast_reciprocal(norm * slope)
    else:
        above = expm1_of(tl.log(total) / r)
        return unit * above, total / ((1.0 + above) * slope)


@tile_function
def beyond_newton(norm, rate, tau, last_norm, last_rate, last_tau):
    """What the inverse cubic through two thresholds, their norms and rates adds to Newton's step norm * rate.

    At most as much again and never back: without these bounds it can run in circles near alpha 2.
    """
    over = fast_reciprocal(tl.maximum(last_norm - norm, 1e-4))
    secant = (tau - last_tau) * over
    more = norm * norm * over * (rate - secant - last_norm * over * (2.0 * secant - rate - last_rate))
    return tl.maximum(tl.minimum(more, norm * rate), 0.0)


@tile_function
def next_threshold(slope, total, tau, low, last_tau, last_norm, last_rate, step, highest, r, unit, KIND: tl.constexpr):
    """One step: (tau, low, norm, rate). low: the best end of Newton's own steps, each below the root as n is convex."""
    norm, rate = norm_of_sums(slope, total, r, unit, KIND)
    new = tau + norm * rate
    low = tl.maximum(low, new)
    more = beyond_newton(norm, rate, tau, last_norm, last_rate, last_tau)
    new = tl.maximum(new + tl.where(step > 0, more, 0.0), low)
    return tl.minimum(new, highest), low, norm, rate


@tile_function
def start_of(r, unit, keys, KIND: tl.constexpr):
    """(tau to start from, the highest it can be: where all scores are equal)."""
    highest = -unit * tl.exp2(-tl.log2(tl.cast(keys, tl.float32)) / r)
    if KIND == 99:
        return 0.0, -unit * expm1_of(-tl.log(tl.cast(keys, tl.float32)) / r)  # the same and unit more
    else:
        return -unit, highest


@tile_function
def add_mask(scores, at, inside, BOOLEAN: tl.constexpr):
    """Scores with what a mask, boolean or additive, adds; -inf where there is no key.

    at: where its elements are, of each score, or of each key for all rows.
    """
    if BOOLEAN:
        keep = tl.load(at, mask=inside, other=0) != 0
        if len(at.shape) == 1:
            keep = keep[None, :]
        return tl.where(keep, scores, float("-inf"))
    else:
        bias = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
        if len(at.shape) == 1:
            bias = bias[None, :]
        return scores + bias


@tile_function
def load_tile(
    at, rows, columns, row_stride, column_stride, all_rows, all_columns, WHOLE_R: tl.constexpr, WHOLE_C: tl.constexpr
):
    """The tile at `rows` and `columns`; zero outside all_rows x all_columns."""
    at = at + rows[:, None] * row_stride + columns[None, :] * column_stride
    if WHOLE_R and WHOLE_C:
        return tl.load(at)
    elif WHOLE_R:
        return tl.load(at, mask=(columns < all_columns)[None, :], other=0.0)
    elif WHOLE_C:
        return tl.load(at, mask=(rows < all_rows)[:, None], other=0.0)
    else:
        return tl.load(at, mask=(rows < all_rows)[:, None] & (columns < all_columns)[None, :], other=0.0)


@tile_function
def store_tile(
    at, tile, rows, columns, row_stride, all_rows, all_columns, WHOLE_R: tl.constexpr, WHOLE_C: tl.constexpr
):
    """Write a tile; channels lie side by side."""
    at = at + rows[:, None] * row_stride + columns[None, :]
    tile = tile.to(at.dtype.element_ty)
    if WHOLE_R and WHOLE_C:
        tl.store(at, tile)
    elif WHOLE_R:
        tl.store(at, tile, mask=(columns < all_columns)[None, :])
    elif WHOLE_C:
        tl.store(at, tile, mask=(rows < all_rows)[:, None])
    else:
        tl.store(at, tile, mask=(rows < all_rows)[:, None] & (columns < all_columns)[None, :])


@tile_function
def log_sum_exp(top, total, qk_scale, SCALED: tl.constexpr):
    """log sum exp of each row, from its largest score and the sum of exponentials below it; -inf without a key."""
    if not SCALED:
        top = top * qk_scale
    return tl.where(total > 0.0, top + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))


@tile_function
def geometry_of_sums(along, length, square, scale, zeta, eta):
    """GAG's output is a T_s + b (T_s - T_d): (a, b) of each row (GAG, arXiv 2603.02531, eq. 11-13).

    along, length, square: <r, T_s>, |T_s|^2 and |r|^2, r = T_s - T_d. r~ = zeta r + (1 - zeta) c T_s with
    c = <r, T_s> / |T_s|^2, and its two parts are orthogonal.
    """
    share = along / tl.where(length > 0.0, length, 1.0)
    parallel = tl.sqrt(tl.maximum(share * along, 0.0))
    orthogonal = tl.abs(zeta) * tl.sqrt(tl.maximum(square - share * along, 0.0))
    longer = tl.maximum(parallel, orthogonal)
    ratio = tl.minimum(parallel, orthogonal) / tl.where(longer > 0.0, longer, 1.0)
    norm = longer * tl.sqrt(1.0 + ratio * ratio)
    gain = scale * tl.where(norm > eta, eta / tl.where(norm > eta, norm, 1.0), 1.0)
    return 1.0 + gain * share * (1.0 - zeta), gain * zeta


@tile_function
def store_sums(sums, batch, rows, is_row, queries, along, length, square):
    """Write a head's part of what `sums_of_tokens` reads."""
    heads = tl.num_programs(1)
    plane = tl.num_programs(2).to(tl.int64) * heads * queries
    at = sums + (batch * heads + tl.program_id(1)) * queries + rows
    tl.store(at, along, mask=is_row)
    tl.store(at + plane, length, mask=is_row)
    tl.store(at + 2 * plane, square, mask=is_row)


@tile_function
def sums_of_tokens(sums, batch, rows, is_row, queries, ROWS: tl.constexpr):
    """<r, T_s>, |T_s|^2 and |r|^2 of whole tokens, from those of each head, (3, batch, heads, queries)."""
    heads = tl.num_programs(1)
    plane = tl.num_programs(2).to(tl.int64) * heads * queries
    along = tl.zeros((ROWS,), tl.float32)
    length = tl.zeros((ROWS,), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    for head in tl.range(0, heads):
        at = sums + (batch * heads + head) * queries + rows
        along += tl.load(at, mask=is_row, other=0.0)
        length += tl.load(at + plane, mask=is_row, other=0.0)
        square += tl.load(at + 2 * plane, mask=is_row, other=0.0)
    return along, length, square


# -------------------- triton_short.py --------------------------------------------------------------------------------

# The Triton kernel for short texts, up to 128 keys: scores stay in registers, queries are read from memory once.
#
# A program takes one block of queries of one head, 16 rows to a warp, so that a row never leaves its warp and no step of
# the solver waits for shared memory. Keys and channels are two tiles each where that saves
# padding (77 keys as 64 + 16). Neither map is normed before its product with the values: outputs are scaled instead.


MOST_SHORT_KEYS = 128


@tile_function
def solve_short(x0, x1, alpha, keys, KIND: tl.constexpr, TWO: tl.constexpr, HALF_BITS: tl.constexpr):
    """tau of each row, for KIND 99 less -unit (triton_tiles.py)."""
    EXACT: tl.constexpr = HALF_BITS == 24
    WIDE: tl.constexpr = x0.shape[1] > 64  # more than 80 keys
    if KIND == 15:
        r = 2.0
        steps = 5 if EXACT else 4 if WIDE else 3
    elif KIND == 20:
        r = 1.0
        steps = 8 if EXACT else 6 if WIDE or HALF_BITS == 11 else 5
    elif KIND == 125:
        r = 4.0
        steps = 5 if EXACT else 3
    else:
        r = exponent_of(alpha, EXACT)
        steps = newton_steps_of(alpha, keys, HALF_BITS, False)
    unit = r * 1.4426950408889634
    start, highest = start_of(r, unit, keys, KIND)
    tau = tl.zeros((x0.shape[0],), tl.float32) + start
    low = tau
    last_tau = tau
    norm = tau
    rate = tau
    for step in tl.range(0, steps):
        slope, total = power_sums(x0, x1, tau, r, unit, KIND, EXACT, TWO)
        slope = tl.maximum(slope, 1e-6)  # a row may have no key at all
        total = tl.maximum(total, 1e-6)
        new, low, norm, rate = next_threshold(
            slope, total, tau, low, last_tau, norm, rate, step, highest, r, unit, KIND
        )
        last_tau = tau
        tau = new
    return tau


@tile_function
def weigh_short(x0, x1, tau, alpha, like, KIND: tl.constexpr, EXACT: tl.constexpr):
    """Both tiles of the sparse weights, not normed, in the dtype of `like`."""
    r = exponent_of(alpha, EXACT)  # which KIND 99 alone reads
    unit = r * 1.4426950408889634
    g0, p0 = power_tiles(x0, tau, r, unit, KIND, EXACT)
    g1, p1 = power_tiles(x1, tau, r, unit, KIND, EXACT)
    return p0.to(like), p1.to(like)


@tile_function
def sparse_short(x0, x1, alpha, keys, like, TWO: tl.constexpr, HALF_BITS: tl.constexpr):
    """Both tiles of the sparse weights, not normed, by the way that alpha wants."""
    EXACT: tl.constexpr = HALF_BITS == 24
    if alpha == 1.5:
        tau = solve_short(x0, x1, alpha, keys, 15, TWO, HALF_BITS)
        p0, p1 = weigh_short(x0, x1, tau, alpha, like, 15, EXACT)
    elif alpha == 2.0:
        tau = solve_short(x0, x1, alpha, keys, 20, TWO, HALF_BITS)
        p0, p1 = weigh_short(x0, x1, tau, alpha, like, 20, EXACT)
    elif alpha == 1.25:
        tau = solve_short(x0, x1, alpha, keys, 125, TWO, HALF_BITS)
        p0, p1 = weigh_short(x0, x1, tau, alpha, like, 125, EXACT)
    elif alpha < 1.001 and not EXACT:
        log_sum = tl.log2(tl.maximum(sum_of_rows(tl.exp2(x0), tl.exp2(x1), TWO), 1.0))
        p0 = near_softmax(x0, log_sum, alpha).to(like)
        p1 = near_softmax(x1, log_sum, alpha).to(like)
    else:
        tau = solve_short(x0, x1, alpha, keys, 99, TWO, HALF_BITS)
        p0, p1 = weigh_short(x0, x1, tau, alpha, like, 99, EXACT)
    return p0, p1


@tile_function
def product_short(w0, w1, v0, v1, sum_so_far, TWO: tl.constexpr, TF32X3: tl.constexpr):
    """weights @ values + sum_so_far over both tiles of keys."""
    sum_so_far = dot_tiles(w0, v0, sum_so_far, TF32X3)
    if TWO:
        sum_so_far = dot_tiles(w1, v1, sum_so_far, TF32X3)
    return sum_so_far


@tile_function
def short_kernel(
    query,
    key,
    value,
    mask,
    output,
    lse,
    sums,
    alpha_at,
    scale_at,
    temperature_at,
    first_at,
    second_at,
    query_b,
    query_h,
    query_n,
    key_b,
    key_h,
    key_n,
    value_b,
    value_h,
    value_n,
    output_b,
    output_h,
    output_n,
    mask_b,
    mask_h,
    mask_n,
    mask_k,
    queries,
    keys,
    qk_scale,
    UNIT: tl.constexpr,
    OPERATOR: tl.constexpr,
    MASKED: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    SCALED: tl.constexpr,
    WITH_LSE: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    M0: tl.constexpr,
    M1: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    TF32X3: tl.constexpr,
    HALF_BITS: tl.constexpr,
):
    TWO: tl.constexpr = M1 > 0
    MORE: tl.constexpr = D1 > 0
    C0: tl.constexpr = D0 <= D
    C1: tl.constexpr = D0 + D1 <= D
    EXACT: tl.constexpr = HALF_BITS == 24
    like: tl.constexpr = query.dtype.element_ty
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    # Strides count UNITs of elements, so that the compiler sees that addresses allow wide loads.
    query_n = query_n * UNIT
    key_n = key_n * UNIT
    value_n = value_n * UNIT
    output_n = output_n * UNIT
    query += batch * (query_b * UNIT) + head * (query_h * UNIT)
    key += batch * (key_b * UNIT) + head * (key_h * UNIT)
    value += batch * (value_b * UNIT) + head * (value_h * UNIT)
    output += batch * (output_b * UNIT) + head * (output_h * UNIT)
    m0 = tl.arange(0, M0)
    m1 = M0 + tl.arange(0, M1 if TWO else M0)
    d0 = tl.arange(0, D0)
    d1 = D0 + tl.arange(0, D1 if MORE else D0)
    # k10: the second tile of channels with the first of keys
    k00 = load_tile(key, d0, m0, 1, key_n, D, keys, C0, TWO)
    v00 = load_tile(value, m0, d0, value_n, 1, keys, D, TWO, C0)
    k01 = k00
    k10 = k00
    k11 = k00
    v01 = v00
    v10 = v00
    v11 = v00
    if MORE:
        k10 = load_tile(key, d1, m0, 1, key_n, D, keys, C1, TWO)
        v01 = load_tile(value, m0, d1, value_n, 1, keys, D, TWO, C1)
    if TWO:
        k01 = load_tile(key, d0, m1, 1, key_n, D, keys, C0, False)
        v10 = load_tile(value, m1, d0, value_n, 1, keys, D, False, C0)
        if MORE:
            k11 = load_tile(key, d1, m1, 1, key_n, D, keys, C1, False)
            v11 = load_tile(value, m1, d1, value_n, 1, keys, D, False, C1)
    if MASKED > 0:
        mask += batch * mask_b + head * mask_h
    alpha = tl.load(alpha_at)
    temperature = tl.load(temperature_at)
    qk_scale = tl.cast(qk_scale, tl.float32)  # inductor hands a Python float over as float64
    over_temperature = 1.4426950408889634 / temperature
    if not SCALED:  # scores are scaled where they are shifted, by the same product
        over_temperature = over_temperature * qk_scale
    rows = tl.arange(0, ROWS)

    start = tl.program_id(0) * ROWS
    first = start.to(tl.int64)
    left = queries - start
    query_at = query + first * query_n
    output_at = output + first * output_n
    z0 = tl.zeros((ROWS, M0), tl.float32)
    q0 = load_tile(query_at, rows, d0, query_n, 1, left, D, WHOLE, C0)
    z0 = dot_tiles(q0, k00, z0, TF32X3)
    z1 = z0
    if TWO:
        z1 = dot_tiles(q0, k01, tl.zeros((ROWS, M1 if TWO else M0), tl.float32), TF32X3)
    if MORE:
        q1 = load_tile(query_at, rows, d1, query_n, 1, left, D, WHOLE, C1)
        z0 = dot_tiles(q1, k10, z0, TF32X3)
        if TWO:
            z1 = dot_tiles(q1, k11, z1, TF32X3)
    if SCALED:
        z0 = z0 * qk_scale
        z1 = z1 * qk_scale
    if MASKED > 0:
        mask_at = mask + first * mask_n
        if MASK_ROWS:
            is_row = (rows < left)[:, None]
            z0 = add_mask(
                z0, mask_at + rows[:, None] * mask_n + m0[None, :] * mask_k, is_row & (m0 < keys)[None, :], MASKED == 1
            )
            z1 = add_mask(
                z1, mask_at + rows[:, None] * mask_n + m1[None, :] * mask_k, is_row & (m1 < keys)[None, :], MASKED == 1
            )
        else:
            z0 = add_mask(z0, mask + m0 * mask_k, m0 < keys, MASKED == 1)
            z1 = add_mask(z1, mask + m1 * mask_k, m1 < keys, MASKED == 1)
    elif TWO:
        z1 = tl.where((m1 < keys)[None, :], z1, float("-inf"))
    else:
        z0 = tl.where((m0 < keys)[None, :], z0, float("-inf"))
    if not TWO:
        z1 = z0

    top = max_of_rows(z0, z1, TWO)
    top = tl.where(top == float("-inf"), 0.0, top)  # a row without keys has no largest score
    if WITH_LSE:  # of the scores not over temperature
        to_log2 = 1.4426950408889634
        if not SCALED:
            to_log2 = to_log2 * qk_scale
        total = sum_of_rows(
            tl.exp2(tl.minimum(z0 - top[:, None], 0.0) * to_log2),
            tl.exp2(tl.minimum(z1 - top[:, None], 0.0) * to_log2),
            TWO,
        )
        at = (batch * tl.num_programs(1) + head) * queries + first
        tl.store(lse + at + rows, log_sum_exp(top, total, qk_scale, SCALED), mask=rows < left)
    # Where scores over temperature are huge their differences are below rounding: the product must not overflow.
    sharpness = tl.minimum(over_temperature, 1048576.0 / tl.maximum(tl.abs(top), 1e-30))
    x0 = tl.minimum(z0 * sharpness[:, None] - (top * sharpness)[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)
    x1 = tl.minimum(z1 * sharpness[:, None] - (top * sharpness)[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)

    p0, p1 = sparse_short(x0, x1, alpha, keys, like, TWO, HALF_BITS)
    sparse_sum = sum_of_weights(p0, p1, TWO, not EXACT)
    sparse_sum = tl.where(sparse_sum == 0.0, 1.0, sparse_sum)  # zeros where a row has no key
    if OPERATOR == 2:  # anderson
        low0, low1 = sparse_short(x0, x1, tl.load(first_at), keys, like, TWO, HALF_BITS)
        low_sum = sum_of_weights(low0, low1, TWO, not EXACT)
        low_sum = tl.where(low_sum == 0.0, 1.0, low_sum)
    e0 = tl.exp2(x0).to(like)
    e1 = tl.exp2(x1).to(like)
    dense_sum = sum_of_weights(e0, e1, TWO, not EXACT)
    dense_sum = tl.where(dense_sum == 0.0, 1.0, dense_sum)

    zeros = tl.zeros((ROWS, D0), tl.float32)
    if OPERATOR >= 3:  # gag: T_s and T_s - T_d
        over_sparse = fast_reciprocal(sparse_sum)[:, None]
        over_dense = fast_reciprocal(dense_sum)[:, None]
        t_sparse = product_short(p0, p1, v00, v10, zeros, TWO, TF32X3) * over_sparse
        residual = t_sparse - product_short(e0, e1, v00, v10, zeros, TWO, TF32X3) * over_dense
        along = tl.sum(t_sparse * residual, 1)
        length = tl.sum(t_sparse * t_sparse, 1)
        square = tl.sum(residual * residual, 1)
        t_sparse1 = t_sparse
        residual1 = residual
        if MORE:
            zeros1 = tl.zeros((ROWS, D1 if MORE else D0), tl.float32)
            t_sparse1 = product_short(p0, p1, v01, v11, zeros1, TWO, TF32X3) * over_sparse
            residual1 = t_sparse1 - product_short(e0, e1, v01, v11, zeros1, TWO, TF32X3) * over_dense
            along += tl.sum(t_sparse1 * residual1, 1)
            length += tl.sum(t_sparse1 * t_sparse1, 1)
            square += tl.sum(residual1 * residual1, 1)
        if OPERATOR == 4:
            store_sums(sums, batch, first + rows, rows < left, queries, along, length, square)
        else:
            if OPERATOR == 5:  # over whole tokens: all heads' sums, found before
                along, length, square = sums_of_tokens(sums, batch, first + rows, rows < left, queries, ROWS)
            of_sparse, of_residual = geometry_of_sums(
                along, length, square, tl.load(scale_at), tl.load(first_at), tl.load(second_at)
            )
            of_sparse = of_sparse[:, None]
            of_residual = of_residual[:, None]
            if D > 128:  # so many channels are not kept: both products once more, as one
                over_sparse = over_sparse * (of_sparse + of_residual)
                over_dense = over_dense * of_residual
                w0 = (p0.to(tl.float32) * over_sparse - e0.to(tl.float32) * over_dense).to(like)
                w1 = (p1.to(tl.float32) * over_sparse - e1.to(tl.float32) * over_dense).to(like)
                t_sparse = product_short(w0, w1, v00, v10, zeros, TWO, TF32X3)
                store_tile(output_at, t_sparse, rows, d0, output_n, left, D, WHOLE, C0)
                t_sparse1 = product_short(w0, w1, v01, v11, zeros1, TWO, TF32X3)
                store_tile(output_at, t_sparse1, rows, d1, output_n, left, D, WHOLE, C1)
            else:
                out = t_sparse * of_sparse + residual * of_residual
                store_tile(output_at, out, rows, d0, output_n, left, D, WHOLE, C0)
                if MORE:
                    out = t_sparse1 * of_sparse + residual1 * of_residual
                    store_tile(output_at, out, rows, d1, output_n, left, D, WHOLE, C1)
    elif OPERATOR == 2:
        scale = tl.load(scale_at)
        scale_low = tl.load(second_at)
        of_sparse = (scale / sparse_sum)[:, None]
        of_low = (scale_low / low_sum)[:, None]
        of_dense = ((1.0 - scale - scale_low) / dense_sum)[:, None]
        w0 = (p0.to(tl.float32) * of_sparse + low0.to(tl.float32) * of_low + e0.to(tl.float32) * of_dense).to(like)
        w1 = (p1.to(tl.float32) * of_sparse + low1.to(tl.float32) * of_low + e1.to(tl.float32) * of_dense).to(like)
        out = product_short(w0, w1, v00, v10, zeros, TWO, TF32X3)
        store_tile(output_at, out, rows, d0, output_n, left, D, WHOLE, C0)
        if MORE:
            zeros1 = tl.zeros((ROWS, D1 if MORE else D0), tl.float32)
            out = product_short(w0, w1, v01, v11, zeros1, TWO, TF32X3)
            store_tile(output_at, out, rows, d1, output_n, left, D, WHOLE, C1)
    else:
        # (1 - scale) e V / sum e + scale p V / sum p, in one accumulator: the first product is scaled so that
        # what the second leaves is the output times (sum p / scale).
        scale = 1.0
        if OPERATOR == 0:
            scale = tl.load(scale_at)
            scale = tl.where(tl.abs(scale) < 1e-15, 1e-15, scale)
        of_sparse = scale * fast_reciprocal(sparse_sum)
        of_dense = (1.0 - scale) / (dense_sum * of_sparse)
        out = dot_scaled(e0, e1, p0, p1, v00, v10, zeros, of_dense, of_sparse, TWO, TF32X3)
        store_tile(output_at, out, rows, d0, output_n, left, D, WHOLE, C0)
        if MORE:
            zeros1 = tl.zeros((ROWS, D1 if MORE else D0), tl.float32)
            out = dot_scaled(e0, e1, p0, p1, v01, v11, zeros1, of_dense, of_sparse, TWO, TF32X3)
            store_tile(output_at, out, rows, d1, output_n, left, D, WHOLE, C1)


@tile_function
def dot_scaled(e0, e1, p0, p1, v0, v1, zeros, of_dense, of_sparse, TWO: tl.constexpr, TF32X3: tl.constexpr):
    """((e V) of_dense + p V) of_sparse."""
    out = product_short(e0, e1, v0, v1, zeros, TWO, TF32X3) * of_dense[:, None]
    return product_short(p0, p1, v0, v1, out, TWO, TF32X3) * of_sparse[:, None]


# -------------------- triton_solver.py -------------------------------------------------------------------------------

# The entmax threshold of rows that are longer than one tile, for the long Triton kernel.
#
# No scores are kept: each pass computes them again from query and keys, tile by tile, so there may be any number of keys.



@tile_function
def scores_of_tile(held, sizes: tl.constexpr, start):
    """Scores of the W keys from `start` on, -inf where there is no key; without qk_scale unless SCALED."""
    q0, q1, key, key_n, mask, mask_n, mask_k, rows, left, keys, qk_scale = held
    D: tl.constexpr = sizes[0]
    D0: tl.constexpr = sizes[1]
    D1: tl.constexpr = sizes[2]
    W: tl.constexpr = sizes[3]
    WHOLE_M: tl.constexpr = sizes[4]
    MASKED: tl.constexpr = sizes[5]
    MASK_ROWS: tl.constexpr = sizes[6]
    SCALED: tl.constexpr = sizes[7]
    TF32X3: tl.constexpr = sizes[8]
    m = tl.arange(0, W)
    here = keys - start
    key += tl.cast(start, tl.int64) * key_n
    z = tl.zeros((q0.shape[0], W), tl.float32)
    z = dot_tiles(q0, load_tile(key, tl.arange(0, D0), m, 1, key_n, D, here, D0 <= D, WHOLE_M), z, TF32X3)
    if D1 > 0:
        k1 = load_tile(key, D0 + tl.arange(0, D1), m, 1, key_n, D, here, D0 + D1 <= D, WHOLE_M)
        z = dot_tiles(q1, k1, z, TF32X3)
    if SCALED:
        z = z * qk_scale
    if MASKED > 0:
        mask += tl.cast(start, tl.int64) * mask_k
        if MASK_ROWS:
            at = mask + rows[:, None] * mask_n + m[None, :] * mask_k
            return add_mask(z, at, (rows < left)[:, None] & (m < here)[None, :], MASKED == 1)
        else:
            return add_mask(z, mask + m * mask_k, m < here, MASKED == 1)
    elif WHOLE_M:
        return z
    else:
        return tl.where((m < here)[None, :], z, float("-inf"))


@tile_function
def shifted_tile(held, sizes: tl.constexpr, start, sharpness, shift):
    """x of the W keys from `start` on."""
    z = scores_of_tile(held, sizes, start)
    return tl.minimum(z * sharpness[:, None] - shift[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)


@tile_function
def weights_of_tile(x, tau, alpha, r, unit, EXACT: tl.constexpr):
    """t^(r-1) and t^r of a tile, by the way that alpha wants."""
    if alpha == 1.5:
        g, p = power_tiles(x, tau, r, unit, 15, EXACT)
    elif alpha == 2.0:
        g, p = power_tiles(x, tau, r, unit, 20, EXACT)
    elif alpha == 1.25:
        g, p = power_tiles(x, tau, r, unit, 125, EXACT)
    elif alpha < 1.001 and not EXACT:
        p = near_softmax(x, tau, alpha)
        g = p
    else:
        g, p = power_tiles(x, tau, r, unit, 99, EXACT)
    return g, p


@tile_function
def solve_long(
    held,
    sizes: tl.constexpr,
    sharpness,
    shift,
    alpha,
    r,
    unit,
    KIND: tl.constexpr,
    LINEAR: tl.constexpr,
    HALF_BITS: tl.constexpr,
):
    """(tau, sum t^(r-1), sum t^r) of each row.

    LINEAR: the sums are those at tau, whose last step is left to the weights. That is worth a step of the threshold,
    but up to alpha 1.5 (bfloat16: below it).
    """
    EXACT: tl.constexpr = HALF_BITS == 24
    keys = held[9]
    steps = newton_steps_of(alpha, keys, HALF_BITS, True)
    if LINEAR:
        if alpha < 1.5 or (alpha == 1.5 and HALF_BITS > 8):
            steps += 1
    start, highest = start_of(r, unit, keys, KIND)
    tau = tl.zeros_like(shift) + start
    low = tau
    last_tau = tau
    norm = tau
    rate = tau
    slope = tau
    total = tau
    for step in tl.range(0, steps):
        slope = tl.zeros_like(shift)
        total = tl.zeros_like(shift)
        for at in tl.range(0, keys, sizes[3]):
            x = shifted_tile(held, sizes, at, sharpness, shift)
            g, p = power_tiles(x, tau, r, unit, KIND, EXACT)
            slope += tl.sum(g, 1)
            total += tl.sum(p, 1)
        slope = tl.maximum(slope, 1e-6)  # a row may have no key at all
        total = tl.maximum(total, 1e-6)
        if not LINEAR or step < steps - 1:
            new, low, norm, rate = next_threshold(
                slope, total, tau, low, last_tau, norm, rate, step, highest, r, unit, KIND
            )
            last_tau = tau
            tau = new
    return tau, slope, total


@tile_function
def sparse_long(
    held,
    sizes: tl.constexpr,
    sharpness,
    shift,
    dense_sum,
    alpha,
    r,
    unit,
    LINEAR: tl.constexpr,
    HALF_BITS: tl.constexpr,
):
    """(tau, factor of t^r, factor of t^(r-1)): the sparse weights, whose sum is one; the factors mean LINEAR alone."""
    EXACT: tl.constexpr = HALF_BITS == 24
    near_one = alpha < 1.001 and not EXACT
    goal = 1.0
    if alpha == 1.5:
        tau, slope, total = solve_long(
            held, sizes, sharpness, shift, 1.5, 2.0, 2.8853900817779268, 15, LINEAR, HALF_BITS
        )
        goal = 8.325475924022431
    elif alpha == 2.0:
        tau, slope, total = solve_long(
            held, sizes, sharpness, shift, 2.0, 1.0, 1.4426950408889634, 20, LINEAR, HALF_BITS
        )
        goal = 1.4426950408889634
    elif alpha == 1.25:
        tau, slope, total = solve_long(
            held, sizes, sharpness, shift, 1.25, 4.0, 5.7707801635558537, 125, LINEAR, HALF_BITS
        )
        goal = 1109.0167897836345
    elif near_one:
        tau = tl.log2(dense_sum)
        slope = tl.zeros_like(shift)
        total = tl.zeros_like(shift) + 1.0
        for at in tl.range(0, held[9], sizes[3]):
            slope += tl.sum(near_softmax(shifted_tile(held, sizes, at, sharpness, shift), tau, alpha), 1)
    else:
        tau, slope, total = solve_long(held, sizes, sharpness, shift, alpha, r, unit, 99, LINEAR, HALF_BITS)
    slope = tl.maximum(slope, 1e-6)
    of_power = tl.zeros_like(shift) + 1.0 / goal
    if near_one:
        of_power = 1.0 / slope
    return tau, of_power, (goal - total) / (goal * slope)


@tile_function
def exponents_of(alpha, EXACT: tl.constexpr):
    """(r, unit); of the alphas whose powers are products to the last bit."""
    r = exponent_of(alpha, EXACT)
    r = tl.where(alpha == 1.5, 2.0, tl.where(alpha == 2.0, 1.0, tl.where(alpha == 1.25, 4.0, r)))
    return r, r * 1.4426950408889634


@tile_function
def pass_tile(z, top, dense_sum, lse_sum, over_temperature, to_log2, temperature, WITH_LSE: tl.constexpr):
    """A tile of scores in the first pass: (largest so far, the same or 0, x by it, both sums so far)."""
    new = tl.maximum(top, tl.max(z, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)  # a row without keys has no largest score
    below = z - safe[:, None]
    before = top - safe
    x = tl.minimum(below * over_temperature, 0.0, propagate_nan=tl.PropagateNan.ALL)
    dense_sum = dense_sum * tl.exp2(before * over_temperature) + tl.sum(tl.exp2(x), 1)
    if WITH_LSE:
        if temperature != 1.0:
            lse_sum = lse_sum * tl.exp2(before * to_log2) + tl.sum(tl.exp2(tl.minimum(below * to_log2, 0.0)), 1)
    return new, safe, x, dense_sum, lse_sum


@tile_function
def lse_of_rows(top, lse_sum, dense_sum, temperature, qk_scale, SCALED: tl.constexpr, WANTED: tl.constexpr):
    """log sum exp of the scores not over temperature; -inf where no key is left."""
    if WANTED:
        if temperature == 1.0:
            lse_sum = dense_sum
        return log_sum_exp(top, lse_sum, qk_scale, SCALED)
    else:
        return top


@tile_function
def share_of_rows(places, own_lse, held, WITH_LSE: tl.constexpr, JOINED: tl.constexpr):
    """Store the log-sum-exp; how much of a joint row is its own keys': sigmoid(own - the others'), 0 without any."""
    lse = places[5]
    dense_lse = places[6]
    rows = held[7]
    left = held[8]
    if WITH_LSE:
        tl.store(lse + rows, own_lse, mask=rows < left)
    if JOINED:
        other = tl.load(dense_lse + rows, mask=rows < left, other=0.0)
        return tl.where(own_lse == float("-inf"), 0.0, 1.0 / (1.0 + tl.exp(other - own_lse)))
    else:
        return own_lse


@tile_function
def store_rows(
    places,
    out,
    channels,
    share,
    held,
    D: tl.constexpr,
    WHOLE_R: tl.constexpr,
    WHOLE_C: tl.constexpr,
    JOINED: tl.constexpr,
):
    """Write channels of the output, in joint attention mixed with the dense attention to the other keys."""
    value, value_n, output, output_n, dense, lse, dense_lse, dense_n = places
    rows = held[7]
    left = held[8]
    if JOINED:
        there = load_tile(dense, rows, channels, dense_n, 1, left, D, WHOLE_R, WHOLE_C).to(tl.float32)
        out = there + share[:, None] * (out - there)
    store_tile(output, out, rows, channels, output_n, left, D, WHOLE_R, WHOLE_C)


# -------------------- triton_held.py ---------------------------------------------------------------------------------

# Rows whose scores the long Triton kernel keeps in registers: up to 320 keys, half precision, alpha 1.5, one product.
#
# What is kept is x (triton_tiles.py) as float16, two tiles to one of 32 bits. float16 holds x to 2^-11 of itself, so that
# what is near the row's largest, which is what the sparse map is made of, is nearly exact. The compiler would unpack all
# of them before the solver's loop and hold twice as many registers, so packing and unpacking are instructions that it may
# not move (inline assembly, NVIDIA's).



@tile_function
def pack_tiles(low, high, like: tl.constexpr):
    """Two float32 tiles as one of 32 bits, each rounded to float16 or, if `like` is that, bfloat16."""
    if INTERPRETED:
        low = low.to(like).to(tl.uint16, bitcast=True).to(tl.uint32)
        high = high.to(like).to(tl.uint16, bitcast=True).to(tl.uint32)
        return ((high << 16) | low).to(tl.int32, bitcast=True)
    elif like == tl.float16:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )


@tile_function
def halves_of(packed, like: tl.constexpr):
    """Both tiles of a packed one, in the dtype that they were packed in, here and now."""
    if INTERPRETED:
        bits = packed.to(tl.uint32, bitcast=True)
        low = (bits & 0xFFFF).to(tl.uint16).to(like, bitcast=True)
        high = (bits >> 16).to(tl.uint16).to(like, bitcast=True)
        return low, high
    else:
        low, high = tl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [packed], dtype=(tl.int16, tl.int16), is_pure=False, pack=1
        )
        return low.to(like, bitcast=True), high.to(like, bitcast=True)


@tile_function
def unpack_x(packed):
    """Both tiles of x in float32, here and now."""
    if INTERPRETED:
        low, high = halves_of(packed, tl.float16)
        return low.to(tl.float32), high.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }",
            "=f,=f,r",
            [packed],
            dtype=(tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )


@tile_function
def depths_of(packed, tau_pair):
    """max(x - tau, 0) of both tiles in float32, subtracted as float16. tau_pair: tau twice, packed."""
    if INTERPRETED:
        low, high = halves_of(packed, tl.float16)
        tau, _ = halves_of(tau_pair, tl.float16)
        return tl.maximum(low - tau, 0.0).to(tl.float32), tl.maximum(high - tau, 0.0).to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; .reg .b16 l, h; sub.rn.f16x2 t, $2, $3; max.f16x2 t, t, $4;"
            " mov.b32 {l, h}, t; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }",
            "=f,=f,r,r,r",
            [packed, tau_pair, tau_pair ^ tau_pair],
            dtype=(tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )


@tile_function
def sums_of_held(xs, tau, PAIRS: tl.constexpr):
    """Row sums of t and of t^2 over all keys, added within a thread first."""
    tau_pair = pack_tiles(tau, tau, tl.float16)[:, None]
    slope = tl.zeros(xs[0].shape, tl.float32)
    total = tl.zeros(xs[0].shape, tl.float32)
    for i in tl.static_range(PAIRS):
        low, high = depths_of(xs[i], tau_pair)
        slope += low + high
        total += low * low + high * high
    return tl.sum(slope, 1), tl.sum(total, 1)


@tile_function
def solve_held(xs, like_row, keys, PAIRS: tl.constexpr, HALF_BITS: tl.constexpr):
    """(tau, sum t, sum t^2) of each row at alpha 1.5, the sums at tau: the last step is left to the weights."""
    unit = 2.8853900817779268
    steps = newton_steps_of(1.5, keys, HALF_BITS, True)
    if keys > 256 or HALF_BITS == 11:  # the last one, in the weights, is worth one of the threshold up to here
        steps += 1
    start, highest = start_of(2.0, unit, keys, 15)
    # tau is kept as the float16 at which the sums are taken.
    tau = (tl.zeros_like(like_row) + start).to(tl.float16).to(tl.float32)
    low = tau
    last_tau = tau
    norm = tau
    rate = tau
    slope = tau
    total = tau
    for step in tl.range(0, steps):
        slope, total = sums_of_held(xs, tau, PAIRS)
        slope = tl.maximum(slope, 1e-6)  # a row may have no key at all
        total = tl.maximum(total, 1e-6)
        if step < steps - 1:
            new, low, norm, rate = next_threshold(
                slope, total, tau, low, last_tau, norm, rate, step, highest, 2.0, unit, 15
            )
            last_tau = tau
            tau = new.to(tl.float16).to(tl.float32)
    return tau, slope, total


@tile_function
def mix_held(xs, scale, dense_sum, tau, slope, total, like: tl.constexpr, PAIRS: tl.constexpr):
    """(1 - scale) dense + scale sparse weights in place of the x that are kept, packed likewise in the dtype `like`."""
    goal = 8.325475924022431
    of_power = scale / goal
    of_slope = (of_power * (goal - total) / slope)[:, None]
    off = tl.log2(dense_sum)[:, None]
    of_dense = 1.0 - scale
    ws = ()
    for i in tl.static_range(PAIRS):
        low, high = unpack_x(xs[i])
        t0 = tl.maximum(low - tau[:, None], 0.0)
        t1 = tl.maximum(high - tau[:, None], 0.0)
        low = tl.exp2(low - off) * of_dense + t0 * (t0 * of_power + of_slope)
        high = tl.exp2(high - off) * of_dense + t1 * (t1 * of_power + of_slope)
        ws = ws + (pack_tiles(low, high, like),)
    return ws


@tile_function
def first_pass_held(
    held, sizes: tl.constexpr, over_temperature, to_log2, temperature, PAIRS: tl.constexpr, WITH_LSE: tl.constexpr
):
    """(x of all keys, largest score, sum of exponentials over temperature, and not) of each row."""
    W: tl.constexpr = sizes[3]
    ROWS: tl.constexpr = held[0].shape[0]
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    dense_sum = tl.zeros((ROWS,), tl.float32)
    lse_sum = tl.zeros((ROWS,), tl.float32)
    # A loop that is one, and what it finds put where it belongs by selection: unrolled, the compiler would compute all
    # products first, and could not keep them.
    nothing = tl.full((ROWS, W), float("-inf"), tl.float32)
    nothing = pack_tiles(nothing, nothing, tl.float16)
    xs = ()
    tops = ()
    for _ in tl.static_range(PAIRS):
        xs = xs + (nothing,)
        tops = tops + (top,)
    for pair in tl.range(0, PAIRS):
        at = 2 * pair * W
        z = scores_of_tile(held, sizes, at)
        top, before, x0, dense_sum, lse_sum = pass_tile(
            z, top, dense_sum, lse_sum, over_temperature, to_log2, temperature, WITH_LSE
        )
        z = scores_of_tile(held, sizes, at + W)
        top, safe, x1, dense_sum, lse_sum = pass_tile(
            z, top, dense_sum, lse_sum, over_temperature, to_log2, temperature, WITH_LSE
        )
        packed = pack_tiles(x0 + ((before - safe) * over_temperature)[:, None], x1, tl.float16)
        new_xs = ()
        new_tops = ()
        for i in tl.static_range(PAIRS):
            new_xs = new_xs + (tl.where(pair == i, packed, xs[i]),)
            new_tops = new_tops + (tl.where(pair == i, safe, tops[i]),)
        xs = new_xs
        tops = new_tops
    top = tl.where(top == float("-inf"), 0.0, top)
    moved = ()  # x less the row's largest of all keys
    for i in tl.static_range(PAIRS):
        x0, x1 = unpack_x(xs[i])
        back = ((tops[i] - top) * over_temperature)[:, None]
        moved = moved + (pack_tiles(x0 + back, x1 + back, tl.float16),)
    return moved, top, dense_sum, lse_sum


@tile_function
def held_rows(
    held,
    sizes: tl.constexpr,
    places,
    numbers,
    like: tl.constexpr,
    WHOLE: tl.constexpr,
    PAIRS: tl.constexpr,
    WITH_LSE: tl.constexpr,
    JOINED: tl.constexpr,
    HALF_BITS: tl.constexpr,
):
    """A block of rows from scores to output. places, numbers: as the long kernel has them."""
    D: tl.constexpr = sizes[0]
    D0: tl.constexpr = sizes[1]
    D1: tl.constexpr = sizes[2]
    SCALED: tl.constexpr = sizes[7]
    HALF: tl.constexpr = 64 if D0 > 64 else D0
    to_log2, temperature, qk_scale, scale = numbers
    keys = held[9]
    xs, top, dense_sum, lse_sum = first_pass_held(
        held, sizes, to_log2 / temperature, to_log2, temperature, PAIRS, WITH_LSE or JOINED
    )
    own_lse = lse_of_rows(top, lse_sum, dense_sum, temperature, qk_scale, SCALED, WITH_LSE or JOINED)
    dense_sum = tl.where(dense_sum == 0.0, 1.0, dense_sum)  # zeros where a row has no key
    tau, slope, total = solve_held(xs, dense_sum, keys, PAIRS, HALF_BITS)
    ws = mix_held(xs, scale, dense_sum, tau, slope, total, like, PAIRS)
    share = share_of_rows(places, own_lse, held, WITH_LSE, JOINED)
    # So many channels at a time as there are registers for, in a loop that is one: unrolled, the compiler would keep
    # all addresses and weights of the first half for the second.
    for at in tl.range(0, D0, HALF, num_stages=1):
        write_held(ws, at, HALF, D0 <= D, held, sizes, places, share, like, WHOLE, PAIRS, JOINED)
    if D1 > 0:
        write_held(ws, D0, D1, D0 + D1 <= D, held, sizes, places, share, like, WHOLE, PAIRS, JOINED)


@tile_function
def write_held(
    ws,
    channel,
    COUNT: tl.constexpr,
    WHOLE_C: tl.constexpr,
    held,
    sizes: tl.constexpr,
    places,
    share,
    like: tl.constexpr,
    WHOLE: tl.constexpr,
    PAIRS: tl.constexpr,
    JOINED: tl.constexpr,
):
    """The output's COUNT channels from `channel` on."""
    D: tl.constexpr = sizes[0]
    W: tl.constexpr = sizes[3]
    WHOLE_M: tl.constexpr = sizes[4]
    keys = held[9]
    value = places[0]
    value_n = places[1]
    d = channel + tl.arange(0, COUNT)
    m = tl.arange(0, W)
    out = tl.zeros((held[0].shape[0], COUNT), tl.float32)
    for pair in tl.range(0, PAIRS):
        chosen = ws[0]
        for i in tl.static_range(1, PAIRS):
            chosen = tl.where(pair == i, ws[i], chosen)
        low, high = halves_of(chosen, like)
        at = 2 * pair * W
        place = value + tl.cast(at, tl.int64) * value_n
        v = load_tile(place, m, d, value_n, 1, keys - at, D, WHOLE_M, WHOLE_C)
        out = dot_tiles(low, v, out, False)
        place += W * value_n
        v = load_tile(place, m, d, value_n, 1, keys - at - W, D, WHOLE_M, WHOLE_C)
        out = dot_tiles(high, v, out, False)
    store_rows(places, out, d, share, held, D, WHOLE, WHOLE_C, JOINED)


# -------------------- triton_long.py ---------------------------------------------------------------------------------

# The Triton kernel for texts of any length, over tiles of their keys.
#
# It goes over the keys once for the largest score and the sum of exponentials, once for each step of the solver and once
# for the output. Up to 320 keys in half precision the scores of the first pass are kept (PAIRS); else it keeps none, as
# flash attention, and computes them again on the tensor cores. Where the output is one product (all operators but GAG)
# the sparse weights are t^r plus a share of t^(r-1) that makes their sum one, by the sums of the last step: a Newton step
# in the weights, so no pass is spent on their sum.
#
# In joint attention (JOINED) the kernel also takes the dense attention of the same rows to the other keys, and mixes it
# with its own by their log-sum-exps while its output is still in registers.


MOST_HELD_KEYS = 320


@tile_function
def product_long(w, value, value_n, at, keys, out0, out1, sizes: tl.constexpr):
    """Weights of the W keys from `at` on, times their values, added to both tiles of the output."""
    D: tl.constexpr = sizes[0]
    D0: tl.constexpr = sizes[1]
    D1: tl.constexpr = sizes[2]
    W: tl.constexpr = sizes[3]
    WHOLE_M: tl.constexpr = sizes[4]
    TF32X3: tl.constexpr = sizes[8]
    m = tl.arange(0, W)
    value += tl.cast(at, tl.int64) * value_n
    v0 = load_tile(value, m, tl.arange(0, D0), value_n, 1, keys - at, D, WHOLE_M, D0 <= D)
    out0 = dot_tiles(w, v0, out0, TF32X3)
    if D1 > 0:
        v1 = load_tile(value, m, D0 + tl.arange(0, D1), value_n, 1, keys - at, D, WHOLE_M, D0 + D1 <= D)
        out1 = dot_tiles(w, v1, out1, TF32X3)
    return out0, out1


@tile_function
def gag_of_tile(
    x,
    maps,
    value,
    value_n,
    at,
    keys,
    out0,
    out1,
    residual0,
    residual1,
    sparse_sum,
    like,
    sizes: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Both maps of a tile times its values, not normed, and the sparse map's sum so far."""
    tau, alpha, r, unit = maps
    g, p = weights_of_tile(x, tau, alpha, r, unit, EXACT)
    sparse_sum += tl.sum(p, 1)
    out0, out1 = product_long(p.to(like), value, value_n, at, keys, out0, out1, sizes)
    residual0, residual1 = product_long(tl.exp2(x).to(like), value, value_n, at, keys, residual0, residual1, sizes)
    return out0, out1, residual0, residual1, sparse_sum


@tile_function
def mix_of_tile(
    x,
    of_dense,
    maps,
    low_maps,
    value,
    value_n,
    at,
    keys,
    out0,
    out1,
    like,
    sizes: tl.constexpr,
    EXACT: tl.constexpr,
    ANDERSON: tl.constexpr,
):
    """One product of a tile's mixed maps with its values, added to the output."""
    tau, alpha, r, unit, of_power, of_slope = maps
    g, p = weights_of_tile(x, tau, alpha, r, unit, EXACT)
    w = tl.exp2(x) * of_dense[:, None] + p * of_power[:, None] + g * of_slope[:, None]
    if ANDERSON:
        tau, alpha, r, unit, of_power, of_slope = low_maps
        g, p = weights_of_tile(x, tau, alpha, r, unit, EXACT)
        w = w + p * of_power[:, None] + g * of_slope[:, None]
    return product_long(w.to(like), value, value_n, at, keys, out0, out1, sizes)


@tile_function
def stream_rows(
    held,
    sizes: tl.constexpr,
    places,
    numbers,
    rest,
    like: tl.constexpr,
    OPERATOR: tl.constexpr,
    WHOLE: tl.constexpr,
    WITH_LSE: tl.constexpr,
    JOINED: tl.constexpr,
    HALF_BITS: tl.constexpr,
):
    """A block of rows from scores to output, keeping no scores."""
    D: tl.constexpr = sizes[0]
    D0: tl.constexpr = sizes[1]
    D1: tl.constexpr = sizes[2]
    W: tl.constexpr = sizes[3]
    SCALED: tl.constexpr = sizes[7]
    MORE: tl.constexpr = D1 > 0
    GAG: tl.constexpr = OPERATOR >= 3
    EXACT: tl.constexpr = HALF_BITS == 24
    ROWS: tl.constexpr = held[0].shape[0]
    to_log2, temperature, qk_scale, scale = numbers
    alpha, sums, first_at, second_at, batch, first, queries = rest
    value = places[0]
    value_n = places[1]
    rows = held[7]
    left = held[8]
    keys = held[9]
    over_temperature = to_log2 / temperature
    r, unit = exponents_of(alpha, EXACT)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    dense_sum = tl.zeros((ROWS,), tl.float32)
    lse_sum = tl.zeros((ROWS,), tl.float32)
    for at in tl.range(0, keys, W):
        z = scores_of_tile(held, sizes, at)
        top, safe, x, dense_sum, lse_sum = pass_tile(
            z, top, dense_sum, lse_sum, over_temperature, to_log2, temperature, WITH_LSE or JOINED
        )
    top = tl.where(top == float("-inf"), 0.0, top)
    own_lse = lse_of_rows(top, lse_sum, dense_sum, temperature, qk_scale, SCALED, WITH_LSE or JOINED)
    dense_sum = tl.where(dense_sum == 0.0, 1.0, dense_sum)  # zeros where a row has no key
    out0 = tl.zeros((ROWS, D0), tl.float32)
    out1 = tl.zeros((ROWS, D1 if MORE else D0), tl.float32)
    # Where scores over temperature are huge their differences are below rounding: the product must not overflow.
    sharpness = tl.minimum(over_temperature, 1048576.0 / tl.maximum(tl.abs(top), 1e-30))
    shift = top * sharpness

    if OPERATOR > 0 or scale != 0.0:
        tau, of_power, of_slope = sparse_long(
            held, sizes, sharpness, shift, dense_sum, alpha, r, unit, not GAG, HALF_BITS
        )
    else:  # dense attention alone: nothing to solve
        tau = tl.zeros_like(shift)
        of_power = tl.zeros_like(shift)
        of_slope = tl.zeros_like(shift)
    if GAG:
        residual0 = out0
        residual1 = out1
        sparse_sum = tl.zeros((ROWS,), tl.float32)
        maps = (tau, alpha, r, unit)
        for at in tl.range(0, keys, W):
            x = shifted_tile(held, sizes, at, sharpness, shift)
            out0, out1, residual0, residual1, sparse_sum = gag_of_tile(
                x, maps, value, value_n, at, keys, out0, out1, residual0, residual1, sparse_sum, like, sizes, EXACT
            )
        sparse_sum = tl.where(sparse_sum == 0.0, 1.0, sparse_sum)
        over_sparse = fast_reciprocal(sparse_sum)[:, None]
        over_dense = fast_reciprocal(dense_sum)[:, None]
        out0 = out0 * over_sparse  # T_s
        residual0 = out0 - residual0 * over_dense  # T_s - T_d
        along = tl.sum(out0 * residual0, 1)
        length = tl.sum(out0 * out0, 1)
        square = tl.sum(residual0 * residual0, 1)
        if MORE:
            out1 = out1 * over_sparse
            residual1 = out1 - residual1 * over_dense
            along += tl.sum(out1 * residual1, 1)
            length += tl.sum(out1 * out1, 1)
            square += tl.sum(residual1 * residual1, 1)
        if OPERATOR == 4:
            store_sums(sums, batch, first + rows, rows < left, queries, along, length, square)
        else:
            if OPERATOR == 5:  # over whole tokens: all heads' sums, found before
                along, length, square = sums_of_tokens(sums, batch, first + rows, rows < left, queries, ROWS)
            of_sparse, of_residual = geometry_of_sums(
                along, length, square, scale, tl.load(first_at), tl.load(second_at)
            )
            out0 = out0 * of_sparse[:, None] + residual0 * of_residual[:, None]
            if MORE:
                out1 = out1 * of_sparse[:, None] + residual1 * of_residual[:, None]
    else:
        of_dense = 1.0 - scale
        maps = (tau, alpha, r, unit, of_power * scale, of_slope * scale)
        low_maps = maps
        if OPERATOR == 2:  # anderson
            alpha_low = tl.load(first_at)
            r_low, unit_low = exponents_of(alpha_low, EXACT)
            tau_low, power_low, slope_low = sparse_long(
                held, sizes, sharpness, shift, dense_sum, alpha_low, r_low, unit_low, True, HALF_BITS
            )
            scale_low = tl.load(second_at)
            of_dense = of_dense - scale_low
            low_maps = (tau_low, alpha_low, r_low, unit_low, power_low * scale_low, slope_low * scale_low)
        of_dense = of_dense / dense_sum
        for at in tl.range(0, keys, W):
            x = shifted_tile(held, sizes, at, sharpness, shift)
            out0, out1 = mix_of_tile(
                x, of_dense, maps, low_maps, value, value_n, at, keys, out0, out1, like, sizes, EXACT, OPERATOR == 2
            )
    if OPERATOR != 4:
        share = share_of_rows(places, own_lse, held, WITH_LSE, JOINED)
        store_rows(places, out0, tl.arange(0, D0), share, held, D, WHOLE, D0 <= D, JOINED)
        if MORE:
            store_rows(places, out1, D0 + tl.arange(0, D1), share, held, D, WHOLE, D0 + D1 <= D, JOINED)


@tile_function
def long_kernel(
    query,
    key,
    value,
    mask,
    output,
    lse,
    sums,
    dense,
    dense_lse,
    alpha_at,
    scale_at,
    temperature_at,
    first_at,
    second_at,
    query_b,
    query_h,
    query_n,
    key_b,
    key_h,
    key_n,
    value_b,
    value_h,
    value_n,
    output_b,
    output_h,
    output_n,
    dense_b,
    dense_h,
    dense_n,
    mask_b,
    mask_h,
    mask_n,
    mask_k,
    queries,
    keys,
    qk_scale,
    UNIT: tl.constexpr,
    OPERATOR: tl.constexpr,
    MASKED: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    SCALED: tl.constexpr,
    WITH_LSE: tl.constexpr,
    JOINED: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    WHOLE: tl.constexpr,
    WHOLE_M: tl.constexpr,
    TF32X3: tl.constexpr,
    HALF_BITS: tl.constexpr,
):
    MORE: tl.constexpr = D1 > 0
    C0: tl.constexpr = D0 <= D
    C1: tl.constexpr = D0 + D1 <= D
    like: tl.constexpr = query.dtype.element_ty
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * ROWS
    first = start.to(tl.int64)
    rows = tl.arange(0, ROWS)
    left = queries - start
    # Strides count UNITs of elements, so that the compiler sees that addresses allow wide loads.
    query_n = query_n * UNIT
    key_n = key_n * UNIT
    value_n = value_n * UNIT
    output_n = output_n * UNIT
    query += batch * (query_b * UNIT) + head * (query_h * UNIT) + first * query_n
    key += batch * (key_b * UNIT) + head * (key_h * UNIT)
    value += batch * (value_b * UNIT) + head * (value_h * UNIT)
    output += batch * (output_b * UNIT) + head * (output_h * UNIT) + first * output_n
    dense_n = dense_n * UNIT
    dense += batch * (dense_b * UNIT) + head * (dense_h * UNIT) + first * dense_n
    lse += (batch * tl.num_programs(1) + head) * queries + first  # of (batch, heads, queries)
    dense_lse += (batch * tl.num_programs(1) + head) * queries + first
    if MASKED > 0:
        mask += batch * mask_b + head * mask_h + first * mask_n
    d0 = tl.arange(0, D0)
    d1 = D0 + tl.arange(0, D1 if MORE else D0)
    q0 = load_tile(query, rows, d0, query_n, 1, left, D, WHOLE, C0)
    q1 = q0
    if MORE:
        q1 = load_tile(query, rows, d1, query_n, 1, left, D, WHOLE, C1)
    qk_scale = tl.cast(qk_scale, tl.float32)  # inductor hands a Python float over as float64
    held = (q0, q1, key, key_n, mask, mask_n, mask_k, rows, left, keys, qk_scale)
    sizes: tl.constexpr = (D, D0, D1, W, WHOLE_M, MASKED, MASK_ROWS, SCALED, TF32X3)
    alpha = tl.load(alpha_at)
    temperature = tl.load(temperature_at)
    to_log2 = 1.4426950408889634
    if not SCALED:  # scores are scaled where they are shifted, by the same product
        to_log2 = to_log2 * qk_scale
    scale = 1.0
    if OPERATOR != 1:
        scale = tl.load(scale_at)
    places = (value, value_n, output, output_n, dense, lse, dense_lse, dense_n)
    numbers = (to_log2, temperature, qk_scale, scale)
    rest = (alpha, sums, first_at, second_at, batch, first, queries)
    if PAIRS > 0:
        if alpha == 1.5:
            half: tl.constexpr = (D, D0, D1, 32, WHOLE_M, MASKED, MASK_ROWS, SCALED, False)
            held_rows(held, half, places, numbers, like, WHOLE, PAIRS, WITH_LSE, JOINED, HALF_BITS)
        else:
            stream_rows(held, sizes, places, numbers, rest, like, OPERATOR, WHOLE, WITH_LSE, JOINED, HALF_BITS)
    else:
        stream_rows(held, sizes, places, numbers, rest, like, OPERATOR, WHOLE, WITH_LSE, JOINED, HALF_BITS)


# -------------------- triton_kernel.py -------------------------------------------------------------------------------

# The fused operators on GPUs: which of two Triton kernels, with which tiles, and how they are launched.
#
# Up to 128 keys take the short kernel, more the long one, and there is no most. alpha, like every hyperparameter, is read
# from memory by the kernel: one compiled kernel serves every value, and a value that changes between two replays of a
# CUDA graph acts. What is fixed when a kernel is compiled are tiles, dtype, operator and kind of mask.
#
# Eager calls launch directly and keep what they found out about a shape; torch.library's operator is for what traces.
# Triton is imported at the first call, not before. TRITON_INTERPRET=1 runs the same code without a GPU.

import contextlib
import functools
import importlib
import importlib.util
import operator as operators
import os
import types
from collections.abc import Sequence

import torch
from torch import Tensor


MOST_CHANNELS = 256
MOST_HEADS = 65535  # of a grid's second and third dimension
_CODES = {"pladis": 0, "sparse": 1, "anderson": 2, "gag": 3}  # the kernels' OPERATOR
_GAG_SUMS, _GAG_ROWS = 4, 5  # gag over whole tokens: first the sums of each head, then the output
_BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}
_MOST_LAUNCHES = 1024  # that are kept: a few for each shape that a process meets
_find_spec = functools.cache(importlib.util.find_spec)  # a search of the disk where it fails; asked at every call


def triton_refusal(query, key, value):
    """Why the kernels cannot take these tensors, as one sentence; None if they can."""
    batch, heads, _, channels = query.shape
    if query.dtype not in _BITS:
        return f"{query.dtype} is not float32, float16 or bfloat16"
    if not query.dtype == key.dtype == value.dtype:
        return "query, key and value differ in dtype"
    if key.shape[2] == 0:
        return "there are no keys"
    if channels > MOST_CHANNELS or value.shape[3] != channels:
        return f"head_dim {channels} and {value.shape[3]} are not the same number up to {MOST_CHANNELS}"
    if any(isinstance(n, int) and n > MOST_HEADS for n in (batch, heads)):
        return f"a batch of {batch} with {heads} heads is more than {MOST_HEADS} of one"
    if not query.is_cuda and not _is_interpreted():
        return f"the tensors are on {query.device}, not on a GPU"
    if not triton_is_ready():
        return "Triton is not installed"
    return None


def tiles_of(keys, head_dim, dtype, code, short, mask_rows=False, capability=9, traced=False):
    """(tile sizes, warps, stages) of a program: a block of rows and all keys where `short`, or W of them at a time.

    code: the kernels' OPERATOR. mask_rows: that there is a mask with rows of its own. capability: the GPU's major
    compute capability. traced: for a graph. benchmarks/triton_registers.py shows what the compiler makes of each; in
    half precision none spills. No program of 64 rows has 8 warps: with tiles 16 wide Triton 3.6 then reads shared
    memory out of bounds.
    """
    exact = dtype == torch.float32
    d0, d1 = _in_two(head_dim, (16, 32, 48, 64, 80, 128, 160, 256))
    heavy = head_dim > 128 or mask_rows  # more numbers for each row than there are registers for 64 rows
    if short:
        m0, m1 = _in_two(keys, (16, 32, 64, 80, 128))
        few = exact or heavy or (capability < 9 and (keys > 80 or head_dim > 80))
        return {"D0": d0, "D1": d1, "M0": m0, "M1": m1, "ROWS": 32 if few else 64}, 4, 1
    if exact or heavy or capability < 9:
        rows = 16 if code == _CODES["anderson"] and head_dim > 80 else 32
        d0, d1 = _in_two(head_dim, (16, 32, 64, 128, 160, 256))
        return {"D0": d0, "D1": d1, "W": 32, "ROWS": rows, "PAIRS": 0}, 4, 2
    held = code in (_CODES["pladis"], _CODES["sparse"]) and torch.version.hip is None
    # What a kernel writes is found from its code, where inline assembly counts as writing to every tensor.
    held = held and not traced and keys <= MOST_HELD_KEYS
    return {"D0": d0, "D1": d1, "W": 64, "ROWS": 64, "PAIRS": -(-keys // 64) if held else 0}, 4, 3


def _in_two(length, sizes):
    """The smallest of `sizes` that holds `length`, as one or two powers of two, the first of them at most 128."""
    whole = next(size for size in sizes if size >= length)
    first = min(128, 1 << (whole.bit_length() - 1))
    return first, whole - first


def is_short(keys, code):
    """Whether the short kernel takes so many keys. A number that a graph leaves open takes the long one."""
    most = 80 if code == _CODES["anderson"] else MOST_SHORT_KEYS  # three maps at once
    return isinstance(keys, int) and keys <= most


class _Launch:
    """One launch of a kernel: its grid and all of its arguments that are not tensors.

    Those are found from shapes, strides and dtypes, so eager calls of one shape share them, and `direct` with them: how
    Triton launches what it compiled, without looking at every argument again.
    """

    def __init__(self, query, key, value, mask, output, dense, code, qk_scale, with_lse, capability=None, traced=False):
        batch, heads, queries, head_dim = query.shape
        keys = key.shape[2]
        self.short = dense is None and is_short(keys, code)
        mask_rows = mask is not None and mask.stride(2) != 0
        tiles, warps, stages = tiles_of(
            keys, head_dim, query.dtype, code, self.short, mask_rows, capability or _capability(query), traced
        )
        rows = tiles["ROWS"]
        self.grid = (-(-queries // rows), heads, batch)
        read = [query, key, value, output]
        if not self.short:
            read.append(query if dense is None else dense)
        strides = [stride for tensor in read for stride in tensor.stride()[:3]]
        unit = 4 if query.dtype == torch.float32 else 8  # 16 bytes
        unit = unit if all(_divides(unit, stride) for stride in strides) else 1
        mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
        self.numbers = (*(stride // unit for stride in strides), *mask_strides, queries, keys, qk_scale)
        kind = 0 if mask is None else 1 if mask.dtype == torch.uint8 else 2
        fixed = {
            "UNIT": unit,
            "OPERATOR": code,
            "MASKED": kind,
            "MASK_ROWS": mask_rows,
            "SCALED": kind > 0 or qk_scale <= 0.0,  # the largest score is then not that of the largest product
            "WITH_LSE": with_lse,
            "D": head_dim,
            "WHOLE": _divides(rows, queries),
            "TF32X3": query.dtype == torch.float32,
            "HALF_BITS": _BITS[query.dtype],
            **tiles,
        }
        if not self.short:
            fixed["JOINED"] = dense is not None
            fixed["WHOLE_M"] = _divides(tiles["W"], keys)
        self.fixed = {**fixed, "num_warps": warps, "num_stages": stages}
        self.direct, self.tail = None, ()

    def trace(self, tensors):
        """Launch through torch, which puts the launch into the graph that it makes."""
        kernel = torch.library.wrap_triton(jitted_kernels()[0 if self.short else 1])
        kernel[self.grid](*tensors, *self.numbers, **self.fixed)

    def now(self, tensors):
        """Launch. tensors: those that the kernel takes, in its order."""
        pointers = [tensor.data_ptr() for tensor in tensors]
        # What is compiled takes addresses to be multiples of 16 where the first ones were.
        aligned = not functools.reduce(operators.or_, pointers) & 15
        if aligned and self.direct is not None:
            return self.direct(*pointers, *self.tail)
        kernel = jitted_kernels()[0 if self.short else 1]
        compiled = kernel[self.grid](*tensors, *self.numbers, **self.fixed)
        if aligned and compiled is not None:  # interpreted it is None
            self.tail = (*self.numbers, *(self.fixed[name] for name in kernel.arg_names if name in self.fixed))
            self.direct = compiled[self.grid]
        return None


def _capability(tensor):
    """The major compute capability of the tensor's GPU; without one that of an H100."""
    return torch.cuda.get_device_capability(tensor.device)[0] if tensor.is_cuda and torch.cuda.is_available() else 9


def _divides(divisor, number):
    """Whether a number is a multiple of another; of one that a graph leaves open, whether every value is."""
    if isinstance(number, int):
        return number % divisor == 0
    return torch.fx.experimental.symbolic_shapes.statically_known_true(number % divisor == 0)


def _arguments(query, key, value, mask, output, lse, sums, dense, dense_lse, settings, operator, short):
    """All tensors that a kernel takes, in its order; one that is not read is the query."""
    more = [query if tensor is None else tensor for tensor in (mask, output, lse, sums)]
    if not short:
        more += [query if tensor is None else tensor for tensor in (dense, dense_lse)]
    alpha, *others = settings
    if operator == "sparse":  # alpha and temperature
        others = [alpha, *others]
    return [query, key, value, *more, alpha, *others, *([alpha] * (4 - len(others)))]


def _prepared(query, key, value, mask):
    """The tensors as the kernels read them: channels side by side, a mask of all rows and keys, booleans as bytes."""
    query, key, value = (t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous() for t in (query, key, value))
    if mask is not None:
        mask = _as_bytes(mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2]))
    return query, key, value, mask


def _as_bytes(mask):
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def _codes(operator, unit):
    return (_GAG_SUMS, _GAG_ROWS) if operator == "gag" and unit == "token" else (_CODES[operator],)


def _sums(query, codes):
    """Uninitialised sums of each head, for gag over whole tokens; None for what has none."""
    return query.new_empty(3, *query.shape[:3], dtype=torch.float32) if _GAG_SUMS in codes else None


def launch_by_triton(
    query, key, value, mask, settings, operator, unit, qk_scale, with_lse, dense=None, dense_lse=None, output=None
):
    """(output, log-sum-exp or None) by a kernel, launched here and now, of tensors that `triton_refusal` passes.

    dense, dense_lse: attention of the same queries to other keys, (batch, heads, queries, head_dim), and its
    log-sum-exp, float32 and contiguous; the output is then attention to both, as joint attention has it (joint.py).
    output: where to write instead of a tensor of its own, its channels side by side; then without a log-sum-exp.
    """
    if query.numel() == 0:
        return empty_outputs(query, value, with_lse)
    query, key, value, mask = _prepared(query, key, value, mask)
    device = query.device
    settings = [
        s if s.dtype is torch.float32 and s.device == device else s.to(device=device, dtype=torch.float32)
        for s in settings
    ]
    codes = _codes(operator, unit)
    lse = None
    if output is None:
        output, lse = empty_outputs(query, value, with_lse)
    sums = _sums(query, codes)
    found = (
        query.shape,
        query.stride(),
        key.shape,
        key.stride(),
        value.stride(),
        query.dtype,
        device,
        None if mask is None else (mask.stride(), mask.dtype),
        output.stride(),
        None if dense is None else dense.stride(),
        operator,
        unit,
        qk_scale,
        with_lse,
    )
    launches = _LAUNCHES.get(found)
    if launches is None:
        if len(_LAUNCHES) >= _MOST_LAUNCHES:
            _LAUNCHES.clear()
        launches = _LAUNCHES[found] = [
            _Launch(query, key, value, mask, output, dense, code, qk_scale, with_lse) for code in codes
        ]
    with _on_device_of(query):
        for launch in launches:
            launch.now(
                _arguments(
                    query, key, value, mask, output, lse, sums, dense, dense_lse, settings, operator, launch.short
                )
            )
    return output, lse


_LAUNCHES = {}


def _on_device_of(tensor):
    """A context in which the tensor's GPU is the current one, which is where Triton launches."""
    if not tensor.is_cuda or torch.cuda.current_device() == tensor.device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def fused_by_triton(query, key, value, settings, *, operator, unit, mask, qk_scale, with_lse=False):
    """As `reference`, by a kernel, as one node of a graph."""
    arguments = (query, key, value, mask, list(settings), operator, unit, qk_scale, with_lse)
    output, lse = torch.ops.pladis.attention_triton_v3(*arguments)
    return output, lse if with_lse else None


def _traced(
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
    # The kernel gets the mask as it is, not expanded: inductor may lay an expanded tensor out anew, and by then the
    # kernel has its strides.
    given = mask if mask is None else _as_bytes(mask.contiguous())
    query, key, value, mask = _prepared(query, key, value, given)
    settings = [setting.to(device=query.device, dtype=torch.float32) for setting in settings]
    codes = _codes(operator, unit)
    output, lse = empty_outputs(query, value, with_lse)
    sums = _sums(query, codes)
    for code in codes:
        launch = _Launch(query, key, value, mask, output, None, code, qk_scale, with_lse, traced=True)
        tensors = _arguments(query, key, value, given, output, lse, sums, None, None, settings, operator, launch.short)
        launch.trace(tensors)
    return output, query.new_empty(0, dtype=torch.float32) if lse is None else lse


def triton_is_ready():
    """Whether Triton is installed; if so, the operator is registered from here on.

    torch.compile and AOTInductor take the kernel out of that operator, torch.export keeps it whole. Not at import:
    torch.library.triton_op imports torch's compiler and Triton, which takes seconds.
    """
    if _find_spec("triton") is None:
        return False
    if not hasattr(torch.ops.pladis, "attention_triton_v3"):  # another copy of this file may have registered it
        operator = torch.library.triton_op("pladis::attention_triton_v3", _traced, mutates_args=())
        operator.register_fake(empty_results)
        operator.register_autograd(no_gradient)
    return True


# What torch.compiler.assume_constant_result sets; that function itself would import the compiler here and now.
triton_is_ready._dynamo_marked_constant = True


def _is_interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def jitted_kernels():
    """(short, long): the kernels as Triton's, each compiled at its first launch for a kind of arguments.

    Every function of the tiles becomes Triton's under the name by which the others of its module find it.
    """
    triton = importlib.import_module("triton")
    language = importlib.import_module("triton.language")
    libdevice = importlib.import_module("triton.language.extra.libdevice")
    made = {function: triton.jit(function) for function in TILE_FUNCTIONS}
    for names in {id(function.__globals__): function.__globals__ for function in TILE_FUNCTIONS}.values():
        names.update(tl=language, libdevice=libdevice, INTERPRETED=language.constexpr(_is_interpreted()))
        names.update({name: made[value] for name, value in names.items() if _is_made(value, made)})
    return made[short_kernel], made[long_kernel]


def _is_made(value, made):
    return isinstance(value, types.FunctionType) and value in made


# -------------------- fused.py ---------------------------------------------------------------------------------------

# Which code computes an attention where, and `torch.ops.pladis.attention_v2`: the operators as one node of a graph.
#
# torch.compile, torch.export and AOTInductor see this one node (on a GPU attention_triton_v3, the kernel's own) and need
# not trace the solver; `decompositions` turns it into plain operations for a backend that does not know it (TensorRT,
# ONNX, a C++ program without Python). Its version is part of its name: a graph that was exported with it finds what it
# was made for, or nothing. Where nothing traces, a call goes straight to the kernel's Python: torch.library's own way
# there costs more than a small attention.

from collections.abc import Sequence

import torch
from torch import Tensor


# "auto" is the fused operator; the others are for comparison, or for a backend that wants plain operations.
IMPLEMENTATIONS = ("auto", "reference", "entmax", "blocked", "cpp", "triton")

_NAME = "pladis::attention_v2"
_IN_ONE_PASS = 1 << 16  # scores
# From so many scores on "auto" is the C++ kernel wherever it can be built: only toys have fewer. The limit is low, and
# nothing asks whether the kernel happens to be built already, because the two forms differ in the last bits: if a
# model's first large layer switched its small ones from one to the other, a seed would not draw the same image twice.
_WORTH_A_KERNEL = 1 << 10

_FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))


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


def attention_by(implementation, query, key, value, mask, settings, operator, unit, qk_scale, with_lse):
    """(output, log-sum-exp or None) by one of IMPLEMENTATIONS, of tensors and names that were checked before.

    As in `attention`, but key and value have query's batch and heads. settings: scalar tensors in the order of
    OPERATORS. Raises RuntimeError where gradients are wanted of an implementation that has none.
    """
    arguments = (query, key, value, mask, settings, operator, unit, qk_scale, with_lse)
    if implementation == "auto":
        if gradient_is_wanted(query, key, value, *settings):
            return _by(reference, arguments)  # plain operations, which autograd follows
        return _as_a_node(arguments) if is_traced(query, key, value, mask, *settings) else _computed(*arguments)
    if implementation == "reference":
        return _by(reference, arguments)
    if implementation == "entmax":
        return _by(reference, arguments, sparse_map=entmax_by_package)
    if gradient_is_wanted(query, key, value, *settings):
        raise RuntimeError(f"implementation={implementation!r} has no gradient; use 'reference' or 'auto' for training")
    if implementation == "triton":
        return _on_triton(arguments)
    return _by(blocked if implementation == "blocked" else _on_cpu, arguments)


def gradient_is_wanted(*tensors):
    """Whether autograd follows a call on these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def is_traced(*tensors):
    """Whether a call on these tensors (or None) has to be an operator's, because something records or reroutes it.

    dynamo and torch.export answer is_compiling(), and so never look at what runs otherwise. make_fx, FakeTensorMode and
    every other mode of torch_dispatch are on a stack, torch.func's transforms on another; torch has no public names for
    asking whether the stacks are empty. Tensor subclasses have a torch_dispatch of their own.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.jit.is_tracing()
        or not _PLAIN.issuperset(map(type, tensors))
    )


def choose_implementation(query, key, value):
    """What "auto" runs for these tensors: "triton", "cpp", "blocked" or "reference"."""
    if query.is_cuda and triton_refusal(query, key, value) is None:
        return "triton"
    batch, heads, queries, _ = query.shape
    scores = batch * heads * queries * key.shape[2]
    if scores >= _WORTH_A_KERNEL and query.is_cpu and _dtype_is_fused(query, value) and compiler_is_available():
        return "cpp"
    # One pass over small inputs; pieces where all the scores at once would be the largest thing in memory.
    return "reference" if scores <= _IN_ONE_PASS else "blocked"


def attention_decompositions():
    """{operator: plain torch function} of the fused operator, for surgery.nn.decompositions."""
    fused = [torch.ops.pladis.attention_v2]
    if triton_is_ready():
        fused.append(torch.ops.pladis.attention_triton_v3)
    return {operator.default: _decomposed for operator in fused}


def _by(function, arguments, **more):
    """Call one of the implementations, which take by name what makes no difference to how they are chosen."""
    query, key, value, mask, settings, operator, unit, qk_scale, with_lse = arguments
    how = {"operator": operator, "unit": unit, "mask": mask, "qk_scale": qk_scale, "with_lse": with_lse}
    return function(query, key, value, settings, **how, **more)


def _as_a_node(arguments):
    """By an operator of torch.library, which a graph holds as one node."""
    if arguments[0].is_cuda and triton_refusal(*arguments[:3]) is None:
        return _by(fused_by_triton, arguments)
    output, lse = torch.ops.pladis.attention_v2(*arguments)
    return output, lse if arguments[-1] else None


def _computed(*arguments):
    """By the kernel, or the plain form, that is best for these tensors."""
    chosen = choose_implementation(*arguments[:3])
    if chosen == "triton":
        return launch_by_triton(*arguments)
    return _by({"cpp": fused_on_cpu, "reference": reference, "blocked": blocked}[chosen], arguments)


def _on_cpu(query, key, value, settings, **how):
    if query.device.type != "cpu" or not _dtype_is_fused(query, value):
        raise ValueError(f"implementation='cpp' is for float32, float16 and bfloat16 on a CPU, not {query.dtype}")
    if not compiler_is_available():
        raise RuntimeError("implementation='cpp' needs a C++ compiler, such as g++")
    return fused_on_cpu(query, key, value, settings, **how)


def _on_triton(arguments):
    reason = triton_refusal(*arguments[:3])
    if reason:
        raise ValueError(f"implementation='triton' cannot take this: {reason}")
    if is_traced(*arguments[:4], *arguments[4]):
        return _by(fused_by_triton, arguments)
    return launch_by_triton(*arguments)


def _dtype_is_fused(query, value):
    return query.dtype in _FUSED_DTYPES and query.dtype == value.dtype


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
    arguments = (query, key, value, mask, list(settings), operator, unit, qk_scale, with_lse)
    output, lse = _computed(*arguments)
    wanted, wanted_lse = empty_results(*arguments)
    if output.stride() != wanted.stride():  # what the compiler was told to expect
        output = wanted.copy_(output)
    return output, wanted_lse if lse is None else lse.contiguous()


def _decomposed(*arguments):
    output, lse = _by(reference, arguments)
    return output, arguments[0].new_empty(0, dtype=torch.float32) if lse is None else lse


# A process may hold several copies of this file; the first one registers.
if not hasattr(torch.ops.pladis, "attention_v2"):
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
    Returns (batch, heads, queries, head_dim) in value's dtype; with return_lse also the log-sum-exp of the scores (not
    over temperature), (batch, heads, queries) in float32, -inf where every key is masked.
    Raises ValueError for numbers out of range, an unknown operator, unit or implementation, shapes that do not fit, or
    tensors that the named kernel does not take; TypeError for dtypes; ImportError or RuntimeError when a named
    implementation needs a package or compiler that is missing, or has no gradient.
    """
    problem = choice_problem(operator, unit, implementation)
    if problem:
        raise ValueError(problem)
    given = {
        "alpha": alpha,
        "scale": scale,
        "temperature": temperature,
        "zeta": zeta,
        "eta": eta,
        "alpha_low": alpha_low,
        "scale_low": scale_low,
    }
    settings = checked_settings(query, key, value, mask, operator, given)
    key, value = fitting(query, key, value)
    qk_scale = query.shape[-1] ** -0.5 if qk_scale is None else float(qk_scale)
    output, lse = attention_by(implementation, query, key, value, mask, settings, operator, unit, qk_scale, return_lse)
    return (output, lse) if return_lse else output


def fitting(query, key, value, mask=None):
    """(key, value) with the batch and heads of query. Raises as `attention` where tensors do not fit together.

    A kernel reads memory by these shapes, so a module's call asks here too, and in as few questions as will do: what
    its projections make is floating, and a mask that does not broadcast cannot be expanded.
    """
    shape, (batch, heads, _, channels) = key.shape, query.shape
    if shape == (batch, heads, shape[2], channels) and shape[:3] == value.shape[:3] and mask is None:
        return key, value
    _check_tensors(query, key, value, mask)
    if shape[:2] != query.shape[:2]:
        key, value = (tensor.expand(batch, heads, -1, -1) for tensor in (key, value))
    return key, value


def checked_settings(query, key, value, mask, operator, given):
    """The operator's hyperparameters as scalar tensors in the order of OPERATORS, `given` or their defaults.

    Raises as `attention` where the tensors do not fit together or a number is out of range.
    """
    _check_tensors(query, key, value, mask)
    return [
        _as_tensor(name, default if given.get(name) is None else given[name], query)
        for name, default in OPERATORS[operator].items()
    ]


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


# -------------------- hooks.py ---------------------------------------------------------------------------------------

# What hooks of diffusers and accelerate keep of a live module: its forward(), copies of its tensors, a device.
#
# They take it when they are put on, so a class or a buffer that changes later has to reach it. Whatever is private to the
# hooks of the two libraries stands here.

import functools
import types


def change_class(module, new):
    """Give a live module another class, and whatever keeps its bound forward() that of the new class."""
    old = type(module).forward
    module.__class__ = new
    bound = types.MethodType(new.forward, module)
    for holder in (module, *getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ())):
        _rebind(holder, old, bound)


def _rebind(holder, old, bound):
    # "forward" of the module itself outlives the hook; "__wrapped__" is where inspect.signature looks.
    for name in ("forward", "original_forward", "_old_forward", "_original_forward", "__wrapped__"):
        held = vars(holder).get(name)
        if getattr(held, "__func__", None) is old:
            setattr(holder, name, bound)
        elif isinstance(held, functools.partial):
            _rebind(held, old, bound)


def offloaded_to(model, modules):
    """Where the buffers of patched modules are offloaded, so that writes are lost: "to disk" and so on; None if not."""
    if any(module.pladis_alpha.is_meta for module in modules):
        return "to the meta device"
    for group in _groups(model):
        copied = {**group.cpu_param_dict, **getattr(group, "tensor_to_key", {})}
        if any(module.pladis_alpha in copied for module in modules):
            return "to disk" if group.offload_to_disk_path else "through a stream"
    return None


def misses_new_buffers(model, modules):
    """Whether an offloading hook would fail on buffers that these modules get now, or put older ones in their place."""
    streamed = [part for group in _groups(model) if group.cpu_param_dict for part in group.modules]
    aligned = [(owner, hook) for owner in model.modules() for hook in _alignments(owner) if hook.offload_buffers]
    streamed += [owner for owner, hook in aligned if hook.place_submodules]
    found = {module for owner in streamed for module in owner.modules()} | {owner for owner, _ in aligned}
    return not found.isdisjoint(modules)


def forget_buffers(model, names):
    """Tell accelerate's offloading that the buffers of these names are gone: it would want to put them back."""
    for module in model.modules():
        for hook in _alignments(module):
            hook.original_devices = {
                path: device for path, device in hook.original_devices.items() if path.rpartition(".")[2] not in names
            }


def execution_device(module):
    """The device that an offloading hook in a module computes on; None without one."""
    groups = (group.onload_device for group in _groups(module))
    aligned = (
        getattr(hook, "execution_device", None) for part in module.modules() for hook in _hooks_of_accelerate(part)
    )
    return next((device for device in (*groups, *aligned) if device is not None), None)


def _groups(model):
    """diffusers' groups of modules that are offloaded together."""
    for module in model.modules():
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            if hasattr(hook, "group"):
                yield hook.group


def _alignments(module):
    """The hooks of accelerate on a module that offload it tensor by tensor."""
    return [hook for hook in _hooks_of_accelerate(module) if getattr(hook, "offload", False)]


def _hooks_of_accelerate(module):
    hook = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", (hook,)) if hook is not None else ()


# -------------------- schedule.py ------------------------------------------------------------------------------------

# Hyperparameters that change from one denoising step to the next, as a pipeline's `callback_on_step_end`.
#
# A schedule is plain data beside an operation, {"steps": [5, 20]} and the like:
#
#     steps     [first, end]   the operator acts from step `first` up to, not including, step `end` (null: to the last)
#     fraction  [from, to]     the same as parts of all steps: step i of n lies in it if from <= i/n < to
#     sigma     [low, high]    the operator acts while the noise level of the model's input lies in [low, high]
#     <name>    [v0, v1, ...]  values of a hyperparameter: one for each step, or stretched evenly over any number of steps
#
# Steps are those that `num_inference_steps` asks for, counted from 0 at the most noise. A run that leaves some out keeps
# their numbers: from an image of strength 0.5, 10 steps begin at step 5; with `denoising_end` 0.5 they end with step 4.
# A scheduler of second order calls the model twice a step: both calls are that step.
#
# A step must lie in every window that is named; outside, attention is dense. Values are written into the modules'
# buffers between two calls of the model, so a compiled graph stays whole and is not compiled again.

import functools
import math
import types


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
            problems += [(key, message) for message in window_problems(key, values)]
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


def window_problems(key, values):
    """What is wrong with a window, [from, to], of one of WINDOWS; empty if nothing is."""
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

    sigma: the noise level; needed where the schedule has a window of it.
    """
    if not is_inside(schedule, step, steps, sigma):
        return off_values(operator)
    lists = {name: values for name, values in schedule.items() if name not in WINDOWS}
    return {name: float(values[step * len(values) // steps]) for name, values in lists.items()}


def is_inside(windows, step, steps, sigma=None):
    """Whether `step` (from 0) of `steps` lies in every window of a schedule; sigma: its noise level, as there."""
    inside = True
    for key in WINDOWS:
        if key in windows:
            low, high = windows[key]
            position = {"steps": step, "fraction": step / steps, "sigma": sigma}[key]
            # An end that was infinite is stored as LARGEST, and pure noise is an infinite level.
            below_end = position <= high or high >= LARGEST if key == "sigma" else high is None or position < high
            inside = inside and low <= position and below_end
    return inside


class StepSchedule:
    """Carries out the schedules of a model's modules in one run of its pipeline, as `callback_on_step_end`.

        with StepSchedule(pipe, pipe.unet) as callback:
            pipe(prompt, num_inference_steps=25, callback_on_step_end=callback)

    The first call's values are set when it is made, and again when the pipeline sets its scheduler. After the last
    step, or on leaving the block, every buffer is as it was. steps, timesteps: taken, but not needed: the scheduler
    tells them. then: another callback_on_step_end to call after it.
    Raises ValueError where no module has a schedule, the buffers are offloaded to the meta device, or a window of sigma
    meets a scheduler that tells no noise level.
    """

    def __init__(self, pipeline, model, steps=None, then=None, timesteps=None):
        self._modules = [module for module in model.modules() if getattr(module, "pladis_schedule", None)]
        self._then = then
        if not self._modules:
            raise ValueError("no module of this model has a schedule")
        if where := offloaded_to(model, self._modules):
            raise ValueError(
                f"a schedule cannot change buffers that are offloaded {where}; use "
                "enable_model_cpu_offload() instead of sequential or group offload of buffers"
            )
        self._needs_sigma = any("sigma" in module.pladis_schedule for module in self._modules)
        self._before = [module.hyperparameters() for module in self._modules]
        self._watched = []
        scheduler = pipeline.scheduler
        if getattr(scheduler, "timesteps", None) is not None:
            self._set(scheduler, 0)
        # No callback comes before the first call of the model. A pipeline that may begin late asks itself where.
        self._watch(scheduler, "set_timesteps", lambda _: self._set(scheduler, 0))
        if hasattr(pipeline, "get_timesteps"):
            self._watch(
                pipeline,
                "get_timesteps",
                lambda found: self._set(scheduler, len(scheduler.timesteps) - len(found[-2])),
            )

    def __call__(self, pipeline, step, timestep, tensors):
        """Set the values of the call after the one at `timestep`; returns `tensors`, as diffusers wants."""
        scheduler = pipeline.scheduler
        count = len(scheduler.timesteps)
        # Fewer where the run begins late, from an image of some strength, or ends early, with denoising_end.
        run = getattr(pipeline, "num_timesteps", None) or count
        index = getattr(scheduler, "step_index", None)  # of the next call
        if index is None:
            index = index_of(scheduler, timestep, count - run + step, step) + 1
        if step + 1 < run and index < count:
            self._set(scheduler, index)
        else:
            self.restore()
        return self._then(pipeline, step, timestep, tensors) if self._then else tensors

    def restore(self):
        """Put back the hyperparameters that the modules had before."""
        for module, values in zip(self._modules, self._before, strict=True):
            module.set_hyperparameters(values)
        for holder, name in self._watched:
            vars(holder).pop(name, None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.restore()

    def _watch(self, holder, name, then):
        """Have then(result) called after each call of a method."""
        method = getattr(type(holder), name)

        @functools.wraps(method)
        def watched(self, *args, **kwargs):
            result = method(self, *args, **kwargs)
            if self is holder:  # not a copy of it
                then(result)
            return result

        setattr(holder, name, types.MethodType(watched, holder))
        self._watched.append((holder, name))

    def _set(self, scheduler, index):
        step, steps = step_at(scheduler, index)
        sigma = sigma_at(scheduler, index) if self._needs_sigma else None
        for module, before in zip(self._modules, self._before, strict=True):
            changed = step_values(module.pladis_schedule, module.pladis_operator, step, steps, sigma)
            module.set_hyperparameters({**before, **changed})


def index_of(scheduler, timestep, *counted):
    """Where among a scheduler's timesteps the model's call at `timestep` stands, for a scheduler that does not tell.

    counted: where it may be by count, the likeliest first: which it is of several equal ones, or if there is none.
    """
    timestep = float(timestep.flatten()[0] if hasattr(timestep, "flatten") else timestep)
    places = [index for index, value in enumerate(scheduler.timesteps.tolist()) if value == timestep]
    return next((index for index in counted if index in places), (places or counted)[0])


def step_at(scheduler, index):
    """(step from 0, how many were asked for) of the model's call at an index of a scheduler's timesteps."""
    calls, order = len(scheduler.timesteps), getattr(scheduler, "order", 1)
    asked = getattr(scheduler, "num_inference_steps", None)
    if order > 1:
        return index // order, -(-calls // order)  # the last step is of first order
    if hasattr(scheduler, "prk_timesteps"):  # PNDM: four calls for each of its first three steps, or two for the first
        four = len(scheduler.prk_timesteps)
        return (index // 4 if index < four else max(index - max(four * 3 // 4, 1), 0)), asked
    return index, asked if asked == calls - 1 else calls  # SCM's last timestep is the end, not a call


def sigma_at(scheduler, index):
    """The noise level at an index of a scheduler's timesteps, noise over signal: of its sigmas, else of its alphas."""
    sigmas, timesteps = getattr(scheduler, "sigmas", None), scheduler.timesteps
    between = getattr(scheduler, "order", 1) == 2 and index % 2 and timesteps[index] != timesteps[index + 1]
    if sigmas is not None and len(sigmas) >= len(timesteps) and not between:
        return float(sigmas[index])
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"{type(scheduler).__name__} tells no noise level; use a window of steps or fraction instead")
    # KDPM2's second calls lie between two sigmas, at a timestep that is no whole number.
    alphas, timestep = scheduler.alphas_cumprod, float(timesteps[index])
    low, part = int(timestep), timestep % 1
    level = _sigma_of_alpha(float(alphas[low]))
    return level * (_sigma_of_alpha(float(alphas[low + 1])) / level) ** part if part else level


def _sigma_of_alpha(alpha_cumprod):
    return math.sqrt(max(0.0, 1.0 - alpha_cumprod) / alpha_cumprod) if alpha_cumprod > 0.0 else math.inf


# -------------------- module.py --------------------------------------------------------------------------------------

# What every patched attention module is: a diffusers module whose class was changed, with float32 buffers added.
#
# It is made from a live module by changing the class of that very object and registering buffers. So nothing that holds
# the module loses it: parents, LoRA layers, quantised Linears, IP-Adapter processors, offload and forward hooks, compiled
# blocks. Taking the buffers away and setting the class back is the exact inverse.

import torch
from diffusers.utils import logging


_BUFFERS_OF = {operator: tuple(f"pladis_{name}" for name in names) for operator, names in OPERATORS.items()}
BUFFERS = tuple(f"pladis_{name}" for name in ALL_HYPERPARAMETERS)  # "scale" alone would clash with Attention.scale


class PladisModule:
    """The part that all patched modules share; it stands before the diffusers class among a class's bases.

    Buffers `pladis_alpha`, `pladis_temperature` and those that the operator has besides (`pladis_scale`, the papers'
    lambda, and so on): float32 scalars that stay float32 under .half(), .to(dtype) and
    from_pretrained(torch_dtype=...). Change them in place (`fill_`, `surgery.tune`): a compiled graph need not be
    compiled again. `pladis_schedule`: how they change over the denoising steps (schedule.py), or None.

    A class has: `stock`, the diffusers class that it is made from; `kind`, "cross" or "joint"; `processors`, the names
    of the processors whose computation its forward() replaces; `own_refusal(module)`; and forward().
    """

    stock = None
    kind = "cross"
    processors = ()

    @classmethod
    def own_refusal(cls, module):
        """Why a module of the stock class and with one of the processors cannot be converted; None if it can."""
        return None

    @classmethod
    def refusal(cls, module):
        """Why `module` cannot be converted, as one sentence; None if it can."""
        if type(module) is not cls.stock:
            return f"{type(module).__name__} is not diffusers' {cls.stock.__name__} class"
        reason = cls.own_refusal(module) or (split_sequence(module) if cls.kind == "joint" else None)
        if reason:
            return reason
        processor = type(module.processor).__name__
        if processor not in cls.processors:
            return (
                f"its processor {processor} computes attention in its own way, which PLADIS would replace; "
                "go back to the model's default processor first"
            )
        return None

    @classmethod
    def convert(
        cls,
        module,
        operator="pladis",
        *,
        unit="head",
        schedule=None,
        implementation="auto",
        device=None,
        **hyperparameters,
    ):
        """Turn a live module of the stock class into this class in place and return it; parameters are not touched.

        hyperparameters: the operator's own; what is left out takes its default. device: of the buffers; that of the
        parameters unless given.
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
        if device is None:
            device = next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))
        change_class(module, cls)
        module.pladis_operator, module.pladis_unit = operator, unit
        module.pladis_schedule = None if schedule is None else stored_schedule(schedule)
        module.pladis_implementation = implementation
        for name, default in OPERATORS[operator].items():
            value = min(float(hyperparameters.get(name, default)), LARGEST)
            # No device given on the meta device's behalf: diffusers builds models there and loads the buffers after.
            module.register_buffer(f"pladis_{name}", torch.tensor(value, dtype=torch.float32, device=device))
        return module

    def revert(self):
        """Turn this very object back into what it was, and return it."""
        for name in OPERATORS[self.pladis_operator]:
            del self._buffers[f"pladis_{name}"]
        del self.pladis_operator, self.pladis_unit, self.pladis_schedule, self.pladis_implementation
        change_class(self, self.stock)
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
        """As the stock class's, but a processor with an attention of its own is refused, not ignored."""
        self.check_processor(processor)
        super().set_processor(processor)

    def check_processor(self, processor):
        """Raises ValueError for a processor with an attention of its own, which forward() would not run."""
        name = type(processor).__name__
        if name not in self.processors:
            raise ValueError(
                f"{type(self).__name__} computes attention itself and cannot run {name}; call surgery.unpatch(pipe) "
                "first"
            )

    def fuse_projections(self, *args, **kwargs):
        """Nothing: a fused projection goes stale when it is unfused, and forward() reads the separate ones."""

    def attend(self, query, key, value, mask=None, qk_scale=None):
        """`attention` by this module's operator. query: (batch, heads, queries, head_dim); the others likewise."""
        query, key, value = of_one_dtype(query, key, value)
        key, value = fitting(query, key, value, mask)
        qk_scale = query.shape[3] ** -0.5 if qk_scale is None else qk_scale
        output, _ = attention_by(
            self.pladis_implementation,
            query,
            key,
            value,
            mask,
            self.hyperparameter_tensors(),
            self.pladis_operator,
            self.pladis_unit,
            qk_scale,
            False,
        )
        return output

    def _split_heads(self, projected):
        return projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (batch, heads, length, head_dim)

    def _merge_heads(self, output, like):
        """(batch, heads, length, head_dim) as (batch, length, channels), in the dtype of `like`."""
        output = output.transpose(1, 2).flatten(2)
        return output if output.dtype == like.dtype else output.to(like.dtype)

    def _mask_per_head(self, attention_mask, text):
        """An additive mask (batch, 1 or queries, keys) as (batch, 1 or heads, 1 or queries, keys); None as it is."""
        if attention_mask is None:
            return None
        batch, keys, _ = text.shape
        if attention_mask.ndim == 3 and attention_mask.shape[0] == batch and attention_mask.shape[2] == keys:
            return attention_mask.unsqueeze(1)
        attention_mask = self.prepare_attention_mask(attention_mask, keys, batch)  # one of each head, as diffusers does
        return attention_mask.view(batch, self.heads, -1, attention_mask.shape[-1])

    def hyperparameter_tensors(self):
        """The operator's hyperparameters, the buffers themselves, in the order of OPERATORS."""
        buffers = self._buffers
        return [buffers[name] for name in _BUFFERS_OF[self.pladis_operator]]

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
    """Whether `module` is a patched attention module, of this file or of any other copy of it.

    By its buffers: diffusers runs a shipped file anew at every load, and each time makes classes of the same name.
    """
    return "pladis_alpha" in module._buffers and "pladis_temperature" in module._buffers


def split_sequence(module):
    """Why joint attention cannot run under context parallelism, where that is switched on; else None."""
    if getattr(module.processor, "_parallel_config", None) is None:
        return None
    return "context parallelism splits its sequence over devices, and the operator needs all of the text; switch it off"


def warn_of_unknown(keywords):
    """Log that keyword arguments of a call (cross_attention_kwargs, joint_attention_kwargs) mean nothing here."""
    if keywords:
        names = ", ".join(sorted(keywords))
        logging.get_logger(__name__).warning(f"attention arguments {names} mean nothing here; ignored")


def shortest_float(tensor):
    """The float32 scalar as the Python float of fewest digits that rounds to it: 1.3, not 1.2999999523162842."""
    value = tensor.float()
    for digits in range(1, 10):
        candidate = float(f"{value.item():.{digits}g}")
        if torch.tensor(candidate, dtype=torch.float32) == value.cpu():
            return candidate
    return value.item()


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


# -------------------- pladis.py --------------------------------------------------------------------------------------

# `PladisAttention`: diffusers' `Attention` as cross-attention, with one of our operators in place of its softmax.
#
# UNets, PixArt and SANA.

from diffusers.models.attention_processor import Attention



class PladisAttention(PladisModule, Attention):
    """Cross-attention by PLADIS (arXiv 2503.07677, eq. 15), GAG or another of OPERATORS, hyperparameters in buffers."""

    stock = Attention
    # They compute plain attention, or add an IP-Adapter to it: forward() below computes what they would.
    processors = (
        "AttnProcessor",
        "AttnProcessor2_0",
        "AttnProcessorNPU",
        "FusedAttnProcessor2_0",
        "IPAdapterAttnProcessor",
        "IPAdapterAttnProcessor2_0",
        "IPAdapterXFormersAttnProcessor",
        "SanaAttnProcessor2_0",
        "SlicedAttnProcessor",
        "XFormersAttnProcessor",
    )

    @classmethod
    def own_refusal(cls, module):
        """As PladisModule's: self-attention and joint attention."""
        if not module.is_cross_attention:
            return "it is self-attention; sparsifying it destroys the image, so it stays dense"
        if module.added_kv_proj_dim is not None or module.to_k is None:
            return "it attends to image and text in one softmax (added key/value projections); not supported yet"
        if module.to_out is None or module.context_pre_only is not None:
            return "it is joint attention without an output of its own; not supported yet"
        return None

    def revert(self):
        """As PladisModule's."""
        super().revert()
        if type(self.processor).__name__ == "FusedAttnProcessor2_0" and not hasattr(self, "to_kv"):
            self.fuse_projections()  # asked for while this class ignored it
        return self

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **kwargs):
        """As `Attention.forward`: (batch, queries, channels) or (batch, channels, height, width), out as in.

        encoder_hidden_states: (batch, keys, cross_attention_dim), or IP-Adapter's (text, [image tokens]).
        attention_mask: additive, (batch, 1 or queries, keys). `ip_adapter_masks` is taken from the keyword arguments.
        """
        masks = kwargs.pop("ip_adapter_masks", None)
        kwargs.pop("scale", None)  # the LoRA scale; peft has applied it before the call
        warn_of_unknown(kwargs)
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

        query, key = self.to_q(hidden_states), self.to_k(text)
        query = self._normed(self.norm_q, query)
        key = self._normed(self.norm_k, key)
        value = self._split_heads(self.to_v(text))
        output = self.attend(query, key, value, self._mask_per_head(attention_mask, text), self.scale)
        if image_tokens:
            output = output + image_attention(self.processor, query, image_tokens, masks)
        output = self._merge_heads(output, query)

        output = self.to_out[1](self.to_out[0](output))
        if image_shape is not None:
            output = output.transpose(-1, -2).reshape(image_shape)
        if self.residual_connection:
            output = output + residual
        return output if self.rescale_output_factor == 1.0 else output / self.rescale_output_factor

    def _normed(self, norm, projected):
        """A projection split into heads and normed: (batch, heads, length, head_dim)."""
        if norm is None:
            return self._split_heads(projected)
        if type(self.processor).__name__ == "SanaAttnProcessor2_0":  # whose norms are over all heads together
            return self._split_heads(norm(projected))
        return norm(self._split_heads(projected))


# -------------------- model.py ---------------------------------------------------------------------------------------

# What every patched model class is: the diffusers class whose config says which of its modules are patched.
#
# The classes exist so that a patched model is saved, loaded and shared as such: a folder whose model_index.json names one
# either loads patched or is refused. Config and buffers say the same thing twice on purpose; loading compares them.

import inspect
import json
import os
import sys

import torch
from diffusers.loaders import peft as lora_of_diffusers
from diffusers.utils import is_accelerate_available


# Behind the value of one key of a saved config, so that the stock class, which ignores keys it does not know and would
# run the model unpatched, stops at that key, and a reader finds these words.
STOCK_CLASS_REFUSAL = " patched with PLADIS: load with surgery.load or trust_remote_code=True"
# Behind another key in memory: what builds its own kind of model of this one (AnimateDiff, ControlNet) stops there
# instead of at the buffers.
_COPY_REFUSAL = " of a model patched with PLADIS, which cannot be copied: surgery.unpatch(pipe), copy, patch again;"


class _EqualsStock(type):
    """A class that equals the diffusers class it stands for: from_pipe() passes on only what equals a type hint."""

    def __eq__(cls, other):
        return other is not None and (other is cls or other is cls.stock)

    __hash__ = type.__hash__


class _KeptInFloat32:
    """The stock class's list, of the class itself with our buffers: from_pretrained(torch_dtype=...) would round them.

    Not of an instance: `.to(dtype)`, which leaves the buffers as they are, would warn that it does not.
    """

    def __get__(self, model, cls):
        stock = cls.stock._keep_in_fp32_modules
        return [*(stock or []), *BUFFERS] if model is None else stock


class PladisModel(metaclass=_EqualsStock):
    """The part that all patched model classes share; it stands before the diffusers class among a class's bases.

    Config key `pladis`: a list of operations, each {"operator", its hyperparameters, "layers": [module paths]}, for
    "gag" with its "unit", where wanted with a "schedule" (schedule.py). Raises ValueError where the config names no
    layer, an unknown operator or a module that is not there, and where a checkpoint's buffers are missing or disagree
    with the config.

    A class has: `stock`, the diffusers class; `forms`, the classes that its attention modules may become; `marked_key`,
    the key of its config that the stock class cannot read once it is marked; `copied_key`, one that only copying reads.
    """

    stock = None
    forms = ()
    marked_key = "num_layers"
    copied_key = None
    _keep_in_fp32_modules = _KeptInFloat32()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("stock") is None:
            return
        # diffusers looks up by a model's class name how weights of LoRA by block are spelt out.
        by_name = getattr(lora_of_diffusers, "_SET_ADAPTER_SCALE_FN_MAPPING", {})
        if cls.stock.__name__ in by_name:
            by_name[cls.__name__] = by_name[cls.stock.__name__]

        def __init__(self, *args, pladis=None, **kwargs):  # noqa: N807  each class has its own signature
            cls._build(self, args, kwargs, pladis)

        # ConfigMixin reads the constructor's signature to know which config keys are its own.
        parameters = dict(inspect.signature(cls.stock.__init__).parameters)
        parameters["pladis"] = inspect.Parameter("pladis", inspect.Parameter.KEYWORD_ONLY, default=None)
        __init__.__signature__ = inspect.Signature(list(parameters.values()))
        cls.__init__ = __init__
        # model_index.json names a component by its class's module: the shipped file, wherever this code came from.
        # Under that name pickle and diffusers find the class.
        sys.modules.setdefault(module_name(cls.__name__), sys.modules[cls.__module__])
        cls.__module__ = module_name(cls.__name__)

    def _build(self, args, kwargs, pladis):
        self.stock.__init__(self, *args, **self._without_marks(kwargs))
        self._convert_modules(check_operations(pladis), "auto")
        self._write_config(pladis)

    @classmethod
    def form_of(cls, module):
        """The class that an attention module of this model may become, or None for a class that is none of `stock`s.

        Where several are made of one diffusers class, the one that knows the module's processor, else the first.
        """
        fitting = [form for form in cls.forms if type(module) is form.stock]
        known = [form for form in fitting if form.refusal(module) is None]
        return next(iter(known or fitting), None)

    @classmethod
    def refusal_of(cls, module, path):
        """Why the attention module of this model at `path` cannot be patched, as one sentence; None if it can."""
        form = cls.form_of(module)
        if form is None:
            return f"{type(module).__name__} has no PLADIS form in a {cls.stock.__name__}"
        return form.refusal(module)

    @classmethod
    def convert(cls, model, operations, implementation="auto"):
        """Turn a live model of the stock class into this class in place, and its named modules into patched ones."""
        operations = check_operations(operations)
        modules = {path: module_at(model, path) for operation in operations for path in operation["layers"]}
        for path, module in modules.items():  # all or none
            reason = cls.refusal_of(module, path)
            if reason:
                raise ValueError(reason)
        if misses_new_buffers(model, modules.values()):
            raise ValueError("it is offloaded in a way that cannot take new buffers; patch first, offload after")
        change_class(model, cls)
        model._convert_modules(operations, implementation)
        model.update_config()
        return model

    def _convert_modules(self, operations, implementation):
        device = execution_device(self)
        for operation in operations:
            setting = {key: value for key, value in operation.items() if key != "layers"}
            for path in operation["layers"]:
                module = module_at(self, path)
                reason = self.refusal_of(module, path)
                if reason:
                    raise ValueError(f"{path}: {reason}")
                where = device and (execution_device(module) or device)
                self.form_of(module).convert(module, **setting, implementation=implementation, device=where)

    def revert(self):
        """Turn this very object back into the stock class's model that it was, and return it."""
        for module in self.modules():
            if is_pladis(module):
                module.revert()
        forget_buffers(self, BUFFERS)
        config = self._without_marks(self.config)
        del config["pladis"]
        change_class(self, self.stock)
        _set_config(self, config)
        return self

    def update_config(self):
        """Write the live buffers' values into the config."""
        self._write_config(self.pladis_operations())

    def _write_config(self, operations):
        config = self.refused_by_stock_class({**self.config, "pladis": operations})
        if self.copied_key:
            config[self.copied_key] += _COPY_REFUSAL
        _set_config(self, config)
        self._unmark_attribute()

    def register_to_config(self, **kwargs):
        """As ConfigMixin's."""
        super().register_to_config(**kwargs)
        self._unmark_attribute()

    def _unmark_attribute(self):
        # Who builds another model of this config reads its items, and is refused; pipelines read its attributes.
        setattr(self.config, self.marked_key, _unmarked(self.config.get(self.marked_key)))

    def pladis_operations(self):
        """The operations as the live buffers have them, for the config: one per setting, layers in model order."""
        modules = {path: module for path, module in self.named_modules() if is_pladis(module)}
        if offloaded_to(self, modules.values()):
            return self.config["pladis"]  # as it was before; the buffers hold nothing now
        by_setting = {}
        for path, module in modules.items():
            setting = module.setting()
            by_setting.setdefault(json.dumps(setting), (setting, []))[1].append(path)
        return [{**setting, "layers": layers} for setting, layers in by_setting.values()]

    def scheduled(self, pipeline, steps=None, then=None, timesteps=None):
        """A StepSchedule that carries out the operations' schedules in one run of `pipeline`.

        with pipe.unet.scheduled(pipe, steps=25) as callback:
            pipe(prompt, num_inference_steps=25, callback_on_step_end=callback)
        """
        return StepSchedule(pipeline, self, steps, then, timesteps)

    def set_attn_processor(self, processor):
        """As the stock class's; raises ValueError, and sets none, where a patched module or a name does not fit."""
        if isinstance(processor, dict) and (lacking := sorted(self.attn_processors.keys() - processor.keys())):
            raise ValueError(f"no processor is given for {lacking[0]}; give one for each of model.attn_processors")
        for path, module in self.named_modules():
            if is_pladis(module):
                module.check_processor(processor[f"{path}.processor"] if isinstance(processor, dict) else processor)
        super().set_attn_processor(processor)

    def save_config(self, save_directory, *args, **kwargs):
        """Also writes the code of this class beside the config, so that what is saved can be loaded."""
        # Hooked here because a save_pretrained(*args, **kwargs) of ours would hide variant= and max_shard_size= from
        # the pipeline, which looks for them in its signature.
        manifest = os.path.join(os.path.dirname(os.path.abspath(save_directory)), "surgery.json")
        if os.path.exists(manifest):
            raise ValueError(f"{manifest} describes an artifact, which saving into it would break; save elsewhere")
        self.update_config()
        super().save_config(save_directory, *args, **kwargs)
        name = type(self).__name__
        with open(os.path.join(save_directory, module_name(name) + ".py"), "w", encoding="utf-8") as file:
            file.write(shipped_source(name))

    def to_json_string(self):
        """The config as it is saved: marked so that the stock class refuses it."""
        return json.dumps(self.refused_by_stock_class(json.loads(super().to_json_string())), indent=2) + "\n"

    @classmethod
    def refused_by_stock_class(cls, config):
        """A config that the stock class cannot load; this class reads it as before."""
        default = inspect.signature(cls.stock.__init__).parameters[cls.marked_key].default
        config = cls._without_marks(config)
        value = config.get(cls.marked_key, default)
        return {**config, cls.marked_key: f"{'' if value is None else value}{STOCK_CLASS_REFUSAL}"}

    @classmethod
    def _without_marks(cls, config):
        keys = config.keys() & {cls.marked_key, cls.copied_key}
        return {**config, **{key: _unmarked(config[key]) for key in keys}}

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
            load = super(PladisModel, plain).from_pretrained
            model, info = load(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
            model.__class__ = cls
            model = model if dtype is None else model.to(dtype)
        _compare_buffers_with_config(model, info, pretrained_model_name_or_path)
        return (model, info) if with_info else model


def _unmarked(value):
    """The value of a config's marked key without the mark."""
    if not isinstance(value, str):
        return value
    value = value.removesuffix(STOCK_CLASS_REFUSAL).removesuffix(_COPY_REFUSAL)
    return int(value) if value.isdecimal() else value or None


def check_operations(operations):
    """The config's list of operations, or ValueError saying what is wrong with it."""
    if operations and not (isinstance(operations, (list, tuple)) and all(isinstance(o, dict) for o in operations)):
        raise ValueError("the config's `pladis` must be a list of operations")
    if not operations:
        raise ValueError("the config's `pladis` names no layer; an unpatched model is one of diffusers' own class")
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


# -------------------- unet.py ----------------------------------------------------------------------------------------

# `PladisUNet2DConditionModel`: SD1.5, SD2, SDXL and what is distilled from them.

from diffusers import ModelMixin, UNet2DConditionModel  # noqa: F401  diffusers looks for ModelMixin in this module



class PladisUNet2DConditionModel(PladisModel, UNet2DConditionModel):
    """UNet2DConditionModel with some of its cross-attention modules turned into PladisAttention."""

    stock = UNet2DConditionModel
    forms = (PladisAttention,)
    marked_key = "mid_block_type"  # "unknown mid_block_type: ..." is what the stock class says
    copied_key = "act_fn"  # "activation function ... not found" is what they say
