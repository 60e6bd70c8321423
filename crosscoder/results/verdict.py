"""A verdict as a study's results keep it: what was decided, and what it was decided from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from crosscoder.results.table import Flag, Number, Plain, Text, closed

Label = Literal["H0", "H1a", "H1b", "H1", "H2-u", "H2", "undecided", "not testable"]
Hypothesis = Literal["H0", "H1", "H2", "H2-u"]
UniversalityLabel = Literal["universal", "not universal", "between", "not measured"]


@closed
@dataclass(frozen=True)
class Gate:
    """A requirement without which the density ratio cannot be read. `value` is None where it was not measured."""

    name: Text
    value: Number | Text | None
    requirement: Text
    passed: Flag


@closed
@dataclass(frozen=True)
class Condition:
    """One requirement of a hypothesis. `met` is None where the statistic was not measured."""

    hypothesis: Hypothesis
    statistic: Text
    requirement: Text
    measured: Text
    met: Flag | None

    @property
    def against(self) -> str:
        """What is said where it is not met."""
        return f"{self.statistic} is {self.measured}, not {self.requirement}"


@closed
@dataclass(frozen=True)
class Verdict:
    """What the decision rule says of a study, with every gate and condition and the rule's constants."""

    version: Text
    label: Label
    kinds: tuple[Text, ...]
    """Kinds of H2; empty for every other label."""
    universality: UniversalityLabel
    sentence: Text
    reasons: tuple[Text, ...]
    notes: tuple[Text, ...]
    gates: tuple[Gate, ...]
    conditions: tuple[Condition, ...]
    rule: dict[Text, Plain] = field(default_factory=dict)
    """Constants of the rule by name: numbers, texts, and pairs of numbers as lists."""
