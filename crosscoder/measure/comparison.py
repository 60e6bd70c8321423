"""Subjects of unequal shape compared at one site: densities, exponents, universality, each with its interval.

`measure_site` turns readings into rows. Nothing here trains or reads files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product

import numpy as np

from crosscoder.measure import counting, density, dimension, matching, universality
from crosscoder.measure.density import ShapeReadings
from crosscoder.measure.reading import Reading
from crosscoder.measure.statistics import Bootstrap, exponentiate, statistic_row, two_level_bootstrap
from crosscoder.results.quantities import ESTIMATORS, PRIMARY_ESTIMATOR
from crosscoder.results.table import COMPARED, Estimate, Place, Row, Site, State, rows_at

NULL_DRAWS = 100
POOLS = 3
STATES: tuple[State, ...] = ("trained", "untrained")
CONTROL = (PRIMARY_ESTIMATOR, "load_weighted")
"""Estimators by which the trained and the untrained pair may be compared: the first that both have."""


@dataclass(frozen=True, kw_only=True)
class SiteReadings:
    """Everything read at one site. `trained` holds A, B and, for slopes, further shapes; `untrained` what it has.

    `document_T` labels each held-out token's document.
    """

    site: Site
    trained: Mapping[str, ShapeReadings]
    untrained: Mapping[str, ShapeReadings] = field(default_factory=dict)
    document_T: np.ndarray

    def shapes(self, state: State) -> Mapping[str, ShapeReadings]:
        """The readings of a state by shape."""
        return self.trained if state == "trained" else self.untrained

    def pair(self, state: State = "trained") -> tuple[ShapeReadings, ShapeReadings] | None:
        """A and B of a state; None where one of them was not read."""
        shapes = self.shapes(state)
        return (shapes["A"], shapes["B"]) if shapes.keys() >= set(COMPARED) else None


def measure_site(readings: SiteReadings) -> list[Row]:
    """R by every estimator, exponents and universality of one site, and the points of each shape and training seed.

    An interval may be infinite. What could not be measured has a row with the reason.
    """
    at = Place(site=readings.site)
    logs: dict[tuple[State, str], Bootstrap | str] = dict.fromkeys(product(STATES, ESTIMATORS), "not run")
    for state, by in logs:
        if pair := readings.pair(state):
            logs[state, by] = density.density_ratio(pair[1], pair[0], by, readings.document_T)
    rows = []
    for (state, by), log in logs.items():
        row = statistic_row(replace(at, state=state, estimator=by), "ratio", log)
        rows.append(replace(row, value=exponentiate(row.value)) if isinstance(row.value, Estimate) else row)
    rows.append(_control_difference(at, logs))
    trained, untrained = (_slopes(list(readings.shapes(state).values())) for state in STATES)
    rows += [statistic_row(at, key, slope) for key, slope in trained.items()]
    rows.append(statistic_row(at, "gamma_excess", _less(trained["gamma"], untrained["gamma"])))
    if readings.pair() is not None:
        rows += measure_universality(readings)
    return rows + [row for state in STATES for row in _points(readings, state)]


def _control_difference(at: Place, logs: Mapping[tuple[State, str], Bootstrap | str]) -> Row:
    """ln R trained less untrained, by the first estimator of `CONTROL` that both have; its place names which."""
    differences = {by: _less(logs["trained", by], logs["untrained", by]) for by in CONTROL}
    for by, difference in differences.items():
        if isinstance(difference, Bootstrap):
            return statistic_row(replace(at, estimator=by), "trained_difference", difference)
    return statistic_row(at, "trained_difference", differences[CONTROL[0]])


def _less(first: Bootstrap | str, second: Bootstrap | str) -> Bootstrap | str:
    """The difference of two resampled values, draw by draw."""
    if isinstance(first, str):
        return first
    if isinstance(second, str):
        return f"untrained: {second}"
    return Bootstrap(first.value - second.value, first.stretched() - second.stretched())


def _slopes(shapes: Sequence[ShapeReadings]) -> dict[str, Bootstrap | str]:
    """alpha, gamma and delta over the shapes at hand."""
    if len({s.n_layers for s in shapes}) < 2:
        return dict.fromkeys(("alpha", "gamma", "delta"), "one depth; a slope needs two")
    if any(not len(reading) for s in shapes for reading in s.readings):
        return dict.fromkeys(("alpha", "gamma", "delta"), "a dictionary without alive features")
    depth, width = [s.n_layers for s in shapes], [s.d_model for s in shapes]
    per_layer = [s.bootstrap(lambda r, s=s: r.rho_F.sum() / s.n_layers, seed=i) for i, s in enumerate(shapes)]
    rho = [s.bootstrap(lambda r: float(r.rho_F.mean()), seed=i) for i, s in enumerate(shapes)]
    relative = [_relative_dimension(s, i) for i, s in enumerate(shapes)]
    reasons = [value for value in relative if isinstance(value, str)]
    known = [value for value in relative if isinstance(value, Bootstrap)]
    return {
        "alpha": dimension.log_slope_of_bootstraps(width, per_layer),
        "gamma": dimension.log_slope_of_bootstraps(depth, rho),
        "delta": reasons[0] if reasons else dimension.log_slope_of_bootstraps(depth, known),
    }


def _relative_dimension(shape: ShapeReadings, seed: int) -> Bootstrap | str:
    """d_eff / D, energy-weighted and debiased, over training seeds and pairs of dictionary seeds."""
    groups = []
    for pairs in shape.pairs:
        known = [pair.debiased.value for pair in pairs if pair.debiased.value is not None]
        reason = next((pair.debiased.reason for pair in pairs if pair.debiased.value is None), None)
        if reason or not known or not np.isfinite(known).all():
            return f"{shape.name}: {reason or 'one dictionary seed, or no interference'}"
        groups.append([value / shape.d_model for value in known])
    return two_level_bootstrap(groups, seed=seed)


def _points(readings: SiteReadings, state: State) -> list[Row]:
    """What each shape's crosscoder has in each training seed: means over dictionary seeds, or over pairs of them."""
    rows, here = [], Place(state=state, site=readings.site, arm="crosscoder", role="main")
    for shape in readings.shapes(state).values():
        for t, (group, pairs) in enumerate(zip(shape.seeds, shape.pairs, strict=True)):
            values = {
                "point_features": [len(r) for r in group],
                "point_rho": [r.rho_F.mean() if len(r) else None for r in group],
                "point_load": [counting.binary_entropy(r.probability_F).sum() for r in group],
                "d_eff_raw": [dimension.weighted_dimension(r.rows_FN) for r in group],
                "d_eff_weighted": [dimension.weighted_dimension(r.rows_FN, r.energy_F) for r in group],
                "d_eff_debiased": [pair.debiased.value for pair in pairs],
                "self_cosine": [pair.debiased.self_cosine for pair in pairs],
                "point_matched_share": [pair.matched_share for pair in pairs],
                "point_explained_variance": [r.explained_variance for r in group],
                "point_dead_share": [r.dead_share for r in group],
                "point_l0": [r.l0 for r in group],
            }
            at = replace(here, subject=shape.name, training_seed=t)
            rows += rows_at(at, {key: _mean(each) for key, each in values.items()})
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where a value is missing, or there is none."""
    return float(np.mean(values)) if values and None not in values else None  # ty: ignore[no-matching-overload]


def measure_universality(readings: SiteReadings) -> list[Row]:
    """U of A and B: the mean best correlation both ways, between chance (0) and another training of a shape (1).

    The ceiling is the mean over A's and B's shape of what two training seeds of one shape reach.
    """
    a, b = readings.trained["A"], readings.trained["B"]
    u = two_level_bootstrap(_between(a, b), seed=0).estimate()
    first, second = a.seeds[0][0], b.seeds[0][0]
    null = universality.shifted_null(first.code, second.code, readings.document_T, seed=0, n_draws=NULL_DRAWS)
    ceilings = [row for shape in (a, b) for row in _within(shape)]
    ceiling = two_level_bootstrap(ceilings, seed=0).estimate() if ceilings else None
    untrained = readings.pair("untrained")
    floor = None if untrained is None else float(np.mean([np.mean(row) for row in _between(*untrained)]))
    normalised, missing = None, "one training seed of each shape, so there is no ceiling to measure U against"
    if ceiling is not None:
        try:
            normalised = universality.universality_estimate(u, null=float(null.mean()), ceiling=ceiling)
        except ValueError as error:
            missing = str(error)
    at = Place(site=readings.site)
    return [
        Row(at, "universality", normalised, None if normalised else missing),
        *rows_at(at, {"u": u, "u_null": float(null.mean()), "u_ceiling": ceiling, "u_floor": floor}),
        *_matched_features(at, first, second),
    ]


def _matched_features(at: Place, first: Reading, second: Reading) -> list[Row]:
    """Shares of features with a close match in the other dictionary, and firing rates of matched ones."""
    correlation = matching.activation_correlation(first.code, second.code)
    found = universality.agreement(correlation)
    ways = (("forward", found.forward_F), ("backward", found.backward_F))
    rows = [
        Row(at, f"share_{way}_{round(10 * limit)}", float((best_F > limit).mean()))
        for way, best_F in ways
        for limit in universality.SHARES
    ]
    pairs_m2 = matching.mutual_nearest_pairs(correlation, counting.LINK)
    if not len(pairs_m2):
        return rows
    return rows + rows_at(at, universality.compare_rates(first.probability_F, second.probability_F, pairs_m2))


def _between(a: ShapeReadings, b: ShapeReadings) -> list[list[float]]:
    """u of each training seed of A with its counterpart of B, over their dictionary seeds."""
    n = min(len(a.seeds), len(b.seeds))
    return [[_u(x, y) for x in a.seeds[t] for y in b.seeds[t]] for t in range(n)]


def _within(shape: ShapeReadings) -> list[list[float]]:
    """u of pairs of training seeds of one shape, over their dictionary seeds."""
    return [[_u(x, y) for x in one for y in other] for one, other in combinations(shape.seeds, 2)]


def _u(first: Reading, second: Reading) -> float:
    return universality.pooled_u(first.code, second.code, seed=0, n_pools=POOLS)
