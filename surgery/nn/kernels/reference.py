"""The operators in plain torch: the definition that every faster implementation is tested against.

`reference` works on whole tensors and is what a graph is decomposed into. `blocked` calls it on pieces that fit a
cache, so that long inputs never hold all their scores at once.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import NoReturn

import torch
from torch import Tensor

from ..operators import OPERATORS, OperatorName, Unit
from .combined import geometry_aware, nearest_of_three
from .entmax import entmax_of_shifted, shift_by_row_max, softmax_of_shifted

BLOCK_SCORES = 1 << 20  # scores at once in a blocked pass: 4 MB in float32


def is_autocast(query: Tensor) -> bool:
    """Whether torch.autocast is on for the tensor's device."""
    kind = query.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def of_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three as they are; under autocast those that differ in dtype, as after a norm in float32, in autocast's own.

    As scaled_dot_product_attention has it, which takes no tensors of different dtypes otherwise.
    """
    if query.dtype == key.dtype == value.dtype or not is_autocast(query):
        return query, key, value
    dtype = torch.get_autocast_dtype(query.device.type)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def without_autocast(function: Callable) -> Callable:
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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: list[Tensor],
    *,
    operator: OperatorName,
    unit: Unit,
    mask: Tensor | None,
    qk_scale: float,
    with_lse: bool = False,
    sparse_map: Callable[[Tensor, Tensor], Tensor] = entmax_of_shifted,
) -> tuple[Tensor, Tensor | None]:
    """(output, log-sum-exp or None) of an operator; shapes and meaning as in `attention`, the batch being query's.

    settings: the operator's hyperparameters as scalar tensors, in the order of OPERATORS. Differentiable.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    named = {
        name: setting.to(dtype=dtype, device=query.device)
        for name, setting in zip(OPERATORS[operator].defaults, settings, strict=True)
    }
    scores = attention_scores(query, key, mask, qk_scale)
    shifted = shift_by_row_max(scores) / named["temperature"]
    dense = softmax_of_shifted(shifted)
    lse = _log_sum_exp(scores) if with_lse else None
    sharpened = shifted / named["sparse_temperature"] if "sparse_temperature" in named else shifted
    sparse = sparse_map(sharpened, named["alpha"])
    if operator in ("gag", "anderson_least_squares"):
        # In float32: what is left of T_s - T_d in half precision is mostly rounding.
        heads_value = value.to(dtype)
        sparse_output = product_of_groups(sparse, heads_value)
        if operator == "gag":
            residual = product_of_groups(sparse - dense, heads_value)
            return geometry_aware(sparse_output, residual, named, unit).to(value.dtype), lse
        low, dense = (product_of_groups(m, heads_value) for m in (sparse_map(sharpened, named["alpha_low"]), dense))
        return nearest_of_three(sparse_output, low, dense, query, unit).to(value.dtype), lse
    # dense + scale (sparse - dense), not (1 - scale) dense + ...: dense is left untouched at scale 0.
    scale = named.get("scale")
    weights = sparse if scale is None else dense + scale * (sparse - dense)
    if operator == "anderson":
        weights = weights + named["scale_low"] * (sparse_map(sharpened, named["alpha_low"]) - dense)
    return product_of_groups(weights.to(value.dtype), value), lse


@without_autocast
def blocked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: list[Tensor],
    *,
    operator: OperatorName,
    unit: Unit,
    mask: Tensor | None,
    qk_scale: float,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `reference`, over one batch entry and as many heads and queries at a time as BLOCK_SCORES allows.

    Not of what is combined from whole outputs (kernels/combined.py).
    """
    output, lse = empty_outputs(query, value, with_lse)
    for batch, heads, rows, block_mask in blocks(query, key, mask, whole_heads=operator == "gag" and unit == "token"):
        piece, shared = (batch, heads, rows), (batch, key_heads_of(heads, query, key))
        output[piece], block_lse = reference(
            query[piece],
            key[shared],
            value[shared],
            settings,
            operator=operator,
            unit=unit,
            mask=block_mask,
            qk_scale=qk_scale,
            with_lse=with_lse,
        )
        if lse is not None and block_lse is not None:
            lse[piece] = block_lse
    return output, lse


def blocks(
    query: Tensor, key: Tensor, mask: Tensor | None, whole_heads: bool = False, size: int = BLOCK_SCORES
) -> Iterator[tuple[slice, slice, slice, Tensor | None]]:
    """Slices (batch, heads, queries) that cut the scores into pieces of about `size`, each with its part of the mask.

    Each slice keeps its dimension. whole_heads: never cut between heads. A piece has whole groups of heads that share
    keys, or a part of one.
    """
    batch, heads, queries, _ = query.shape
    keys = max(1, key.shape[2])
    if mask is not None:
        mask = mask.expand(batch, heads, queries, key.shape[2])
    heads_at_once = heads if whole_heads else max(1, min(heads, size // max(1, queries * keys)))
    group = heads // max(1, key.shape[1])
    if heads_at_once > group:
        heads_at_once -= heads_at_once % group
    elif group:
        heads_at_once = next(count for count in range(heads_at_once, 0, -1) if group % count == 0)
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


def key_heads_of(heads: slice, query: Tensor, key: Tensor) -> slice:
    """The heads of `key` to which these of `query` attend, as `blocks` cuts them."""
    group = query.shape[1] // max(1, key.shape[1])
    return slice(heads.start // group, -(-min(heads.stop, query.shape[1]) // group))


def product_of_groups(rows: Tensor, shared: Tensor) -> Tensor:
    """rows @ shared, each head of `shared` being that of a group of heads in a row: nothing of `shared` is copied.

    rows: (batch, heads, n, m); shared: (batch, key_heads, m, k). Returns (batch, heads, n, k).
    """
    if rows.shape[1] == shared.shape[1]:
        return torch.matmul(rows, shared)
    # In one step each way: of two onnxscript makes none where the sizes allow it, and takes another group's heads.
    product = torch.matmul(rows.reshape(rows.shape[0], shared.shape[1], -1, rows.shape[-1]), shared)
    return product.reshape(*rows.shape[:-1], shared.shape[-1])


def empty_outputs(
    query: Tensor, value: Tensor, with_lse: bool, wanted: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """Uninitialised (output, log-sum-exp or None); the output lies in memory as (batch, queries, heads, head_dim).

    That is how scaled_dot_product_attention lays out its own, and what the projection behind it reads without a copy.
    wanted: the output's dtype, value's unless given.
    """
    batch, heads, queries, _ = query.shape
    output = value.new_empty(batch, queries, heads, value.shape[-1], dtype=wanted or value.dtype).transpose(1, 2)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return output, query.new_empty(batch, heads, queries, dtype=dtype) if with_lse else None


def attention_scores(query: Tensor, key: Tensor, mask: Tensor | None = None, qk_scale: float | None = None) -> Tensor:
    """`query key^T qk_scale`, masked: (batch, heads, queries, keys) in float32 (float64 for float64).

    The product is taken in float32: half-precision scores are off by a percent of a weight, and SD 2.1's overflow.
    -inf is a masked key; a row with a score of inf, or that is no number, is no number, as in dense attention.
    key: (batch, key_heads, keys, head_dim), heads being a multiple of key_heads.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    factor = query.shape[-1] ** -0.5 if qk_scale is None else qk_scale
    scores = product_of_groups(query.to(dtype) * factor, key.to(dtype).transpose(-1, -2))
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask.to(dtype)
    return scores


def entmax_by_package(shifted: Tensor, alpha: Tensor) -> Tensor:
    """alpha-entmax by the entmax package, zeros for masked rows. Reads alpha's value, so it breaks graphs."""
    try:
        package = importlib.import_module("entmax")
    except ImportError as error:
        raise ImportError('implementation="entmax" needs the entmax package: pip install entmax') from error
    number = float(alpha)
    # The package's cumulative sums turn -inf into NaN. Below -1e4 every alpha > 1.0001 gives zero anyway.
    finite = shifted.clamp_min(-1.0e4)
    if number == 1.0:
        sparse = torch.softmax(finite, dim=-1)
    elif number == 1.5:
        sparse = package.entmax15(finite, dim=-1)
    elif number == 2.0:
        sparse = package.sparsemax(finite, dim=-1)
    else:
        sparse = package.entmax_bisect(finite, alpha=number, dim=-1)
    return sparse.masked_fill(shifted == float("-inf"), 0.0)


def empty_results(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    settings: list[Tensor],
    operator: OperatorName,
    unit: Unit,
    qk_scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """What the fused operators return in shape, dtype and layout: all that a tracing compiler needs of them."""
    output, lse = empty_outputs(query, value, with_lse)
    return output, query.new_empty(0, dtype=torch.float32) if lse is None else lse


def no_gradient(context: object, *gradients: Tensor | None) -> NoReturn:
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
