"""SSIM: how much of the base image's structure the patched one keeps."""

import numpy as np

from surgery.validate.metrics.info import Info
from surgery.validate.metrics.pairs import pair_tensors, torchmetrics_function

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

    def __init__(self, files, device):
        self._device = device
        self._similarity = torchmetrics_function("structural_similarity_index_measure")

    def compare(self, patched, base):
        """float64 array (n,): 1 for identical images, at least -1. Images are PIL RGB, each pair of one size.

        Raises InputError for a pair of different sizes, or with a side under 11 pixels.
        """
        pairs = pair_tensors(patched, base, self._device, self.info.title, _WINDOW)
        return np.array([self._similarity(one, other, data_range=1.0).item() for one, other in pairs], np.float64)
