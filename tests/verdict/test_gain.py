"""X, the gain of joint counting, what R owes to unequal explained variance, and the residual, by hand."""

import math

import numpy as np
import pytest

from crosscoder.measure.statistics import Bootstrap
from crosscoder.results.table import Estimate
from crosscoder.verdict.evidence import (
    Density,
    Point,
    count_gain,
    cross_layer_excess,
    equal_variance_shift,
    identity_residual,
)


class TestEqualVariance:
    A = (Density(0.88, -1.1), Density(0.80, -1.5), Density(0.92, -0.8))
    B = (Density(0.90, -1.1), Density(0.84, -1.4), Density(0.95, -0.8))

    def test_both_are_read_at_the_mean(self):
        # at .89: A is a quarter of the way from -1.1 to -.8, B a sixth of the way from -1.1 to -1.4
        assert equal_variance_shift(self.B, self.A) == pytest.approx(-0.05 - 0.075)
        assert equal_variance_shift(self.A, self.B) == pytest.approx(0.05 + 0.075)

    def test_equal_variances_shift_nothing(self):
        assert equal_variance_shift(self.A, self.A) == 0

    def test_nothing_is_extrapolated(self):
        assert "explain 0.900 to 0.900" in equal_variance_shift(self.B[:1], self.A)
        assert equal_variance_shift(self.B, ()) == "not run"


def test_count_gain_by_hand():
    bank = [Point(20, 0.8), Point(80, 0.95)]
    assert count_gain(Point(20, 0.8), bank) == pytest.approx(0)
    assert count_gain(Point(10, 0.95), bank) == pytest.approx(math.log(8))
    assert count_gain(Point(10, 0.875), bank) == pytest.approx(math.log(4))  # halfway
    assert "outside" in count_gain(Point(10, 0.97), bank)


def test_count_gain_is_near_0_between_a_bank_with_too_few_features_and_one_with_enough():
    """Six features of one layer each: a bank with 4.4 of them explains that share, one with 6.5 everything."""
    bank = [Point(4.4, 0.82), Point(6.5, 0.9999)]
    assert abs(count_gain(Point(6.0, 0.98), bank)) < 0.05


def test_cross_layer_excess_takes_the_larger_null():
    low, high = Bootstrap(0.1, np.full(50, 0.1)), Bootstrap(0.3, np.linspace(0.2, 0.4, 50))
    found = cross_layer_excess(Bootstrap(0.5, np.full(50, 0.5)), low, high)
    assert found.value == pytest.approx(0.2)
    np.testing.assert_allclose(found.draws, 0.5 - high.draws)


def test_identity_residual():
    """alpha + 2 gamma - 2, at one end of its line."""
    found = identity_residual(Estimate(1.0, 0.9, 1.1), Estimate(0.5, 0.4, 0.6))
    assert found.value == pytest.approx(0)
    assert (found.low, found.high) == (pytest.approx(-math.hypot(0.1, 0.2)), pytest.approx(math.hypot(0.1, 0.2)))
    assert identity_residual(None, Estimate(0.5, 0.4, 0.6)) is None
