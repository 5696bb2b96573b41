"""FID and KID: distances between Inception features of images and of reference images."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from surgery.errors import InputError

from ..reference import Statistics
from .inception import WEIGHTS, InceptionFeatures
from .info import Info


class Fid(InceptionFeatures):
    """Frechet Inception distance: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), lower for more alike sets."""

    info = Info(
        name="fid",
        title="FID",
        margin=0.5,
        kind="distance",
        higher_is_better=False,
        source="Heusel et al. 2017 (arXiv:1706.08500); network, weights and preprocessing of mseitzer/pytorch-fid",
        checkpoints={"inception": WEIGHTS},
    )

    def distance(self, features: np.ndarray, reference: "np.ndarray | Statistics") -> float:
        """The distance of features (n, 2048) to a reference: features (m, 2048) or `Statistics`."""
        return frechet_distance(features, reference)

    def resampled(
        self, features: np.ndarray, reference: "np.ndarray | Statistics", draws: np.ndarray
    ) -> Iterator[float]:
        """Yield distance(features[draw]) for each of draws, indices (k, n) drawn with replacement.

        The time of each grows with the cube of the smaller of n and 2048.
        """
        return _distances(features, _root(reference), draws)


def frechet_distance(features: np.ndarray, reference: "np.ndarray | Statistics") -> float:
    """The Frechet distance, at least 0, of features (n, d) to a reference: features (m, d) or `Statistics`, in float64.

    Covariances are divided by n - 1, as numpy.cov's. Raises InputError for fewer than 2 rows, or of another width.
    """
    features, root = _checked(features, "FID"), _root(reference)
    mean = features.mean(0)
    projected = _projected(features - mean, root)
    # tr (S1 S2)^(1/2) is the sum of the singular values of X R', with S1 = X'X/(n - 1) and S2 = R'R.
    shared = np.linalg.svd(projected, compute_uv=False).sum() / np.sqrt(len(features) - 1)
    spread = np.square(features - mean).sum() / (len(features) - 1)
    return float(max(np.square(mean - root.mean).sum() + spread + root.trace - 2 * shared, 0.0))


@dataclass(frozen=True, eq=False)
class _Root:
    """A reference as mean (d,) and factor (r, d) with covariance = factor' factor; trace: the covariance's."""

    mean: np.ndarray
    factor: np.ndarray

    @property
    def trace(self):
        return np.square(self.factor).sum()


def _root(reference):
    if not isinstance(reference, Statistics):
        features = _checked(reference, "FID")
        mean, count = features.mean(0), len(features)
        if count <= features.shape[1]:
            return _Root(mean, (features - mean) / np.sqrt(count - 1))
        reference = Statistics(mean, np.cov(features, rowvar=False).reshape(mean.size, mean.size))
    eigenvalues, vectors = np.linalg.eigh(reference.covariance)
    if eigenvalues[0] < -1e-3 * max(eigenvalues[-1], 0):
        raise InputError(f"the reference's sigma has the eigenvalue {eigenvalues[0]:g}, so it is no covariance")
    return _Root(reference.mean, np.sqrt(eigenvalues.clip(0))[:, None] * vectors.T)


def _distances(features, root, draws):
    """Yield frechet_distance(features[draw]) for each draw.

    A drawn set is its distinct rows, each weighted by how often it was drawn, and its singular values are the roots of
    the eigenvalues of the smaller of two Gram matrices. That is what makes thousands of draws affordable; it leaves
    an error of some 1e-8 of the largest singular value in each.
    """
    features = _checked(features, "FID")
    middle = features.mean(0)
    centred = features - middle  # near 0, so that centring a draw costs no digits
    projected = _projected(centred, root)
    squares, offset, trace = np.square(centred).sum(1), middle - root.mean, root.trace
    for draw in draws:
        count = len(draw)
        weights = np.bincount(draw, minlength=len(features)).astype(np.float64)
        mean = weights @ centred / count
        spread = (weights @ squares - count * mean @ mean) / (count - 1)
        rows = np.flatnonzero(weights)
        drawn = (projected[rows] - weights @ projected / count) * np.sqrt(weights[rows, None])
        gram = drawn @ drawn.T if len(rows) <= drawn.shape[1] else drawn.T @ drawn
        shared = np.sqrt(np.linalg.eigvalsh(gram).clip(0)).sum() / np.sqrt(count - 1)
        shift = mean + offset
        yield float(shift @ shift + spread + trace - 2 * shared)


def _projected(centred, root):
    """Rows of centred (n, d) against the factor's: (n, min(n, r)), with the singular values of centred @ factor.T."""
    if centred.shape[1] != root.mean.size:
        raise InputError(f"the features are {centred.shape[1]} wide and the reference's {root.mean.size}")
    projected = centred @ root.factor.T
    if projected.shape[0] < projected.shape[1]:
        projected = np.asarray(np.linalg.qr(projected.T, mode="r")).T  # the same rows in coordinates of their own span
    return projected


def _checked(features, title):
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise InputError(f"{title} needs the features of 2 images at least, not an array of shape {features.shape}")
    return features


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

    def distance(self, features: np.ndarray, reference: "np.ndarray | Statistics") -> float:
        """The distance of features (n, 2048) to a reference's (m, 2048); InputError for `Statistics`."""
        return kernel_distance(features, reference)

    def resampled(
        self, features: np.ndarray, reference: "np.ndarray | Statistics", draws: np.ndarray
    ) -> Iterator[float]:
        """Yield distance(features[draw]) for each of draws, indices (k, n) drawn with replacement.

        An image drawn twice is no pair of two images of its set: such pairs are left out and the mean is over the pairs
        of different images, each as often as it was drawn. With them in, every draw would lie above the distance by
        about (mean k(x, x) - mean k(x, x')) / n. Where a draw is one image alone, which has no such pair, its own term
        is k(x, x).
        """
        features, reference = _checked(features, "KID"), _reference(reference)
        return map(float, _without_reference(features, reference, draws) + _mean_of_pairs(reference))


def kernel_distance(features: np.ndarray, reference: "np.ndarray | Statistics") -> float:
    """The unbiased MMD^2 of features (n, d) to a reference's (m, d), in float64 (eq. 4 of the paper).

    Raises InputError for fewer than 2 rows, another width, or a reference that is `Statistics`.
    """
    features, reference = _checked(features, "KID"), _reference(reference)
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
    return _checked(reference, "KID")
