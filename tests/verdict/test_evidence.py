"""The evidence of a whole comparison, and the plain values that the report is made of."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from crosscoder.measure import comparison
from crosscoder.measure.comparison import SiteReadings, Statistic
from crosscoder.measure.density import PRIMARY
from crosscoder.results.table import Estimate
from crosscoder.verdict import evidence
from tests.measure.test_comparison import DOCUMENT_T, F, subject


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


def conditions(**changes) -> evidence.Conditions:
    settings = {
        "loss_gap": 0.001,
        "loss_matched": True,
        "calibration": evidence.Calibration(count_error=0.01, rho_error=0.02, same_sizes=True),
        "cross_layer": Statistic("cross_layer", Estimate(0.0, -0.01, 0.01), "cross_layer_excess"),
        "count_gain": Statistic("count_gain", Estimate(0.0, -0.1, 0.1), "count_gain"),
    }
    return evidence.Conditions(**(settings | changes))


def test_planted_single_layer_features_give_h0(readings):
    sites = {"write": comparison.measure_site(readings)}
    found = evidence.gather(sites, readings, conditions())
    assert found.ratio.covers(2)
    described = evidence.describe(sites, found, conditions())
    assert described["label"] == "H0", described["sentence"]
    assert all(gate["passed"] for gate in described["gates"])
    json.dumps(described, allow_nan=False)


def test_a_broken_gate_is_named(readings):
    sites = {"write": comparison.measure_site(readings)}
    broken = conditions(calibration=evidence.Calibration(count_error=0.2, rho_error=0.02, same_sizes=True))
    described = evidence.describe(sites, evidence.gather(sites, readings, broken), broken)
    assert described["label"] == "not testable"
    assert "calibration count" in described["sentence"]


def test_every_estimator_stands_in_the_table_with_its_reason_if_missing(readings):
    alone = SiteReadings(site="write", trained=readings.trained, document_T=DOCUMENT_T)
    sites = {"write": comparison.measure_site(alone)}
    described = evidence.describe(sites, evidence.gather(sites, alone, conditions()), conditions())
    assert len(described["estimators"]) == 8
    assert sum(row["primary"] for row in described["estimators"]) == 1
    row = next(r for r in described["statistics"] if r["name"] == f"R untrained, {PRIMARY}")
    assert row["estimate"] is None
    assert row["missing"]
    assert {row["definition"] for row in described["statistics"]} <= evidence.DEFINITIONS.keys()
    assert {row["definition"] for row in described["estimators"]} <= evidence.DEFINITIONS.keys()


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
    shift = evidence.removal_shift(marked(readings, {"A": half, "B": half}))
    assert abs(shift.estimate.value) < 0.25
    one_side = evidence.removal_shift(marked(readings, {"A": none, "B": half}))
    assert one_side.estimate.value == pytest.approx(-math.log(2), abs=0.25)
    assert "not every" in evidence.removal_shift(readings).missing


def test_a_statistic_over_seeds_keeps_the_reason_of_what_is_missing():
    assert evidence.seeds_statistic("count_gain", [[1.0, 1.2], [0.9]]).estimate.value == pytest.approx(1.0)
    assert evidence.seeds_statistic("count_gain", [[1.0], ["no bank"]]).missing == "no bank"
    assert evidence.seeds_statistic("count_gain", []).missing == "not run"


def test_notes_say_what_no_gate_asks(readings):
    """R, loads and delta are one equation; an untrained pair as alike as two trainings makes U empty."""
    site = comparison.measure_site(readings)
    given = conditions(
        calibration=evidence.Calibration(count_error=0.01, rho_error=0.02, d_eff_error=0.155, same_sizes=True)
    )
    found = evidence.gather({"write": site}, readings, given)
    notes = evidence.describe({"write": site}, found, given)["notes"]
    assert any("d_eff is up to 15.5% off" in note for note in notes)
    load = next(note for note in notes if "at the loads measured" in note)
    assert "(1)" in load, load  # the same tokens and rates on both sides
    assert "delta from 0.34 to 0.66" in load, load  # ln(2 * .8) / ln 4 and ln(2 * 1.25) / ln 4
    for floor, empty in ((0.1, False), (2.0, True)):
        other = dataclasses.replace(site, universality=dataclasses.replace(site.universality, floor=floor))
        notes = evidence.describe({"write": other}, found, given)["notes"]
        assert any("U says nothing there" in note for note in notes) == empty


def test_the_gate_names_the_estimator_of_the_control(readings):
    sites = {"write": comparison.measure_site(readings)}
    gates = evidence.describe(sites, evidence.gather(sites, readings, conditions()), conditions())["gates"]
    assert PRIMARY in next(gate["requirement"] for gate in gates if gate["name"] == "trained against untrained")
