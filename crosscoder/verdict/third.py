"""Rule version 3, as data: what each label asks of values with intervals, and what the rule says of them.

A leg is met where a whole interval lies where it is asked to, missed where it lies wholly elsewhere, and open where it
crosses the bound. Legs that depend on what "equally good" means are asked in both currencies of fidelity. A label that
needs n trainings and has fewer is a pilot: estimates, and no verdict. q is the log of the load of the wide, shallow
model B over that of the deep A; r the log of the ratio of features a neuron and layer, from banks alone, of which
complete superposition in each layer says ln 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from crosscoder.measure.fidelity import Currency
from crosscoder.results.table import Estimate
from crosscoder.verdict.loads import LoadLegs

VERSION = "crosscoder.verdict/3"
CURRENCIES = ("fvu", "loss")
"""Equal fraction of variance unexplained, and equal increase of the model's loss where reconstructions stand in."""
N_TRAININGS = {"A": 5, "B": 5}
EQUAL = math.log(1.25)
CROWDED, COMPLETE = math.log(1.6), math.log(2.5)
NULLS = {"gaussian": "explained by covariance", "frozen encoder": "explained by the dictionary"}
"""What a leg must differ from, and what a label is called where it does not."""
Met = Literal["met", "missed", "open", "not measured"]


@dataclass(frozen=True)
class Leg:
    """A statistic, and the range in which its whole interval must lie or, `outside`, beyond which on one side."""

    statistic: str
    low: float = -math.inf
    high: float = math.inf
    outside: bool = False

    def check(self, found: Estimate | None) -> Met:
        """How an estimate stands to what is asked."""
        if found is None or not found.finite:
            return "not measured"
        inside, beyond = found.inside(self.low, self.high), found.high < self.low or found.low > self.high
        met, missed = (beyond, inside) if self.outside else (inside, beyond)
        return "met" if met else "missed" if missed else "open"

    def __str__(self) -> str:
        where = "outside" if self.outside else "in"
        return f"{self.statistic} {where} [{self.low:.3g}, {self.high:.3g}]"


EQUAL_LOADS = Leg("q", -EQUAL, EQUAL)
BY_CURRENCY = frozenset({"q", "r", "room"})
"""Statistics that are read at a common fidelity, `q/fvu` and `q/loss`."""
PREMISES: dict[str, tuple[Leg, ...]] = {
    "premise fails: load": (Leg("q", -EQUAL, EQUAL, outside=True),),
    "premise fails: features": (
        Leg("universality", high=0.5),
        Leg("rate dispersion", low=1.25),
        Leg("median rate", -EQUAL, EQUAL, outside=True),
    ),
}
"""Of a premise any one leg is enough. The median rate is a log."""
LABELS: dict[str, tuple[Leg, ...]] = {
    "H0": (
        EQUAL_LOADS,
        Leg("r", CROWDED, COMPLETE),
        Leg("kappa", high=0.25),
        Leg("room", CROWDED, COMPLETE),
        Leg("headroom of B", high=1.0),
    ),
    "H1a": (EQUAL_LOADS, Leg("r", -EQUAL, EQUAL), Leg("kappa", 0.25, 0.75), Leg("conjunctive excess", high=0.05)),
    "H1b": (
        EQUAL_LOADS,
        Leg("r", low=CROWDED),
        Leg("room", -EQUAL, EQUAL),
        Leg("conjunctive or twin excess", low=0.05),
        Leg("removal share", low=0.5),
    ),
    "H2: over": (EQUAL_LOADS, Leg("r", high=-EQUAL)),
    "H2: partial": (EQUAL_LOADS, Leg("r", EQUAL, CROWDED)),
    "H2: denser": (EQUAL_LOADS, Leg("r", low=COMPLETE)),
}
"""Of a label every leg is asked. `room` is ln R_J; excesses are over the highest null, of the share of conjunctive
features (`causal.CausalLayers`: losing one layer is as bad as losing all) or of twins; the removal share is how far
ln R_J moves towards ln 2 without the conjunctive features."""
KINDS_OF_R = {name: leg for name in LABELS for leg in LABELS[name] if leg.statistic == "r"}


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that the rule looks at; a value that was not measured is None or left out."""

    values: Mapping[str, Estimate | None]
    """By statistic; those that depend on fidelity by `statistic/currency`."""
    gates: Mapping[str, tuple[Estimate | None, Leg]]
    """By name: what was measured, and what is asked of it."""
    nulls: Mapping[tuple[str, str], Estimate | None]
    """By value and null: the real value less the null's."""
    n_trainings: Mapping[str, int]


@dataclass(frozen=True)
class Checked:
    """A leg or gate with what was measured."""

    name: str
    asked: str
    measured: Estimate | None
    met: Met

    def __str__(self) -> str:
        return f"{self.name}: {'not measured' if self.measured is None else format(self.measured, '.3g')}, {self.asked}"


@dataclass(frozen=True)
class Decision:
    """What the rule says, why, and how every gate and leg stands."""

    label: str
    explained: tuple[str, ...]
    """What else would give the same, of `NULLS`."""
    reasons: tuple[str, ...]
    gates: tuple[Checked, ...]
    legs: Mapping[str, tuple[Checked, ...]] = field(default_factory=dict)

    @property
    def is_conclusive(self) -> bool:
        """Whether it answers the question, or says which premise of it fails."""
        return self.label in PREMISES or self.label in LABELS


def decide(evidence: Evidence) -> Decision:
    """The label of the evidence: number of trainings, gates, premises, then the one label all of whose legs are met."""
    gates = tuple(Checked(name, str(leg), found, leg.check(found)) for name, (found, leg) in evidence.gates.items())
    legs = {name: check_legs(evidence, name) for name in (*PREMISES, *LABELS)}

    def decision(label: str, reasons: tuple[str, ...], explained: tuple[str, ...] = ()) -> Decision:
        return Decision(label, explained, reasons, gates, legs)

    if few := [f"{evidence.n_trainings.get(name, 0)} of {n} trainings of {name}" for name, n in N_TRAININGS.items()
               if evidence.n_trainings.get(name, 0) < n]:  # fmt: skip
        return decision("pilot", tuple(few))
    if failed := [str(gate) for gate in gates if gate.met in ("missed", "not measured")]:
        return decision("not testable", tuple(failed))
    if crossed := [str(gate) for gate in gates if gate.met == "open"]:
        return decision("undecided", tuple(crossed))
    found = _label(legs)
    if found is None:
        return decision("undecided", _open_legs(legs))
    explained, missing = _explained(evidence, legs[found])
    if missing:
        return decision("undecided", tuple(f"{found}, but no null of {name} was measured" for name in missing))
    return decision(found, tuple(str(leg) for leg in legs[found] if leg.met == "met"), explained)


def notes(legs: Mapping[Currency, LoadLegs], n_trainings: Mapping[str, int]) -> tuple[str, ...]:
    """What this version says of a study that has its load legs alone: never a conclusion, which takes nulls."""
    values = {f"{name}/{one}": value for one, found in legs.items() for name, value in (("q", found.q), ("r", found.r))}
    known = {name: value for name, value in values.items() if isinstance(value, Estimate)}
    decision = decide(Evidence(values=known, gates={}, nulls={}, n_trainings=n_trainings))
    kinds = {name: kind_of_r(value) for name, value in known.items() if name.startswith("r/")}
    said = [
        f"rule version 3, of which the load legs alone are measured: {decision.label} ({'; '.join(decision.reasons)})"
    ]
    said += [f"{name} is {known[name]:.3g}, in the range of {kind}" for name, kind in kinds.items() if kind]
    return tuple(said)


def check_legs(evidence: Evidence, label: str) -> tuple[Checked, ...]:
    """How each leg of a label stands, in each currency where it depends on that."""
    checked = []
    for leg in (PREMISES | LABELS)[label]:
        names = [f"{leg.statistic}/{one}" for one in CURRENCIES] if leg.statistic in BY_CURRENCY else [leg.statistic]
        checked += [Checked(name, str(leg), found := evidence.values.get(name), leg.check(found)) for name in names]
    return tuple(checked)


def kind_of_r(found: Estimate) -> str | None:
    """Which label's range of r an estimate lies in wholly, the premise apart; None where it crosses a bound."""
    ranges = {name: leg for name, leg in KINDS_OF_R.items() if name != "H1b"}
    return next((name for name, leg in ranges.items() if leg.check(found) == "met"), None)


def _label(legs: Mapping[str, tuple[Checked, ...]]) -> str | None:
    """The premise that fails, or the label all of whose legs are met; loads must differ the same way in both."""
    loads = legs["premise fails: load"]
    if all(leg.met == "met" for leg in loads) and len({(leg.measured or ZERO).value > 0 for leg in loads}) == 1:
        return "premise fails: load"
    if any(leg.met == "met" for leg in legs["premise fails: features"]):
        return "premise fails: features"
    return next((name for name in LABELS if all(leg.met == "met" for leg in legs[name])), None)


ZERO = Estimate(0.0, 0.0, 0.0)


def _open_legs(legs: Mapping[str, tuple[Checked, ...]]) -> tuple[str, ...]:
    """What keeps each label that nothing excludes from being the answer."""
    possible = {name: [leg for leg in legs[name] if leg.met != "met"] for name in LABELS}
    possible = {name: left for name, left in possible.items() if all(leg.met != "missed" for leg in left)}
    if not possible:
        return ("every label misses one of its legs wholly",)
    return tuple(f"{name} lacks {leg}" for name, left in possible.items() for leg in left)


def _explained(evidence: Evidence, legs: tuple[Checked, ...]) -> tuple[tuple[str, ...], list[str]]:
    """What explains the met legs as well as the models do, and the legs of which a null was not measured."""
    met = [leg.name for leg in legs if leg.met == "met"]
    given = {(name, null): evidence.nulls.get((name, null)) for name in met for null in NULLS}
    missing = sorted({name for (name, _), excess in given.items() if excess is None or not excess.finite})
    explained = [null for (_, null), excess in given.items() if excess is not None and excess.covers(0)]
    return tuple(NULLS[null] for null in NULLS if null in explained), missing
