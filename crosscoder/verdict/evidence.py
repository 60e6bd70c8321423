"""From the rows and readings of a study to the rule's evidence: X, the gain of joint counting, the worst dictionary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from crosscoder.measure import density
from crosscoder.measure.comparison import SiteReadings
from crosscoder.measure.density import ShapeReadings
from crosscoder.measure.statistics import Bootstrap, linear_combination, statistic_row
from crosscoder.results.quantities import PRIMARY_ESTIMATOR
from crosscoder.results.table import COMPARED, SITE_NAME, SITES, Estimate, LongTable, Place, Row
from crosscoder.verdict.rule import RULE, STATISTICS, Calibration, Evidence, Rule

PRIMARY_SITE = SITES[0]


@dataclass(frozen=True, kw_only=True)
class GateInputs:
    """Inputs of the gates that are not in the readings."""

    loss_gap: float | None
    loss_matched: bool
    calibration: Calibration = field(default_factory=Calibration)


def gather(table: LongTable, readings: SiteReadings, inputs: GateInputs) -> Evidence:
    """The rule's evidence: the statistics of `table`, the worst dictionary of the primary site, and the inputs.

    `table` holds the rows of `measure_site` for every site, and X, the count gain, the removal shift and the headroom
    where they were measured; `readings` are those of the primary site.
    """
    ratios = (table.one("ratio", site=site, state="trained", estimator=PRIMARY_ESTIMATOR) for site in SITES)
    ratio, ratio_residual = ratios
    keys = (*STATISTICS, "trained_difference", "removal_shift", "headroom")
    shapes = list(readings.trained.values())
    (difference,) = table.select("trained_difference", site=PRIMARY_SITE)
    return Evidence(
        loss_gap=inputs.loss_gap,
        loss_matched=inputs.loss_matched,
        explained_variance=_explained(readings),
        dead_share=max(reading.dead_share for shape in shapes for reading in shape.readings),
        self_cosine=worst_self_cosine(shapes),
        calibration=inputs.calibration,
        trained_difference_by=difference.at.estimator,
        ratio=ratio,
        ratio_residual=ratio_residual,
        n_training_seeds=min(len(shape.seeds) for shape in shapes),
        **{key: table.one(key, site=PRIMARY_SITE) for key in keys},
    )


def _explained(readings: SiteReadings) -> tuple[float, float] | None:
    """Mean explained variance of A's and of B's dictionaries."""
    pair = readings.pair()
    if pair is None:
        return None
    first, second = (float(np.mean([r.explained_variance for r in shape.readings])) for shape in pair)
    return first, second


def worst_self_cosine(shapes: Sequence[ShapeReadings]) -> float | None:
    """The lowest mean decoder cosine of matched features of two seeds over all shapes; None without pairs."""
    found = [pair.debiased.self_cosine for shape in shapes for pairs in shape.pairs for pair in pairs]
    return min((value for value in found if not math.isnan(value)), default=None)


def reading_notes(table: LongTable, inputs: GateInputs, rule: Rule = RULE) -> tuple[str, ...]:
    """Cautions for a reader of R that no statistic of the rule expresses."""
    notes = []
    error = inputs.calibration.d_eff_error
    if error is not None:
        notes.append(f"no gate asks for it: d_eff is up to {error:.1%} off in the planted worlds, and R with it")
    where = {"state": "trained", "site": PRIMARY_SITE}
    a, b = (table.values("point_load", subject=name, **where) for name in COMPARED)
    if a and b:
        share = float(np.mean(b) / np.mean(a))
        low, high = (math.log(2 * bound / share) / math.log(4) for bound in rule.equal)
        notes.append(
            f"R = (load of B over A) 4^delta / 2 for L and L / 4 layers; at the loads measured ({share:.3g}) an R in "
            f"[{rule.equal[0]:g}, {rule.equal[1]:g}] goes with delta from {low:.2f} to {high:.2f}, and H1 asks for "
            f"[{rule.delta[0]:g}, {rule.delta[1]:g}]"
        )
    for site in SITES:
        floor, ceiling = table.one("u_floor", site=site), table.one("u_ceiling", site=site)
        if floor is not None and ceiling is not None and floor >= ceiling.value:
            notes.append(
                f"on the {SITE_NAME[site]} untrained subjects are as alike (u {floor:.3g}) as two trainings of one "
                f"shape ({ceiling.value:.3g}): U says nothing there"
            )
    return tuple(notes)


def removal_shift(readings: SiteReadings) -> Row:
    """ln R without the features marked genuinely cross-layer in the readings of A and B, less ln R with them."""
    at = Place(site=readings.site)
    with_all = [readings.trained[name] for name in COMPARED]
    if any(reading.genuine_F is None for shape in with_all for reading in shape.readings):
        return Row(at, "removal_shift", None, "not every dictionary of A and B was probed")

    without = [shape.only(lambda reading: ~np.asarray(reading.genuine_F)) for shape in with_all]
    logs = [density.density_ratio(b, a, PRIMARY_ESTIMATOR, readings.document_T) for a, b in (without, with_all)]
    for log in logs:
        if isinstance(log, str):
            return Row(at, "removal_shift", None, log)
    first, second = (log for log in logs if isinstance(log, Bootstrap))
    return statistic_row(at, "removal_shift", Bootstrap(first.value - second.value, first.draws - second.draws))


def cross_layer_excess(trained: Bootstrap, shuffled: Bootstrap, untrained: Bootstrap) -> Bootstrap:
    """X = share - larger of both nulls, draw by draw, each share stretched by its own small-sample factor.

    The larger of two noisy nulls is too large on average, so X errs on the low side, and below 0 where nothing differs.
    """
    null = np.maximum(shuffled.stretched(), untrained.stretched())
    return Bootstrap(trained.value - max(shuffled.value, untrained.value), trained.stretched() - null)


def identity_residual(alpha: Estimate | None, gamma: Estimate | None) -> Estimate | None:
    """`alpha + 2 gamma - 2` with its interval, alpha and gamma taken as independent; None where one is missing."""
    if alpha is None or gamma is None or not (alpha.finite and gamma.finite):
        return None
    return linear_combination([(1.0, alpha), (2.0, gamma)], constant=-2.0)


@dataclass(frozen=True)
class Point:
    """One dictionary of a sweep over k: explained variance, and ln of what is compared at equal variance."""

    explained_variance: float
    log_value: float


def point_of_l0(explained_variance: float, l0: float) -> Point:
    """The point of a dictionary whose value is L0; ln is minus infinity where nothing is active."""
    return Point(explained_variance, math.log(l0) if l0 > 0 else -math.inf)


def log_value_at(explained_variance: float, points: Sequence[Point]) -> float | str:
    """ln of the compared value between dictionaries of several k; what they explain where that does not enclose it."""
    known = sorted(points, key=lambda point: point.explained_variance)
    if not known or not known[0].explained_variance <= explained_variance <= known[-1].explained_variance:
        return ", ".join(f"{point.explained_variance:.3f}" for point in known) or "nothing"
    x, y = zip(*((point.explained_variance, point.log_value) for point in known), strict=True)
    return float(np.interp(explained_variance, x, y))


def count_gain(crosscoder: Point, bank: Sequence[Point]) -> float | str:
    """ln(L0 of the bank / L0 of the crosscoder) at the crosscoder's explained variance, or why there is none.

    The value of a point is L0: active features of a token over the whole model. With planted features of one layer each
    the gain is 0; with features that last all L layers it is ln L. Explained variance is interpolated as it is. On a
    scale of ln(1 - explained variance), a bank that has just enough features would be far to the right, because nothing
    is left to explain, and the line to it would give too small an L0 at every point before.
    """
    if not all(math.isfinite(point.log_value) for point in (crosscoder, *bank)):
        return "a dictionary without active features"
    target = crosscoder.explained_variance
    found = log_value_at(target, bank)
    if isinstance(found, str):
        return f"the crosscoder explains {target:.3f}, outside what the banks do ({found}); train banks of other k"
    return found - crosscoder.log_value


def equal_variance_shift(b: Sequence[Point], a: Sequence[Point]) -> float | str:
    """ln R at equal explained variance less ln R as it was run, or why it cannot be said.

    The value of a point is a density: entropy load over effective dimension. The first of either sequence is the
    dictionary that R was read from, the others have other k.
    """
    if not a or not b:
        return "not run"
    target = (a[0].explained_variance + b[0].explained_variance) / 2
    moved = []
    for name, points in (("B", b), ("A", a)):
        found = log_value_at(target, points)
        if isinstance(found, str):
            return f"{name}'s dictionaries of several k explain {found}, and {target:.3f} is asked"
        moved.append(found - points[0].log_value)
    return moved[0] - moved[1]
