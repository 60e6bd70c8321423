"""What two shapes' features share, from kept readings: U, and how often matched features fire.

`recheck.py` says what for. Nothing is imported from the library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import combinations
from typing import NamedTuple

import numpy as np
from recheck_intervals import FEWEST_DOCUMENTS, MOST_GROUPS, Interval, jackknife, over, t_interval, text_variance, total
from recheck_readings import Kept, Pair, chance_u, compare_two, spread_of
from scipy import sparse


class Between(NamedTuple):
    """What two shapes' features share."""

    u: float
    chance: float | None
    ceiling: float | None
    text_of_u: tuple[float, float] | None
    """The variance that (u - chance) / (ceiling - chance) owes to the text, and its degrees of freedom."""
    matched: float
    median_rate: Interval | None
    dispersion: Interval | None


def universality_of(found: Between, u: object, ceiling: object) -> Interval | None:
    """U and its interval, from those of u and of the ceiling as results have them, and the text's variance."""
    if not isinstance(u, Interval) or not isinstance(ceiling, Interval) or found.chance is None or not found.ceiling:
        return None
    shifted = (Interval(found.u, *u[1:]), Interval(found.ceiling, *ceiling[1:]))
    value = over(*(total([(1.0, one)], -found.chance) for one in shifted))
    if value is None or found.text_of_u is None or found.text_of_u[0] == 0:
        return value
    return total([(1.0, value), (1.0, t_interval(0.0, [found.text_of_u]))])


def compare_shapes(firsts: dict[str, list[Kept]], document_T: np.ndarray) -> Between:
    """Agreement of the first dictionaries of A's and B's trainings, on the same tokens."""
    a, b = firsts["A"], firsts["B"]
    between = [[compare_two(x, y) for y in b] for x in a]
    within = {name: {pair: compare_two(*(each[t] for t in pair)) for pair in combinations(range(len(each)), 2)}
              for name, each in firsts.items()}  # fmt: skip
    ceilings = [np.mean([one.u for one in found.values()]) for found in within.values() if found]
    rates, own = [[one.rate for one in row] for row in between], {pair: one.rate for pair, one in within["A"].items()}
    median = dispersion = None
    if all(rate is not None for row in rates for rate in row) and min(len(a), len(b)) > 1:
        known, text_of = np.array(rates), _text_of_rates(a, b, between, within["A"], document_T)
        median = jackknife(
            lambda i, j: float(known[np.ix_(i, j)][:, :, 0].mean()), known.shape[:2], text_of(median=True)
        )
        if all(rate is not None for rate in own.values()) and len(a) > 2:

            def excess(i: list[int], j: list[int]) -> float:
                pairs = [own[pair] for pair in combinations(i, 2)]
                return float(known[np.ix_(i, j)][:, :, 1].mean() - np.array(pairs)[:, 1].mean())

            dispersion = Interval(*np.exp(jackknife(excess, known.shape[:2], text_of(median=False))).tolist())
    return Between(
        u=float(np.mean([one.u for row in between for one in row])),
        chance=(chance := chance_u(a[0], b[0], document_T)),
        ceiling=float(np.mean(ceilings)) if ceilings else None,
        text_of_u=_text_of_u(firsts, between, within, document_T, chance) if ceilings and chance is not None else None,
        matched=float(np.mean([one.matched for row in between for one in row])),
        median_rate=median,
        dispersion=dispersion,
    )


def _text_of_u(
    firsts: dict[str, list[Kept]],
    between: list[list[Pair]],
    within: dict[str, dict[tuple[int, int], Pair]],
    document_T: np.ndarray,
    chance: float,
) -> tuple[float, float] | None:
    """A jackknife over documents; the pairs stay as they are, their correlations are those of the other tokens."""
    names, number_T = np.unique(document_T, return_inverse=True)
    if len(names) < FEWEST_DOCUMENTS:
        return None
    group_T, n, left = number_T % MOST_GROUPS, min(len(names), MOST_GROUPS), []
    for gone in range(n):
        rest = np.flatnonzero(group_T != gone)
        unit = {
            name: [_standardised(sparse.csr_array(kept.code)[rest]) for kept in each] for name, each in firsts.items()
        }
        across = [(unit["A"][i], unit["B"][j], one) for i, row in enumerate(between) for j, one in enumerate(row)]
        u, tops = np.mean([_u_of(*pair) for pair in across]), []
        for name, found in within.items():
            tops += [np.mean([_u_of(unit[name][i], unit[name][j], one) for (i, j), one in found.items()])] * bool(found)
        left.append((u - chance) / (np.mean(tops) - chance))
    return (n - 1) / n * float(np.square(left - np.mean(left)).sum()), n - 1


Standardised = tuple[sparse.csc_array, np.ndarray, np.ndarray]


def _standardised(code: sparse.csr_array) -> Standardised:
    """A code with the mean and the standard deviation of every column."""
    mean_F = np.asarray(code.mean(0)).ravel()
    square_F = np.asarray(code.multiply(code).mean(0)).ravel()
    return sparse.csc_array(code), mean_F, np.sqrt(np.maximum(square_F - mean_F**2, 0))


def _u_of(first: Standardised, second: Standardised, pair: Pair) -> float:
    """u of given pairs of features."""
    found = []
    for i, j in pair.nearest:
        both_m = np.asarray(first[0][:, i].multiply(second[0][:, j]).mean(0)).ravel() - first[1][i] * second[1][j]
        scale_m = first[2][i] * second[2][j]
        found.append(np.where(scale_m > 0, both_m / np.where(scale_m > 0, scale_m, 1), 0).mean())
    return float(np.mean(found))


def _text_of_rates(
    a: list[Kept], b: list[Kept], between: list[list[Pair]], within: dict[tuple[int, int], Pair], document_T: np.ndarray
) -> Callable[..., tuple[float, float] | None]:
    """What gives the text's variance of the median rate, or of ln dispersion; the pairs stay as they are."""
    names, number_T = np.unique(document_T, return_inverse=True)
    group_T, n = number_T % MOST_GROUPS, min(len(names), MOST_GROUPS)
    inside_ET = sparse.csr_array((np.ones(len(group_T)), (group_T, np.arange(len(group_T)))))
    a_EF, b_EF = ([(inside_ET @ (kept.code > 0).astype(float)).toarray() for kept in each] for each in (a, b))

    def mean_spread(weight_E: np.ndarray, found: Iterable[tuple[np.ndarray, np.ndarray, Pair]]) -> np.ndarray:
        every = [spread_of(weight_E @ x[:, one.same_2m[0]], weight_E @ y[:, one.same_2m[1]]) for x, y, one in found]
        return np.mean(every, axis=0)

    across = [(a_EF[i], b_EF[j], one) for i, row in enumerate(between) for j, one in enumerate(row)]
    inside = [(a_EF[i], a_EF[j], one) for (i, j), one in within.items()]

    def variance(*, median: bool) -> tuple[float, float] | None:
        def statistic(weight_E: np.ndarray) -> float:
            found = mean_spread(weight_E, across)
            return float(found[0] if median else found[1] - mean_spread(weight_E, inside)[1])

        return text_variance(statistic, n) if len(names) >= FEWEST_DOCUMENTS else None

    return variance
