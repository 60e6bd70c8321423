"""An estimate refuses what cannot be an interval, and says where it lies."""

import pytest

from crosscoder.results.table import Estimate


def test_estimates_refuse_to_be_the_wrong_way_round():
    with pytest.raises(ValueError, match="from 2 down to 1"):
        Estimate(1.5, 2, 1)
    with pytest.raises(ValueError, match="confidence is 90"):
        Estimate(1, 1, 1, 90)
    assert Estimate(1, 0.8, 1.25).inside(0.8, 1.25)
    assert not Estimate(1, 0.79, 1.25).inside(0.8, 1.25)
