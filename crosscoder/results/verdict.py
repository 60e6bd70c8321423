"""A verdict as a study's results keep it: what was decided, and what it was decided from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from crosscoder.results.table import Plain, Text, closed

Met = Literal["met", "missed", "open", "not measured"]
VERSION_2 = "crosscoder.verdict/2"


@closed
@dataclass(frozen=True)
class Asked:
    """A leg or a gate: what was measured, what was asked, and how the one stands to the other."""

    name: Text
    requirement: Text
    measured: Text
    met: Met


@closed
@dataclass(frozen=True)
class Verdict:
    """What the decision rule says of a study, with every gate, every label's legs, and the rule's constants."""

    version: Text
    label: Text
    sentence: Text
    """The answer in words, for a reader who has not seen the code."""
    explained: tuple[Text, ...]
    """What else would give the same numbers."""
    reasons: tuple[Text, ...]
    decides: tuple[Text, ...]
    """What would decide it; empty where it is decided."""
    notes: tuple[Text, ...]
    gates: tuple[Asked, ...]
    legs: dict[Text, tuple[Asked, ...]]
    """By label."""
    rule: dict[Text, Plain] = field(default_factory=dict)
    """Constants of the rule by name: numbers, texts, and pairs of numbers as lists."""


def _from_version_2(value: Any) -> Any:
    """A verdict of version 2, as it was written then, in today's form; anything else as it is."""
    if not isinstance(value, Mapping) or value.get("version") != VERSION_2 or "legs" in value:
        return value
    met = {True: "met", False: "missed", None: "not measured"}
    legs: dict[str, list[dict[str, Any]]] = {}
    for one in value["conditions"]:
        kept = {"name": one["statistic"], "requirement": one["requirement"], "measured": one["measured"]}
        legs.setdefault(one["hypothesis"], []).append({**kept, "met": met[one["met"]]})
    gates = [
        {
            "name": one["name"],
            "requirement": one["requirement"],
            "measured": "not measured" if one["value"] is None else str(one["value"]),
            "met": met[one["passed"]],
        }
        for one in value["gates"]
    ]
    kinds = [f"kind: {kind}" for kind in value["kinds"]]
    notes = [*value["notes"], f"universality: {value['universality']}", *kinds]
    kept = {name: value[name] for name in ("version", "label", "sentence", "reasons", "rule")}
    return {**kept, "explained": (), "decides": (), "notes": notes, "gates": gates, "legs": legs}


KeptVerdict = Annotated[Verdict, BeforeValidator(_from_version_2)]
"""A verdict in a file, also of version 2, which today's rule does not say any more."""
