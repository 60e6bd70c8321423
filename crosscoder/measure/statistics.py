"""Intervals over seeds, and ratios and sums of estimates.

Every interval covers 90 %. A training seed is the unit of replication: what varies within it (dictionary
seeds) is averaged, never counted as further replicates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from crosscoder.results.table import CONFIDENCE, Estimate, Place, Row

N_DRAWS = 1000


@dataclass(frozen=True)
class Bootstrap:
    """A statistic on the whole data, its resampled values, and how far these are to be stretched.

    `expansion` is the small-sample factor; `draws` are as resampled.
    """

    value: float
    draws: np.ndarray  # [R]
    expansion: float = 1.0

    def stretched(self) -> np.ndarray:
        """The draws with their deviations from the value multiplied by `expansion`, `[R]`."""
        return self.value + self.expansion * (self.draws - self.value)

    def estimate(self) -> Estimate:
        """The value with the central percentile interval of the stretched draws."""
        return percentile_interval(self.value, self.stretched())


def percentile_interval(value: float, draws: np.ndarray) -> Estimate:
    """`value` with the central 90 % of `draws` `[R]` (linear between order statistics)."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(float(value), float(low), float(high))


def small_sample_expansion(n_units: int) -> float:
    """`sqrt(n / (n - 1)) t / z` for n independent units, 1 for a single one.

    Resampled means of n values vary by (n - 1) / n of what they should, and a normal quantile ignores that the variance
    is estimated (Hesterberg 2015, section 5). The factor multiplies deviations, because at three or four seeds no
    percentile of so few distinct resamples reaches far enough.
    """
    if n_units < 2:
        return 1.0
    upper = (1 + CONFIDENCE) / 2
    return math.sqrt(n_units / (n_units - 1)) * float(stats.t.ppf(upper, n_units - 1) / stats.norm.ppf(upper))


def two_level_bootstrap(groups: Sequence[Sequence[float]], *, seed: int, n_draws: int = N_DRAWS) -> Bootstrap:
    """Mean over training seeds of the mean over their dictionary seeds, resampled at both levels.

    `groups[t][d]` belongs to dictionary seed d of training seed t. Drawing both levels with replacement counts the
    variance within a training seed slightly twice (Davison and Hinkley 1997, section 3.8), so intervals err on the wide
    side.
    """
    tables = [np.array(group, dtype=np.float64) for group in groups]
    value = float(np.mean([table.mean() for table in tables]))
    rng = np.random.default_rng([seed, 1])
    chosen = rng.integers(len(groups), size=(len(groups), n_draws))
    draws = np.zeros(n_draws)
    for slot in chosen:
        for t, table in enumerate(tables):
            picks = rng.integers(len(table), size=(len(table), n_draws))
            draws += np.where(slot == t, table[picks].mean(0), 0.0)
    return Bootstrap(value, draws / len(groups), small_sample_expansion(len(groups)))


def statistic_row(at: Place, key: str, value: Bootstrap | Estimate | str) -> Row:
    """A value with its interval, or the reason why there is none."""
    if isinstance(value, str):
        return Row(at, key, None, value)
    return Row(at, key, value.estimate() if isinstance(value, Bootstrap) else value)


def exponentiate(estimate: Estimate | float) -> Estimate:
    """exp of a value and of both ends: from a log-ratio to the ratio. A value alone is its own ends."""
    if not isinstance(estimate, Estimate):
        estimate = Estimate(estimate, estimate, estimate)
    return Estimate(*(math.exp(x) for x in (estimate.value, estimate.low, estimate.high)))


def linear_combination(terms: Sequence[tuple[float, Estimate]], constant: float = 0.0) -> Estimate:
    """`constant + sum of coefficient * estimate` of independent estimates, by the method of variance recovery.

    Each end's distance from the value is the root sum of squares of the terms' distances on the side that moves it
    (Zou and Donner 2008), which keeps lopsided intervals lopsided.
    """
    value = constant + sum(c * e.value for c, e in terms)
    below = math.hypot(*(c * (e.value - (e.low if c > 0 else e.high)) for c, e in terms))
    above = math.hypot(*(c * ((e.high if c > 0 else e.low) - e.value) for c, e in terms))
    return Estimate(value, value - below, value + above)


def signed_ratio_of(numerator: Estimate, denominator: Estimate) -> Estimate:
    """numerator / denominator of independent estimates where the numerator may be 0 or negative.

    The method of variance recovery for ratios (Donner and Zou 2012, equation 9), from intervals alone; for a known
    denominator it divides both ends.
    """
    top, bottom = numerator, denominator
    if not (bottom.low > 0 and bottom.high < 2 * bottom.value):
        raise ValueError(f"the denominator is {bottom:g}; too near 0 to divide")
    product = top.value * bottom.value

    def end(over: float, under: float, sign: int) -> float:
        spread = product**2 - over * under * (2 * top.value - over) * (2 * bottom.value - under)
        return (product + sign * math.sqrt(max(spread, 0.0))) / (under * (2 * bottom.value - under))

    low, high = end(top.low, bottom.high, -1), end(top.high, bottom.low, 1)
    return Estimate(top.value / bottom.value, low, high)
