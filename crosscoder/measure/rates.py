"""Whether sparsity is the data's: how firing rates of matched features scatter between shapes, and between trainings.

Features are matched by activity (`matching.mutual_nearest_pairs` of `matching.activation_correlation`). Features that
must correlate cannot differ much in rate: of planted sds of .3, .6, .9 and 1.2, a match at .7 lets .29, .37, .40 and
.39 through, with 98, 78, 59 and 46 % of the features. So a ratio of dispersions near 1 says little where many features
do not match; read it beside the matched share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from crosscoder.measure.statistics import exponentiate
from crosscoder.measure.welch import Variance, document_jackknife, interval, without_documents
from crosscoder.results.table import Estimate

FEWEST_PAIRS = 30
"""Of features; the standard deviation of so many is known to 13 %."""


class RateSpread(NamedTuple):
    """ln(p_second / p_first) of matched features: how many, their median and their standard deviation."""

    n_pairs: int
    median: float
    sd: float
    left_E2: np.ndarray | None = None
    """Median and ln sd without each document of the text, of the same pairs, `[documents, 2]`."""


def rate_spread(
    p_first: np.ndarray,
    p_second: np.ndarray,
    pairs_m2: np.ndarray,
    fired: tuple[np.ndarray, np.ndarray] | None = None,
) -> RateSpread | str:
    """How the rates of matched features of two dictionaries differ, pairs `[m, 2]`; a reason for few pairs.

    fired: of both dictionaries, the tokens of each document on which each feature is active, `[documents, F]`.

    Raises:
        ValueError: a matched feature never fires.
    """
    if len(pairs_m2) < FEWEST_PAIRS:
        return f"{len(pairs_m2)} features match, of which a spread of rates needs {FEWEST_PAIRS}"
    first_m, second_m = np.asarray(p_first)[pairs_m2[:, 0]], np.asarray(p_second)[pairs_m2[:, 1]]
    if not (min(first_m.min(), second_m.min()) > 0):
        raise ValueError("a matched feature has a firing rate of 0; match features that are alive")
    log_m = np.log(second_m / first_m)
    if np.ptp(log_m) == 0:
        return "all matched features have one ratio of rates: copies, which have no spread"
    left_E2 = None
    if fired is not None:
        first_Em, second_Em = (one[:, pairs] for one, pairs in zip(fired, pairs_m2.T, strict=True))

        def spread(weight_WE: np.ndarray) -> np.ndarray:
            log_Wm = np.log((weight_WE @ second_Em) / (weight_WE @ first_Em))
            return np.stack([np.median(log_Wm, axis=1), np.log(log_Wm.std(axis=1, ddof=1))], axis=1)

        left_E2 = without_documents(spread, len(first_Em))
    return RateSpread(len(log_m), float(np.median(log_m)), float(log_m.std(ddof=1)), left_E2)


Spreads = Sequence[Sequence[RateSpread | str]]


def median_log_rate(between_AB: Spreads) -> Estimate | str:
    """Median ln(rate of a feature of the second shape / of its match), the mean over pairs of trainings.

    `between_AB[i][j]` compares training i of the first shape with training j of the second. See `dispersion_ratio` for
    the interval.
    """
    if isinstance(missing := _first_reason(between_AB), str):
        return missing
    median_AB = np.array([[one.median for one in row if isinstance(one, RateSpread)] for row in between_AB])
    left = _without_documents(between_AB)
    left_E = None if left is None else left[:, 0]
    return _over_trainings(lambda a, b: float(median_AB[np.ix_(a, b)].mean()), median_AB.shape, (2, 2), left_E)


def dispersion_ratio(between_AB: Spreads, within_A: Spreads) -> Estimate | str:
    """Dispersion of rates between two shapes over that between two trainings of the first: a ratio, with its interval.

    `between_AB` as in `median_log_rate`; `within_A[i]` compares training i of the first shape with each later one, so
    that its last row is empty. Mean of ln sd over pairs less mean of ln sd over pairs. Pairs that share a training are
    not independent, so the interval leaves out one training at a time with all its pairs, those of each shape giving a
    variance with one degree of freedom fewer than trainings (`welch.interval`), and adds the text's variance where
    spreads are known without each document. The features, and which of them match, count as given.

    Raises:
        ValueError: the trainings of `within_A` are not those of `between_AB`.
    """
    n_first, given = len(between_AB), [len(row) for row in within_A]
    if given != list(range(n_first - 1, -1, -1)):
        raise ValueError(f"{given} pairs within {n_first} trainings; compare each with every later one")
    for spreads in (between_AB, within_A):
        if isinstance(missing := _first_reason(spreads), str):
            return missing
    log_AB = np.log([[one.sd for one in row if isinstance(one, RateSpread)] for row in between_AB])
    log_AA = np.full((n_first, n_first), np.nan)
    for i, row in enumerate(within_A):
        log_AA[i, i + 1 :] = np.log([one.sd for one in row if isinstance(one, RateSpread)])

    def contrast(a: np.ndarray, b: np.ndarray) -> float:
        return float(log_AB[np.ix_(a, b)].mean() - np.nanmean(log_AA[np.ix_(a, a)]))

    lefts = [_without_documents(spreads) for spreads in (between_AB, within_A)]
    left_E = None if lefts[0] is None or lefts[1] is None else lefts[0][:, 1] - lefts[1][:, 1]
    found = _over_trainings(contrast, log_AB.shape, (3, 2), left_E)
    return found if isinstance(found, str) else exponentiate(found)


def _first_reason(spreads: Spreads) -> str | None:
    if len({len(row) for row in spreads}) == 0:
        return "not run"
    return next((one for row in spreads for one in row if isinstance(one, str)), None)


def _without_documents(spreads: Spreads) -> np.ndarray | None:
    """Median and ln sd without each document, the means over pairs of trainings."""
    every = [one.left_E2 for row in spreads for one in row if isinstance(one, RateSpread)]
    known = [left_E2 for left_E2 in every if left_E2 is not None]
    return np.mean(known, axis=0) if known and len(known) == len(every) else None


def _over_trainings(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    shape: tuple[int, ...],
    fewest: tuple[int, int],
    left_E: np.ndarray | None,
) -> Estimate | str:
    """A statistic of the trainings of two shapes, with its interval by a jackknife over those of each, and over the
    text's documents where it is known without each."""
    if shape[0] < fewest[0] or shape[1] < fewest[1]:
        return f"{shape[0]} and {shape[1]} trainings; an interval needs {fewest[0]} and {fewest[1]}"
    all_A, all_B = (np.arange(n) for n in shape)
    left = (
        np.array([statistic(np.delete(all_A, i), all_B) for i in all_A]),
        np.array([statistic(all_A, np.delete(all_B, j)) for j in all_B]),
    )
    variances = [Variance(float((len(x) - 1) * x.var()), len(x) - 1) for x in left]
    if left_E is not None:
        text = document_jackknife(left_E)
        if isinstance(text, str):
            return text
        variances.append(text)
    return interval(statistic(all_A, all_B), variances)
