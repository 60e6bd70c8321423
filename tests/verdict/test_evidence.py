"""The evidence of a whole comparison, and what a reader is told beside it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from crosscoder.measure.comparison import SiteReadings, measure_site
from crosscoder.results.quantities import PRIMARY_ESTIMATOR
from crosscoder.results.table import Estimate, LongTable, Place, Row
from crosscoder.results.verdict import Verdict
from crosscoder.verdict.decide import decide
from crosscoder.verdict.evidence import GateInputs, gather, reading_notes, removal_shift
from crosscoder.verdict.rule import Calibration
from tests.measure.test_comparison import DOCUMENT_T, F, subject

WRITE = Place(site="write")
GOOD = Calibration(count_error=0.01, rho_error=0.02, d_eff_error=0.155, same_sizes=True)
INPUTS = GateInputs(loss_gap=0.001, loss_matched=True, calibration=GOOD)


@pytest.fixture(scope="module")
def readings() -> SiteReadings:
    """Features of one layer in the trained pair, of all layers in the control: R is 2 and 1/2."""
    shapes = (("A", 8, 32), ("B", 2, 64))
    return SiteReadings(
        site="write",
        trained={name: subject(name, layers, width, 1) for name, layers, width in shapes},
        untrained={name: subject(name, layers, width, layers) for name, layers, width in shapes},
        document_T=DOCUMENT_T,
    )


@pytest.fixture(scope="module")
def table(readings) -> LongTable:
    """What was measured of it, with X and a count gain of 0."""
    nothing = (("cross_layer", Estimate(0.0, -0.01, 0.01)), ("count_gain", Estimate(0.0, -0.1, 0.1)))
    return LongTable((*measure_site(readings), *(Row(WRITE, key, value) for key, value in nothing)))


def judged(table: LongTable, readings: SiteReadings, inputs: GateInputs = INPUTS) -> Verdict:
    return decide(gather(table, readings, inputs))


def test_planted_single_layer_features_give_h0(table, readings):
    assert gather(table, readings, INPUTS).ratio.covers(2)
    found = judged(table, readings)
    assert found.label == "H0", found.sentence
    assert all(gate.passed for gate in found.gates)


def test_a_broken_gate_is_named(table, readings):
    broken = dataclasses.replace(INPUTS, calibration=dataclasses.replace(GOOD, count_error=0.2))
    found = judged(table, readings, broken)
    assert found.label == "not testable"
    assert "calibration count" in found.sentence


def test_the_worst_dictionary_stands_for_all(table, readings):
    first = readings.trained["B"]
    worse = dataclasses.replace(first.seeds[1][0], dead_share=0.3)
    seeds = (first.seeds[0], (worse, *first.seeds[1][1:]))
    other = dataclasses.replace(readings, trained={**readings.trained, "B": dataclasses.replace(first, seeds=seeds)})
    found = gather(table, other, INPUTS)
    assert found.dead_share == 0.3
    assert found.n_training_seeds == 2
    assert found.self_cosine == min(
        p.debiased.self_cosine for s in readings.trained.values() for g in s.pairs for p in g
    )


def test_every_estimator_has_a_row_with_its_reason_if_missing(readings):
    alone = SiteReadings(site="write", trained=readings.trained, document_T=DOCUMENT_T)
    rows = LongTable(tuple(measure_site(alone))).select("ratio")
    assert len(rows) == 2 * 8
    assert all(row.missing == "not run" for row in rows.select(state="untrained"))
    assert all(row.value is not None for row in rows.select(state="trained"))


def test_the_gate_names_the_estimator_of_the_control(table, readings):
    gates = {gate.name: gate for gate in judged(table, readings).gates}
    assert PRIMARY_ESTIMATOR in gates["trained against untrained"].requirement


def marked(readings: SiteReadings, genuine_F: dict[str, np.ndarray]) -> SiteReadings:
    trained = {
        name: dataclasses.replace(
            s, seeds=tuple(tuple(dataclasses.replace(r, genuine_F=genuine_F[name]) for r in g) for g in s.seeds)
        )
        for name, s in readings.trained.items()
    }
    return dataclasses.replace(readings, trained=trained)


def test_removing_half_of_all_features_moves_no_ratio_but_half_of_one_side_halves_it(readings):
    half, none = np.random.default_rng(0).random(F) < 0.5, np.zeros(F, dtype=bool)
    assert abs(removal_shift(marked(readings, {"A": half, "B": half})).value.value) < 0.25
    one_side = removal_shift(marked(readings, {"A": none, "B": half}))
    assert one_side.value.value == pytest.approx(-math.log(2), abs=0.25)
    assert "not every" in removal_shift(readings).missing


def test_notes_say_what_no_gate_asks(table):
    """R, loads and delta are one equation; an untrained pair as alike as two trainings makes U empty."""
    notes = reading_notes(table, INPUTS)
    assert any("d_eff is up to 15.5% off" in note for note in notes)
    load = next(note for note in notes if "at the loads measured" in note)
    assert "(1)" in load, load  # the same tokens and rates on both sides
    assert "delta from 0.34 to 0.66" in load, load  # ln(2 * .8) / ln 4 and ln(2 * 1.25) / ln 4
    others = [row for row in table if row.key != "u_floor"]
    for floor, empty in ((0.1, False), (2.0, True)):
        notes = reading_notes(LongTable((*others, Row(WRITE, "u_floor", floor))), INPUTS)
        assert any("U says nothing there" in note for note in notes) == empty
