"""Two shapes compared feature by feature: whether features of one are found in the other, and how often they fire.

`compare_shapes` turns readings into rows. Nothing here trains or reads files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

import numpy as np

from crosscoder.data.tokens import MOST_GROUPS
from crosscoder.measure import counting, dimension, matching, rates, universality
from crosscoder.measure.counting import SeedPair
from crosscoder.measure.rates import RateSpread
from crosscoder.measure.reading import Reading
from crosscoder.measure.statistics import statistic_row, two_level_bootstrap
from crosscoder.measure.welch import FEWEST_DOCUMENTS
from crosscoder.results.table import Estimate, Place, Row, rows_at

NULL_DRAWS = 20
SITE = "write"


@dataclass(frozen=True)
class ShapeReadings:
    """All readings of one shape: `seeds[t][d]` is dictionary seed d of training seed t, on the same tokens."""

    name: str
    seeds: tuple[tuple[Reading, ...], ...]

    @property
    def readings(self) -> tuple[Reading, ...]:
        return tuple(reading for group in self.seeds for reading in group)

    @property
    def firsts(self) -> tuple[Reading, ...]:
        return tuple(group[0] for group in self.seeds)

    @cached_property
    def pairs(self) -> tuple[tuple[SeedPair, ...], ...]:
        """All pairs of dictionary seeds within each training; a seed alone makes none."""
        return tuple(tuple(SeedPair(a, b) for a, b in combinations(group, 2)) for group in self.seeds)

    def on_tokens(self, token_T: np.ndarray) -> ShapeReadings:
        """The shape on some of its tokens, given by their numbers in the text."""
        return ShapeReadings(self.name, tuple(tuple(r.on_tokens(token_T) for r in group) for group in self.seeds))


def compare_shapes(a: ShapeReadings, b: ShapeReadings, document_T: np.ndarray) -> list[Row]:
    """U, rates of matched features, and what two dictionaries of one training share, of every training.

    document_T: each token's document; where they are enough, intervals carry the text's variance.
    """
    rows = [row for shape in (a, b) for row in training_rows(shape)]
    groups = Groups.of(document_T)
    firsts = [[_First.of(reading, groups) for reading in shape.firsts] for shape in (a, b)]
    between = [[_agree(x, y) for y in firsts[1]] for x in firsts[0]]
    within = [[[_agree(x, y) for y in shape[i + 1 :]] for i, x in enumerate(shape)] for shape in firsts]
    rows += _universality_rows(a, b, between, within, document_T)
    at, spreads = Place(site=SITE), [[one.spread for one in row] for row in between]
    inner = [[one.spread for one in row] for row in within[0]]
    rows.append(statistic_row(at, "median_log_rate", rates.median_log_rate(spreads)))
    rows.append(statistic_row(at, "rate_dispersion", rates.dispersion_ratio(spreads, inner)))
    matched = [one.matched_share for row in between for one in row]
    return [*rows, *rows_at(at, {"matched_between": float(np.mean(matched))})]


class Groups(NamedTuple):
    """The group of documents of each token, from 0, and how many there are."""

    group_T: np.ndarray
    n: int

    @classmethod
    def of(cls, document_T: np.ndarray) -> Groups | None:
        """None where the documents are too few for a variance of their own."""
        documents, index_T = np.unique(document_T, return_inverse=True)
        n = min(len(documents), MOST_GROUPS)
        return cls(index_T % n, n) if len(documents) >= FEWEST_DOCUMENTS else None


@dataclass(frozen=True)
class Agreed:
    """Two dictionaries of different models: u (also without each group of documents), the share of features that
    match, and how rates of these differ."""

    u: float
    u_left_E: np.ndarray | None
    matched_share: float
    spread: RateSpread | str


@dataclass(frozen=True)
class _First:
    """The first dictionary of a training, and its firings by group of documents of a text that has enough of them."""

    reading: Reading
    groups: Groups | None
    fired_EF: np.ndarray | None

    @classmethod
    def of(cls, reading: Reading, groups: Groups | None) -> _First:
        return cls(reading, groups, None if groups is None else counting.fired_by_document(reading, *groups))


def _agree(one: _First, other: _First) -> Agreed:
    first, second = one.reading, other.reading
    found = matching.nearest(matching.activation_correlation(first.code, second.code))
    pairs_m2, pools = found.mutual_pairs(counting.LINK), (first.code, second.code)
    if len(first) != len(second):
        pools = universality.equal_pools(*pools, seed=0)
        found = matching.nearest(matching.activation_correlation(*pools))
    fired = None if one.fired_EF is None or other.fired_EF is None else (one.fired_EF, other.fired_EF)
    return Agreed(
        u=universality.Agreement(found.best_a, found.best_b).u,
        u_left_E=None if one.groups is None else universality.u_left(*pools, found, *one.groups),
        matched_share=matching.matched_share(pairs_m2, len(first), len(second)),
        spread=rates.rate_spread(first.probability_F, second.probability_F, pairs_m2, fired),
    )


def _universality_rows(
    a: ShapeReadings,
    b: ShapeReadings,
    between: Sequence[Sequence[Agreed]],
    within: Sequence[Sequence[Sequence[Agreed]]],
    document_T: np.ndarray,
) -> Iterator[Row]:
    """U of A and B: the mean best correlation both ways, between chance (0) and another training of a shape (1)."""
    u = two_level_bootstrap([[one.u for one in row] for row in between], seed=0).estimate()
    # A training with every other of its shape, so that each pair counts alike.
    others = [
        [shape[min(i, j)][abs(i - j) - 1] for j in range(len(shape)) if j != i]
        for shape in within
        for i in range(len(shape))
        if len(shape) > 1
    ]
    ceiling = two_level_bootstrap([[one.u for one in row] for row in others], seed=0).estimate() if others else None
    at, scaled = Place(site=SITE), "one training of each shape, so there is no ceiling to measure U against"
    try:
        null = universality.shifted_null(
            a.firsts[0].code, b.firsts[0].code, document_T, seed=0, n_draws=NULL_DRAWS
        ).mean()
    except ValueError as error:
        yield statistic_row(at, "universality", str(error))
        return
    value: Estimate | str = scaled
    if ceiling is not None:
        try:
            lefts = _mean_left(between), _mean_left(others)
            left = None if lefts[0] is None or lefts[1] is None else (lefts[0], lefts[1])
            value = universality.universality_estimate(u, null=float(null), ceiling=ceiling, left=left)
        except ValueError as error:
            value = str(error)
    yield statistic_row(at, "universality", value)
    yield from rows_at(at, {"u": u, "u_null": float(null), "u_ceiling": ceiling})


def _mean_left(agreed: Sequence[Sequence[Agreed]]) -> np.ndarray | None:
    """u without each group of documents, the mean over groups of pairs of their means."""
    rows = [[one.u_left_E for one in row if one.u_left_E is not None] for row in agreed]
    return np.mean([np.mean(row, axis=0) for row in rows], axis=0) if all(rows) else None


def training_rows(shape: ShapeReadings) -> list[Row]:
    """What the main dictionaries of each training say of directions: means over dictionaries, or over pairs of them."""
    rows = []
    for t, (group, pairs) in enumerate(zip(shape.seeds, shape.pairs, strict=True)):
        values = {
            "d_eff_raw": [dimension.weighted_dimension(r.rows_FN) for r in group],
            "d_eff_weighted": [dimension.weighted_dimension(r.rows_FN, r.energy_F) for r in group],
            "d_eff_debiased": [pair.debiased.value for pair in pairs],
            "self_cosine": [pair.debiased.self_cosine for pair in pairs],
            "point_matched_share": [pair.matched_share for pair in pairs],
        }
        at = Place(subject=shape.name, training_seed=t, state="trained", site=SITE, arm="crosscoder", role="main")
        rows += rows_at(at, {key: _mean(each) for key, each in values.items()})
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where a value is missing, or there is none."""
    return float(np.mean(values)) if values and None not in values else None  # ty: ignore[no-matching-overload]
