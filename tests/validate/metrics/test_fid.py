"""The Frechet distance against closed forms and scipy's matrix root, and its values over draws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from surgery.errors import InputError
from surgery.validate.metrics.distances import Fid, frechet_distance
from surgery.validate.reference import Statistics

# Images, images of the reference, width of the features: each is the smallest and the largest of the three once.
SIZES = [(30, 60, 12), (60, 30, 12), (8, 40, 24), (40, 8, 24), (8, 6, 24), (6, 8, 24)]


def features(count, width, seed):
    """Correlated, of unequal variances, away from 0, float32: like Inception's."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((count, width)) @ np.random.default_rng(99).standard_normal((width, width))
    return (0.5 + 0.2 * mixed).astype(np.float32)


def statistics(rows):
    return Statistics(rows.mean(0, dtype=np.float64), np.cov(rows.astype(np.float64), rowvar=False))


def by_matrix_root(rows, other):
    """The definition, by scipy's square root of the product of the covariances."""
    one, two = statistics(rows), statistics(other)
    root = linalg.sqrtm(one.covariance @ two.covariance).real
    squares = np.square(one.mean - two.mean).sum()
    return squares + np.trace(one.covariance) + np.trace(two.covariance) - 2 * np.trace(root)


def gaussian(mean, deviations):
    """2 d rows with exactly this mean and the diagonal covariance deviations^2."""
    width = len(mean)
    spokes = np.diag(deviations) * np.sqrt((2 * width - 1) / 2)
    return np.concatenate([spokes, -spokes]) + mean


def fid():
    return Fid.__new__(Fid)  # its distances take features, so no network is needed


@given(
    st.lists(
        st.tuples(*[st.floats(-5, 5)] * 2, *[st.floats(0.01, 5)] * 2),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=30, deadline=None)
def test_gaussians_of_diagonal_covariance_have_the_closed_form(axes):
    first_mean, second_mean, first, second = np.array(axes).T
    expected = np.square(first_mean - second_mean).sum() + np.square(first - second).sum()
    rows = gaussian(first_mean, first)
    assert frechet_distance(rows, gaussian(second_mean, second)) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    stored = Statistics(second_mean, np.diag(np.square(second)))
    assert frechet_distance(rows, stored) == pytest.approx(expected, rel=1e-9, abs=1e-6)


@pytest.mark.parametrize(("count", "others", "width"), SIZES)
def test_it_is_the_definition_by_matrix_root(count, others, width):
    rows, other = features(count, width, 0), features(others, width, 1) + 0.1
    assert frechet_distance(rows, other) == pytest.approx(by_matrix_root(rows, other), rel=1e-6)


@pytest.mark.parametrize(("count", "others", "width"), SIZES)
def test_stored_statistics_are_worth_their_features(count, others, width):
    rows, other = features(count, width, 0), features(others, width, 1)
    assert frechet_distance(rows, statistics(other)) == pytest.approx(frechet_distance(rows, other), rel=1e-6)


@pytest.mark.parametrize(("count", "width"), [(10, 40), (60, 12)])
def test_a_set_is_at_no_distance_from_itself(count, width):
    rows = features(count, width, 0)
    assert frechet_distance(rows, rows[::-1]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(("count", "others", "width"), SIZES)
def test_resampled_distances_are_those_of_the_drawn_images(count, others, width, stored):
    rows, reference = features(count, width, 0), features(others, width, 2)
    reference = statistics(reference) if stored else reference
    draws = np.random.default_rng(3).integers(0, count, (5, count))
    draws[0] = np.arange(count)
    draws[1] = 1  # one image alone
    expected = [frechet_distance(rows[draw], reference) for draw in draws]
    np.testing.assert_allclose(list(fid().resampled(rows, reference, draws)), expected, rtol=1e-6, atol=1e-6)


def test_too_few_images_or_another_width_are_refused():
    rows = features(5, 8, 0)
    with pytest.raises(InputError, match="2 images at least"):
        frechet_distance(rows[:1], rows)
    with pytest.raises(InputError, match="2 images at least"):
        frechet_distance(rows, rows[:1])
    with pytest.raises(InputError, match="8 wide and the reference's 6"):
        frechet_distance(rows, features(5, 6, 0))
    with pytest.raises(InputError, match="no covariance"):
        frechet_distance(rows, Statistics(np.zeros(8), -np.eye(8)))
