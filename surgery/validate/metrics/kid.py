"""KID: the squared maximum mean discrepancy between the Inception features of two sets of images.

Unlike FID it has no bias from the number of images. It is given as it is, not times 1000; it can fall under 0.
"""

import numpy as np

from surgery.errors import InputError
from surgery.validate.metrics.inception import WEIGHTS, InceptionFeatures
from surgery.validate.metrics.info import Info
from surgery.validate.reference import Statistics

_ROWS = 512  # of a kernel matrix at a time, so that memory stays at 512 by the larger set


class Kid(InceptionFeatures):
    """Kernel Inception distance: the unbiased estimate of MMD^2 with the kernel (x.y / d + 1)^3, lower for more alike.

    It uses every pair of both whole sets. torch-fidelity's mean over random subsets estimates the same figure with more
    noise.
    """

    info = Info(
        name="kid",
        title="KID",
        kind="distance",
        higher_is_better=False,
        source="Binkowski et al. 2018 (arXiv:1801.01401), whole sets; network and weights of mseitzer/pytorch-fid",
        checkpoints={"inception": WEIGHTS},
    )

    def distance(self, features, reference):
        """The distance of features (n, 2048) to a reference's (m, 2048); InputError for `Statistics`."""
        return kernel_distance(features, reference)

    def differences(self, patched, base, reference, draws):
        """float64 array (k,): distance(patched[draw]) - distance(base[draw]) for each of draws, indices (k, n).

        Drawn with replacement; the same image is drawn on both sides. An image drawn twice is no pair of two images of
        its set: such pairs are left out and the mean is over the pairs of different images, each as often as it was
        drawn. With them in, every draw would lie above the distance by about (mean k(x, x) - mean k(x, x')) / n. Where
        a draw is one image alone, which has no such pair, its own term is k(x, x).
        """
        patched, base, reference = _checked_for_kid(patched), _checked_for_kid(base), _reference(reference)
        return _without_reference(patched, reference, draws) - _without_reference(base, reference, draws)


def kernel_distance(features, reference):
    """The unbiased MMD^2 of features (n, d) to a reference's (m, d), in float64 (eq. 4 of the paper).

    Raises InputError for fewer than 2 rows, another width, or a reference that is `Statistics`.
    """
    features, reference = _checked_for_kid(features), _reference(reference)
    own = _mean_of_pairs(features) + _mean_of_pairs(reference)
    return float(own - 2 * _mean_kernel(features, reference).mean())


def _kernel(features, other):
    linear = features @ other.T / features.shape[1] + 1
    return linear * linear * linear


def _blocks(features):
    for start in range(0, len(features), _ROWS):
        yield slice(start, start + _ROWS)


def _mean_of_pairs(features):
    """The kernel's mean over the pairs of different rows."""
    count, total = len(features), 0.0
    for rows in _blocks(features):
        kernel = _kernel(features[rows], features)
        total += kernel.sum() - np.trace(kernel, offset=rows.start)
    return total / (count * (count - 1))


def _mean_kernel(features, reference):
    """The kernel's mean of each row with the reference's rows: (n,)."""
    if features.shape[1] != reference.shape[1]:
        raise InputError(f"the features are {features.shape[1]} wide and the reference's {reference.shape[1]}")
    return np.concatenate([_kernel(features[rows], reference).mean(1) for rows in _blocks(features)])


def _without_reference(features, reference, draws):
    """Each draw's distance less the mean over the reference's own pairs, which both sides share: (k,)."""
    weights = np.stack([np.bincount(draw, minlength=len(features)) for draw in draws]).astype(np.float64)  # (k, n)
    count = weights.sum(1)
    pairs = np.zeros(len(weights))
    own = np.empty(len(features))  # k(x, x)
    for rows in _blocks(features):
        kernel = _kernel(features, features[rows])  # (n, rows)
        diagonal = np.arange(kernel.shape[1])
        own[rows] = kernel[rows.start + diagonal, diagonal]
        kernel[rows.start + diagonal, diagonal] = 0
        pairs += ((weights @ kernel) * weights[:, rows]).sum(1)
    different = count**2 - np.square(weights).sum(1)
    pairs = np.where(different > 0, pairs / np.maximum(different, 1), weights @ own / count)
    return pairs - 2 * (weights @ _mean_kernel(features, reference)) / count


def _reference(reference):
    if isinstance(reference, Statistics):
        raise InputError("KID compares images with images: give a folder of images as its reference, not an .npz")
    return _checked_for_kid(reference)


def _checked_for_kid(features):
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise InputError(f"KID needs the features of 2 images at least, not an array of shape {features.shape}")
    return features
