"""The decision rule, version 3, as data: what each label asks of values with intervals, and what is said of them.

A leg is met where a whole interval lies where it is asked to, missed where it lies wholly elsewhere, and open where it
crosses the bound. Legs that depend on what "equally good" means are asked in both currencies of fidelity. A label that
needs n trainings and has fewer is a pilot: estimates, and no verdict. q is the log of the load of the wide, shallow
model B over that of the deep A; r the log of the ratio of features a neuron and layer, from banks alone, of which
complete superposition in each layer says ln 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from crosscoder.measure.fidelity import Currency
from crosscoder.results.table import Estimate

VERSION = "crosscoder.verdict/3"
CURRENCIES: tuple[Currency, ...] = ("fvu", "loss")
UNITS: dict[Currency, str] = {"fvu": "equal variance unexplained", "loss": "equal loss of prediction"}
"""Equal fraction of variance unexplained, and equal increase of the model's loss where reconstructions stand in."""
N_TRAININGS = {"A": 5, "B": 5}
EQUAL = math.log(1.25)
CROWDED, COMPLETE = math.log(1.6), math.log(2.5)
NULLS: dict[str, tuple[str, tuple[Currency, ...]]] = {
    "gaussian": ("explained by covariance", ("fvu",)),
    "frozen_encoder": ("explained by the dictionary", CURRENCIES),
}
"""What a leg must differ from, what a label is called where it does not, and the currencies in which the null exists:
tokens of a Gaussian are nobody's, so that no loss is measured on them."""
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
        Leg("median log rate", -EQUAL, EQUAL, outside=True),
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
    "H2: partial": (EQUAL_LOADS, Leg("r", EQUAL, CROWDED), Leg("conjunctive or twin excess", high=0.05)),
    "H2: denser": (EQUAL_LOADS, Leg("r", low=COMPLETE)),
}
"""Of a label every leg is asked. `room` is ln R_J; excesses are over the highest null, of the share of conjunctive
features (`causal.CausalLayers`: losing one layer is as bad as losing all) or of twins; the removal share is how far
ln R_J moves towards ln 2 without the conjunctive features. Sparse product codes have an r of partial, which is
therefore not said of features that are conjunctive or twins."""
KINDS_OF_R = {name: leg for name in LABELS for leg in LABELS[name] if leg.statistic == "r"}
FEATURES = frozenset({"premise fails: features", "H1a", "H1b", "H2: partial"})
"""Labels that read single features: which match, on how many layers and how they act."""
DIRECTIONS = frozenset({"H0", "H1b"})
"""Labels that read how features share directions."""
GATES: dict[str, tuple[Leg, frozenset[str] | None]] = {
    "loss over a trigram table's": (Leg("ln", high=0.0), None),
    "share that token lookup keeps": (Leg("share", high=0.8), None),
    "loss, B over A": (Leg("ln", -0.01, 0.01), None),
    "learning rate at the checkpoints": (Leg("share of its peak", high=0.2), None),
    "what interpolation may move a load": (Leg("|d ln|", high=0.03), None),
    "features a dimension": (Leg("n / (L D)", low=2.0), None),
    "load of another order of the text": (Leg("|ln|", high=0.1), None),
    "same direction in another order": (Leg("cosine", low=0.9), DIRECTIONS),
    "found in another order": (Leg("share", low=0.7), FEATURES | DIRECTIONS),
    "two rooms agree": (Leg("ln", -EQUAL, EQUAL), DIRECTIONS),
    "room at twice the size": (Leg("ln", -0.1, 0.1), DIRECTIONS),
    "features found, planted": (Leg("MCC", low=0.9), FEATURES | DIRECTIONS),
    "error of q, planted": (Leg("|error|", high=0.1), None),
    "error of g, planted": (Leg("|error|", high=0.1), frozenset(LABELS)),
    "error of ln R, planted": (Leg("|error|", high=0.1), DIRECTIONS),
}
"""What is asked of each gate, and the labels that read what it guards; None: all of them. A gate on what a label does
not read must not keep it from being said: loads are sums over features, whichever features these are."""
ONE_NUMBER = dict.fromkeys(("learning rate at the checkpoints", "features a dimension"), "set, not measured")
ONE_NUMBER |= {name: "of one planted pair; two have an interval" for name in GATES if name.endswith("planted")}
"""Why a gate may have no interval."""


@dataclass(frozen=True)
class Gate:
    """What was measured, or why nothing was; what is asked; and the labels that need it, None for all."""

    measured: Estimate | str | None
    leg: Leg
    labels: frozenset[str] | None = None

    def guards(self, label: str) -> bool:
        """Whether a label needs it."""
        return self.labels is None or label in self.labels


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that the rule looks at; what was not measured is left out, None, or a text that says why."""

    values: Mapping[str, Estimate | str | None]
    """By statistic; those that depend on fidelity by `statistic/currency`."""
    gates: Mapping[str, Gate]
    nulls: Mapping[tuple[str, str], Estimate | str | None]
    """By value and null: the real value less the null's."""
    n_trainings: Mapping[str, int]


@dataclass(frozen=True)
class Checked:
    """A leg or gate with what was measured."""

    name: str
    asked: str
    measured: Estimate | str | None
    met: Met

    @property
    def said(self) -> str:
        """What was measured, in words."""
        if isinstance(self.measured, Estimate):
            exact = self.measured.low == self.measured.high
            why = ONE_NUMBER.get(self.name, "alike in all trainings")
            return f"{self.measured.value:.3g} ({why})" if exact else format(self.measured, ".3g")
        return f"not measured: {self.measured}" if self.measured else "not measured"

    def __str__(self) -> str:
        return f"{self.name}: {self.said}, asked {self.asked}"


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
    """The label of the evidence: trainings, gates, premises, then the one label all of whose legs are met.

    A gate counts for the labels that read what it guards. A label whose legs are met and whose gates are not is not
    given: "undecided" where a gate crosses its bound, "not testable" where one is wholly beyond it or was not measured.
    """
    gates = {name: _check(name, gate.measured, gate.leg) for name, gate in evidence.gates.items()}
    legs = {name: check_legs(evidence, name) for name in (*PREMISES, *LABELS)}

    def decision(label: str, reasons: Sequence[str], explained: tuple[str, ...] = ()) -> Decision:
        return Decision(label, explained, tuple(reasons), tuple(gates.values()), legs)

    few = [f"{evidence.n_trainings.get(name, 0)} of {n} trainings of {name}" for name, n in N_TRAININGS.items()
           if evidence.n_trainings.get(name, 0) < n]  # fmt: skip
    if few:
        return decision("pilot", few)
    everywhere = [gate for name, gate in gates.items() if evidence.gates[name].labels is None]
    if stop := _stopped(everywhere):
        return decision(*stop)
    found = _labels(legs)
    if not found:
        return decision("undecided", _open_legs(legs))
    stops = {
        name: _stopped([gates[one] for one, gate in evidence.gates.items() if gate.guards(name)]) for name in found
    }
    for label in found:
        if stops[label] is None:
            explained, missing = _explained(evidence, legs[label])
            if missing:
                return decision("undecided", [f"{label}, but {one}" for one in missing])
            return decision(label, [str(leg) for leg in legs[label] if leg.met == "met"], explained)
    label, stop = found[0], stops[found[0]] or ("undecided", [])
    return decision(stop[0], [f"{label} would be met, but {reason}" for reason in stop[1]])


def _stopped(gates: Sequence[Checked]) -> tuple[str, list[str]] | None:
    """The label that gates give, and why; None where all are met."""
    if failed := [str(gate) for gate in gates if gate.met in ("missed", "not measured")]:
        return "not testable", failed
    crossed = [str(gate) for gate in gates if gate.met == "open"]
    return ("undecided", crossed) if crossed else None


def _check(name: str, measured: Estimate | str | None, leg: Leg) -> Checked:
    return Checked(name, str(leg), measured, leg.check(measured if isinstance(measured, Estimate) else None))


def check_legs(evidence: Evidence, label: str) -> tuple[Checked, ...]:
    """How each leg of a label stands, in each currency where it depends on that."""
    checked = []
    for leg in (PREMISES | LABELS)[label]:
        names = [f"{leg.statistic}/{one}" for one in CURRENCIES] if leg.statistic in BY_CURRENCY else [leg.statistic]
        checked += [_check(name, evidence.values.get(name), leg) for name in names]
    return tuple(checked)


def kind_of_r(found: Estimate) -> str | None:
    """Which label's range of r an estimate lies in wholly, the premise apart; None where it crosses a bound."""
    ranges = {name: leg for name, leg in KINDS_OF_R.items() if name != "H1b"}
    return next((name for name, leg in ranges.items() if leg.check(found) == "met"), None)


def _labels(legs: Mapping[str, tuple[Checked, ...]]) -> list[str]:
    """The labels whose legs are met, in the order in which they are said; loads must differ the same way in both
    currencies, and where they do no hypothesis about equal loads is asked."""
    found = []
    loads = legs["premise fails: load"]
    signs = {one.measured.value > 0 for one in loads if isinstance(one.measured, Estimate)}
    if all(leg.met == "met" for leg in loads) and len(signs) == 1:
        found.append("premise fails: load")
    if any(leg.met == "met" for leg in legs["premise fails: features"]):
        found.append("premise fails: features")
    return found + [name for name in LABELS if all(leg.met == "met" for leg in legs[name])]


def _open_legs(legs: Mapping[str, tuple[Checked, ...]]) -> tuple[str, ...]:
    """What keeps each label that nothing excludes from being the answer."""
    asked = {name: legs[name] for name in ("premise fails: load", *LABELS)}
    possible = {
        name: [leg for leg in found if leg.met != "met"]
        for name, found in asked.items()
        if all(leg.met != "missed" for leg in found)
    }
    if not possible:
        return ("every label misses one of its legs wholly",)
    return tuple(f"{name} lacks {leg}" for name, left in possible.items() for leg in left)


def _explained(evidence: Evidence, legs: tuple[Checked, ...]) -> tuple[tuple[str, ...], list[str]]:
    """What explains the met legs as well as the models do, in which currency where not in all, and the legs of which a
    null was not measured.

    Legs of other measurements than those at common fidelity have nulls of their own in their statistic.
    """
    as_well: dict[str, list[Currency]] = {}
    missing = []
    for leg in legs:
        statistic, _, currency = leg.name.partition("/")
        if leg.met != "met" or statistic not in BY_CURRENCY:
            continue
        for null, (_, currencies) in NULLS.items():
            if currency not in currencies:
                continue
            excess = evidence.nulls.get((leg.name, null))
            if not isinstance(excess, Estimate) or not excess.finite:
                missing.append(f"no null {null} of {leg.name}: {excess or 'not run'}")
            elif excess.covers(0):
                as_well.setdefault(null, []).append(currency)
    explained = []
    for null, found in as_well.items():
        words, currencies = NULLS[null]
        where = "" if set(found) == set(currencies) else f" {' and '.join(f'at {UNITS[one]}' for one in found)}"
        explained.append(words + where)
    return tuple(explained), missing
