"""Density of features: their load or count over their dimension, with intervals over seeds and documents.

The estimator that decides is fixed beforehand: `PRIMARY_ESTIMATOR` of `results.quantities`. The others are shown
beside it, because in practice the ratio of two models varies more with the estimator than with the models.
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
    """Two dictionary seeds trained on the activations of one subject, and which of their features are the same."""

    first: Reading
    second: Reading

    @cached_property
    def pairs_m2(self) -> np.ndarray:
        """Mutual nearest neighbours by activation correlation."""
        return counting.match_features(self.first, self.second)

    @property
    def matched_share(self) -> float:
        """Matched features over the smaller dictionary's."""
        return matching.matched_share(self.pairs_m2, len(self.first), len(self.second))

    @cached_property
    def debiased(self) -> dimension.DebiasedDimension:
        """The energy-weighted two-seed effective dimension, or why there is none."""
        a, b = self.pairs_m2.T
        weight_m = np.sqrt(self.first.energy_F[a] * self.second.energy_F[b])
        return dimension.debiased_dimension(self.first.rows_FN, self.second.rows_FN, self.pairs_m2, weight_m)


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

    @property
    def readings(self) -> tuple[Reading, ...]:
        """Every reading, training seed by training seed."""
        return tuple(reading for group in self.seeds for reading in group)

    @cached_property
    def pairs(self) -> tuple[tuple[SeedPair, ...], ...]:
        """All pairs of dictionary seeds within each training seed; a seed alone makes none."""
        return tuple(tuple(SeedPair(a, b) for a, b in combinations(group, 2)) for group in self.seeds)

    def only(self, keep: Callable[[Reading], np.ndarray]) -> ShapeReadings:
        """The shape with only the features of each reading that `keep` marks."""
        kept = tuple(tuple(reading.only(keep(reading)) for reading in group) for group in self.seeds)
        return ShapeReadings(self.name, self.n_layers, self.d_model, kept)

    def on_tokens(self, token_T: np.ndarray) -> ShapeReadings:
        """The shape on some of its tokens, given by their numbers in the text."""
        kept = tuple(tuple(reading.on_tokens(token_T) for reading in group) for group in self.seeds)
        return ShapeReadings(self.name, self.n_layers, self.d_model, kept)

    def bootstrap(self, value: Callable[[Reading], float], *, seed: int = 0) -> Bootstrap:
        """`value` of each reading, resampled over training and dictionary seeds."""
        return two_level_bootstrap([[value(r) for r in group] for group in self.seeds], seed=seed)


def shape_density(shape: ShapeReadings, estimator: str, document_T: np.ndarray, *, seed: int = 0) -> Bootstrap | str:
    """The density of a shape's features by one of `ESTIMATORS`, or the reason why there is none.

    Training seeds, dictionary seeds and documents are resampled; a shape's `seed` should be its own, while documents
    are drawn alike for all shapes, so that ratios share them.
    """
    if estimator == "load_sparse":
        sparse = shape.only(lambda reading: reading.probability_F <= counting.ULTRA_DENSE)
        return shape_density(sparse, PRIMARY_ESTIMATOR, document_T, seed=seed)
    kind, divisor = estimator.split("_", 1)
    neurons = shape.n_layers * shape.d_model
    match divisor:
        case "joint":
            return shape.bootstrap(lambda r: len(r) / neurons, seed=seed)
        case "slots":
            return shape.bootstrap(lambda r: float(r.rho_F.sum()) / neurons, seed=seed)
        case "weighted" | "raw":
            reason = "a single feature has no effective dimension"
            weights = (lambda r: r.energy_F) if divisor == "weighted" else (lambda r: None)
            entries = [[((r,), dimension.weighted_dimension(r.rows_FN, weights(r))) for r in g] for g in shape.seeds]
        case _:
            if not all(shape.pairs):
                return "one dictionary seed of a subject; the debiased dimension compares two"
            found = [pair.debiased.reason for group in shape.pairs for pair in group]
            reason = next((one for one in found if one), "no interference could be measured")
            is_corrected = divisor == "corrected"
            entries = [[((p.first, p.second), _two_seed_dimension(p, is_corrected)) for p in g] for g in shape.pairs]
    if not all(np.isfinite(d) and d > 0 for group in entries for _, d in group):
        return reason
    if kind == "count":
        counts = [[float(np.mean([len(r) for r in readings])) / d for readings, d in group] for group in entries]
        return two_level_bootstrap(counts, seed=seed)
    sums = [[_load_sums(readings, d, document_T) for readings, d in group] for group in entries]
    return two_level_bootstrap(sums, seed=seed, document_seed=0, statistic=_load_on_dimension)


def _two_seed_dimension(pair: SeedPair, is_corrected: bool) -> float:
    found = pair.debiased.attenuation_corrected if is_corrected else pair.debiased.value
    return np.nan if found is None else found


def _load_sums(readings: Sequence[Reading], dimension: float, document_T: np.ndarray) -> np.ndarray:
    """By document: tokens on which each feature fired, tokens times what the load is divided by, and tokens."""
    fired = [document_sums(reading.code.astype(bool), document_T) for reading in readings]
    tokens = document_sums(np.ones((len(document_T), 1)), document_T)
    return np.concatenate([*fired, tokens * dimension * len(readings), tokens], axis=1)


def _load_on_dimension(totals_RQ: np.ndarray) -> np.ndarray:
    tokens = totals_RQ[:, -1]
    return counting.binary_entropy(totals_RQ[:, :-2] / tokens[:, None]).sum(1) * tokens / totals_RQ[:, -2]


def density_ratio(b: ShapeReadings, a: ShapeReadings, estimator: str, document_T: np.ndarray) -> Bootstrap | str:
    """ln of B's density over A's, or the reason why there is none."""
    sides = [shape_density(shape, estimator, document_T, seed=seed) for shape, seed in ((b, 2), (a, 1))]
    for side, shape in zip(sides, (b, a), strict=True):
        if isinstance(side, str):
            return f"{shape.name}: {side}"
    top, bottom = (side for side in sides if isinstance(side, Bootstrap))
    if not (top.value > 0 and bottom.value > 0):
        return "a density of 0 has no ratio"
    return log_ratio(top, bottom)
