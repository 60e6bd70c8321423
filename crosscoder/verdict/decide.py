"""The decision rule, fixed before any run, as a pure function of values with intervals.

R = lambda_B / lambda_A compares the wide, shallow model B with the deep, narrow A, lambda being entropy load over
effective dimension. Gates say whether R can be interpreted at all; conditions list what each hypothesis requires, also
where a gate fails. A requirement holds only where the whole interval meets it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from crosscoder.results.table import CONFIDENCE, Estimate, finite
from crosscoder.results.verdict import Condition, Gate, Hypothesis, Label, UniversalityLabel, Verdict
from crosscoder.verdict.evidence import identity_residual
from crosscoder.verdict.rule import RULE, STATISTICS, Evidence, Rule

Requirement = tuple[str, Callable[[Estimate], bool]]
"""What is asked of a statistic: in words, and whether an estimate of it does."""
ROUNDING = 1e-12  # 1 - .95 is not .05 in binary; a value at its bound must not fail for that
BELOW_CEILING = "below the ceiling: no contradiction at this scale"
OPTIONAL = ("removal_shift", "ratio_residual", "trained_difference")  # `headroom` may be infinite
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


def decide(evidence: Evidence, rule: Rule = RULE) -> Verdict:
    """The verdict on `evidence`: the gates first, then universality, then the band of R and what stands beside it."""
    gates, conditions = check_gates(evidence, rule), check_conditions(evidence, rule)
    universality = _universality(evidence, rule)
    failed = [gate for gate in gates if not gate.passed]
    kinds: tuple[str, ...] = ()
    if failed:
        label: Label = "not testable"
        reasons = tuple(f"{gate.name}: {_value(gate)}; required: {gate.requirement}" for gate in failed)
    elif universality == "not universal":
        label, reasons = "H2-u", (f"U is {known(evidence.universality):.3g}, below {rule.not_universal:g}",)
    else:
        label, kinds, reasons = _read_ratio(evidence, conditions, rule)
    return Verdict(
        version=rule.version,
        label=label,
        kinds=kinds,
        universality=universality,
        sentence=_sentence(label, kinds, reasons, evidence, rule),
        reasons=reasons,
        notes=_notes(evidence, rule),
        gates=gates,
        conditions=conditions,
        rule=rule.constants(),
    )


def known(estimate: Estimate | None) -> Estimate:
    """The estimate of a statistic that the gates have found measured."""
    assert estimate is not None
    return estimate


def check_gates(evidence: Evidence, rule: Rule = RULE) -> tuple[Gate, ...]:
    """Every gate with its value; one that was not measured, or is not a number, fails."""
    e = evidence
    gap = None
    if e.explained_variance is not None and max(e.explained_variance) > 0:
        gap = abs(e.explained_variance[0] - e.explained_variance[1]) / max(e.explained_variance)
    loss = _at_most("loss gap", e.loss_gap, rule.loss_gap, "gap of held-out losses")
    loss_passed = loss.passed or (e.loss_matched and finite(e.loss_gap) is not None)
    difference = e.trained_difference
    measured = {name: getattr(e, name) for name in ("ratio", *STATISTICS)}
    missing = [name for name, value in measured.items() if value is None or not value.finite]
    present = [value for value in (*measured.values(), *(getattr(e, name) for name in OPTIONAL)) if value]
    return (
        replace(loss, requirement=f"{loss.requirement}, or loss-matched checkpoints", passed=loss_passed),
        _at_most("explained variance", gap, rule.explained_variance_gap, "relative gap of A and B"),
        _at_most("dead features", e.dead_share, rule.dead_share, "dead share"),
        Gate(
            "self-cosine",
            finite(e.self_cosine),
            f"decoder cosine of matched features of two seeds, at least {rule.self_cosine:g}",
            e.self_cosine is not None and e.self_cosine >= rule.self_cosine - ROUNDING,
        ),
        _at_most("calibration count", e.calibration.count_error, rule.calibration_error, "count error when planted"),
        _at_most("calibration rho", e.calibration.rho_error, rule.calibration_error, "rho error when planted"),
        Gate(
            "calibration sizes",
            "same" if e.calibration.same_sizes else "different",
            "planted worlds of the study's own sizes",
            e.calibration.same_sizes,
        ),
        Gate(
            "trained against untrained",
            None if difference is None else f"{difference:.3g}",
            f"a difference in ln R whose interval leaves out 0 (by {e.trained_difference_by or 'any estimator'})",
            difference is not None and difference.finite and not difference.covers(0),
        ),
        Gate(
            "statistics measured",
            f"missing: {', '.join(missing)}" if missing else "all",
            "a finite value and interval for each statistic of the rule",
            not missing,
        ),
        Gate(
            "confidence",
            f"{CONFIDENCE:g}" if present else None,
            f"all intervals at {rule.confidence:g}",
            bool(present) and rule.confidence == CONFIDENCE,
        ),
    )


def _at_most(name: str, value: float | None, limit: float, what: str) -> Gate:
    passed = value is not None and 0 <= value <= limit + ROUNDING
    return Gate(name, finite(value), f"{what}, at most {limit:g}", passed)


def check_conditions(evidence: Evidence, rule: Rule) -> tuple[Condition, ...]:
    """Every condition of every hypothesis."""
    e = evidence
    low, high = rule.equal
    outside = f"wholly below {low:g}, between {high:g} and {rule.complete[0]:g}, or above {rule.complete[1]:g}"
    universal = f"at most {rule.not_universal:g}"
    return (
        _condition("H0", "R", e.ratio, _inside(rule.complete)),
        _condition("H0", "gamma", e.gamma, _near_zero(rule.zero_gamma)),
        _condition("H0", "X", e.cross_layer, _near_zero(rule.zero_cross_layer)),
        _condition("H0", "count gain", e.count_gain, _near_zero(rule.zero_count_gain)),
        _condition("H1", "R", e.ratio, _inside(rule.equal)),
        _condition("H1", "delta", e.delta, _inside(rule.delta)),
        _shared(e, rule),
        _condition("H1", "count gain", e.count_gain, ("above 0", lambda found: found.low > 0)),
        _condition("H2", "R", e.ratio, (outside, lambda found: _kind_outside(found, rule) is not None)),
        _condition("H2-u", "U", e.universality, (universal, lambda found: found.high <= rule.not_universal)),
    )


def _condition(hypothesis: Hypothesis, statistic: str, value: Estimate | None, required: Requirement) -> Condition:
    requirement, is_met = required
    if value is None or not value.finite:
        return Condition(hypothesis, statistic, requirement, "not measured", None)
    return Condition(hypothesis, statistic, requirement, f"{value:.3g}", is_met(value))


def _inside(bounds: tuple[float, float]) -> Requirement:
    return f"inside [{bounds[0]:g}, {bounds[1]:g}]", lambda found: found.inside(*bounds)


def _near_zero(zero: tuple[float, float]) -> Requirement:
    negligible, bound = zero
    requirement = f"consistent with 0 (reaching to {negligible:g} of it and inside [-{bound:g}, {bound:g}])"
    return (
        requirement,
        lambda found: found.low <= negligible and found.high >= -negligible and found.inside(-bound, bound),
    )


def _shared(evidence: Evidence, rule: Rule) -> Condition:
    """Lifespans grow beyond the control, or features are genuinely cross-layer."""
    gamma, excess, cross_layer = evidence.gamma, evidence.gamma_excess, evidence.cross_layer
    requirement = f"gamma above {rule.gamma:g} and beyond the untrained control, or X above 0"
    if gamma is None or excess is None or cross_layer is None:
        return Condition("H1", "structure across layers", requirement, "not measured", None)
    measured = f"gamma {gamma:.3g}, excess {excess:.3g}, X {cross_layer:.3g}"
    is_met = (gamma.low > rule.gamma and excess.low > 0) or _above_zero(cross_layer, rule)
    return Condition("H1", "structure across layers", requirement, measured, is_met)


def _above_zero(cross_layer: Estimate, rule: Rule) -> bool:
    """Whether X is above 0: wholly above what is negligible."""
    return cross_layer.low > rule.zero_cross_layer[0]


def _kind_outside(ratio: Estimate, rule: Rule) -> str | None:
    """Which kind of H2 an interval of R wholly outside both bands is; None for one that touches a band."""
    if ratio.high < rule.equal[0]:
        return "over-reconciled"
    if rule.equal[1] < ratio.low and ratio.high < rule.complete[0]:
        return "partial"
    return "denser" if ratio.low > rule.complete[1] else None


def _value(gate: Gate) -> str:
    if gate.value is None:
        return "not measured"
    return gate.value if isinstance(gate.value, str) else f"{gate.value:.3g}"


def _universality(evidence: Evidence, rule: Rule) -> UniversalityLabel:
    u = evidence.universality
    if u is None or not u.finite:
        return "not measured"
    if u.low >= rule.universal:
        return "universal"
    return "not universal" if u.high <= rule.not_universal else "between"


def _read_ratio(
    evidence: Evidence, conditions: tuple[Condition, ...], rule: Rule
) -> tuple[Label, tuple[str, ...], tuple[str, ...]]:
    """Label, kinds of H2 and reasons, by where the interval of R lies."""
    ratio = known(evidence.ratio)
    shown = f"R is {ratio:.3g}"
    unmet = {
        name: [c for c in conditions if c.hypothesis == name and c.statistic != "R" and not c.met]
        for name in ("H0", "H1")
    }
    for name, band in (("H0", rule.complete), ("H1", rule.equal)):
        if ratio.inside(*band):
            if unmet[name]:
                return "undecided", (), (f"{shown}, in the band of {name}", *(c.against for c in unmet[name]))
            return ("H0", (), (shown,)) if name == "H0" else _kind_of_reconciliation(evidence, rule)
    kind = _kind_outside(ratio, rule)
    if kind is None:
        # what a sharper R would not mend
        beside = [f"{name} also lacks {', '.join(c.statistic for c in left)}" for name, left in unmet.items() if left]
        return "undecided", (), (_across(ratio, rule), *beside)
    squared = known(evidence.alpha).covers(rule.alternative_alpha) and known(evidence.gamma).high < rule.gamma
    return "H2", (kind, "alternative compression") if squared else (kind,), (shown,)


def _across(ratio: Estimate, rule: Rule) -> str:
    held = [f"{bound:g}" for bound in (*rule.equal, *rule.complete) if ratio.covers(bound)]
    listed = held[0] if len(held) == 1 else f"{', '.join(held[:-1])} and {held[-1]}"
    return f"R is {ratio:.3g}, an interval that crosses the rule's bound{'s' * (len(held) > 1)} {listed}"


def _kind_of_reconciliation(evidence: Evidence, rule: Rule) -> tuple[Label, tuple[str, ...], tuple[str, ...]]:
    ratio, cross_layer, shift = known(evidence.ratio), known(evidence.cross_layer), evidence.removal_shift
    shown = f"R is {ratio:.3g}"
    if not _above_zero(cross_layer, rule):
        return "H1a", (), (shown, f"X is {cross_layer:.3g}, not above 0")
    if shift is None or not shift.finite:
        return "H1", (), (shown, "R without the genuinely cross-layer features was not measured")
    needed = rule.removal_share * (math.log(2) - math.log(ratio.value))
    moved = f"without the genuinely cross-layer features ln R moves by {shift:.3g}; half the way is {needed:.3g}"
    return ("H1b" if shift.value >= needed else "H1"), (), (shown, f"X is {cross_layer:.3g}", moved)


def _notes(evidence: Evidence, rule: Rule) -> tuple[str, ...]:
    notes = []
    if evidence.headroom is not None and evidence.headroom.value > rule.ceiling:
        notes.append(BELOW_CEILING)
    if evidence.headroom is not None and evidence.headroom.high < rule.ceiling:
        notes.append(
            f"headroom is {evidence.headroom:.3g}: the features found are denser than the ceiling of independent "
            "noise allows"
        )
    if _universality(evidence, rule) == "between":
        notes.append(f"universality is {known(evidence.universality):.3g}: neither shown nor refuted")
    if evidence.n_training_seeds < 2:
        notes.append("one training run of each shape: no interval says what another run would give")
    primary, secondary = evidence.ratio, evidence.ratio_residual
    if primary is not None and secondary is not None:
        apart = primary.high < secondary.low or secondary.high < primary.low
        notes.append(f"R on the residual stream is {secondary:.3g}, {'apart from' if apart else 'within reach of'} R")
    residual = identity_residual(evidence.alpha, evidence.gamma)
    if residual is not None:
        fits = "consistent" if residual.covers(0) else "not consistent"
        forced = "; equal dictionaries that are all but full give 0 whatever the models do"
        notes.append(f"alpha + 2 gamma - 2 is {residual:.3g}, {fits} with 0{forced}")
    return tuple(notes)


def _sentence(label: Label, kinds: tuple[str, ...], reasons: tuple[str, ...], evidence: Evidence, rule: Rule) -> str:
    ratio = "an unmeasured number" if evidence.ratio is None else f"{evidence.ratio:.3g}"
    explained = "; ".join(f"{KINDS[kind]} ({kind})" for kind in kinds)
    sentence = SENTENCES[label].format(ratio=ratio, reasons="; ".join(reasons), kinds=explained)
    if evidence.headroom is not None and evidence.headroom.value > rule.ceiling:
        return f"{sentence} Headroom {evidence.headroom.value:.3g}: {BELOW_CEILING}."
    return sentence
