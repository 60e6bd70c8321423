"""Intervals against simulated coverage, ratios and sums against cases worked out by hand."""

import math

import numpy as np
import pytest

from crosscoder.measure import statistics
from crosscoder.results.table import Estimate


def test_the_value_is_the_mean_of_means_and_not_of_dictionaries():
    found = statistics.two_level_bootstrap([[1.0, 3.0], [8.0]], seed=0, n_draws=50)
    assert found.value == 5
    assert found.draws.min() >= 1
    assert found.draws.max() <= 8
    again = statistics.two_level_bootstrap([[1.0, 3.0], [8.0]], seed=0, n_draws=50)
    np.testing.assert_array_equal(found.draws, again.draws)


def test_one_training_seed_with_equal_dictionaries_has_no_interval():
    assert statistics.two_level_bootstrap([[2.0, 2.0]], seed=0).estimate() == Estimate(2, 2, 2)


def test_small_samples_are_stretched_by_the_t_quantile():
    assert statistics.small_sample_expansion(3) == pytest.approx(math.sqrt(1.5) * 2.919986 / 1.644854, rel=1e-5)
    assert statistics.small_sample_expansion(1) == 1
    found = statistics.two_level_bootstrap([[1.0], [2.0], [3.0]], seed=0)
    plain, stretched = statistics.percentile_interval(found.value, found.draws), found.estimate()
    assert (plain.low, plain.high) == (pytest.approx(4 / 3), pytest.approx(8 / 3))
    assert stretched.high - 2 == pytest.approx((plain.high - 2) * statistics.small_sample_expansion(3))


@pytest.mark.parametrize(("training", "dictionaries"), [(3, 2), (6, 3)])
def test_nine_intervals_in_ten_cover_the_truth(training, dictionaries):
    covered = 0
    for case in range(200):
        rng = np.random.default_rng([case, training])
        groups = 5 + rng.normal(size=(training, 1)) + 0.5 * rng.normal(size=(training, dictionaries))
        found = statistics.two_level_bootstrap(groups.tolist(), seed=case, n_draws=400).estimate()
        covered += found.covers(5.0)
    assert 0.80 <= covered / 200 <= 0.97


def test_signed_ratio_by_hand_and_by_coverage():
    found = statistics.signed_ratio_of(Estimate(0.5, -0.5, 2), Estimate(2, 2, 2))
    assert (found.value, found.low, found.high) == (0.25, pytest.approx(-0.25), pytest.approx(1))
    rng, covered = np.random.default_rng(5), 0
    for _ in range(400):
        top, bottom = 0.3 + 0.2 * rng.standard_normal(), 2 + 0.2 * rng.standard_normal()
        reach = 0.2 * 1.644854
        found = statistics.signed_ratio_of(
            Estimate(top, top - reach, top + reach), Estimate(bottom, bottom - reach, bottom + reach)
        )
        covered += found.covers(0.15)
    assert 0.86 <= covered / 400 <= 0.94
    with pytest.raises(ValueError, match="too near 0"):
        statistics.signed_ratio_of(Estimate(1, 1, 1), Estimate(1, -1, 1.5))


def test_linear_combination_keeps_lopsided_intervals_lopsided():
    found = statistics.linear_combination([(1.0, Estimate(1, 0.7, 3)), (-2.0, Estimate(0.5, 0.3, 0.5))], constant=1)
    assert found.value == 1
    assert found.low == pytest.approx(0.7)
    assert found.high == pytest.approx(1 + math.hypot(2, 0.4))
