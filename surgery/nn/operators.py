"""The attention operators: their hyperparameters, and what each makes of the dense and the sparse attention map.

With p the dense map (softmax), s_a the alpha-entmax map, T_d = p V and T_s = s V (all of the same scores):

    pladis    T_d + scale (T_s - T_d)                                      PLADIS, arXiv 2503.07677, eq. 15
    sparse    T_s                                                          PLADIS at scale 1
    gag       T_s + scale min(1, eta / |r~|) r~,  r = T_s - T_d,           GAG, arXiv 2603.02531, eq. 11-13
              r~ = r_par + zeta r_orth, split along T_s
    anderson  scale T_alpha + scale_low T_alpha_low + (1 - scale - scale_low) T_d      GAG, Appendix F, m = 2

GAG's base is T_s, so at zeta = 1 and eta = infinity it is PLADIS with a scale one larger. The paper does not say over
which dimensions it projects: `unit` is "head" (each head's own channels) or "token" (the channels of all heads
together). It does not give the weights of the Anderson surrogate either: ours share PLADIS's scale of 2 evenly.
"""

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
