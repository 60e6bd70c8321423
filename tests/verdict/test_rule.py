"""Rule version 3: every label is reached, each of its legs is needed, and nothing is concluded from what is open."""

import math
import random
from dataclasses import replace

import pytest

from crosscoder.results.table import Estimate
from crosscoder.verdict.rule import (
    BY_CURRENCY,
    CURRENCIES,
    DIRECTIONS,
    GATES,
    LABELS,
    NULLS,
    PREMISES,
    UNITS,
    Evidence,
    Gate,
    Leg,
    decide,
    kind_of_r,
)

PLENTY = {"A": 6, "B": 5}
OPEN = Estimate(0.0, -50.0, 50.0)
POINTS = {
    "H0": {"q": 0.0, "r": 0.7, "kappa": 0.1, "room": 0.7, "headroom of B": 0.5},
    "H1a": {"q": 0.0, "r": 0.0, "kappa": 0.5, "conjunctive excess": 0.0},
    "H1b": {"q": 0.0, "r": 0.7, "room": 0.0, "conjunctive or twin excess": 0.2, "removal share": 0.8},
    "H2: over": {"q": 0.0, "r": -0.5},
    "H2: partial": {"q": 0.0, "r": 0.35, "conjunctive or twin excess": 0.0},
    "H2: denser": {"q": 0.0, "r": 1.2},
    "premise fails: load": {"q": -0.63},
    "premise fails: features": {"universality": 0.3},
}


def around(value, half=0.02):
    return Estimate(value, value - half, value + half)


def names(statistic):
    return [f"{statistic}/{one}" for one in CURRENCIES] if statistic in BY_CURRENCY else [statistic]


def evidence(values, *, null=2.0, **changes):
    every = {leg.statistic for legs in (PREMISES | LABELS).values() for leg in legs}
    given = {name: OPEN for statistic in every for name in names(statistic)}
    given |= {name: around(value) for statistic, value in values.items() for name in names(statistic)}
    nulls = {(name, which): around(null) for name in given for which in NULLS}
    made = Evidence(values=given, gates={"fit": Gate(around(1), Leg("fit", 0, 2))}, nulls=nulls, n_trainings=PLENTY)
    return replace(made, **changes)


@pytest.mark.parametrize("label", POINTS)
def test_every_label_is_reached_where_its_legs_are_met(label):
    found = decide(evidence(POINTS[label]))
    assert found.label == label, found.reasons
    assert found.is_conclusive
    assert found.explained == ()


@pytest.mark.parametrize(("label", "statistic"), [(label, one) for label in LABELS for one in POINTS[label]])
@pytest.mark.parametrize("value", [OPEN, None, Estimate(math.nan, math.nan, math.nan)])
def test_no_label_without_each_of_its_legs_in_each_currency(label, statistic, value):
    whole = evidence(POINTS[label])
    for name in names(statistic):
        found = decide(replace(whole, values={**whole.values, name: value}))
        assert not found.is_conclusive
        assert any(name in reason for reason in found.reasons)


def test_loads_that_differ_in_opposite_directions_are_no_failed_premise():
    whole = evidence({"q": -0.63})
    assert decide(replace(whole, values={**whole.values, "q/loss": around(0.63)})).label == "undecided"


@pytest.mark.parametrize("missing", ["A", "B"])
def test_fewer_trainings_are_a_pilot(missing):
    found = decide(evidence(POINTS["H0"], n_trainings={**PLENTY, missing: 4}))
    assert (found.label, found.reasons) == ("pilot", (f"4 of 5 trainings of {missing}",))


@pytest.mark.parametrize(
    ("value", "label"), [(around(3), "not testable"), (None, "not testable"), (around(2), "undecided")]
)
def test_gates_come_before_labels(value, label):
    found = decide(evidence(POINTS["H0"], gates={"fit": Gate(value, Leg("fit", 0, 2))}))
    assert found.label == label
    assert "fit" in found.reasons[0]


@pytest.mark.parametrize(
    ("value", "label"), [(around(3), "not testable"), (None, "not testable"), (around(2), "undecided")]
)
def test_a_gate_keeps_only_the_labels_that_it_guards_from_being_said(value, label):
    gates = {"directions": Gate(value, Leg("fit", 0, 2), DIRECTIONS)}
    found = decide(evidence(POINTS["H0"], gates=gates))
    assert found.label == label
    assert "H0 would be met, but directions" in found.reasons[0]
    assert decide(evidence(POINTS["premise fails: load"], gates=gates)).label == "premise fails: load"
    assert decide(evidence(POINTS["H2: over"], gates=gates)).label == "H2: over"


def test_gates_guard_labels_that_there_are():
    for leg, labels in GATES.values():
        assert labels is None or labels <= set(LABELS) | set(PREMISES)
        assert leg.check(around(leg.low if math.isfinite(leg.low) else leg.high)) == "open"


def test_what_a_null_explains_as_well_is_said_and_a_null_that_is_missing_is_needed():
    whole = evidence(POINTS["H0"])
    for which, (words, currencies) in NULLS.items():
        for currency in currencies:
            same = decide(replace(whole, nulls={**whole.nulls, (f"r/{currency}", which): around(0)}))
            where = f" at {UNITS[currency]}" if len(currencies) > 1 else ""  # not by the other one
            assert (same.label, same.explained) == ("H0", (words + where,))
            gone = decide(replace(whole, nulls={**whole.nulls, (f"r/{currency}", which): "not reached"}))
            assert gone.label == "undecided"
            assert f"no null {which} of r/{currency}: not reached" in gone.reasons[0]


def test_a_null_that_explains_in_every_currency_is_said_without_one():
    whole = evidence(POINTS["H0"])
    both = {(f"r/{currency}", "frozen_encoder"): around(0) for currency in NULLS["frozen_encoder"][1]}
    assert decide(replace(whole, nulls={**whole.nulls, **both})).explained == ("explained by the dictionary",)


def test_a_gaussian_has_no_loss_and_none_is_asked():
    whole = evidence(POINTS["H0"])
    nulls = {key: value for key, value in whole.nulls.items() if key[1] != "gaussian" or key[0].endswith("/fvu")}
    assert decide(replace(whole, nulls=nulls)).label == "H0"


def test_wide_intervals_never_conclude_and_narrow_ones_never_wrongly():
    """Values drawn anywhere: a label is only given where every true value lies in its ranges."""
    draw = random.Random(0)
    every = {leg.statistic for legs in LABELS.values() for leg in legs}
    labels = set()
    for _ in range(3000):
        truth = {statistic: draw.uniform(-1.2, 1.5) for statistic in every}
        half = draw.choice([0.01, 0.1, 0.3])
        given = {name: around(truth[statistic], half) for statistic in every for name in names(statistic)}
        found = decide(replace(evidence({}), values=given))
        labels.add(found.label)
        for leg in (PREMISES | LABELS).get(found.label, ()):
            inside = leg.low <= truth[leg.statistic] <= leg.high
            assert inside != leg.outside
    assert labels >= {"undecided", "premise fails: load", "H2: over", "H2: denser"}


def test_the_kind_of_r_is_printed_beside_a_failed_premise():
    assert [kind_of_r(around(value)) for value in (-0.5, 0.0, 0.35, 0.7, 1.2)] == [
        "H2: over",
        "H1a",
        "H2: partial",
        "H0",
        "H2: denser",
    ]
    assert kind_of_r(around(math.log(1.6))) is None
