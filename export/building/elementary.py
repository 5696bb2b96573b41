"""Operations that other backends lack, or take otherwise than torch does, in ones that they compute alike.

TensorRT and ONNX compute log1p(x) as log(1 + x) and expm1(x) as exp(x) - 1, which have no digit left where x is small.
That is where the entmax solver takes them when alpha is near 1: at alpha = 1, dense attention, its weights would be off
by up to 0.07. Around zero these are series, which hold whatever a compiler makes of 1 + x; both are right to 3e-7.
"""

import torch

_NEAR_ZERO = 0.25  # beyond it the plain formulas lose less than two bits
_TAKEN_FOR_ZERO = 1e-8
_SCALE = 2.0**60  # exact in float32, where sums up to 1e20 stay finite


def log1p(x):
    """log(1 + x) of a float tensor; around zero 2 artanh(x / (2 + x)), by its series."""
    y = x / (x + 2.0)
    square = y * y
    series = y * (2.0 + square * (2.0 / 3.0 + square * (2.0 / 5.0 + square * (2.0 / 7.0 + square * (2.0 / 9.0)))))
    return torch.where(x.abs() < _NEAR_ZERO, series, (x + 1.0).log())


def expm1(x):
    """exp(x) - 1 of a float tensor; around zero its Taylor series."""
    series = x * (1.0 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720))))))
    return torch.where(x.abs() < _NEAR_ZERO, series, x.exp() - 1.0)


def add(x, other, *, alpha=1):
    """x + other; a constant under 1e-8, such as SANA's 1e-15 in a denominator, is added to a scaled x.

    The optimiser of ONNX graphs takes it for a zero, and what was kept from 0 / 0 is NaN then.
    """
    if alpha != 1 or not isinstance(other, float) or x.dtype != torch.float32 or not 0.0 < abs(other) < _TAKEN_FOR_ZERO:
        return NotImplemented
    return (x * _SCALE + other * _SCALE) / _SCALE


def squeeze(x, dim):
    """x without an axis of length 1; an axis that is longer stays, where ONNX's Squeeze fails (PixArt has one)."""
    dim %= x.ndim
    if x.shape[dim] != 1:
        return x.clone()
    return x.reshape([size for axis, size in enumerate(x.shape) if axis != dim])


def masked_fill(x, mask, value):
    """x with `value` where mask is true; for booleans (HunyuanVideo's mask), which ONNX Runtime's Where lacks."""
    if x.dtype != torch.bool:
        return NotImplemented
    return x | mask if value else x & ~mask


def elementary_decompositions():
    """{operator: plain torch function}, for `exported_program.run_decompositions`."""
    aten = torch.ops.aten
    return {
        aten.log1p.default: log1p,
        aten.expm1.default: expm1,
        aten.add.Tensor: add,
        aten.squeeze.dim: squeeze,
        aten.masked_fill.Scalar: masked_fill,
    }
