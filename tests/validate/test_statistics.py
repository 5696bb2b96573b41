"""The statistics: known values, intervals that hold what they promise, prompts resampled with all their images."""

import numpy as np
import pytest
from scipy import stats

from surgery.validate.statistics import draws_of_images, mean_interval, normal_interval, paired


def test_means_wins_and_ties():
    found = paired([0, 0, 1, 1, 2], [1, 0, 0, 3, 3], range(5))
    assert (found.base, found.patched, found.difference) == (0.8, 1.4, pytest.approx(0.6))
    assert (found.win_rate, found.tie_rate, found.n, found.groups, found.decided) == (0.6, 0.2, 5, 5, 4)
    assert paired([0, 1], [1, 1], range(2), higher_is_better=False).win_rate == 0
    assert paired([1, 1, 1], [0, 1, 0], range(3), higher_is_better=False).win_rate == pytest.approx(2 / 3)


def test_prompts_whose_images_outweigh_each_other_are_not_decided():
    found = paired([0, 0, 0, 0, 0], [1, -1, 2, 0, -3], [7, 7, 9, 9, 4])
    assert (found.groups, found.decided) == (3, 2)


def test_the_same_values_always_give_the_same_interval():
    values = np.random.default_rng(1).normal(size=50)
    assert mean_interval(values, range(50)) == mean_interval(values, range(50))
    assert mean_interval(np.zeros(9), range(9)) == (0, 0)


@pytest.mark.parametrize("count", [8, 30])
def test_the_interval_holds_the_mean_as_often_as_it_says(count):
    random = np.random.default_rng(count)
    held = 0
    for _ in range(400):
        low, high = mean_interval(random.normal(1.0, 2.0, size=count), np.arange(count))
        held += low <= 1.0 <= high
    assert 0.92 <= held / 400 <= 0.985  # 95%, give or take 3 standard errors


def test_images_of_one_prompt_count_as_one_observation():
    """Four copies of each value tell no more than one, though there are four times as many pairs."""
    values = np.random.default_rng(0).normal(size=40)
    single = mean_interval(values, np.arange(40))
    copied = mean_interval(np.tile(values, 4), np.tile(np.arange(40), 4))
    naive = mean_interval(np.tile(values, 4), np.arange(160))
    assert np.allclose(single, copied)
    assert np.ptp(naive) < 0.6 * np.ptp(copied)


def test_few_groups_widen_the_interval():
    values = np.array([0.9, 1.0, 1.1, 0.8, 1.2, 1.0])
    low, high = mean_interval(values, range(6))
    assert high - low > 2 * 1.96 * values.std() / 6**0.5


def test_the_percentiles_for_six_groups_are_those_of_the_expanded_interval():
    values = np.array([0.9, 1.0, 1.1, 0.8, 1.2, 1.05])
    means = values[np.random.default_rng(0).integers(6, size=(10_000, 6))].mean(1)
    tail = stats.norm.cdf(np.sqrt(6 / 5) * stats.t.ppf(0.025, 5))
    assert mean_interval(values, range(6)) == pytest.approx(np.quantile(means, [tail, 1 - tail]))


def test_draws_of_many_groups_are_made_in_parts_and_none_is_left_out():
    values = np.random.default_rng(2).normal(size=450)  # 4444 draws at once, so three parts of 10,000
    low, high = mean_interval(values, range(450))
    spread = 1.96 * values.std(ddof=1) / 450**0.5
    assert low == pytest.approx(values.mean() - spread, abs=0.01)
    assert high == pytest.approx(values.mean() + spread, abs=0.01)


def test_the_normal_interval_lies_around_the_value_not_around_the_draws():
    draws = 10 + np.random.default_rng(0).normal(size=20_000)  # biased upwards, as resampled FIDs are
    low, high = normal_interval(3.0, draws)
    assert low == pytest.approx(3 - 1.96, abs=0.03) and high == pytest.approx(3 + 1.96, abs=0.03)


def test_draws_keep_the_images_of_a_prompt_together():
    draws = draws_of_images([0, 1, 2, 0, 1, 2], 200)
    assert draws.shape == (200, 6) and draws.min() == 0 and draws.max() == 5
    counts = np.stack([np.bincount(draw, minlength=6) for draw in draws])
    assert (counts[:, :3] == counts[:, 3:]).all()
    assert abs(counts.mean() - 1) < 1e-9 and (counts == 0).any() and (counts > 1).any()


def test_draws_of_prompts_with_unequal_numbers_of_images_have_the_same_length():
    assert draws_of_images([0, 0, 0, 1, 2], 10).shape == (10, 5)
