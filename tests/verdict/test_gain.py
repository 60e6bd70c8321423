"""X, the gain of joint counting, what R owes to unequal explained variance, and the residual, by hand."""

import math

import numpy as np
import pytest

from crosscoder.measure.statistics import Bootstrap
from crosscoder.results.table import Estimate
from crosscoder.verdict.evidence import (
    Point,
    count_gain,
    cross_layer_excess,
    equal_variance_shift,
    identity_residual,
    point_of_l0,
)


class TestEqualVariance:
    A = (Point(0.88, -1.1), Point(0.80, -1.5), Point(0.92, -0.8))
    B = (Point(0.90, -1.1), Point(0.84, -1.4), Point(0.95, -0.8))

    def test_both_are_read_at_the_mean(self):
        # at .89: A is a quarter of the way from -1.1 to -.8, B a sixth of the way from -1.1 to -1.4
        assert equal_variance_shift(self.B, self.A) == pytest.approx(-0.05 - 0.075)
        assert equal_variance_shift(self.A, self.B) == pytest.approx(0.05 + 0.075)

    def test_equal_variances_shift_nothing(self):
        assert equal_variance_shift(self.A, self.A) == 0

    def test_nothing_is_extrapolated(self):
        assert "explain 0.900, and" in equal_variance_shift(self.B[:1], self.A)
        assert equal_variance_shift(self.B, ()) == "not run"


def test_count_gain_by_hand():
    bank = [point_of_l0(0.8, 20), point_of_l0(0.95, 80)]
    assert count_gain(point_of_l0(0.8, 20), bank) == pytest.approx(0)
    assert count_gain(point_of_l0(0.95, 10), bank) == pytest.approx(math.log(8))
    assert count_gain(point_of_l0(0.875, 10), bank) == pytest.approx(math.log(4))  # halfway
    assert "outside what the banks do (0.800, 0.950)" in count_gain(point_of_l0(0.97, 10), bank)
    assert count_gain(point_of_l0(0.0, 0), bank) == "a dictionary without active features"


def test_count_gain_is_near_0_between_a_bank_with_too_few_features_and_one_with_enough():
    """Six features of one layer each: a bank with 4.4 of them explains that share, one with 6.5 everything."""
    bank = [point_of_l0(0.82, 4.4), point_of_l0(0.9999, 6.5)]
    assert abs(count_gain(point_of_l0(0.98, 6.0), bank)) < 0.05


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
