"""alpha-entmax in float64 by bisection to the last bit: what every implementation is held to."""

import torch


def entmax_oracle(scores, alpha):
    """alpha-entmax along the last dimension, float64. alpha: a float above 1."""
    x = scores.double()
    x = (x - x.amax(-1, keepdim=True)) * (alpha - 1.0)
    r = 1.0 / (alpha - 1.0)

    def weights(lift):
        return torch.exp(r * torch.log1p((x - lift).clamp_min(-1.0)))

    low, high = torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1])
    for _ in range(80):
        middle = (low + high) / 2
        too_much = weights(middle).sum(-1, keepdim=True) >= 1.0
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    found = weights(low)
    return found / found.sum(-1, keepdim=True)


def float32(number):
    """The float64 value of a number rounded to float32: what a float32 buffer holds."""
    return torch.tensor(number, dtype=torch.float32).double().item()
