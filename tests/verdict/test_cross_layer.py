"""X against the larger of its two nulls, by hand."""

import numpy as np
import pytest

from crosscoder.measure.statistics import Bootstrap
from crosscoder.verdict.cross_layer import excess_bootstrap


def test_excess_takes_the_larger_null():
    low, high = Bootstrap(0.1, np.full(50, 0.1)), Bootstrap(0.3, np.linspace(0.2, 0.4, 50))
    found = excess_bootstrap(Bootstrap(0.5, np.full(50, 0.5)), low, high)
    assert found.value == pytest.approx(0.2)
    np.testing.assert_allclose(found.draws, 0.5 - high.draws)
    with pytest.raises(ValueError, match="draws"):
        excess_bootstrap(low, high, Bootstrap(0.1, np.zeros(3)))
