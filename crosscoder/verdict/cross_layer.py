"""X, the genuinely cross-layer share beyond both nulls, with its interval."""

from __future__ import annotations

import numpy as np

from crosscoder.measure.statistics import Bootstrap


def excess_bootstrap(trained: Bootstrap, shuffled: Bootstrap, untrained: Bootstrap) -> Bootstrap:
    """X = share - larger of both nulls, draw by draw, each share stretched by its own small-sample factor.

    The larger of two noisy nulls is too large on average, so X errs on the low side, and below 0 where nothing differs.

    Raises:
        ValueError: numbers of draws differ.
    """
    numbers = {len(side.draws) for side in (trained, shuffled, untrained)}
    if len(numbers) != 1:
        raise ValueError(f"the three shares have {sorted(numbers)} draws; resample all equally often")
    null = np.maximum(shuffled.stretched(), untrained.stretched())
    return Bootstrap(trained.value - max(shuffled.value, untrained.value), trained.stretched() - null)
