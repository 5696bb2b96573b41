"""PSNR: how near the patched image's pixels are to the base's."""

import numpy as np

from surgery.validate.metrics.info import Info
from surgery.validate.metrics.pairs import pair_tensors, torchmetrics_function

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

    def __init__(self, files, device):
        self._device = device
        self._ratio = torchmetrics_function("peak_signal_noise_ratio")

    def compare(self, patched, base):
        """float64 array (n,) in dB, at most 100. Images are PIL RGB; InputError for a pair of different sizes."""
        pairs = pair_tensors(patched, base, self._device, self.info.title, smallest=1)
        return np.array([min(self._ratio(one, other, data_range=1.0).item(), HIGHEST) for one, other in pairs])
