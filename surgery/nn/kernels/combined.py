"""What combines whole outputs of the kernels in plain torch: GAG, and Anderson's weights by least squares.

A kernel of one tile can take the sums of a query's own channels, or of a token's; those of a whole image, and the three
outputs among which Anderson acceleration chooses, it does not hold. There the kernels make T_s, T_d and T_low one after
the other, in float32, and what follows costs a few passes over tensors of the output's size.

No quantity is squared before it is divided by the largest of its unit, so nothing overflows or vanishes.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..operators import OPERATORS, OperatorName, Unit

_DIMS = {"head": (-1,), "token": (1, -1), "image": (1, 2, 3)}  # of (batch, heads, queries, head_dim)
_THIN = 1e-12  # of two squared lengths: what is shorter is rounding


def of_one_step(operator: OperatorName, settings: list[Tensor]) -> tuple[OperatorName, list[Tensor]]:
    """What an operator computes of one step alone, which is what a kernel is asked for: (operator, its settings)."""
    if not OPERATORS[operator].keeps:
        return operator, settings
    named = dict(zip(OPERATORS[operator].defaults, settings, strict=True))
    return "sparse", [named[name] for name in OPERATORS["sparse"].defaults]


def is_combined(operator: OperatorName, unit: Unit) -> bool:
    """Whether no single kernel computes it, but `from_outputs` does. operator: as `of_one_step` gives it."""
    return OPERATORS[operator].code is None or (OPERATORS[operator].projects and unit == "image")


def from_outputs(
    run: Callable[[list[Tensor], bool], tuple[Tensor, Tensor | None]],
    query: Tensor,
    settings: list[Tensor],
    operator: OperatorName,
    unit: Unit,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """(output, log-sum-exp or None) of an operator that `is_combined`, in float32.

    run: ([alpha, temperature], with_lse) -> (entmax_alpha(scores / temperature) V in float32, log-sum-exp or None).
    query: (batch, heads, queries, head_dim). settings: scalar tensors in the order of OPERATORS.
    """
    named = dict(zip(OPERATORS[operator].defaults, settings, strict=True))
    temperature = named["temperature"] * named["sparse_temperature"]
    dense, lse = run([torch.ones_like(named["alpha"]), named["temperature"]], with_lse)
    sparse, _ = run([named["alpha"], temperature], False)
    if operator == "gag":
        return geometry_aware(sparse, sparse - dense, named, unit), lse
    low, _ = run([named["alpha_low"], temperature], False)
    return nearest_of_three(sparse, low, dense, query, unit), lse


def geometry_aware(sparse: Tensor, residual: Tensor, settings: Mapping[str, Tensor], unit: Unit) -> Tensor:
    """GAG, eq. 11-13: sparse + scale min(1, eta/|u|) u, u = parallel r_par + zeta r_orth, r split along `sparse`.

    sparse: T_s, (batch, heads, queries, head_dim) in float32 or float64; residual: r = T_s - T_d, the same.
    """
    dims = _DIMS[unit]
    direction = sparse / _at_least_tiny(sparse.abs().amax(dims, keepdim=True))
    length = (direction * direction).sum(dims, keepdim=True)  # at least 1, or the output is zero
    parallel = (residual * direction).sum(dims, keepdim=True) / length.clamp_min(1.0) * direction
    update = settings["parallel"] * parallel + settings["zeta"] * (residual - parallel)
    largest = _at_least_tiny(update.abs().amax(dims, keepdim=True))
    norm = largest * (update / largest).square().sum(dims, keepdim=True).sqrt()
    eta = settings["eta"]
    gain = torch.where(norm > eta, eta / _at_least_tiny(norm), torch.ones_like(norm))
    return sparse + settings["scale"] * gain * update


def nearest_of_three(sparse: Tensor, low: Tensor, dense: Tensor, query: Tensor, unit: Unit) -> Tensor:
    """GAG, Appendix F: w_0 sparse + w_1 low + w_2 dense by the simplex weights whose residual is the shortest."""
    weight, weight_low = weights_of_three(sparse, low, dense, query, unit)
    return dense + weight * (sparse - dense) + weight_low * (low - dense)


def weights_of_three(sparse: Tensor, low: Tensor, dense: Tensor, query: Tensor, unit: Unit) -> tuple[Tensor, Tensor]:
    """(w_0, w_1) of `nearest_of_three`, w_2 being what is left to 1; each broadcastable to the outputs.

    The residuals are each output less the query, so with a sum of 1 this is the point of their triangle that is nearest
    to the query: inside it, or on one of its sides. All: (batch, heads, queries, head_dim), the first three float32 or
    float64. unit: what shares its weights.
    """
    dims = _DIMS[unit]
    query = query.to(dense.dtype)
    parts = sparse - dense, low - dense, query - dense
    largest = _at_least_tiny(torch.stack([part.abs().amax(dims, keepdim=True) for part in parts]).amax(0))
    first, second, goal = (part / largest for part in parts)

    def dot(one, other):
        return (one * other).sum(dims, keepdim=True)

    def along(step, aim):  # the share of `step`, in [0, 1], that comes nearest to `aim`
        square = dot(step, step)
        return (dot(step, aim) / _at_least_tiny(square)).clamp(0.0, 1.0)

    # By Gram and Schmidt, as both sides may be nearly one line.
    square = _at_least_tiny(dot(first, first))
    shared = dot(first, second) / square
    upright = second - shared * first
    height = dot(upright, upright)
    inner_low = dot(upright, goal) / _at_least_tiny(height)
    inner = dot(first, goal) / square - shared * inner_low
    is_inside = (height > _THIN * dot(second, second)) & (inner > 0.0) & (inner_low > 0.0) & (inner + inner_low < 1.0)

    on_first, on_second, on_third = along(first, goal), along(second, goal), along(first - second, goal - second)
    best = on_first, torch.zeros_like(on_first)
    shortest = _square_of(goal - on_first * first, dims)
    for weight, weight_low in ((torch.zeros_like(on_second), on_second), (on_third, 1.0 - on_third)):
        left = _square_of(goal - weight * first - weight_low * second, dims)
        best = torch.where(left < shortest, weight, best[0]), torch.where(left < shortest, weight_low, best[1])
        shortest = torch.minimum(left, shortest)
    return torch.where(is_inside, inner, best[0]), torch.where(is_inside, inner_low, best[1])


def share_of_before(query: Tensor, output: Tensor, query_before: Tensor, output_before: Tensor, unit: Unit) -> Tensor:
    """Anderson's weight of the iterate before (GAG, eq. 6 with m = 1): w in [0, 1], of each `unit`, that minimises
    |(1 - w) (output - query) + w (output_before - query_before)|.

    All: (batch, heads, queries, head_dim), float32. Returns it broadcastable to them.
    """
    dims = _DIMS[unit]
    residual = output - query
    fall = residual - (output_before - query_before)
    largest = _at_least_tiny(torch.maximum(residual.abs(), fall.abs()).amax(dims, keepdim=True))
    residual, fall = residual / largest, fall / largest
    square = _square_of(fall, dims)
    return ((residual * fall).sum(dims, keepdim=True) / _at_least_tiny(square)).clamp(0.0, 1.0)


def _square_of(vector, dims):
    return vector.square().sum(dims, keepdim=True)


def _at_least_tiny(value):
    return value.clamp_min(torch.finfo(value.dtype).tiny)
