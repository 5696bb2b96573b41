"""KID against the sums of its definition, its lack of bias, and its values over draws."""

import numpy as np
import pytest

from surgery.errors import InputError
from surgery.validate.metrics import distances as module
from surgery.validate.metrics.distances import Kid, kernel_distance
from surgery.validate.reference import Statistics


def features(count, width=6, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal((count, width))).astype(np.float32)


def kernel(one, other):
    return (float(np.dot(one.astype(np.float64), other)) / len(one) + 1) ** 3


def by_sums(rows, other, draw=None):
    """The definition in plain loops; with a draw, over pairs of different images of it."""
    drawn = range(len(rows)) if draw is None else draw
    own = [kernel(rows[i], rows[j]) for i in drawn for j in drawn if i != j]
    others = [kernel(x, y) for i, x in enumerate(other) for j, y in enumerate(other) if i != j]
    return np.mean(own) + np.mean(others) - 2 * np.mean([kernel(rows[i], y) for i in drawn for y in other])


def kid():
    return Kid.__new__(Kid)  # its distances take features, so no network is needed


@pytest.mark.parametrize("at_a_time", [1, 4, 512])
def test_it_is_the_sum_over_pairs_of_its_definition(monkeypatch, at_a_time):
    monkeypatch.setattr(module, "_ROWS", at_a_time)
    rows, other = features(9), features(7, seed=1) + 0.3
    assert kernel_distance(rows, other) == pytest.approx(by_sums(rows, other), rel=1e-12)


def test_a_known_value():
    # k = (x.y / 1 + 1)^3: own pairs (0 + 1)^3 = 1; the reference's (4 + 1)^3 = 125; between them 1 and (2 + 1)^3 = 27.
    assert kernel_distance([[0.0], [1.0]], [[2.0], [2.0]]) == pytest.approx(1 + 125 - 2 * (1 + 27) / 2)


def test_sets_of_one_distribution_are_at_no_distance_on_average():
    rows = features(3000, seed=5)
    distances = [kernel_distance(rows[i : i + 5], rows[i + 5 : i + 15]) for i in range(0, 3000, 15)]
    error = np.std(distances) / np.sqrt(len(distances))
    assert abs(np.mean(distances)) < 3 * error
    assert min(distances) < 0 and error < 0.2


def test_sets_of_different_distributions_are_apart():
    rows = features(200)
    assert kernel_distance(rows, features(200, seed=1) + 1) > 10 * abs(kernel_distance(rows, features(200, seed=1)))


@pytest.mark.parametrize("at_a_time", [3, 512])
def test_resampled_distances_are_over_the_pairs_of_different_images_drawn(monkeypatch, at_a_time):
    monkeypatch.setattr(module, "_ROWS", at_a_time)
    rows, reference = features(8), features(6, seed=2)
    draws = np.random.default_rng(3).integers(0, 8, (6, 8))
    draws[0] = np.arange(8)
    expected = [by_sums(rows, reference, draw) for draw in draws]
    found = list(kid().resampled(rows, reference, draws))
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert found[0] == pytest.approx(kernel_distance(rows, reference))


def test_draws_lie_around_the_distance_and_not_above_it():
    rows, reference = features(40, scale=2), features(40, seed=2)
    draws = np.random.default_rng(4).integers(0, 40, (2000, 40))
    found = np.array(list(kid().resampled(rows, reference, draws)))
    duplicates = np.mean([kernel(x, x) for x in rows]) / 40
    assert abs(found.mean() - kernel_distance(rows, reference)) < 0.1 * duplicates


def test_a_draw_of_one_image_alone_has_a_finite_distance():
    rows, reference = features(4), features(4, seed=2)
    pairs = np.mean([kernel(x, y) for i, x in enumerate(reference) for j, y in enumerate(reference) if i != j])
    crossed = np.mean([kernel(rows[2], y) for y in reference])
    found = kid().resampled(rows, reference, np.full((1, 4), 2))
    assert list(found) == pytest.approx([kernel(rows[2], rows[2]) + pairs - 2 * crossed])


def test_stored_statistics_too_few_images_or_another_width_are_refused():
    rows = features(5)
    stored = Statistics(np.zeros(6), np.eye(6))
    with pytest.raises(InputError, match="give a folder of images"):
        kernel_distance(rows, stored)
    with pytest.raises(InputError, match="give a folder of images"):
        kid().resampled(rows, stored, np.zeros((1, 5), int))
    with pytest.raises(InputError, match="2 images at least"):
        kernel_distance(rows, rows[:1])
    with pytest.raises(InputError, match="6 wide and the reference's 3"):
        kernel_distance(rows, features(5, width=3))
