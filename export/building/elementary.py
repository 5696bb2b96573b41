"""log1p and expm1 in operations that keep their digits on backends that have neither.

TensorRT and ONNX compute log1p(x) as log(1 + x) and expm1(x) as exp(x) - 1, which have no digit left where x is small.
That is where the entmax solver takes them when alpha is near 1: at alpha = 1, dense attention, its weights would be off
by up to 0.07. Around zero these are series, which hold whatever a compiler makes of 1 + x; both are right to 3e-7.
"""

import torch

_NEAR_ZERO = 0.25  # beyond it the plain formulas lose less than two bits


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


def elementary_decompositions():
    """{operator: plain torch function}, for `exported_program.run_decompositions`."""
    return {torch.ops.aten.log1p.default: log1p, torch.ops.aten.expm1.default: expm1}
