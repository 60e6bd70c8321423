"""Intervals over training seeds by Welch's and Satterthwaite's t, on logs; the text's variance by a jackknife.

A training seed is the unit of replication. Dictionary seeds are averaged on logs first, and what is measured of one
training (a load, the loads of its banks) is combined within it: only groups of different trainings are independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import fft, stats

from crosscoder.results.table import CONFIDENCE, Estimate

FEWEST_DOCUMENTS = 30
TILT = 0.7
"""Root mean square by which weights of documents are moved from 1; at .707 the smallest would be 0."""


class Variance(NamedTuple):
    """A squared standard error, and its degrees of freedom; NaN and 0 where one training was run."""

    value: float
    freedom: float


class GroupMean(NamedTuple):
    """The mean of a group of trainings with its variance between them, and the mean without each document."""

    value: float
    variances: tuple[Variance, ...]
    left_E: np.ndarray | None = None
    """Where one of the text's documents is left out, `[documents]`; None: not read on the text, or on too few."""
    each: Mapping[int, float] = {}
    """The values by training, where it is known which these are."""


Group = GroupMean | str
"""Or why there is none."""


def group_mean(
    value_T: Sequence[float] | np.ndarray, left_TE: np.ndarray | None = None, trainings: Sequence[int] = ()
) -> Group:
    """The mean over trainings with its variance `s^2 / n`, n - 1 degrees of freedom.

    left_TE: the same without each of the text's documents, `[trainings, documents]`. trainings: which they are.

    One training has a mean, and no interval. A reason where there is none, or where all are equal (copies, not
    replicates).
    """
    values = np.asarray(value_T, dtype=np.float64)
    n = len(values)
    if n == 0:
        return "0 trainings; an interval over trainings needs two"
    if not np.isfinite(values).all():
        return f"not every training has a finite value: {values.tolist()}"
    if n > 1 and np.ptp(values) == 0:
        return f"all {n} trainings have the same value, {values[0]:g}: copies say nothing of how trainings vary"
    between = Variance(float(values.var(ddof=1)) / n, n - 1) if n > 1 else Variance(math.nan, 0)
    left_E = None if left_TE is None else left_TE.mean(0)
    return GroupMean(float(values.mean()), (between,), left_E, dict(zip(trainings, values.tolist())))


def excess(first: Group, second: Group) -> Group:
    """A group's mean less that of a null, which is of the same trainings, of some of them, or of others.

    A training that both have counts once. With `n` and `m` trainings, of which `s` are shared, the difference is a sum
    over trainings of `x / n - y / m` where both were measured, and of one of these elsewhere: each kind has the
    variance of its own terms, known with as many degrees of freedom as there are trainings to see it in, less one. With
    `s = n = m` this is the paired t. A single shared training does not say how the two go together, and counts as two.
    """
    if isinstance(first, str) or isinstance(second, str):
        return first if isinstance(first, str) else str(second)
    left_E = None if first.left_E is None else first.left_E - second.value
    if second.left_E is not None:
        left_E = (first.value if first.left_E is None else first.left_E) - second.left_E
    variances = (*first.variances, *second.variances)
    shared = [t for t in first.each if t in second.each]
    if len(shared) > 1:
        parts = [{t: x / len(one.each) for t, x in one.each.items()} for one in (first, second)]
        both = float(np.var([parts[0][t] - parts[1][t] for t in shared], ddof=1))
        alone = ((len(part) - len(shared), float(np.var([*part.values()], ddof=1)), len(part)) for part in parts)
        kinds = [(len(shared), both, len(shared)), *alone]
        variances = tuple(Variance(count * variance, seen - 1) for count, variance, seen in kinds if count)
    return GroupMean(first.value - second.value, variances, left_E)


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
    if math.isnan(total):
        return "1 training; an interval over trainings needs two"
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


def without_documents(statistic: Callable[[np.ndarray], np.ndarray], n: int) -> np.ndarray:
    """What a statistic of n documents is without each of them, `[n, ...]`, also one that moves in steps.

    statistic: its values `[W, ...]` at each of W rows of weights of the documents, `[W, n]`; 1 takes a document as it
        is. No weight is 0, and all of a row sum to n.

    A median, or a share of features beyond a bound, hardly ever moves as one document goes, and then by a whole step,
    so that a jackknife finds several times its variance. Here all weights move at once, by `TILT` and far enough to
    smooth the steps, along n - 1 directions at right angles (a cosine transform's), each there and back; what the
    statistic moves by is turned back to documents. Of a mean this is what is left without each, exactly; the variance
    of `document_jackknife` is then that of half-samples (Wolter 2007, section 3.4).
    """
    moves_WE = TILT * math.sqrt(n) * fft.dct(np.eye(n), norm="ortho", axis=0)[1:]
    whole, there_back = statistic(np.ones((1, n)))[0], statistic(np.concatenate([1 + moves_WE, 1 - moves_WE]))
    there, back = np.split(there_back, 2)
    turned = np.tensordot(moves_WE / (TILT * math.sqrt(n)), (there - back) / 2, axes=(0, 0))
    return whole - math.sqrt(n) / (TILT * (n - 1)) * turned
