"""Density of features: their load or count over their dimension, with intervals over seeds and documents.

The statistic that decides is fixed beforehand: `PRIMARY_ESTIMATOR` of `results.quantities`. The others are shown
beside it, because in practice the ratio of two models moves more with the estimator than with the models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from crosscoder.measure import counting, dimension, matching
from crosscoder.measure.reading import Reading
from crosscoder.measure.statistics import Bootstrap, document_sums, log_ratio, two_level_bootstrap
from crosscoder.results.quantities import PRIMARY_ESTIMATOR


@dataclass(frozen=True)
class SeedPair:
    """Two dictionary seeds on the activations of one subject, and which of their features are the same."""

    first: Reading
    second: Reading

    @cached_property
    def pairs_m2(self) -> np.ndarray:
        """Mutual nearest neighbours by activation correlation."""
        correlation = matching.activation_correlation(self.first.code, self.second.code)
        return matching.mutual_nearest_pairs(correlation, counting.LINK)

    @property
    def matched_share(self) -> float:
        """Matched features over the smaller dictionary's."""
        smaller = min(len(self.first), len(self.second))
        return len(self.pairs_m2) / smaller if smaller else float("nan")

    @cached_property
    def debiased(self) -> dimension.DebiasedDimension:
        """The energy-weighted two-seed effective dimension, or why there is none."""
        a, b = self.pairs_m2.T
        weight_m = np.sqrt(self.first.energy_F[a] * self.second.energy_F[b])
        return dimension.debiased_dimension(self.first.rows_FN, self.second.rows_FN, self.pairs_m2, weight_m)

    def only(self, first_F: np.ndarray, second_F: np.ndarray) -> SeedPair:
        """The pair with some features of each."""
        return SeedPair(self.first.only(first_F), self.second.only(second_F))


@dataclass(frozen=True)
class ShapeReadings:
    """All readings of one shape: `seeds[t][d]` is dictionary seed d of training seed t, on the same tokens."""

    name: str
    n_layers: int
    d_model: int
    seeds: tuple[tuple[Reading, ...], ...]

    def __post_init__(self) -> None:
        if not self.seeds or not all(self.seeds):
            counts = [len(group) for group in self.seeds]
            raise ValueError(f"{self.name} has {counts} dictionaries by training seed; each needs at least one")
        if len({reading.n_tokens for reading in self.readings}) != 1:
            raise ValueError(f"readings of {self.name} cover different numbers of tokens; read the same text")

    @property
    def readings(self) -> tuple[Reading, ...]:
        """Every reading, training seed by training seed."""
        return tuple(reading for group in self.seeds for reading in group)

    @cached_property
    def pairs(self) -> tuple[tuple[SeedPair, ...], ...]:
        """All pairs of dictionary seeds within each training seed; a seed alone makes none."""
        return tuple(tuple(SeedPair(a, b) for a, b in combinations(group, 2)) for group in self.seeds)

    def only(self, keep: Callable[[Reading], np.ndarray]) -> ShapeReadings:
        """The shape with the features of each reading that `keep` marks."""
        kept = tuple(tuple(reading.only(keep(reading)) for reading in group) for group in self.seeds)
        return ShapeReadings(self.name, self.n_layers, self.d_model, kept)

    def bootstrap(self, value: Callable[[Reading], float], *, seed: int = 0) -> Bootstrap:
        """A number of each reading, resampled over training and dictionary seeds."""
        return two_level_bootstrap([[value(r) for r in group] for group in self.seeds], seed=seed)


def sparse_features(reading: Reading) -> np.ndarray:
    """True for features that are not ultra-dense."""
    return reading.probability_F <= counting.ULTRA_DENSE


def density(subject: ShapeReadings, estimator: str, document_T: np.ndarray, *, seed: int = 0) -> Bootstrap | str:
    """A density of features by one of `ESTIMATORS`, or the reason why there is none.

    Training seeds, dictionary seeds and documents are resampled; a shape's `seed` should be its own, while documents
    are drawn alike for all shapes, so that ratios share them.
    """
    if estimator == "load_sparse":
        return density(subject.only(sparse_features), PRIMARY_ESTIMATOR, document_T, seed=seed)
    kind, room = estimator.split("_", 1)
    if room in ("joint", "slots"):
        return subject.bootstrap(lambda r: _on_neurons(r, subject, by_slot=room == "slots"), seed=seed)
    if room in ("weighted", "raw"):
        singles = [[((r,), _dimension(r, room)) for r in group] for group in subject.seeds]
        return _resampled(singles, kind, document_T, seed, "a single feature has no effective dimension")
    groups, reasons = [], []
    for pairs in subject.pairs:
        known = [(pair, _debiased(pair, room)) for pair in pairs]
        reasons += [pair.debiased.reason for pair, value in known if value is None and pair.debiased.reason]
        groups.append([((pair.first, pair.second), value) for pair, value in known])
    if not all(groups):
        return "one dictionary seed of a subject; the debiased dimension compares two"
    return _resampled(groups, kind, document_T, seed, "; ".join(reasons[:1]) or "no interference could be measured")


def _on_neurons(reading: Reading, subject: ShapeReadings, *, by_slot: bool) -> float:
    held = float(reading.rho_F.sum()) if by_slot else float(len(reading))
    return held / (subject.n_layers * subject.d_model)


def _dimension(reading: Reading, room: str) -> float | None:
    weight_F = reading.energy_F if room == "weighted" else None
    return _usable(dimension.weighted_dimension(reading.rows_FN, weight_F))


def _debiased(pair: SeedPair, room: str) -> float | None:
    found = pair.debiased
    return _usable(found.attenuation_corrected if room == "corrected" else found.value)


def _usable(dimension: float | None) -> float | None:
    return dimension if dimension is not None and np.isfinite(dimension) and dimension > 0 else None


def _resampled(
    groups: Sequence[Sequence[tuple[tuple[Reading, ...], float | None]]],
    kind: str,
    document_T: np.ndarray,
    seed: int,
    reason: str,
) -> Bootstrap | str:
    """Load or count over dimension of each entry; the reason where one has no dimension."""
    if any(dimension is None for group in groups for _, dimension in group):
        return reason
    known = [[(readings, float(dimension or 0)) for readings, dimension in group] for group in groups]
    if kind == "count":
        values = [[float(np.mean([len(r) for r in readings])) / d for readings, d in group] for group in known]
        return two_level_bootstrap(values, seed=seed)
    sums = [[_load_sums(readings, d, document_T) for readings, d in group] for group in known]
    return two_level_bootstrap(sums, seed=seed, document_seed=0, statistic=_load_on_dimension)


def _load_sums(readings: Sequence[Reading], dimension: float, document_T: np.ndarray) -> np.ndarray:
    """Tokens on which each feature fired by document, then tokens times what the load is divided by, then tokens."""
    fired = [firing_sums(reading, document_T) for reading in readings]
    tokens = document_sums(np.ones(len(document_T)), document_T)
    return np.concatenate([*fired, tokens * dimension * len(readings), tokens], axis=1)


def firing_sums(reading: Reading, document_T: np.ndarray) -> np.ndarray:
    """On how many tokens of each document each feature is active, `[documents, F]`.

    Raises:
        ValueError: the labels are not one for each token.
    """
    if len(document_T) != reading.n_tokens:
        raise ValueError(f"{reading.n_tokens} tokens have {len(document_T)} document labels; give one for each token")
    labels, index_T = np.unique(document_T, return_inverse=True)
    code = reading.code
    feature_P = np.repeat(np.arange(len(reading)), np.diff(code.indptr))
    sums = np.zeros((len(labels), len(reading)))
    np.add.at(sums, (index_T[code.indices], feature_P), 1.0)
    return sums


def _load_on_dimension(totals_RQ: np.ndarray) -> np.ndarray:
    tokens = totals_RQ[:, -1]
    return counting.binary_entropy(totals_RQ[:, :-2] / tokens[:, None]).sum(1) * tokens / totals_RQ[:, -2]


def density_ratio(b: ShapeReadings, a: ShapeReadings, estimator: str, document_T: np.ndarray) -> Bootstrap | str:
    """ln of B's density over A's, or the reason why there is none."""
    sides = [density(subject, estimator, document_T, seed=seed) for subject, seed in ((b, 2), (a, 1))]
    for side, subject in zip(sides, (b, a), strict=True):
        if isinstance(side, str):
            return f"{subject.name}: {side}"
    top, bottom = (side for side in sides if isinstance(side, Bootstrap))
    if not (top.value > 0 and bottom.value > 0):
        return "a density of 0 has no ratio"
    return log_ratio(top, bottom)
