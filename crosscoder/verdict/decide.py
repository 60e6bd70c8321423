"""The decision rule, fixed before any run, as a pure function of values with intervals.

R = lambda_B / lambda_A compares the wide, shallow model B with the deep, narrow A, lambda being entropy load over
effective dimension. Which measurement gives which value is not decided here; what the values mean is.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from crosscoder.measure.statistics import linear_combination
from crosscoder.results.table import Estimate
from crosscoder.verdict.conditions import Condition, above_zero, check_conditions, kind_outside
from crosscoder.verdict.rule import RULE, Evidence, Rule, known, show

Label = Literal["H0", "H1a", "H1b", "H1", "H2-u", "H2", "undecided", "not testable"]

ROUNDING = 1e-12  # 1 - .95 is not .05 in binary; a value at its bound must not fail for that
BELOW_CEILING = "below the ceiling: no contradiction at this scale"

DEFINITIONS = {
    "R": "Density ratio R = lambda_B / lambda_A, with lambda = entropy load over effective dimension (energy-weighted, "
    "two-seed debiased), at equal explained variance, on what blocks write.",
    "in_band": "A value is inside, above or below a bound when its whole 90 % interval is (for a band around 1 this is "
    "the two one-sided test at 5 %).",
    "consistent_with_0": "Consistent with 0: the interval reaches to within a negligible size of 0 and stays inside a "
    "bound, so that neither a precise trace of bias refutes 0 nor a wide interval confirms it. Both numbers are "
    "constants of the rule. X is above 0 when its whole interval is above what is negligible.",
    "gamma_excess": "gamma of the trained subjects less gamma of the same subjects untrained.",
    "count_gain": "Gain of joint counting: ln of the features of A's bank active on a token, over all layers, per "
    "active feature of A's crosscoder at equal explained variance. 0 where every feature lives in one layer; above 0 "
    "where one joint feature does the work of several layers' features, persisting or as a code across layers.",
    "removal_shift": "ln R without the genuinely cross-layer features, less ln R with them.",
    "H0": "Per-layer superposition is complete: R in the band around 2; gamma, X and count gain consistent with 0.",
    "H1a": "Persistence reconciles the count: R equal to 1, d_eff growing as D sqrt(L), lifespans growing with depth "
    "beyond the untrained control, count gain above 0, X not above 0.",
    "H1b": "Genuinely cross-layer features reconcile the count: as H1a, with X above 0, and leaving those features out "
    "moves ln R at least half the way to ln 2.",
    "H1": "Cross-layer structure reconciles the count, but which kind is not shown.",
    "H2-u": "The two models do not have the same features, so their counts are not two measures of one thing.",
    "H2": "Neither: R outside both bands. Over-reconciled, partial, denser than per-layer superposition predicts, or "
    "alternative compression (alpha consistent with 2 and gamma below .25).",
    "undecided": "All gates pass, but an interval crosses a bound, or the evidence beside R contradicts its band.",
    "not-testable": "A gate failed, so R says nothing about the question.",
    "residual": "alpha + 2 gamma - 2: 0 where features are a function of parameters alone.",
}


@dataclass(frozen=True)
class Gate:
    """One condition without which the ratio cannot be read."""

    name: str
    value: float | str | None
    requirement: str
    passed: bool


@dataclass(frozen=True)
class Verdict:
    """What the rule says, and everything that it was said from."""

    version: str
    label: Label
    kinds: tuple[str, ...]  # of H2
    universality: Literal["universal", "not universal", "between", "not measured"]
    sentence: str
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    gates: tuple[Gate, ...]
    conditions: tuple[Condition, ...]
    residual: Estimate | None  # alpha + 2 gamma - 2


REQUIRED = ("ratio", "universality", "alpha", "gamma", "gamma_excess", "delta", "cross_layer", "count_gain")
OPTIONAL = ("removal_shift", "ratio_residual")  # `headroom` may be infinite


def _at_most(name: str, value: float | None, limit: float, what: str) -> Gate:
    passed = value is not None and 0 <= value <= limit + ROUNDING
    return Gate(name, value, f"{what}, at most {limit:g}", passed)


def check_gates(evidence: Evidence, rule: Rule = RULE) -> tuple[Gate, ...]:
    """Every gate with its value; one that was not measured, or is not a number, fails."""
    e = evidence
    gap = None
    if e.explained_variance is not None and max(e.explained_variance) > 0:
        gap = abs(e.explained_variance[0] - e.explained_variance[1]) / max(e.explained_variance)
    loss = _at_most("loss gap", e.loss_gap, rule.loss_gap, "gap of held-out losses")
    loss_passed = loss.passed or (e.loss_matched and e.loss_gap is not None and math.isfinite(e.loss_gap))
    difference = e.trained_difference
    differs = difference is not None and difference.finite and not difference.covers(0)
    measured = {name: getattr(e, name) for name in REQUIRED}
    missing = [name for name, value in measured.items() if value is None or not value.finite]
    present = [value for value in (*measured.values(), *(getattr(e, name) for name in OPTIONAL), difference) if value]
    confidences = sorted({value.confidence for value in present})
    return (
        dataclasses.replace(loss, requirement=f"{loss.requirement}, or loss-matched checkpoints", passed=loss_passed),
        _at_most("explained variance", gap, rule.explained_variance_gap, "relative gap of A and B"),
        _at_most("dead features", e.dead_share, rule.dead_share, "dead share"),
        Gate(
            "self-cosine",
            e.self_cosine,
            f"decoder cosine of matched features of two seeds, at least {rule.self_cosine:g}",
            e.self_cosine is not None and e.self_cosine >= rule.self_cosine - ROUNDING,
        ),
        _at_most("calibration count", e.calibration_count_error, rule.calibration_error, "count error when planted"),
        _at_most("calibration rho", e.calibration_rho_error, rule.calibration_error, "rho error when planted"),
        Gate(
            "calibration sizes",
            "same" if e.calibration_same_sizes else "different",
            "planted worlds of the study's own sizes",
            e.calibration_same_sizes,
        ),
        Gate(
            "trained against untrained",
            None if difference is None else show(difference),
            f"a difference in ln R whose interval leaves out 0 (by {e.trained_difference_by or 'any estimator'})",
            differs,
        ),
        Gate(
            "statistics measured",
            f"missing: {', '.join(missing)}" if missing else "all",
            "a finite value and interval for each statistic of the rule",
            not missing,
        ),
        Gate(
            "confidence",
            ", ".join(f"{c:g}" for c in confidences) or None,
            f"all intervals at {rule.confidence:g}",
            confidences == [rule.confidence],
        ),
    )


def decide(evidence: Evidence, rule: Rule = RULE) -> Verdict:
    """The verdict on `evidence`: the gates first, then universality, then the band of R and what stands beside it."""
    gates = check_gates(evidence, rule)
    failed = [gate for gate in gates if not gate.passed]
    kinds: tuple[str, ...] = ()
    if failed:
        label: Label = "not testable"
        reasons = tuple(f"{gate.name}: {_value(gate)}; required: {gate.requirement}" for gate in failed)
    elif _universality(evidence, rule) == "not universal":
        label, reasons = "H2-u", (f"U is {show(known(evidence.universality))}, below {rule.not_universal:g}",)
    else:
        label, kinds, reasons = _read_ratio(evidence, rule)
    sentence = _sentence(label, kinds, reasons, evidence)
    if evidence.headroom is not None and evidence.headroom.value > rule.ceiling:
        sentence = f"{sentence} Headroom {evidence.headroom.value:.3g}: {BELOW_CEILING}."
    return Verdict(
        version=rule.version,
        label=label,
        kinds=kinds,
        universality=_universality(evidence, rule),
        sentence=sentence,
        reasons=reasons,
        notes=_notes(evidence, rule),
        gates=gates,
        conditions=check_conditions(evidence, rule),
        residual=line_residual(evidence.alpha, evidence.gamma),
    )


def line_residual(alpha: Estimate | None, gamma: Estimate | None) -> Estimate | None:
    """`alpha + 2 gamma - 2` with its interval, alpha and gamma taken as independent; None where one is missing."""
    if alpha is None or gamma is None or not (alpha.finite and gamma.finite) or alpha.confidence != gamma.confidence:
        return None
    return linear_combination([(1.0, alpha), (2.0, gamma)], constant=-2.0)


def _value(gate: Gate) -> str:
    if gate.value is None:
        return "not measured"
    return gate.value if isinstance(gate.value, str) else f"{gate.value:.3g}"


def _universality(evidence: Evidence, rule: Rule) -> Literal["universal", "not universal", "between", "not measured"]:
    u = evidence.universality
    if u is None or not u.finite:
        return "not measured"
    if u.low >= rule.universal:
        return "universal"
    return "not universal" if u.high <= rule.not_universal else "between"


def _read_ratio(evidence: Evidence, rule: Rule) -> tuple[Label, tuple[str, ...], tuple[str, ...]]:
    """Label, kinds of H2 and reasons, by where the interval of R lies."""
    ratio = known(evidence.ratio)
    shown = f"R is {show(ratio)}"
    conditions = check_conditions(evidence, rule)
    against = {
        name: tuple(c.against for c in conditions if c.hypothesis == name and c.statistic != "R" and not c.met)
        for name in ("H0", "H1")
    }
    if ratio.inside(*rule.complete):
        if against["H0"]:
            return "undecided", (), (f"{shown}, in the band of H0", *against["H0"])
        return "H0", (), (shown,)
    if ratio.inside(*rule.equal):
        if against["H1"]:
            return "undecided", (), (f"{shown}, in the band of H1", *against["H1"])
        return _kind_of_reconciliation(evidence, rule)
    kind = kind_outside(ratio, rule)
    if kind is None:
        return "undecided", (), (_across(ratio, rule), *_beside(conditions))
    squared = known(evidence.alpha).covers(rule.alternative_alpha) and known(evidence.gamma).high < rule.gamma
    return "H2", (kind, "alternative compression") if squared else (kind,), (shown,)


def _across(ratio: Estimate, rule: Rule) -> str:
    held = [f"{bound:g}" for bound in (*rule.equal, *rule.complete) if ratio.covers(bound)]
    listed = held[0] if len(held) == 1 else f"{', '.join(held[:-1])} and {held[-1]}"
    return f"R is {show(ratio)}, an interval that crosses the rule's bound{'s' * (len(held) > 1)} {listed}"


def _beside(conditions: tuple[Condition, ...]) -> tuple[str, ...]:
    """What a sharper R would not mend: the hypotheses that other statistics already speak against."""
    said = []
    for name in ("H0", "H1"):
        unmet = [c.statistic for c in conditions if c.hypothesis == name and c.statistic != "R" and not c.met]
        if unmet:
            said.append(f"{name} also lacks {', '.join(unmet)}")
    return tuple(said)


def _kind_of_reconciliation(evidence: Evidence, rule: Rule) -> tuple[Label, tuple[str, ...], tuple[str, ...]]:
    ratio, cross_layer, shift = known(evidence.ratio), known(evidence.cross_layer), evidence.removal_shift
    shown = f"R is {show(ratio)}"
    if not above_zero(cross_layer, rule):
        return "H1a", (), (shown, f"X is {show(cross_layer)}, not above 0")
    if shift is None or not shift.finite:
        return "H1", (), (shown, "R without the genuinely cross-layer features was not measured")
    needed = rule.removal_share * (math.log(2) - math.log(ratio.value))
    moved = f"without the genuinely cross-layer features ln R moves by {show(shift)}; half the way is {needed:.3g}"
    return ("H1b" if shift.value >= needed else "H1"), (), (shown, f"X is {show(cross_layer)}", moved)


def _notes(evidence: Evidence, rule: Rule) -> tuple[str, ...]:
    notes = []
    if evidence.headroom is not None and evidence.headroom.value > rule.ceiling:
        notes.append(BELOW_CEILING)
    if evidence.headroom is not None and evidence.headroom.high < rule.ceiling:
        notes.append(
            f"headroom is {show(evidence.headroom)}: the features found are denser than the ceiling of independent "
            "noise allows"
        )
    if _universality(evidence, rule) == "between":
        notes.append(f"universality is {show(known(evidence.universality))}: neither shown nor refuted")
    if evidence.n_training_seeds < 2:
        notes.append("one training run of each shape: no interval says what another run would give")
    primary, secondary = evidence.ratio, evidence.ratio_residual
    if primary is not None and secondary is not None:
        apart = primary.high < secondary.low or secondary.high < primary.low
        notes.append(f"R on the residual stream is {show(secondary)}, {'apart from' if apart else 'within reach of'} R")
    residual = line_residual(evidence.alpha, evidence.gamma)
    if residual is not None:
        fits = "consistent" if residual.covers(0) else "not consistent"
        forced = "; equal dictionaries that are all but full give 0 whatever the models do"
        notes.append(f"alpha + 2 gamma - 2 is {show(residual)}, {fits} with 0{forced}")
    return tuple(notes)


KINDS = {
    "over-reconciled": "the wide model is the less dense, so depth costs more than sharing across layers explains",
    "partial": "the wide model is denser, but by less than per-layer superposition predicts",
    "denser": "the wide model is denser than per-layer superposition predicts",
    "alternative compression": "layers hold features as the square of their width without sharing them across depth",
}
SENTENCES: dict[Label, str] = {
    "H0": "Per-layer superposition is complete: {ratio} times as many features fill a dimension of the wide model, and "
    "nothing says that features are shared across layers.",
    "H1a": "Features that persist across layers reconcile the counts: both models are equally dense ({ratio}).",
    "H1b": "Features that only several layers together express reconcile the counts: both models are equally dense "
    "({ratio}), and without these features they are not.",
    "H1": "Structure across layers reconciles the counts: both models are equally dense ({ratio}); whether features "
    "persist or are genuinely cross-layer is not shown.",
    "H2-u": "The two models do not have the same features, so the ratio of their densities does not bear on the "
    "question: {reasons}.",
    "H2": "Neither account holds, R is {ratio}: {kinds}.",
    "undecided": "Undecided: {reasons}.",
    "not testable": "Not testable: {reasons}.",
}


def _sentence(label: Label, kinds: tuple[str, ...], reasons: tuple[str, ...], evidence: Evidence) -> str:
    ratio = "an unmeasured number" if evidence.ratio is None else show(evidence.ratio)
    explained = "; ".join(f"{KINDS[kind]} ({kind})" for kind in kinds)
    return SENTENCES[label].format(ratio=ratio, reasons="; ".join(reasons), kinds=explained)
