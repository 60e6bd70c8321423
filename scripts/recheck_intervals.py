"""Intervals over trainings, with the text's own variance, written again from their definitions.

`recheck.py` says what for. A number of each training is a group, `{training: number}`, mostly of logs; or an array: of
the whole text, then without each of its documents. None stands for what cannot be read. Nothing is imported from the
library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

Group = dict[int, Any] | None
TILT = 0.7
"""By how much documents' weights of 1 are moved, times the square root of 2."""
FEWEST_DOCUMENTS, MOST_GROUPS = 30, 64
"""Of documents, which are left out one group at a time where there are more."""


class Interval(NamedTuple):
    """A value and its 90 % interval."""

    value: float
    low: float
    high: float


class Term(NamedTuple):
    """`constant + sum of coefficient * mean of a group`, or of the difference to a null's group."""

    groups: Sequence[tuple[float, Group]]
    constant: float = 0.0
    nulls: Sequence[Group] = ()
    """Of the groups in their order, where this is beyond a null."""
    alike: bool = False
    """Trainings may all have the same number, which then has no variance over them."""

    @property
    def interval(self) -> Interval | None:
        """Welch's; None where a group has fewer than two trainings, or no spread."""
        value, variances, moved = self.constant, list[tuple[float, float]](), np.zeros(0)
        for (coefficient, group), null in zip(self.groups, self.nulls or repeat(None)):
            columns = []
            for sign, one in ((coefficient, group), (-coefficient, null))[: 1 + bool(self.nulls)]:
                each = np.array([] if one is None else [np.atleast_1d(x) for x in one.values()])
                x = each[:, 0] if len(each) else each
                if one is None or len(x) < 2 or not np.isfinite(each).all() or (np.ptp(x) == 0 and not self.alike):
                    return None
                value += sign * float(x.mean())
                columns.append(dict(zip(one, (sign * x / len(x)).tolist())) if np.ptp(x) else {})
                if each.shape[1] > 1:  # documents are shared by all groups: their part is that of the combination
                    moved = (moved if len(moved) else 0) + sign * (each[:, 1:] - each[:, :1]).mean(0)
            variances += over_trainings(columns)
        if n := len(moved):
            variances.append(((n - 1) / n * float(((moved - moved.mean()) ** 2).sum()), n - 1))
        return t_interval(value, variances) if variances else Interval(value, value, value)

    def of(self, state: str) -> Interval | float | None:
        """The interval; of a null with one training the value alone."""
        known = [(c, [float(np.ravel(x)[0]) for x in group.values()]) for c, group in self.groups if group]
        if state == "trained" or len(known) < len(self.groups) or min(len(x) for _, x in known) > 1:
            return self.interval
        return self.constant + sum(c * sum(x) / len(x) for c, x in known)

    def less(self, other: Term) -> Term:
        """This less a null's, whose groups are in the same order and mostly of the same trainings."""
        return Term(self.groups, self.constant - other.constant, [group for _, group in other.groups])


def over_trainings(columns: Sequence[dict[int, float]]) -> list[tuple[float, float]]:
    """Of sums over trainings, a column for each group: variances with their degrees of freedom.

    A training in two columns counts once, by the sum of both, if there are two such to see how that varies.
    """
    both = set(columns[0]).intersection(*columns[1:]) if len(columns) > 1 else set()
    if len(both) < 2:
        both = set()
    found = [(len(both), [sum(column[t] for column in columns) for t in both])] if both else []
    found += [(len(column) - len(both), list(column.values())) for column in columns]
    return [(n * float(np.var(seen, ddof=1)), len(seen) - 1) for n, seen in found if n]


def over(top: Interval, below: Interval) -> Interval | None:
    """A ratio with its interval from those of both (Donner and Zou 2012, equation 9)."""
    if not 0 < below.low <= below.high < 2 * below.value:
        return None
    product = top.value * below.value

    def end(t: float, b: float, sign: int) -> float:
        inner = product**2 - t * b * (2 * top.value - t) * (2 * below.value - b)
        return (product + sign * math.sqrt(max(0.0, inner))) / (b * (2 * below.value - b))

    return Interval(top.value / below.value, end(top.low, below.high, -1), end(top.high, below.low, 1))


def total(terms: Sequence[tuple[float, Interval]], constant: float = 0.0) -> Interval:
    """A sum with its interval from those of its terms (Zou and Donner 2008)."""
    value = constant + sum(c * one.value for c, one in terms)
    ends = [sorted((c * (one.low - one.value), c * (one.high - one.value))) for c, one in terms]
    return Interval(
        value, value - math.hypot(*(low for low, _ in ends)), value + math.hypot(*(high for _, high in ends))
    )


def jackknife(
    statistic: Callable[[list[int], list[int]], float],
    sizes: tuple[int, int],
    text: tuple[float, float] | None,
) -> Interval:
    """A statistic of the trainings of two shapes; each left out once, and a t interval of both shapes' variances and
    the text's."""
    whole = [list(range(size)) for size in sizes]
    variances = [] if text is None else [text]
    for side, size in enumerate(sizes):
        left = [[[t for t in one if t != gone or side != s] for s, one in enumerate(whole)] for gone in whole[side]]
        values = np.array([statistic(*both) for both in left])
        variances.append(((size - 1) / size * float(((values - values.mean()) ** 2).sum()), size - 1))
    return t_interval(statistic(*whole), variances)


def t_interval(value: float, variances: Sequence[tuple[float, float]]) -> Interval:
    """The 90 % interval of a sum of independent variances with their degrees of freedom, by Satterthwaite's t."""
    total = sum(v for v, _ in variances)
    freedom = total**2 / sum(v**2 / f for v, f in variances)
    reach = float(stats.t.ppf(0.95, freedom)) * float(np.sqrt(total))
    return Interval(value, value - reach, value + reach)


def text_variance(statistic: Callable[[np.ndarray], float], n: int) -> tuple[float, float]:
    """The variance that a statistic of weighted documents owes to the n of them, and its degrees of freedom.

    Weights are 1 plus or minus each cosine wave of n points but the constant one, of mean square `TILT` squared; half
    the difference of what the statistic is on both sides, squared and summed over waves, is `TILT^2 (n - 1)` times it.
    """
    place, total = np.arange(n) + 0.5, 0.0
    for wave in range(1, n):
        tilt = TILT * math.sqrt(2) * np.cos(math.pi * wave * place / n)
        up, down = statistic(1 + tilt), statistic(1 - tilt)
        total = total + ((up - down) / 2) ** 2
    return float(total / TILT**2 / (n - 1)), n - 1
