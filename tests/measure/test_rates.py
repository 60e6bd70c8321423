"""Scatter of firing rates against planted shapes, trainings and features."""

import math

import numpy as np
import pytest
from scipy import sparse

from crosscoder.measure import rates
from crosscoder.measure.matching import activation_correlation, mutual_nearest_pairs
from crosscoder.measure.rates import RateSpread
from crosscoder.measure.welch import Variance, interval

CASES = 300
BINOMIAL = 3 * math.sqrt(0.09 / CASES)


def test_median_and_sd_of_matched_features_only():
    p_first, p_second = np.full(50, 0.1), np.concatenate([np.full(20, 0.05), np.full(20, 0.2), [0.4]])
    p_first[45:] = 0.7  # unmatched
    order = np.random.default_rng(0).permutation(41)
    pairs = np.stack([np.arange(41), order], axis=1)
    found = rates.rate_spread(p_first, p_second, pairs)
    logs = np.repeat(np.log([0.5, 2, 4]), [20, 20, 1])
    assert found[:3] == pytest.approx((41, math.log(2), logs.std(ddof=1)))
    uneven = rates.rate_spread(np.arange(1, 42) / 100, p_second, pairs)
    assert uneven.sd == pytest.approx(np.log(p_second[order] / np.arange(1, 42)).std(ddof=1))
    assert rates.rate_spread(p_first, p_second, pairs[:29]).startswith("29 features match")
    with pytest.raises(ValueError, match="rate of 0"):
        rates.rate_spread(p_first * 0, p_second, pairs)


def test_rates_halved_in_the_second_shape_are_found_through_the_match():
    """B's feature fires on every second of its token of A, which is matched at a correlation of .7."""
    rng = np.random.default_rng(0)
    fires = rng.random((20_000, 40)) < 0.1
    a = sparse.csc_array(fires.astype(float))
    b = sparse.csc_array((fires & (rng.random(fires.shape) < 0.55)).astype(float))
    pairs = mutual_nearest_pairs(activation_correlation(a, b), 0.7)
    found = rates.rate_spread(a.mean(0), b.mean(0), pairs)
    assert math.exp(found.median) == pytest.approx(0.55, abs=0.02)


def test_a_match_hides_the_scatter_of_rates():
    """Nested activity, the kindest case: twice the scatter is hardly more among those that match."""
    rng, seen = np.random.default_rng(0), {}
    for sd in (0.6, 1.2):
        base = rng.random((10_000, 200))
        p = np.exp(rng.normal(-3.2, 0.5, 200))
        fires = [base < p, base < np.clip(p * np.exp(rng.normal(0, sd, 200)), 0.002, 0.6)]
        value = rng.exponential(size=base.shape) + 0.2
        pairs = mutual_nearest_pairs(activation_correlation(*(sparse.csc_array(one * value) for one in fires)), 0.7)
        seen[sd] = rates.rate_spread(fires[0].mean(0), fires[1].mean(0), pairs).sd
    assert seen[1.2] / seen[0.6] == pytest.approx(1, abs=0.2)


def study(rng, n, *, shift, extra):
    """Spreads of n trainings of A and of B; each training has its own scatter and B a further one of its shape."""
    rate_F = rng.normal(-4, 1, 400)
    scatter = lambda: np.exp(rng.normal(math.log(0.3), 0.3)) * rng.standard_normal(400)
    a = [np.exp(rate_F + scatter()) for _ in range(n)]
    drift = rng.normal(0, extra, 400)
    b = [np.exp(rate_F + rng.normal(shift, 0.1) + drift + scatter()) for _ in range(n)]
    pairs = np.repeat(np.arange(400)[:, None], 2, axis=1)
    between = [[rates.rate_spread(x, y, pairs) for y in b] for x in a]
    return between, [[rates.rate_spread(x, y, pairs) for y in a[i + 1 :]] for i, x in enumerate(a)]


@pytest.mark.parametrize("n", [3, 5])
def test_nine_in_ten_intervals_hold_the_planted_shift_and_no_more_dispersion(n):
    rng, covered = np.random.default_rng([1, n]), np.zeros(2)
    for _ in range(CASES):
        between, within = study(rng, n, shift=-0.3, extra=0.0)
        covered += (
            rates.median_log_rate(between).covers(-0.3),
            rates.dispersion_ratio(between, within).covers(1.0),
        )
    assert (covered / CASES >= 0.9 - BINOMIAL).all()
    assert (covered / CASES <= 0.97).all()


def test_a_scatter_of_the_shape_widens_the_dispersion():
    between, within = study(np.random.default_rng(2), 6, shift=0.0, extra=0.6)
    found = rates.dispersion_ratio(between, within)
    assert found.low > 1.25
    assert found.value == pytest.approx(math.hypot(0.3, 0.3, 0.6) / math.hypot(0.3, 0.3), rel=0.25)


def test_a_training_is_left_out_with_all_its_pairs():
    rng = np.random.default_rng(4)
    between, within = (
        np.exp(rng.normal(size=(3, 2))),
        {(i, j): np.exp(rng.normal()) for i, j in ((0, 1), (0, 2), (1, 2))},
    )

    def log_ratio(a, b):
        own = [math.log(sd) for pair, sd in within.items() if set(pair) <= set(a)]
        return np.log(between[np.ix_(a, b)]).mean() - np.mean(own)

    left = [log_ratio([i for i in range(3) if i != out], [0, 1]) for out in range(3)]
    left_b = [log_ratio([0, 1, 2], [out]) for out in range(2)]
    parts = [Variance(2 * np.var(left), 2), Variance(np.var(left_b), 1)]
    wanted = interval(log_ratio([0, 1, 2], [0, 1]), parts)
    spreads = [[RateSpread(40, 0.0, sd) for sd in row] for row in between]
    own = [[RateSpread(40, 0.0, within[i, j]) for j in range(i + 1, 3)] for i in range(3)]
    found = rates.dispersion_ratio(spreads, own)
    assert np.log([found.value, found.low, found.high]) == pytest.approx([wanted.value, wanted.low, wanted.high])


def test_what_is_missing_is_said():
    one = RateSpread(40, 0.1, 0.5)
    assert rates.median_log_rate([[one, one], [one, "12 features match"]]) == "12 features match"
    assert rates.median_log_rate([]) == "not run"
    assert rates.median_log_rate([[one, one]]).startswith("1 and 2 trainings")
    assert rates.dispersion_ratio([[one] * 2] * 2, [[one], []]).startswith("2 and 2 trainings; an interval needs 3")
    with pytest.raises(ValueError, match=r"\[2, 2\] pairs within 2"):
        rates.dispersion_ratio([[one] * 2] * 2, [[one] * 2] * 2)
    assert "no variance" in rates.median_log_rate([[one] * 2] * 2)


def test_a_text_whose_documents_move_all_rates_of_a_shape_is_in_the_interval():
    """Documents in which B's features fire more or less often than A's, alike in all trainings; the truth is 0."""
    cases, covered, n = 150, np.zeros(2), 3
    pairs = np.repeat(np.arange(60)[:, None], 2, axis=1)
    for case in range(cases):
        rng = np.random.default_rng([case, 3])
        of_text_E1, rate_F = rng.normal(0, 0.4, (31, 1)), np.exp(rng.normal(4, 0.5, 60))
        fired = [
            [rng.poisson(rate_F * np.exp(sign * of_text_E1 / 2 + rng.normal(0, 0.2, 60))) for _ in range(n)]
            for sign in (-1, 1)
        ]
        for i, known in enumerate((True, False)):
            between = [
                [rates.rate_spread(x.sum(0), y.sum(0), pairs, (x, y) if known else None) for y in fired[1]]
                for x in fired[0]
            ]
            covered[i] += rates.median_log_rate(between).covers(0.0)
    assert 0.85 <= covered[0] / cases <= 0.97
    assert covered[1] / cases < 0.6
    x, y = fired[0][0], fired[1][0]
    left_E2 = rates.rate_spread(x.sum(0), y.sum(0), pairs, (x, y)).left_E2
    for document in (0, 30):  # features in plenty: nearly what is left without the document
        kept = np.arange(31) != document
        alone = rates.rate_spread(x[kept].sum(0), y[kept].sum(0), pairs)
        assert left_E2[document] == pytest.approx([alone.median, math.log(alone.sd)], abs=0.02)
