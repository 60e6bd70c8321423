"""Subjects of unequal shape compared at one site: densities, exponents, universality, each with its interval.

`measure_site` turns readings into named statistics; `verdict.Evidence` is made of those of the primary site. Nothing
here trains or reads files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from crosscoder.measure import counting, density, dimension, matching, universality
from crosscoder.measure.density import PRIMARY, ShapeReadings
from crosscoder.measure.reading import Reading
from crosscoder.measure.statistics import Bootstrap, exponentiate, two_level_bootstrap
from crosscoder.results.table import Estimate

NULL_DRAWS = 100
POOLS = 3
CONTROL = (PRIMARY, "load_weighted")

DEFINITIONS = {
    "ratio": "R: density of B over density of A, by the named estimator.",
    "dimension_growth": "Slope of ln(d_eff / D) on ln(L) over the shapes, d_eff energy-weighted and two-seed debiased.",
    "alpha": "Slope of ln(features per layer) on ln(D) over the shapes, features per layer being distinct features "
    "times mean rho over L. With dictionaries of equal size that are all but full, and N fixed, "
    "alpha = 2 - 2 gamma whatever the models do.",
    "trained_difference": "ln R of the trained pair less ln R of the untrained pair: by the primary estimator where "
    "both have it, else by entropy load over the energy-weighted dimension of single dictionaries. Two seeds seldom "
    "agree on the directions of an untrained subject, and without agreement there is no debiased dimension.",
    "universality_floor": "u of the untrained subjects: how alike features are that no training made.",
}


@dataclass(frozen=True, kw_only=True)
class SiteReadings:
    """Everything read at one site. `trained` holds A, B and, for slopes, further shapes; `untrained` what it has."""

    site: str
    trained: Mapping[str, ShapeReadings]
    untrained: Mapping[str, ShapeReadings] = field(default_factory=dict)
    document_T: np.ndarray

    def side(self, state: str) -> Mapping[str, ShapeReadings]:
        """The subjects of a state."""
        return self.trained if state == "trained" else self.untrained


@dataclass(frozen=True)
class Statistic:
    """One measured quantity: its interval, or why there is none."""

    name: str
    estimate: Estimate | None
    definition: str  # a key of some module's DEFINITIONS
    missing: str | None = None


@dataclass(frozen=True)
class Universality:
    """How alike the features of A and B are, beside what chance and what another training of one shape give."""

    u: Estimate
    null: float
    ceiling: Estimate | None
    floor: float | None  # u of the untrained pair
    normalised: Estimate | None  # U
    shares: dict[str, float]
    rates: universality.RateComparison | None
    missing: str | None


@dataclass(frozen=True)
class SiteStatistics:
    """The statistics of one site by name, and the densities and dimensions of each shape for pictures."""

    site: str
    statistics: dict[str, Statistic]
    universality: Universality | None
    points: list[dict[str, object]]
    difference_by: str | None = None
    """The estimator of the difference between the trained and the untrained pair."""

    def estimate(self, name: str) -> Estimate | None:
        """The estimate of a statistic; None where it was not measured."""
        found = self.statistics.get(name)
        return None if found is None else found.estimate


def measure_site(readings: SiteReadings) -> SiteStatistics:
    """All ratios, exponents and the universality of one site."""
    found: list[Statistic] = []
    logs: dict[tuple[str, str], Bootstrap | str] = {}
    for state in ("trained", "untrained"):
        sides = readings.side(state)
        for estimator in density.ESTIMATORS:
            log = _log_ratio(sides, estimator, readings.document_T)
            logs[state, estimator] = log
            name = f"{'R' if state == 'trained' else 'R untrained'}, {estimator}"
            found.append(_as_statistic(name, log, estimator, transform=exponentiate))
    by, difference = _control_difference(logs)
    found.append(_as_statistic("trained_difference", difference, "trained_difference"))
    slopes = {state: _slopes(readings.side(state)) for state in ("trained", "untrained")}
    for name, slope in slopes["trained"].items():
        found.append(_as_statistic(name, slope, name if name != "delta" else "dimension_growth"))
    for name, slope in slopes["untrained"].items():
        found.append(_as_statistic(f"{name} untrained", slope, name if name != "delta" else "dimension_growth"))
    excess = _less(slopes["trained"]["gamma"], slopes["untrained"]["gamma"])
    found.append(_as_statistic("gamma_excess", excess, "gamma_excess"))
    both = {"A", "B"} <= readings.trained.keys()
    return SiteStatistics(
        site=readings.site,
        statistics={statistic.name: statistic for statistic in found},
        universality=measure_universality(readings) if both else None,
        points=[point for state in ("trained", "untrained") for point in _points(readings, state)],
        difference_by=by,
    )


def _control_difference(logs: Mapping[tuple[str, str], Bootstrap | str]) -> tuple[str | None, Bootstrap | str]:
    """ln R trained less untrained, by the first estimator of `CONTROL` that both have, and which that is."""
    differences = {by: _less(logs["trained", by], logs["untrained", by]) for by in CONTROL}
    for by, difference in differences.items():
        if isinstance(difference, Bootstrap):
            return by, difference
    return None, differences[CONTROL[0]]


def _log_ratio(sides: Mapping[str, ShapeReadings], estimator: str, document_T: np.ndarray) -> Bootstrap | str:
    if not {"A", "B"} <= sides.keys():
        return "not run"
    return density.density_ratio(sides["B"], sides["A"], estimator, document_T)


def _less(first: Bootstrap | str, second: Bootstrap | str) -> Bootstrap | str:
    """The difference of two resampled values, draw by draw."""
    if isinstance(first, str):
        return first
    if isinstance(second, str):
        return f"untrained: {second}"
    return Bootstrap(first.value - second.value, first.stretched() - second.stretched())


def _as_statistic(name: str, value: Bootstrap | str, definition: str, transform=None) -> Statistic:
    if isinstance(value, str):
        return Statistic(name, None, definition, value)
    estimate = value.estimate()
    return Statistic(name, transform(estimate) if transform else estimate, definition)


def _slopes(sides: Mapping[str, ShapeReadings]) -> dict[str, Bootstrap | str]:
    """alpha, gamma and delta over the shapes at hand."""
    subjects = list(sides.values())
    names = ("alpha", "gamma", "delta")
    if len({s.n_layers for s in subjects}) < 2:
        return dict.fromkeys(names, "one depth; a slope needs two")
    if any(not len(reading) for s in subjects for reading in s.readings):
        return dict.fromkeys(names, "a dictionary without alive features")
    depth, width = [s.n_layers for s in subjects], [s.d_model for s in subjects]
    per_layer = [s.bootstrap(lambda r, s=s: r.rho_F.sum() / s.n_layers, seed=i) for i, s in enumerate(subjects)]
    rho = [s.bootstrap(lambda r: float(r.rho_F.mean()), seed=i) for i, s in enumerate(subjects)]
    out: dict[str, Bootstrap | str] = {
        "alpha": dimension.log_slope_of_bootstraps(width, per_layer),
        "gamma": dimension.log_slope_of_bootstraps(depth, rho),
    }
    relative = [_relative_dimension(s, i) for i, s in enumerate(subjects)]
    reasons = [value for value in relative if isinstance(value, str)]
    known = [value for value in relative if isinstance(value, Bootstrap)]
    out["delta"] = reasons[0] if reasons else dimension.log_slope_of_bootstraps(depth, known)
    return out


def _relative_dimension(subject: ShapeReadings, seed: int) -> Bootstrap | str:
    """d_eff / D, energy-weighted and debiased, over training seeds and pairs of dictionary seeds."""
    groups = []
    for pairs in subject.pairs:
        known = [pair.debiased.value for pair in pairs if pair.debiased.value is not None]
        reason = next((pair.debiased.reason for pair in pairs if pair.debiased.value is None), None)
        if reason or not known or not np.isfinite(known).all():
            return f"{subject.name}: {reason or 'one dictionary seed, or no interference'}"
        groups.append([value / subject.d_model for value in known])
    return two_level_bootstrap(groups, seed=seed, n_draws=density.N_DRAWS)


def _points(readings: SiteReadings, state: str) -> list[dict[str, object]]:
    """One row a training seed and shape: what the picture of R and delta is drawn from."""
    rows: list[dict[str, object]] = []
    for subject in readings.side(state).values():
        for seed, (group, pairs) in enumerate(zip(subject.seeds, subject.pairs, strict=True)):
            rows.append(
                {
                    "subject": subject.name,
                    "state": state,
                    "training_seed": seed,
                    "features": _mean([len(r) for r in group]),
                    "rho": _mean([r.rho_F.mean() if len(r) else np.nan for r in group]),
                    "load": _mean([counting.binary_entropy(r.probability_F).sum() for r in group]),
                    "d_eff_raw": _mean([dimension.weighted_dimension(r.rows_FN) for r in group]),
                    "d_eff_weighted": _mean([dimension.weighted_dimension(r.rows_FN, r.energy_F) for r in group]),
                    "d_eff_debiased": _mean([pair.debiased.value for pair in pairs]),
                    "self_cosine": _mean([pair.debiased.self_cosine for pair in pairs]),
                    "matched_share": _mean([pair.matched_share for pair in pairs]),
                    "explained_variance": _mean([r.explained_variance for r in group]),
                    "dead_share": _mean([r.dead_share for r in group]),
                    "l0": _mean([r.l0 for r in group]),
                }
            )
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where a value is missing or not finite, or there is none."""
    found = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    return float(found.mean()) if len(found) and np.isfinite(found).all() else None


def measure_universality(readings: SiteReadings) -> Universality:
    """U of A and B: the mean best correlation both ways, between chance (0) and another training of a shape (1).

    The ceiling is the mean over A's and B's shape of what two training seeds of one shape reach.
    """
    a, b = readings.trained["A"], readings.trained["B"]
    u = two_level_bootstrap(_between(a, b), seed=0, n_draws=density.N_DRAWS).estimate()
    first, second = a.seeds[0][0], b.seeds[0][0]
    null = universality.shifted_null(first.code, second.code, readings.document_T, seed=0, n_draws=NULL_DRAWS)
    ceilings = [row for subject in (a, b) for row in _within(subject)]
    untrained = readings.untrained
    floor = None
    if {"A", "B"} <= untrained.keys():
        floor = float(np.mean([np.mean(row) for row in _between(untrained["A"], untrained["B"])]))
    correlation = matching.activation_correlation(first.code, second.code)
    agreement = universality.agreement(correlation)
    shares = dict(zip(("forward_5", "forward_7"), agreement.shares_forward, strict=True))
    shares |= dict(zip(("backward_5", "backward_7"), agreement.shares_backward, strict=True))
    pairs = matching.mutual_nearest_pairs(correlation, counting.LINK)
    rates = universality.compare_rates(first.probability_F, second.probability_F, pairs) if len(pairs) else None
    ceiling = two_level_bootstrap(ceilings, seed=0, n_draws=density.N_DRAWS).estimate() if ceilings else None
    normalised, missing = None, None
    if ceiling is None:
        missing = "one training seed of each shape, so there is no ceiling to measure U against"
    else:
        try:
            normalised = universality.universality_estimate(u, null=float(null.mean()), ceiling=ceiling)
        except ValueError as error:
            missing = str(error)
    return Universality(u, float(null.mean()), ceiling, floor, normalised, shares, rates, missing)


def _between(a: ShapeReadings, b: ShapeReadings) -> list[list[float]]:
    """u of each training seed of A with its counterpart of B, over their dictionary seeds."""
    n = min(len(a.seeds), len(b.seeds))
    return [[_u(x, y) for x in a.seeds[t] for y in b.seeds[t]] for t in range(n)]


def _within(subject: ShapeReadings) -> list[list[float]]:
    """u of pairs of training seeds of one shape, over their dictionary seeds."""
    return [[_u(x, y) for x in one for y in other] for one, other in combinations(subject.seeds, 2)]


def _u(first: Reading, second: Reading) -> float:
    def measure(x, y) -> float:
        return universality.agreement(matching.activation_correlation(x, y)).u

    return universality.average_over_pools(first.code, second.code, measure, seed=0, n_pools=POOLS)
