"""SSIM and PSNR, and how pairs of images are compared."""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from surgery.errors import InputError

from .info import Device, Files, Images, Info


def pair_tensors(
    patched: Images, base: Images, device: Device, title: str, smallest: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (patched, base) as float64 tensors (1, 3, height, width) in [0, 1], one pair after another.

    Raises InputError for as many patched as base images not being there, for a pair of different sizes and for one with
    a side under `smallest` pixels; it says which pair, counted from 0. title: the metric's, for the errors.
    """
    if len(patched) != len(base):
        raise InputError(f"{title} compares pairs, but there are {len(patched)} patched and {len(base)} base images")
    for index, (one, other) in enumerate(zip(patched, base, strict=True)):
        if one.size != other.size:
            raise InputError(
                f"{title}: in pair {index} the patched image is {_size(one)} and the base's {_size(other)}; "
                "generate both at one height and width"
            )
        if min(one.size) < smallest:
            raise InputError(
                f"{title}: pair {index} is {_size(one)}, and each side must have at least {smallest} pixels; "
                "generate larger images or leave this metric out"
            )
        yield _tensor(one, device), _tensor(other, device)


def torchmetrics_function(name: str) -> Callable[..., torch.Tensor]:
    """A function of torchmetrics.functional.image; InputError where torchmetrics is not installed."""
    try:
        from torchmetrics.functional import image
    except ImportError as error:
        raise InputError(f"{name} needs torchmetrics, which is not installed: pip install torchmetrics") from error
    return getattr(image, name)


def _tensor(image, device):
    pixels = torch.from_numpy(np.array(image)).to(device)  # (height, width, 3), uint8
    return pixels.permute(2, 0, 1)[None].double() / 255


def _size(image):
    return f"{image.width}x{image.height}"


_WINDOW = 11  # pixels


class Ssim:
    """Structural similarity as torchmetrics computes it: a Gaussian window of 11x11 pixels and sigma 1.5, K1 0.01,
    K2 0.03, on each of red, green and blue; borders are reflected and every pixel counts in the mean.
    """

    info = Info(
        name="ssim",
        title="SSIM",
        kind="fidelity",
        higher_is_better=True,
        source="Wang et al. 2004 (doi:10.1109/TIP.2003.819861), as torchmetrics computes it",
    )

    def __init__(self, files: Files, device: Device) -> None:
        self._device = device
        self._similarity = torchmetrics_function("structural_similarity_index_measure")

    def compare(self, patched: Images, base: Images) -> np.ndarray:
        """float64 array (n,): 1 for identical images, at least -1. Images are PIL RGB, each pair of one size.

        Raises InputError for a pair of different sizes, or with a side under 11 pixels.
        """
        pairs = pair_tensors(patched, base, self._device, self.info.title, _WINDOW)
        return np.array([self._similarity(one, other, data_range=1.0).item() for one, other in pairs], np.float64)


HIGHEST = 100.0  # dB


class Psnr:
    """Peak signal-to-noise ratio in dB over all pixels of red, green and blue, of images in [0, 1].

    Identical images have an infinite one, which JSON cannot hold and a mean cannot use, so none is above 100 dB: a
    mean squared error of 1e-10, which in 8 bits is one level in one of 150 000 values. Only nearly identical images
    reach it.
    """

    info = Info(
        name="psnr",
        title="PSNR",
        kind="fidelity",
        higher_is_better=True,
        source="10 log10(1 / mean squared error), as torchmetrics computes it; at most 100 dB",
    )

    def __init__(self, files: Files, device: Device) -> None:
        self._device = device
        self._ratio = torchmetrics_function("peak_signal_noise_ratio")

    def compare(self, patched: Images, base: Images) -> np.ndarray:
        """float64 array (n,) in dB, at most 100. Images are PIL RGB; InputError for a pair of different sizes."""
        pairs = pair_tensors(patched, base, self._device, self.info.title, smallest=1)
        return np.array([min(self._ratio(one, other, data_range=1.0).item(), HIGHEST) for one, other in pairs])
