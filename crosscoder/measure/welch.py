"""Intervals over training seeds by Welch's and Satterthwaite's t, on logs; the text's variance by a jackknife.

A training seed is the unit of replication. Dictionary seeds are averaged on logs first, and what is measured of one
training (a load, the loads of its banks) is combined within it: only groups of different trainings are independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    """The mean of a group of trainings with its variance between them, and the mean without each document."""

    value: float
    variances: tuple[Variance, ...]
    left_E: np.ndarray | None = None
    """Where one of the text's documents is left out, `[documents]`; None: not read on the text, or on too few."""


Group = GroupMean | str
"""Or why there is none."""


def group_mean(value_T: Sequence[float] | np.ndarray, left_TE: np.ndarray | None = None) -> Group:
    """The mean over trainings with its variance `s^2 / n`, n - 1 degrees of freedom.

    left_TE: the same without each of the text's documents, `[trainings, documents]`.

    A reason where fewer than two trainings were run, or where all are equal (copies, not replicates).
    """
    values = np.asarray(value_T, dtype=np.float64)
    n = len(values)
    if n < 2:
        return f"{n} training{'s' * (n != 1)}; an interval over trainings needs two"
    if not np.isfinite(values).all():
        return f"not every training has a finite value: {values.tolist()}"
    if np.ptp(values) == 0:
        return f"all {n} trainings have the same value, {values[0]:g}: copies say nothing of how trainings vary"
    between = Variance(float(values.var(ddof=1)) / n, n - 1)
    return GroupMean(float(values.mean()), (between,), None if left_TE is None else left_TE.mean(0))


def contrast(terms: Sequence[tuple[float, Group]], constant: float = 0.0) -> Estimate | str:
    """`constant + sum of coefficient * mean` of groups of different trainings, or the first reason why there is none.

    The variance is the sum of `coefficient^2 * variance` over all groups, its degrees of freedom Satterthwaite's
    (1946), `(sum v)^2 / sum (v^2 / freedom)`; for two groups this is Welch's (1947) interval. Groups that were read on
    the same documents share the text's error: its variance is that of the whole combination.

    Raises:
        ValueError: groups were read on texts of unequally many documents.
    """
    if missing := [group for _, group in terms if isinstance(group, str)]:
        return missing[0]
    known = [(c, group) for c, group in terms if isinstance(group, GroupMean)]
    variances = [Variance(c * c * v, freedom) for c, group in known for v, freedom in group.variances]
    left = [c * (group.left_E - group.value) for c, group in known if group.left_E is not None]
    if len({one.shape for one in left}) > 1:
        raise ValueError(f"groups were read on {[len(one) for one in left]} documents, expected the same text")
    if left:
        text = document_jackknife(np.sum(left, axis=0))
        if isinstance(text, str):
            return text
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


def difference(second: Group, first: Group) -> Estimate | str:
    """Mean of the second group less that of the first: of logs, the log of a ratio."""
    return contrast([(1.0, second), (-1.0, first)])


def document_jackknife(left_E: np.ndarray) -> Variance | str:
    """The variance that a statistic owes to the E documents it was read on; `left_E` is it without each of them.

    `(E - 1) / E sum (left_e - mean)^2` with E - 1 degrees of freedom (Efron and Stein 1981). Documents are real ones:
    blocks of one are alike. A reason below `FEWEST_DOCUMENTS`, or where the statistic is not known without one of them.
    """
    n = len(left_E)
    if n < FEWEST_DOCUMENTS:
        return f"{n} documents, of which the text's variance needs {FEWEST_DOCUMENTS}"
    if not np.isfinite(left_E).all():
        return f"without document {int(np.flatnonzero(~np.isfinite(left_E))[0])} the statistic is not finite"
    return Variance(float((n - 1) / n * np.square(left_E - left_E.mean()).sum()), n - 1)
