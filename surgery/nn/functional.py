"""The attention operators as one function over query, key, value."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.fused import Implementation, attention_by, choice_problem
from .operators import OPERATORS, OperatorName, Unit, value_problem


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    operator: OperatorName = "pladis",
    alpha: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    temperature: float | Tensor | None = None,
    sparse_temperature: float | Tensor | None = None,
    zeta: float | Tensor | None = None,
    parallel: float | Tensor | None = None,
    eta: float | Tensor | None = None,
    unit: Unit = "head",
    alpha_low: float | Tensor | None = None,
    scale_low: float | Tensor | None = None,
    mask: Tensor | None = None,
    qk_scale: float | None = None,
    implementation: Implementation = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention by one of OPERATORS (`operators.py` has their formulas), on the scores `query key^T qk_scale`.

    query: (batch, heads, queries, head_dim); key, value: (batch, key_heads, keys, head_dim); any floating dtype. Where
        there are fewer heads of keys, query head i has key head i // (heads / key_heads), which is not copied for each
        (grouped-query attention, as scaled_dot_product_attention's enable_gqa). Scores, both maps and their combination
        are float32 whatever the inputs (float64 for float64 input).
    operator: "pladis" (PLADIS, arXiv 2503.07677, eq. 15), "sparse" (PLADIS at scale 1), "gag" (GAG, arXiv
        2603.02531, eq. 11-13), "anderson_least_squares" (its Appendix F), "anderson" (that with given weights) or
        "anderson_history" (its eq. 6; here its first step, which is "sparse": a module keeps the step before).
    alpha: of the sparse map, in [1, 2]; 1.5 unless given. scale: the papers' lambda; 2 unless given (gag: 10,
        anderson: 1). 0 is dense attention for pladis; above 1 it extrapolates and weights may be negative. temperature:
        > 0, divides the scores of every map (PLADIS eq. 36); sparse_temperature: those of the sparse maps alone, once
        more (Fig. 9), 1 unless given. zeta, parallel, eta: gag's shares of the orthogonal and the parallel part and its
        bound on the step; 0, 1, 15 unless given. unit: over what gag projects and anderson_least_squares solves,
        "head", "token" or "image". alpha_low, scale_low: the second sparse map of both andersons; 1.25 and 1 unless
        given. Each is a number or a tensor of one element; a tensor's value is not checked, and changing it never
        recompiles a graph. What an operator does not have is not read.
    mask: boolean (True keeps a key) or additive, broadcastable to (batch, heads, queries, keys). A query whose keys
        are all masked gets zeros.
    qk_scale: 1/sqrt(head_dim) unless given.
    implementation: "auto" picks by device and shape and is one operator in a compiled or exported graph. "reference" is
        plain torch, "blocked" the same in pieces, "entmax" the entmax package's functions, the papers' own arithmetic;
        "cpp" and "triton" are the kernels for CPUs and GPUs. What is combined of whole outputs (unit "image",
        anderson_least_squares) they compute in two or three passes and plain torch. Where gradients are wanted "auto"
        is "reference".
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
        "sparse_temperature": sparse_temperature,
        "zeta": zeta,
        "parallel": parallel,
        "eta": eta,
        "alpha_low": alpha_low,
        "scale_low": scale_low,
    }
    settings = checked_settings(query, key, value, mask, operator, given)
    key, value = fitting(query, key, value)
    factor = query.shape[-1] ** -0.5 if qk_scale is None else float(qk_scale)
    output, lse = attention_by(implementation, query, key, value, mask, settings, operator, unit, factor, return_lse)
    return output if lse is None else (output, lse)


def fitting(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(key, value) with the batch of query. Raises as `attention` where tensors do not fit together.

    A kernel reads memory by these shapes, so a module's call asks here too, and in as few questions as will do: what
    its projections make is floating, and a mask that does not broadcast cannot be expanded.
    """
    shape, (batch, heads, _, channels) = key.shape, query.shape
    if shape == (batch, heads, shape[2], channels) and shape[:3] == value.shape[:3] and mask is None:
        return key, value
    _check_tensors(query, key, value, mask)
    if shape[0] != batch:
        key, value = (tensor.expand(batch, -1, -1, -1) for tensor in (key, value))
    return key, value


def checked_settings(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    operator: OperatorName,
    given: Mapping[str, float | Tensor | None],
) -> list[Tensor]:
    """The operator's hyperparameters as scalar tensors in the order of OPERATORS, `given` or their defaults.

    Raises as `attention` where the tensors do not fit together or a number is out of range.
    """
    _check_tensors(query, key, value, mask)
    if operator == "anderson_least_squares" and value.shape[3] != query.shape[3]:
        raise ValueError(
            f"{operator} takes outputs less queries, so value must have {query.shape[3]} channels, not {value.shape[3]}"
        )
    return [
        _as_tensor(name, default if given.get(name) is None else given[name], query)
        for name, default in OPERATORS[operator].defaults.items()
    ]


def _check_tensors(query, key, value, mask):
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating, not {tensor.dtype}")
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be (batch, heads, length, head_dim), not {tuple(tensor.shape)}")
    (batch, heads, _, channels), (key_batch, key_heads, _, key_channels) = query.shape, key.shape
    shared = heads == key_heads or (key_heads > 0 and heads % key_heads == 0)
    if key_batch not in (1, batch) or not shared or key_channels != channels:
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
    if problem := value_problem(name, number):
        raise ValueError(f"{name} {problem}")
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return torch.full((), float(number), dtype=dtype, device=query.device)


def text_and_image(length: int, text_length: int, text_first: bool) -> tuple[slice, slice]:
    """(slice of the text, slice of the image) in a joint sequence."""
    if text_first:
        return slice(0, text_length), slice(text_length, length)
    return slice(length - text_length, length), slice(0, length - text_length)


def mask_block(mask: Tensor | None, rows: slice, columns: slice) -> Tensor | None:
    """The rows and columns of a mask that may have one of either."""
    if mask is None:
        return None
    if mask.ndim >= 2 and mask.shape[-2] > 1:
        mask = mask[..., rows, :]
    return mask[..., columns] if mask.shape[-1] > 1 else mask


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, qk_scale: float | None = None
) -> Tensor:
    """scaled_dot_product_attention, where heads may share keys as in `attention`.

    On a GPU its kernels for masks and for float32 have no such heads, and its plain form would hold all scores at once:
    keys are repeated there.
    """
    shared = key.shape[1] != query.shape[1]
    if shared and query.is_cuda and (mask is not None or query.dtype == torch.float32):
        key, value = (for_all_heads(states, query.shape[1]) for states in (key, value))
        shared = False
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=qk_scale, enable_gqa=shared)


def for_all_heads(states: Tensor, heads: int) -> Tensor:
    """Keys or values, (batch, heads or a divisor, length, head_dim), with each head for the queries that share it."""
    return states if states.shape[1] == heads else states.repeat_interleave(heads // states.shape[1], dim=1)
