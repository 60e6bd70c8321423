"""What each hypothesis asks for, and whether it was met: the rule's conditions one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from crosscoder.results.table import Estimate
from crosscoder.verdict.rule import Evidence, Rule, show

Hypothesis = Literal["H0", "H1", "H2", "H2-u"]


@dataclass(frozen=True)
class Condition:
    """One thing that a hypothesis asks for. `met` is None where it was not measured."""

    hypothesis: Hypothesis
    statistic: str
    requirement: str
    measured: str
    met: bool | None

    @property
    def against(self) -> str:
        """What is said where it is not met."""
        return f"{self.statistic} is {self.measured}, not {self.requirement}"


def check_conditions(evidence: Evidence, rule: Rule) -> tuple[Condition, ...]:
    """Every condition of every hypothesis, whatever the gates say; an interval must lie wholly where it should."""
    e = evidence
    zero = {"gamma": (e.gamma, rule.zero_gamma), "X": (e.cross_layer, rule.zero_cross_layer)}
    zero["count gain"] = (e.count_gain, rule.zero_count_gain)
    outside = f"wholly below {rule.equal[0]:g}, between {rule.equal[1]:g} and {rule.complete[0]:g}, or above "
    return (
        _inside("H0", "R", e.ratio, rule.complete),
        *(_near_zero("H0", name, value, bounds) for name, (value, bounds) in zero.items()),
        _inside("H1", "R", e.ratio, rule.equal),
        _inside("H1", "delta", e.delta, rule.delta),
        _shared(e, rule),
        _condition("H1", "count gain", e.count_gain, "above 0", lambda value: value.low > 0),
        _condition(
            "H2", "R", e.ratio, f"{outside}{rule.complete[1]:g}", lambda value: kind_outside(value, rule) is not None
        ),
        _condition(
            "H2-u",
            "U",
            e.universality,
            f"at most {rule.not_universal:g}",
            lambda value: value.high <= rule.not_universal,
        ),
    )


def _condition(
    hypothesis: Hypothesis,
    statistic: str,
    value: Estimate | None,
    requirement: str,
    is_met: Callable[[Estimate], bool],
) -> Condition:
    if value is None or not value.finite:
        return Condition(hypothesis, statistic, requirement, "not measured", None)
    return Condition(hypothesis, statistic, requirement, show(value), is_met(value))


def _inside(hypothesis: Hypothesis, statistic: str, value: Estimate | None, bounds: tuple[float, float]) -> Condition:
    requirement = f"inside [{bounds[0]:g}, {bounds[1]:g}]"
    return _condition(hypothesis, statistic, value, requirement, lambda found: found.inside(*bounds))


def _near_zero(hypothesis: Hypothesis, statistic: str, value: Estimate | None, zero: tuple[float, float]) -> Condition:
    negligible, bound = zero
    requirement = f"consistent with 0 (reaching to {negligible:g} of it and inside [-{bound:g}, {bound:g}])"

    def is_met(found: Estimate) -> bool:
        return found.low <= negligible and found.high >= -negligible and found.inside(-bound, bound)

    return _condition(hypothesis, statistic, value, requirement, is_met)


def above_zero(cross_layer: Estimate, rule: Rule) -> bool:
    """Whether X is above 0: wholly above what is negligible."""
    return cross_layer.low > rule.zero_cross_layer[0]


def kind_outside(ratio: Estimate, rule: Rule) -> str | None:
    """Which kind of H2 an interval of R wholly outside both bands is; None for one that touches a band."""
    if ratio.high < rule.equal[0]:
        return "over-reconciled"
    if rule.equal[1] < ratio.low and ratio.high < rule.complete[0]:
        return "partial"
    return "denser" if ratio.low > rule.complete[1] else None


def _shared(evidence: Evidence, rule: Rule) -> Condition:
    """Lifespans grow beyond the control, or features are genuinely cross-layer."""
    gamma, excess, cross_layer = evidence.gamma, evidence.gamma_excess, evidence.cross_layer
    requirement = f"gamma above {rule.gamma:g} and beyond the untrained control, or X above 0"
    if gamma is None or excess is None or cross_layer is None:
        return Condition("H1", "structure across layers", requirement, "not measured", None)
    measured = f"gamma {show(gamma)}, excess {show(excess)}, X {show(cross_layer)}"
    is_met = (gamma.low > rule.gamma and excess.low > 0) or above_zero(cross_layer, rule)
    return Condition("H1", "structure across layers", requirement, measured, is_met)
