"""From measured sites to the rule's evidence and to the plain values of the report's verdict section."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosscoder.measure import (
    comparison,
    counting,
    density,
    dimension,
    probes,
    profile,
    saturation,
    statistics,
    universality,
)
from crosscoder.measure.comparison import SiteReadings, SiteStatistics, Statistic
from crosscoder.measure.density import PRIMARY, ShapeReadings
from crosscoder.measure.reading import Reading
from crosscoder.measure.statistics import Bootstrap, two_level_bootstrap
from crosscoder.results.table import Estimate
from crosscoder.verdict import decide as verdict
from crosscoder.verdict import gain

DEFINITIONS = {
    **counting.DEFINITIONS,
    **profile.DEFINITIONS,
    **probes.DEFINITIONS,
    **dimension.DEFINITIONS,
    **universality.DEFINITIONS,
    **statistics.DEFINITIONS,
    **density.DEFINITIONS,
    **comparison.DEFINITIONS,
    **gain.DEFINITIONS,
    **saturation.DEFINITIONS,
    **verdict.DEFINITIONS,
}
PRIMARY_SITE, SECONDARY_SITE = "write", "residual"
FURTHER = {
    "chapman": "features of {} by capture-recapture of two dictionary seeds",
    "chao2": "features of {} by Chao2, first training seed",
    "stable": "stable features of {}, first training seed",
    "F_inf": "features of {} as dictionaries grow",
    "equal_variance": "ln R shift if explained variance were exactly equal",
    "exclusive": "features of a joint crosscoder that are {}'s alone",
}
WORDS = {
    f"R, {PRIMARY}": "R, density of B over A (primary estimator)",
    f"R untrained, {PRIMARY}": "R of the untrained pair",
    "trained_difference": "ln R, trained less untrained",
    "alpha": "alpha: features per layer as a power of D",
    "gamma": "gamma: lifespan as a power of L",
    "gamma_excess": "gamma, trained less untrained",
    "delta": "delta: d_eff / D as a power of L",
    "universality": "U: universality of A and B",
    "cross_layer": "X: genuinely cross-layer share beyond its nulls",
    "count_gain": "count gain of the crosscoder over the bank, ln",
    "removal_shift": "ln R shift when those features are left out",
    "residual": "alpha + 2 gamma - 2",
    "headroom": "headroom below the ceiling (above 1: no contradiction)",
}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Errors on planted worlds, the worst over worlds: relative, absolute value; None where not measured."""

    count_error: float | None = None
    rho_error: float | None = None
    d_eff_error: float | None = None  # shown; no gate
    same_sizes: bool = False


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What the gates need that no reading holds."""

    loss_gap: float | None
    loss_matched: bool
    calibration: Calibration = Calibration()
    cross_layer: Statistic | None = None
    count_gain: Statistic | None = None
    removal_shift: Statistic | None = None
    headroom: Estimate | None = None
    further: tuple[Statistic, ...] = ()
    """Statistics of the primary site that the report shows and the rule does not read."""


def gather(sites: Mapping[str, SiteStatistics], readings: SiteReadings, conditions: Conditions) -> verdict.Evidence:
    """The rule's evidence: the primary site's statistics, the worst dictionary behind them, and the conditions."""
    primary = sites[PRIMARY_SITE]
    secondary = sites.get(SECONDARY_SITE)
    main = [subject for name, subject in readings.trained.items() if name in ("A", "B")]
    everyone = list(readings.trained.values())
    u = primary.universality
    return verdict.Evidence(
        loss_gap=conditions.loss_gap,
        loss_matched=conditions.loss_matched,
        explained_variance=_explained(main),
        dead_share=max(r.dead_share for s in everyone for r in s.readings),
        self_cosine=worst_self_cosine(everyone),
        calibration_count_error=conditions.calibration.count_error,
        calibration_rho_error=conditions.calibration.rho_error,
        calibration_same_sizes=conditions.calibration.same_sizes,
        trained_difference=primary.estimate("trained_difference"),
        trained_difference_by=primary.difference_by,
        ratio=primary.estimate(f"R, {PRIMARY}"),
        universality=None if u is None else u.normalised,
        alpha=primary.estimate("alpha"),
        gamma=primary.estimate("gamma"),
        gamma_excess=primary.estimate("gamma_excess"),
        delta=primary.estimate("delta"),
        cross_layer=_estimate(conditions.cross_layer),
        count_gain=_estimate(conditions.count_gain),
        removal_shift=_estimate(conditions.removal_shift),
        ratio_residual=None if secondary is None else secondary.estimate(f"R, {PRIMARY}"),
        headroom=conditions.headroom,
        n_training_seeds=min(len(s.seeds) for s in everyone),
    )


def _estimate(statistic: Statistic | None) -> Estimate | None:
    return None if statistic is None else statistic.estimate


def _explained(subjects: Sequence[ShapeReadings]) -> tuple[float, float] | None:
    if len(subjects) != 2:
        return None
    first, second = (float(np.mean([r.explained_variance for r in s.readings])) for s in subjects)
    return first, second


def worst_self_cosine(subjects: Sequence[ShapeReadings]) -> float | None:
    """The lowest mean decoder cosine of matched features of two seeds over all subjects; None without pairs."""
    found = [pair.debiased.self_cosine for s in subjects for pairs in s.pairs for pair in pairs]
    return min((value for value in found if not math.isnan(value)), default=None)


def removal_shift(readings: SiteReadings) -> Statistic:
    """ln R without the features marked genuinely cross-layer in the readings of A and B, less ln R with them."""
    sides = {name: readings.trained[name] for name in ("A", "B")}
    if any(reading.genuine_F is None for subject in sides.values() for reading in subject.readings):
        return Statistic("removal_shift", None, "removal_shift", "not every dictionary of A and B was probed")

    def others(reading: Reading) -> np.ndarray:
        return np.ones(len(reading), dtype=bool) if reading.genuine_F is None else ~reading.genuine_F

    without = {name: subject.only(others) for name, subject in sides.items()}
    logs = [density.density_ratio(x["B"], x["A"], PRIMARY, readings.document_T) for x in (without, sides)]
    for log in logs:
        if isinstance(log, str):
            return Statistic("removal_shift", None, "removal_shift", log)
    first, second = (log for log in logs if isinstance(log, Bootstrap))
    both = Bootstrap(first.value - second.value, first.draws - second.draws)
    return Statistic("removal_shift", both.estimate(), "removal_shift")


def seeds_statistic(name: str, groups: Sequence[Sequence[float | str]], *, definition: str | None = None) -> Statistic:
    """A number of each dictionary of each training seed as one statistic; the first reason where one is missing.

    `definition` is the key of its definition, where that is not the name.
    """
    key = definition or name
    reasons = [value for group in groups for value in group if isinstance(value, str)]
    if reasons or not groups or not all(groups):
        return Statistic(name, None, key, reasons[0] if reasons else "not run")
    values = [[float(value) for value in group] for group in groups]
    return Statistic(name, two_level_bootstrap(values, seed=0, n_draws=density.N_DRAWS).estimate(), key)


def describe(
    sites: Mapping[str, SiteStatistics],
    evidence: verdict.Evidence,
    conditions: Conditions,
    rule: verdict.Rule = verdict.RULE,
) -> dict[str, Any]:
    """The verdict section of `results.json`: sentence, gates, statistics, every estimator, points and the rule."""
    decided = verdict.decide(evidence, rule)
    extra = [s for s in (conditions.cross_layer, conditions.count_gain, conditions.removal_shift) if s is not None]
    rows = []
    for site, found in sites.items():
        listed = [found.statistics[name] for name in WORDS if name in found.statistics]
        if found.universality is not None:
            u = found.universality
            listed.append(Statistic("universality", u.normalised, "universality", u.missing))
        if site == PRIMARY_SITE:
            listed += [*extra, *conditions.further]
            listed.append(Statistic("residual", decided.residual, "residual", "alpha or gamma was not measured"))
            unbounded = (
                "no d_eff" if conditions.headroom is None else "no firing probability is too high at this density"
            )
            listed.append(Statistic("headroom", conditions.headroom, "headroom", unbounded))
        rows += [_row(site, statistic) for statistic in listed]
    return {
        "version": decided.version,
        "label": decided.label,
        "kinds": list(decided.kinds),
        "universality": decided.universality,
        "sentence": decided.sentence,
        "reasons": list(decided.reasons),
        "notes": [*decided.notes, *_further_notes(sites, conditions, rule)],
        "gates": [_gate(gate) for gate in decided.gates],
        "conditions": [dataclasses.asdict(condition) for condition in decided.conditions],
        "statistics": rows,
        "estimators": [row for site, found in sites.items() for row in _estimators(site, found)],
        "points": [{"site": site, **point} for site, found in sites.items() for point in found.points],
        "universality_by_site": {
            site: _universality(found.universality) for site, found in sites.items() if found.universality is not None
        },
        "rule": {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(rule).items()},
    }


def _further_notes(sites: Mapping[str, SiteStatistics], conditions: Conditions, rule: verdict.Rule) -> list[str]:
    """What a reader of R must know and no statistic says."""
    notes = []
    error = conditions.calibration.d_eff_error
    if error is not None:
        notes.append(f"no gate asks for it: d_eff is up to {error:.1%} off in the planted worlds, and R with it")
    rows = [row for row in sites[PRIMARY_SITE].points if row["state"] == "trained"]
    loads = {name: [float(str(row["load"])) for row in rows if row["subject"] == name] for name in ("A", "B")}
    if all(loads.values()):
        share = float(np.mean(loads["B"]) / np.mean(loads["A"]))
        low, high = (math.log(2 * bound / share) / math.log(4) for bound in rule.equal)
        notes.append(
            f"R = (load of B over A) 4^delta / 2 for L and L / 4 layers; at the loads measured ({share:.3g}) an R in "
            f"[{rule.equal[0]:g}, {rule.equal[1]:g}] goes with delta from {low:.2f} to {high:.2f}, and H1 asks for "
            f"[{rule.delta[0]:g}, {rule.delta[1]:g}]"
        )
    for site, found in sites.items():
        u = found.universality
        if u is not None and u.floor is not None and u.ceiling is not None and u.floor >= u.ceiling.value:
            notes.append(
                f"on the {'block writes' if site == PRIMARY_SITE else 'residual stream'} untrained subjects are as "
                f"alike (u {u.floor:.3g}) as two trainings of one shape ({u.ceiling.value:.3g}): U says nothing there"
            )
    return notes


def _gate(gate: verdict.Gate) -> dict[str, Any]:
    value = gate.value
    if isinstance(value, float) and not math.isfinite(value):
        value = None
    return {"name": gate.name, "value": value, "requirement": gate.requirement, "passed": gate.passed}


def _row(site: str, statistic: Statistic) -> dict[str, Any]:
    return {
        "site": site,
        "name": statistic.name,
        "words": WORDS.get(statistic.name)
        or FURTHER.get(statistic.name.split(" ")[0], "{}").format(statistic.name.split(" ")[-1]),
        "estimate": plain(statistic.estimate),
        "missing": None if plain(statistic.estimate) is not None else statistic.missing or "not measured",
        "definition": statistic.definition,
    }


def _estimators(site: str, found: SiteStatistics) -> list[dict[str, Any]]:
    rows = []
    for estimator in density.ESTIMATORS:
        trained, untrained = (found.statistics.get(f"{r}, {estimator}") for r in ("R", "R untrained"))
        rows.append(
            {
                "site": site,
                "estimator": estimator,
                "primary": estimator == PRIMARY and site == PRIMARY_SITE,
                "trained": plain(_estimate(trained)),
                "untrained": plain(_estimate(untrained)),
                "missing": None if trained is None or trained.estimate else trained.missing,
                "definition": estimator,
            }
        )
    return rows


def _universality(found: comparison.Universality) -> dict[str, Any]:
    rates = None if found.rates is None else dataclasses.asdict(found.rates)
    if rates is not None:
        rates = {key: value if math.isfinite(value) else None for key, value in rates.items()}
    return {
        "u": plain(found.u),
        "null": found.null,
        "ceiling": plain(found.ceiling),
        "floor": found.floor,
        "normalised": plain(found.normalised),
        "shares": found.shares,
        "rates": rates,
        "missing": found.missing,
    }


def plain(estimate: Estimate | None) -> dict[str, float] | None:
    """`{"mean", "low", "high"}` as the tables want it; None where something is not finite."""
    if estimate is None or not estimate.finite:
        return None
    return {"mean": estimate.value, "low": estimate.low, "high": estimate.high}
