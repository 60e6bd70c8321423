"""From rows to evidence and verdict: every gate reads what it says, labels come where their rows are planted."""

import math
from dataclasses import replace

import numpy as np
import pytest
from planted_rows import SHAPES, study_rows
from scipy import stats

from crosscoder.results.table import Estimate, LongTable, Place, Row
from crosscoder.verdict import evidence, rule, words
from crosscoder.verdict.rows import statistic_rows

SITE_ROWS = [
    Row(Place(site="write"), "universality", Estimate(0.9, 0.8, 1.0)),
    Row(Place(site="write"), "rate_dispersion", Estimate(1.0, 0.9, 1.1)),
    Row(Place(site="write"), "median_log_rate", Estimate(0.0, -0.05, 0.05)),
]
CROWDED = {"joint": {"A": 20.0, "B": 20.4}, "bank": {"A": 3.0, "B": 11.5}}
DEEP = {"A": {"layers": 2.0}, "B": {"layers": 2.0}}


def judged(**changes):
    table = study_rows(extra=SITE_ROWS, **changes)
    found = evidence.gather(table, SHAPES)
    return rule.decide(found), found, table


def test_loads_that_differ_are_the_premise_that_fails_and_nulls_are_asked():
    decision, found, _ = judged()
    assert [gate.name for gate in decision.gates if gate.met != "met" and rule.GATES[gate.name][1] is None] == []
    assert decision.label == "premise fails: load", decision.reasons
    assert decision.explained == ()
    assert found.nulls["q/fvu", "gaussian"].high < 0


def test_a_null_that_loads_alike_is_said():
    factor = {"A": 20 / 25, "B": 11 / 24}

    def alike(row):
        is_load = (row.key, row.at.state) == ("entropy_load", "gaussian")
        return replace(row, value=row.value * factor[row.at.subject]) if is_load else row

    rows = [alike(row) for row in study_rows(extra=SITE_ROWS)]
    decision = rule.decide(evidence.gather(LongTable(tuple(rows)), SHAPES))
    assert decision.label == "premise fails: load"
    assert decision.explained == ("explained by covariance",)


def test_a_null_that_was_not_run_leaves_it_undecided():
    kept = [row for row in study_rows(extra=SITE_ROWS) if row.at.state != "frozen_encoder"]
    decision = rule.decide(evidence.gather(LongTable(tuple(kept)), SHAPES))
    assert decision.label == "undecided"
    assert "no null frozen_encoder of q/fvu" in decision.reasons[0]


def test_equal_loads_and_equal_crowding_of_layers_are_h0_where_rooms_agree():
    rooms = {"A": {"room": 60.0, "layers": 2.0}, "B": {"room": 30.0, "layers": 2.0}}
    decision, found, _ = judged(**CROWDED, **rooms)
    assert found.values["room/fvu"].value == pytest.approx(math.log(2 * 1.02), abs=1e-6)
    assert decision.label in ("H0", "undecided", "not testable")
    legs = {leg.name: leg.met for leg in decision.legs["H0"]}
    assert legs["q/fvu"] == legs["r/fvu"] == legs["kappa"] == legs["room/fvu"] == "met"


@pytest.mark.parametrize(
    ("changes", "gate"),
    [
        ({"A": {"trigram": 2.0}}, "loss over a trigram table's"),
        ({"B": {"lookup": 0.95}}, "share that token lookup keeps"),
        ({"B": {"loss": 2.7}}, "loss, B over A"),
    ],
)
def test_a_subject_gate_on_the_wrong_side_is_not_testable(changes, gate):
    decision, _, _ = judged(**changes)
    assert decision.label == "not testable"
    assert any(reason.startswith(gate) for reason in decision.reasons)


def test_a_gate_on_directions_does_not_keep_loads_from_being_said():
    rows = [replace(row, value=0.3) if row.key == "self_cosine" else row for row in study_rows(extra=SITE_ROWS)]
    rows = [
        replace(row, value=row.value + 0.001 * row.at.training_seed) if row.key == "self_cosine" else row
        for row in rows
    ]
    found = evidence.gather(LongTable(tuple(rows)), SHAPES)
    decision = rule.decide(found)
    assert {gate.name: gate.met for gate in decision.gates}["same direction in another order"] == "missed"
    assert decision.label == "premise fails: load"


def test_agreement_that_is_full_in_every_training_is_measured():
    rows = [replace(row, value=1.0) if row.key == "self_cosine" else row for row in study_rows(extra=SITE_ROWS)]
    gate = evidence.gather(LongTable(tuple(rows)), SHAPES).gates["same direction in another order"]
    assert gate.measured == Estimate(1.0, 1.0, 1.0)


def test_equal_losses_have_to_be_known_to_be_equal():
    """Within .01 in every sample, and not for certain: trainings that vary say so."""
    apart = [
        replace(row, value=row.value * (1 + 0.02 * (row.at.training_seed - 2))) if row.key == "held_out_loss" else row
        for row in study_rows()
    ]
    gates = [evidence.gather(LongTable(tuple(rows)), SHAPES).gates["loss, B over A"] for rows in (study_rows(), apart)]
    assert [gate.leg.check(gate.measured) for gate in gates] == ["met", "open"]


def test_planted_pairs_have_an_interval_where_there_are_two_and_what_is_one_number_says_why():
    one = {gate.name: rule.Checked(gate.name, "", gate.measured, "met").said for gate in judged()[0].gates}
    assert one["error of q, planted"] == "0.03 (of one planted pair; two have an interval)"
    assert one["features a dimension"] == "2 (set, not measured)"
    second = [replace(r, at=replace(r.at, seed=1), value=0.05) for r in study_rows() if r.key == "calibration_q_error"]
    gate = evidence.gather(LongTable((*study_rows(), *second)), SHAPES).gates["error of q, planted"]
    assert gate.measured.value == pytest.approx(0.04)
    assert gate.measured.high - 0.04 == pytest.approx(stats.t.ppf(0.95, 1) * 0.01)
    assert gate.leg.check(gate.measured) == "open"
    unknown = replace(second[0], value=None, missing="no target is enclosed")
    gate = evidence.gather(LongTable((*study_rows(), unknown)), SHAPES).gates["error of q, planted"]
    assert gate.measured == "no target is enclosed"


def test_twice_the_size_needs_a_dictionary_of_the_same_seed():
    rows = study_rows()
    second = [replace(row, at=replace(row.at, training_seed=1), value=row.value * 1.02) for row in rows
              if row.at.role == "size"]  # fmt: skip
    found, other = (
        evidence.gather(LongTable((*rows, *each)), SHAPES).gates["room at twice the size"].measured
        for each in (second, [replace(row, at=replace(row.at, seed=7)) for row in second])
    )
    assert isinstance(found, Estimate)
    assert other == "1 training; an interval over trainings needs two"


def test_the_text_s_variance_is_in_what_single_features_say_and_in_gates_of_loads():
    """Documents move A's features alone; a null that they move alike takes that out again."""
    moved, still = np.exp(0.2 * np.random.default_rng(0).standard_normal(31)), np.ones(31)
    rows = [*study_rows(extra=SITE_ROWS), Row(Place(), "n_documents", 31)]
    rows += [replace(row, at=replace(row.at, state="frozen_encoder"), value=0.02) for row in rows
             if row.key == "conjunctive_share"]  # fmt: skip
    left = [
        Row(row.at, f"{row.key}_left", (row.value * (moved if row.at.subject == "A" else still)).tolist())
        for row in rows
        if row.key in ("causal_layers", "conjunctive_share", "raw_density_rest", "raw_density", "entropy_load")
    ]
    plain, found = (evidence.gather(LongTable(tuple(one)), SHAPES) for one in (rows, [*rows, *left]))
    text = 30 / 31 * np.square(np.log(moved) - np.log(moved).mean()).sum()
    kappa = [one.values["kappa"] for one in (plain, found)]
    assert kappa[1].value == pytest.approx(kappa[0].value)
    assert kappa[1].high - kappa[1].value > 1.6 * math.sqrt(text) / math.log(4) > 2 * (kappa[0].high - kappa[0].value)
    excess = [one.values["conjunctive excess"] for one in (plain, found)]
    shares = (0.05 - 0.02) * np.sqrt(30 / 31 * np.square(moved - moved.mean()).sum())
    assert excess[1].high - excess[1].value > 1.6 * shares > 2 * (excess[0].high - excess[0].value)
    for name in ("room at twice the size", "load of another order of the text"):  # every load moves by as much
        assert found.gates[name].measured == plain.gates[name].measured
    (said,) = [n for n in words.notes(found, LongTable((*rows, *left)), SHAPES) if "31 documents" in n]
    assert said.startswith("causal layers and conjunctive shares, what removing twins moves, U, rates of matched")


def test_statistics_are_rows_and_nulls_have_their_excess():
    table = study_rows()
    rows = LongTable(tuple(statistic_rows(evidence.statistics(table, SHAPES))))
    assert rows.one("load_log_ratio", state="trained", estimator="fvu").value < 0
    excess = rows.one("null_excess", state="gaussian", estimator="q-fvu").value
    real, null = (rows.one("load_log_ratio", state=s, estimator="fvu").value for s in ("trained", "gaussian"))
    assert excess == pytest.approx(real - null)


def test_the_verdict_says_in_words_what_was_found_and_what_would_decide():
    decision, found, table = judged()
    told = words.tell(decision, found, table, SHAPES)
    assert "the argument does not start" in told.sentence
    assert "0.55" in told.sentence
    assert told.decides == ()
    assert any("A is deep for its width" in note for note in told.notes)
    few = LongTable(tuple(row for row in table if (row.at.training_seed or 0) < 2))
    found = evidence.gather(few, SHAPES)
    pilot = words.tell(rule.decide(found), found, few, SHAPES)
    assert pilot.label == "pilot"
    assert pilot.decides[:2] == ("5 trainings of A instead of 2", "5 trainings of B instead of 2")
