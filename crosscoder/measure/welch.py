"""Intervals over training seeds by Welch's and Satterthwaite's t, on logs; the text's variance by a jackknife.

A training seed is the unit of replication. Dictionary seeds are averaged on logs first, and what is measured of one
training (a load, the loads of its banks) is combined within it: only groups of different trainings are independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from crosscoder.results.table import CONFIDENCE, Estimate

FEWEST_DOCUMENTS = 30


class Variance(NamedTuple):
    """A squared standard error, and its degrees of freedom."""

    value: float
    freedom: float


class GroupMean(NamedTuple):
    """The mean of a group of trainings, and its independent variances: between trainings, and of the text."""

    value: float
    variances: tuple[Variance, ...]


Group = GroupMean | str
"""Or why there is none."""


def training_logs(groups: Sequence[Sequence[float]]) -> np.ndarray:
    """ln of each training, the mean over its dictionaries' logs, `[trainings]`; `groups[t]` are those of training t.

    Raises:
        ValueError: a training has no dictionary, or a number is not positive and finite.
    """
    for number, values in enumerate(groups):
        if len(values) == 0 or not all(0 < value < math.inf for value in values):
            raise ValueError(f"training {number} has {list(values)}, expected one number or more, each above 0")
    return np.array([np.log(values).mean() for values in groups])


def combine_within(terms: Sequence[tuple[float, Sequence[float] | np.ndarray]]) -> np.ndarray:
    """`sum of coefficient * value` training by training, `[trainings]`, of quantities of the same trainings.

    What is measured of one training varies together, so a sum of such quantities has no interval from those of its
    parts: combine first, then take the mean of the group.

    Raises:
        ValueError: the quantities are not of equally many trainings.
    """
    if len({len(values) for _, values in terms}) != 1:
        raise ValueError(f"the quantities are of {[len(values) for _, values in terms]} trainings; give all of each")
    return sum((c * np.asarray(values, dtype=np.float64) for c, values in terms), np.zeros(len(terms[0][1])))


def group_mean(value_T: Sequence[float] | np.ndarray, *, text: Variance | str | None = None) -> Group:
    """The mean over trainings with its variance `s^2 / n`, n - 1 degrees of freedom; `text` is a further variance.

    A reason where fewer than two trainings were run, where all are equal (copies, not replicates), or where there is
    one for `text`.
    """
    values = np.asarray(value_T, dtype=np.float64)
    n = len(values)
    if n < 2:
        return f"{n} training{'s' * (n != 1)}; an interval over trainings needs two"
    if not np.isfinite(values).all():
        return f"not every training has a finite value: {values.tolist()}"
    if np.ptp(values) == 0:
        return f"all {n} trainings have the same value, {values[0]:g}: copies say nothing of how trainings vary"
    if isinstance(text, str):
        return text
    between = Variance(float(values.var(ddof=1)) / n, n - 1)
    return GroupMean(float(values.mean()), (between,) if text is None else (between, text))


def contrast(
    terms: Sequence[tuple[float, Group]], constant: float = 0.0, *, text: Variance | str | None = None
) -> Estimate | str:
    """`constant + sum of coefficient * mean` of groups of different trainings, or the first reason why there is none.

    The variance is the sum of `coefficient^2 * variance` over all parts, its degrees of freedom Satterthwaite's (1946),
    `(sum v)^2 / sum (v^2 / freedom)`; for two groups this is Welch's (1947) interval. Groups that were read on the same
    text share its error: give that of the whole combination as `text`, not that of each group.
    """
    if missing := [one for one in (*(group for _, group in terms), text) if isinstance(one, str)]:
        return missing[0]
    known = [(c, group) for c, group in terms if isinstance(group, GroupMean)]
    variances = [Variance(c * c * v, freedom) for c, group in known for v, freedom in group.variances]
    if isinstance(text, Variance):
        variances.append(text)
    return interval(constant + math.fsum(c * group.value for c, group in known), variances)


def interval(value: float, variances: Sequence[Variance]) -> Estimate | str:
    """`value` with the 90 % t interval of a sum of independent variances, or why there is none."""
    total = math.fsum(v for v, _ in variances)
    if not total > 0:
        return "no variance is known, so there is no interval"
    freedom = total**2 / math.fsum(v**2 / f for v, f in variances)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(total)
    return Estimate(value, value - reach, value + reach)


def difference(second: Group, first: Group, *, text: Variance | str | None = None) -> Estimate | str:
    """Mean of the second group less that of the first: of logs, the log of a ratio."""
    return contrast([(1.0, second), (-1.0, first)], text=text)


def document_jackknife(sums_EQ: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> Variance | str:
    """The variance that a statistic owes to the documents it was read on, by leaving out one at a time.

    `sums_EQ` are sums of Q token quantities over each of E real documents (`statistics.document_sums`; blocks of one
    document are not documents), and `statistic` maps totals `[R, Q]` to `[R]`, such as ln of a ratio of two. For a mean
    over trainings, or a difference of two, put the sums of all of them side by side: they share the documents.
    `(E - 1) / E sum (left_e - mean)^2` with E - 1 degrees of freedom (Efron and Stein 1981). A reason below
    `FEWEST_DOCUMENTS`, or where the statistic is not known without one of them.
    """
    sums = np.asarray(sums_EQ, dtype=np.float64)
    n = len(sums)
    if n < FEWEST_DOCUMENTS:
        return f"{n} documents, of which the text's variance needs {FEWEST_DOCUMENTS}"
    left_E = np.asarray(statistic(sums.sum(0) - sums))
    if left_E.shape != (n,):
        raise ValueError(f"the statistic gives {left_E.shape} for totals {sums.shape}, expected {(n,)}")
    if not np.isfinite(left_E).all():
        return f"without document {int(np.flatnonzero(~np.isfinite(left_E))[0])} the statistic is not finite"
    return Variance(float((n - 1) / n * np.square(left_E - left_E.mean()).sum()), n - 1)
