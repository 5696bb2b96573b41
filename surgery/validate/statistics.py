"""What paired values say: means, the difference with its 95% bootstrap interval, how often the patched side wins."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

DRAWS = 10_000


@dataclass(frozen=True)
class Paired:
    """Base and patched values of the same prompts and seeds.

    difference is patched minus base, interval its 95% interval (low, high); win_rate and tie_rate the shares of pairs
    in which the patched image is the better one, and in which the two are equal. n: pairs; groups: prompts; decided:
    those of them on which the sides differ.
    """

    n: int
    groups: int
    base: float
    patched: float
    difference: float
    interval: tuple[float, float]
    win_rate: float
    tie_rate: float
    decided: int


def paired(base: ArrayLike, patched: ArrayLike, groups: ArrayLike, higher_is_better: bool = True) -> Paired:
    """The Paired of two float arrays (n,) and the prompt's number of each pair (n,) int.

    The interval resamples prompts, each with all its images, because images of one prompt are not independent.
    """
    base, patched = np.asarray(base, np.float64), np.asarray(patched, np.float64)
    difference = patched - base
    better = difference > 0 if higher_is_better else difference < 0
    return Paired(
        n=len(difference),
        groups=len(np.unique(groups)),
        base=float(base.mean()),
        patched=float(patched.mean()),
        difference=float(difference.mean()),
        interval=mean_interval(difference, groups),
        win_rate=float(better.mean()),
        tie_rate=float((difference == 0).mean()),
        decided=int((np.bincount(np.unique(groups, return_inverse=True)[1], difference) != 0).sum()),
    )


def mean_interval(values: ArrayLike, groups: ArrayLike) -> tuple[float, float]:
    """The 95% percentile interval (low, high) of the mean of values (n,), bootstrapped over groups (n,).

    Its percentiles are widened for few groups as in Hesterberg (2015, arXiv 1411.5279, "expanded percentile
    interval"): plain ones are as narrow as a normal interval with the variance's divisor n.
    """
    _, members = np.unique(groups, return_inverse=True)
    count = members.max() + 1
    sums = np.bincount(members, values)
    sizes = np.bincount(members).astype(np.float64)
    means = np.empty(DRAWS)
    random = np.random.default_rng(0)
    at_once = max(1, 2_000_000 // count)
    for start in range(0, DRAWS, at_once):
        drawn = random.integers(count, size=(min(at_once, DRAWS - start), count))
        means[start : start + len(drawn)] = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, _tails(count))
    return float(low), float(high)


def normal_interval(value: float, draws: ArrayLike) -> tuple[float, float]:
    """The 95% interval value +- 1.96 standard deviations of its bootstrap `draws`.

    For FID, whose resampled values are biased upwards by the repeated images (on both sides alike), so that their
    percentiles would not lie around the value.
    """
    spread = 1.959963984540054 * float(np.std(np.asarray(draws, np.float64), ddof=1))
    return value - spread, value + spread


def draws_of_images(groups: ArrayLike, count: int, seed: int = 0) -> np.ndarray:
    """(count, n) int: each row the indices of n images, drawn by resampling whole groups until n are reached."""
    groups = np.asarray(groups)
    random = np.random.default_rng(seed)
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(groups[order]) > 0])
    members = np.split(order, starts[1:])
    rows = []
    for _ in range(count):
        drawn = np.concatenate([members[group] for group in random.integers(len(members), size=len(members))])
        rows.append(np.resize(drawn, len(groups)))
    return np.stack(rows)


def _tails(count):
    from scipy import stats

    if count < 2:
        return 0.0, 1.0
    tail = stats.norm.cdf(np.sqrt(count / (count - 1)) * stats.t.ppf(0.025, count - 1))
    return tail, 1 - tail
