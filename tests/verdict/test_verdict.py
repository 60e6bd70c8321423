"""The rule: values that give each hypothesis, each gate broken on purpose, and what happens at the bounds."""

import dataclasses
import json
import math

import numpy as np
import pytest

from crosscoder.measure import statistics
from crosscoder.results.quantities import NOTES
from crosscoder.results.table import Estimate
from crosscoder.verdict.decide import BELOW_CEILING, decide
from crosscoder.verdict.rule import RULE, Calibration, Evidence

ZERO = Estimate(0.0, -0.05, 0.05)
ABOVE = Estimate(0.3, 0.2, 0.4)
CALIBRATION = Calibration(count_error=0.04, rho_error=0.02, same_sizes=True)

COMPLETE = Evidence(
    loss_gap=0.004,
    loss_matched=False,
    explained_variance=(0.9, 0.88),
    dead_share=0.03,
    self_cosine=0.95,
    calibration=CALIBRATION,
    trained_difference=Estimate(0.5, 0.3, 0.7),
    ratio=Estimate(2.0, 1.8, 2.2),
    universality=Estimate(0.95, 0.9, 1.0),
    alpha=Estimate(1.9, 1.7, 2.1),
    gamma=ZERO,
    gamma_excess=ZERO,
    delta=Estimate(0.95, 0.9, 1.0),
    cross_layer=ZERO,
    count_gain=ZERO,
    n_training_seeds=3,
)
PERSISTENT = dataclasses.replace(
    COMPLETE,
    ratio=Estimate(1.02, 0.9, 1.15),
    alpha=Estimate(1.0, 0.9, 1.1),
    gamma=Estimate(0.5, 0.4, 0.6),
    gamma_excess=Estimate(0.3, 0.2, 0.4),
    delta=Estimate(0.5, 0.4, 0.6),
    count_gain=ABOVE,
)
GENUINE = dataclasses.replace(
    PERSISTENT,
    gamma=ZERO,
    gamma_excess=ZERO,
    cross_layer=ABOVE,
    removal_shift=Estimate(0.5, 0.4, 0.6),
)


def with_ratio(low, high, base=COMPLETE):
    return dataclasses.replace(base, ratio=Estimate((low + high) / 2, low, high))


@pytest.mark.parametrize(
    ("evidence", "label", "kinds"),
    [
        (COMPLETE, "H0", ()),
        (PERSISTENT, "H1a", ()),
        (GENUINE, "H1b", ()),
        (dataclasses.replace(GENUINE, removal_shift=Estimate(0.1, 0.0, 0.2)), "H1", ()),
        (dataclasses.replace(GENUINE, removal_shift=None), "H1", ()),
        (dataclasses.replace(COMPLETE, universality=Estimate(0.4, 0.3, 0.5)), "H2-u", ()),
        (with_ratio(0.5, 0.7, PERSISTENT), "H2", ("over-reconciled",)),
        (with_ratio(1.3, 1.5, PERSISTENT), "H2", ("partial",)),
        (with_ratio(2.7, 3.5, PERSISTENT), "H2", ("denser",)),
        (with_ratio(1.3, 1.5, COMPLETE), "H2", ("partial", "alternative compression")),
        (with_ratio(1.3, 1.5, dataclasses.replace(COMPLETE, alpha=Estimate(1.5, 1.4, 1.6))), "H2", ("partial",)),
        (with_ratio(1.3, 1.5, dataclasses.replace(COMPLETE, gamma=Estimate(0.1, -0.1, 0.3))), "H2", ("partial",)),
        (with_ratio(1.1, 1.5), "undecided", ()),
        (with_ratio(2.3, 2.9), "undecided", ()),
        (dataclasses.replace(COMPLETE, gamma=Estimate(-0.2, -0.3, -0.1)), "undecided", ()),
        (dataclasses.replace(COMPLETE, count_gain=ABOVE), "undecided", ()),
        (dataclasses.replace(COMPLETE, gamma=Estimate(1e-4, 0.9e-4, 1.1e-4)), "H0", ()),  # a precise trace of bias
        (dataclasses.replace(COMPLETE, gamma=Estimate(0.1, -0.4, 0.6)), "undecided", ()),  # too wide to say anything
        (dataclasses.replace(PERSISTENT, cross_layer=Estimate(0.01, 0.005, 0.015)), "H1a", ()),
        (dataclasses.replace(PERSISTENT, count_gain=ZERO), "undecided", ()),
        (dataclasses.replace(PERSISTENT, count_gain=Estimate(0.1, -0.1, 0.3)), "undecided", ()),
        (dataclasses.replace(PERSISTENT, gamma=Estimate(0.5, 0.2, 0.8)), "undecided", ()),
        (dataclasses.replace(PERSISTENT, gamma_excess=ZERO), "undecided", ()),
        (dataclasses.replace(PERSISTENT, delta=Estimate(0.6, 0.5, 0.7)), "undecided", ()),
    ],
)
def test_values_that_give_each_verdict(evidence, label, kinds):
    found = decide(evidence)
    assert (found.label, found.kinds) == (label, kinds)
    assert found.version == "crosscoder.verdict/2"
    assert all(gate.passed for gate in found.gates)
    assert found.label.replace(" ", "-") in NOTES
    assert found.sentence.endswith(".")
    assert "{" not in found.sentence


def test_an_interval_over_several_bounds_names_them_and_what_a_sharper_one_would_not_mend():
    wide = dataclasses.replace(with_ratio(0.6, 1.7, PERSISTENT), delta=Estimate(0.9, 0.5, 1.3), count_gain=ABOVE)
    sentence = decide(wide).sentence
    assert "crosses the rule's bounds 0.8, 1.25 and 1.6" in sentence
    assert "H0 also lacks gamma, count gain" in sentence
    assert "H1 also lacks delta" in sentence
    assert "crosses the rule's bound 1.25" in decide(with_ratio(1.1, 1.5)).sentence


@pytest.mark.parametrize(("evidence", "hypothesis"), [(COMPLETE, "H0"), (PERSISTENT, "H1"), (GENUINE, "H1")])
def test_conditions_are_met_where_the_verdict_says_so(evidence, hypothesis):
    found = decide(evidence)
    met = {name: [c.met for c in found.conditions if c.hypothesis == name] for name in ("H0", "H1", "H2", "H2-u")}
    assert all(met[hypothesis])
    assert not any(all(value) for name, value in met.items() if name != hypothesis)


def test_conditions_are_listed_also_where_a_gate_fails_or_a_value_is_missing():
    found = decide(dataclasses.replace(COMPLETE, loss_gap=0.5, delta=None, cross_layer=None))
    assert found.label == "not testable"
    assert [(c.statistic, c.measured) for c in found.conditions if c.met is None] == [
        ("X", "not measured"),
        ("delta", "not measured"),
        ("structure across layers", "not measured"),
    ]


BROKEN = [
    ("loss gap", {"loss_gap": 0.0101}),
    ("loss gap", {"loss_gap": -0.02}),
    ("loss gap", {"loss_gap": None, "loss_matched": True}),
    ("explained variance", {"explained_variance": (0.9, 0.85)}),
    ("explained variance", {"explained_variance": (-0.1, -0.2)}),
    ("dead features", {"dead_share": 0.11}),
    ("dead features", {"dead_share": math.nan}),
    ("self-cosine", {"self_cosine": 0.89}),
    ("self-cosine", {"self_cosine": None}),
    ("calibration count", {"calibration": dataclasses.replace(CALIBRATION, count_error=0.12)}),
    ("calibration rho", {"calibration": dataclasses.replace(CALIBRATION, rho_error=0.12)}),
    ("calibration rho", {"calibration": dataclasses.replace(CALIBRATION, rho_error=None)}),
    ("calibration sizes", {"calibration": dataclasses.replace(CALIBRATION, same_sizes=False)}),
    ("trained against untrained", {"trained_difference": ZERO}),
    ("trained against untrained", {"trained_difference": None}),
    ("trained against untrained", {"trained_difference": Estimate(1.0, 0.5, math.inf)}),
    ("statistics measured", {"delta": None}),
    ("statistics measured", {"alpha": Estimate(2.0, -math.inf, math.inf)}),
]


@pytest.mark.parametrize(("name", "change"), BROKEN)
@pytest.mark.parametrize("base", [COMPLETE, PERSISTENT])
def test_each_gate_alone_makes_it_not_testable_and_is_named(base, name, change):
    found = decide(dataclasses.replace(base, **change))
    assert found.label == "not testable"
    assert [gate.name for gate in found.gates if not gate.passed] == [name]
    assert len(found.reasons) == 1
    assert found.reasons[0].startswith(f"{name}: ")
    assert found.sentence.startswith(f"Not testable: {name}: ")


def test_every_gate_is_broken_above():
    assert {gate.name for gate in decide(COMPLETE).gates} == {*(name for name, _ in BROKEN), "confidence"}


def test_a_rule_of_another_confidence_than_the_intervals_decides_nothing():
    found = decide(COMPLETE, dataclasses.replace(RULE, confidence=0.95))
    assert found.label == "not testable"
    assert [gate.name for gate in found.gates if not gate.passed] == ["confidence"]
    assert found.reasons == ("confidence: 0.9; required: all intervals at 0.95",)


def test_gates_say_their_value_and_requirement():
    gates = {gate.name: gate for gate in decide(COMPLETE).gates}
    assert gates["explained variance"].value == pytest.approx(0.02 / 0.9)
    assert gates["self-cosine"].requirement.endswith("at least 0.9")
    assert gates["trained against untrained"].value == "0.5 [0.3, 0.7]"
    assert gates["confidence"].value == "0.9"
    found = decide(dataclasses.replace(COMPLETE, dead_share=None, delta=None))
    assert "dead features: not measured" in found.sentence
    assert "missing: delta" in found.sentence


def test_loss_matched_checkpoints_stand_for_a_small_gap():
    assert decide(dataclasses.replace(COMPLETE, loss_gap=0.07, loss_matched=True)).label == "H0"


@pytest.mark.parametrize(
    "change",
    [
        {"loss_gap": 0.01},
        {"explained_variance": (1.0, 0.95)},
        {"dead_share": 0.1},
        {"self_cosine": 0.9},
        {"calibration": dataclasses.replace(CALIBRATION, count_error=0.1)},
        {"universality": Estimate(0.9, 0.8, 1.0)},
        {"ratio": Estimate(2.0, 1.6, 2.5)},
    ],
)
def test_bounds_belong_to_what_they_allow(change):
    found = decide(dataclasses.replace(COMPLETE, **change))
    assert (found.label, found.universality) == ("H0", "universal")


@pytest.mark.parametrize(
    ("low", "high", "label"),
    [
        (0.8, 1.25, "H1a"),
        (0.799, 1.25, "undecided"),
        (0.8, 1.251, "undecided"),
        (0.7, 0.8, "undecided"),
        (0.7, 0.799, "H2"),
        (1.251, 1.599, "H2"),
        (1.25, 1.5, "undecided"),
        (1.3, 1.6, "undecided"),
        (2.501, 3.0, "H2"),
        (0.5, 3.0, "undecided"),
    ],
)
def test_the_bands_of_the_ratio(low, high, label):
    assert decide(with_ratio(low, high, PERSISTENT)).label == label


def test_removal_must_move_half_the_way_to_two():
    half = 0.5 * (math.log(2) - math.log(1.02))
    for shift, label in ((half + 1e-9, "H1b"), (half - 1e-6, "H1"), (-half, "H1")):
        evidence = dataclasses.replace(GENUINE, removal_shift=Estimate(shift, shift, shift))
        assert decide(evidence).label == label


def test_universality_between_is_noted_and_does_not_decide():
    found = decide(dataclasses.replace(COMPLETE, universality=Estimate(0.85, 0.7, 1.0)))
    assert (found.label, found.universality) == ("H0", "between")
    assert any("neither shown nor refuted" in note for note in found.notes)
    assert decide(dataclasses.replace(COMPLETE, universality=Estimate(0.4, 0.3, 0.501))).label == "H0"


def test_a_failed_gate_comes_before_universality():
    evidence = dataclasses.replace(COMPLETE, universality=Estimate(0.2, 0.1, 0.3), dead_share=0.5)
    assert decide(evidence).label == "not testable"


@pytest.mark.parametrize(
    "base", [COMPLETE, PERSISTENT, dataclasses.replace(COMPLETE, dead_share=0.5), with_ratio(2.7, 3)]
)
def test_headroom_is_printed_whatever_the_ratio(base):
    room = dataclasses.replace(base, headroom=Estimate(1.8, 0.9, 2.5))
    assert decide(room).sentence.endswith(f"Headroom 1.8: {BELOW_CEILING}.")
    assert BELOW_CEILING in decide(room).notes
    endless = dataclasses.replace(base, headroom=Estimate(math.inf, 2.0, math.inf))
    assert BELOW_CEILING in decide(endless).sentence
    full = dataclasses.replace(base, headroom=Estimate(1.0, 0.8, 1.2))
    assert BELOW_CEILING not in decide(full).sentence


def test_whether_features_are_a_function_of_parameters_alone_is_noted():
    """alpha 1 and gamma 1/2 are one end of the line alpha + 2 gamma - 2."""
    assert any("alpha + 2 gamma - 2 is" in note and "not consistent" not in note for note in decide(PERSISTENT).notes)
    off = decide(dataclasses.replace(PERSISTENT, alpha=Estimate(1.9, 1.8, 2.0)))
    assert any("not consistent with 0" in note for note in off.notes)
    assert not any("alpha" in note for note in decide(dataclasses.replace(COMPLETE, alpha=None)).notes)


def test_notes_on_replication_and_on_the_other_site():
    notes = decide(dataclasses.replace(COMPLETE, n_training_seeds=1, ratio_residual=Estimate(1, 0.9, 1.1))).notes
    assert any("one training run" in note for note in notes)
    assert any("1 [0.9, 1.1], apart from R" in note for note in notes)


def test_the_rule_is_data():
    strict = dataclasses.replace(RULE, dead_share=0.01, version="strict")
    found = decide(COMPLETE, strict)
    assert (found.label, found.version) == ("not testable", "strict")
    assert found.rule["dead_share"] == 0.01
    assert found.rule["complete"] == [1.6, 2.5]
    json.dumps(dataclasses.asdict(found), allow_nan=False)


def test_the_labels_are_defined_with_the_rules_own_numbers():
    assert f"gamma below {RULE.gamma:g}".replace("0.", ".") in NOTES["H2"]
    assert f"alpha consistent with {RULE.alternative_alpha:g}" in NOTES["H2"]
    assert RULE.complete[0] < 2 < RULE.complete[1]
    assert "the band around 2" in NOTES["H0"]
    assert RULE.removal_share == 0.5
    assert "half the way" in NOTES["H1b"]


def test_a_gate_without_a_number_holds_none_and_fails():
    found = decide(dataclasses.replace(COMPLETE, dead_share=math.nan, self_cosine=math.nan))
    gates = {gate.name: gate for gate in found.gates if not gate.passed}
    assert gates["dead features"].value is gates["self-cosine"].value is None
    json.dumps(dataclasses.asdict(found), allow_nan=False)


@pytest.mark.parametrize(("gamma", "label"), [(0.0, "H0"), (0.5, "H1a"), (1.0, "H2")])
def test_simulated_seeds_of_a_planted_exponent_reach_its_verdict(gamma, label):
    """R = 2 * 4^(-gamma), from three training and two dictionary seeds of each shape."""
    right = 0
    for case in range(20):
        rng = np.random.default_rng([case, 5])

        def shape(density, seed, rng=rng):
            values = density * np.exp(0.02 * rng.normal(size=(3, 1)) + 0.01 * rng.normal(size=(3, 2)))
            return statistics.two_level_bootstrap(values.tolist(), seed=seed, n_draws=300)

        ratio = statistics.log_ratio(shape(2 * 4**-gamma, 1), shape(1.0, 2)).estimate()
        base = COMPLETE if gamma == 0 else PERSISTENT
        found = decide(dataclasses.replace(base, ratio=statistics.exponentiate(ratio)))
        right += found.label == label
    assert right >= 18
