"""What methods of guidance make of C and U, the outputs with and without the prompt, of one step after another.

Needs torch alone: the nodes for ComfyUI have a copy of this file. The methods' classes name the sources.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Scale = float | Tensor  # guidance_scale, w: of all images, or of each, (batch, 1, ...)


def mambo_g(pred_cond: Tensor, pred_uncond: Tensor, guidance_scale: Scale, alpha: float) -> Tensor:
    """U + (1 + (w - 1) exp(-alpha |C - U| / |U|)) (C - U), the norms of each image: (batch, ...)."""
    away = pred_cond - pred_uncond
    size, whole = (one.flatten(1).norm(dim=1).view(-1, *[1] * (away.ndim - 1)) for one in (away, pred_uncond))
    return pred_uncond + (1 + (guidance_scale - 1) * (-alpha * size / whole).exp()) * away


def momentum(guided: Tensor, average: Tensor | None, scale: float, decay: float) -> tuple[Tensor, Tensor]:
    """(G + scale (G - m), the next m) of the guided output G; average: m, None at the first step."""
    before = guided if average is None else average
    return guided + scale * (guided - before), guided + decay * (before - guided)


def sliding_mode(
    pred_cond: Tensor, pred_uncond: Tensor, guidance_scale: Scale, before: Tensor | None, rate: float, gain: float
) -> tuple[Tensor, Tensor]:
    """(U + w e', e'), e' = e - gain sign(e - e'_before + rate e'_before), e = C - U; before: None at the first step."""
    error = pred_cond - pred_uncond
    before = error if before is None else before
    moved = error - gain * (error - before + rate * before).sign()
    return pred_uncond + guidance_scale * moved, moved


def frequency_decoupled(
    pred_cond: Tensor,
    pred_uncond: Tensor,
    guidance_scale: Scale,
    high: float,
    low_of: Callable[[Tensor], Tensor],
) -> Tensor:
    """U + w low(C - U) + high (C - U - low(C - U)); low_of: low_frequencies, of the planes that a prediction has."""
    away = pred_cond - pred_uncond
    low = low_of(away)
    return pred_uncond + guidance_scale * low + high * (away - low)


_BINOMIAL = (1.0, 4.0, 6.0, 4.0, 1.0)
_LEAST_CUTOFF = 3  # as in FreSca's code


def low_frequencies(planes: Tensor) -> Tensor:
    """What is left of planes, (batch, channels, height, width) float32, after halving their sides and doubling them.

    Blurred by the binomial kernel before the one and after the other, as in a Laplacian pyramid.
    """
    size = planes.shape[-2:]
    halved = F.interpolate(_binomial(planes), [max(side // 2, 1) for side in size], mode="bilinear")
    return _binomial(F.interpolate(halved, list(size), mode="bilinear"))


def _binomial(planes):
    line = planes.new_tensor(_BINOMIAL) / sum(_BINOMIAL)
    kernel = line[:, None] * line[None]
    channels, (height, width) = planes.shape[1], planes.shape[-2:]
    border = "reflect" if min(height, width) > 2 else "replicate"  # two pixels have no two more to reflect
    padded = F.pad(planes, (2, 2, 2, 2), mode=border)
    return F.conv2d(padded, kernel.expand(channels, 1, 5, 5), groups=channels)


def scaled_frequencies(planes: Tensor, low: float, high: float, threshold: float) -> Tensor:
    """Planes, (batch, channels, height, width) float32, with frequencies within each image's cutoff times `low`, and
    those beyond times `high`.
    """
    spectrum = torch.fft.fftshift(torch.fft.fft2(planes), dim=(-2, -1))
    height, width = planes.shape[-2:]
    middle, most = (height // 2, width // 2), max(min(height, width) // 4, 1)
    size = spectrum.abs().mean(dim=1)  # (batch, height, width)
    cutoff = (_cutoff(size[:, middle[0]], threshold, most) + _cutoff(size[:, :, middle[1]], threshold, most)) // 2
    cutoff = cutoff.clamp(min=_LEAST_CUTOFF).clamp(max=min(middle))  # (batch,)
    within = [_within(side, at, cutoff) for side, at in zip((height, width), middle, strict=True)]
    is_low = within[0][:, None, :, None] & within[1][:, None, None]  # (batch, 1, height, width)
    spectrum = spectrum * torch.where(is_low, low, high)
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real


def _cutoff(magnitudes, threshold, most):
    """(batch,): the first index of (batch, length) up to which the magnitudes add up to a share of all."""
    sums = magnitudes.cumsum(dim=1)
    return (sums >= threshold * sums[:, -1:]).int().argmax(dim=1).clamp(max=most)


def _within(length, middle, cutoff):
    """(batch, length): whether an index is in [middle - cutoff, middle + cutoff)."""
    away = torch.arange(length, device=cutoff.device)[None] - middle
    return (away >= -cutoff[:, None]) & (away < cutoff[:, None])
