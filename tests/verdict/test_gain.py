"""What R owes to unequal explained variance, by hand."""

import pytest

from crosscoder.verdict import gain


class TestEqualVariance:
    A = (gain.Density(0.88, -1.1), gain.Density(0.80, -1.5), gain.Density(0.92, -0.8))
    B = (gain.Density(0.90, -1.1), gain.Density(0.84, -1.4), gain.Density(0.95, -0.8))

    def test_both_are_read_at_the_mean(self):
        # at .89: A is a quarter of the way from -1.1 to -.8, B a sixth of the way from -1.1 to -1.4
        assert gain.equal_variance_shift(self.B, self.A) == pytest.approx(-0.05 - 0.075)
        assert gain.equal_variance_shift(self.A, self.B) == pytest.approx(0.05 + 0.075)

    def test_equal_variances_shift_nothing(self):
        assert gain.equal_variance_shift(self.A, self.A) == 0

    def test_nothing_is_extrapolated(self):
        assert "explain 0.900 to 0.900" in gain.equal_variance_shift(self.B[:1], self.A)
        assert gain.equal_variance_shift(self.B, ()) == "not run"
