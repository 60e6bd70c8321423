"""Planted pairs through instruments and rule: what is planted is what is measured, and nothing wrong is concluded."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from crosscoder.results.table import Estimate, LongTable, Place, rows_at

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from operating_plants import BY_NAME, PLANTS
from operating_record import QUANTITIES, study_record
from operating_rule import RuleConfig, instruments_of, measure_rule, pooled_spread
from operating_studies import InstrumentConfig, measure_study, planted_rows
from operating_worlds import (
    WorldSizes,
    as_trained,
    draw_subject,
    truth_of,
    word_directions,
)

from crosscoder.verdict.rule import GATES, LABELS, PREMISES

TINY = InstrumentConfig(
    sizes=WorldSizes(d_model=16),
    trainings=2,
    k_joint=(1, 2),
    fractions=(0.6,),
    steps=20,
    batch=128,
    held_out=4096,
    room_tokens=8192,
)
RULE = RuleConfig(instruments=TINY, studies=12, draws=4)
CLOSE = [-0.02, 0.01, 0.02, -0.01, 0.0]


def record(**changes):
    """A record of instruments that are nearly right, all gates met."""
    gates = {
        name: [leg.low + 0.01 if math.isfinite(leg.low) else leg.high - 0.01] * 3 for name, (leg, _) in GATES.items()
    }
    main = {key: [0.97, 0.98, 0.96] for key in ("self_cosine", "point_matched_share")}
    legs = {
        "universality": [0.9, 0.85, 0.95],
        "rate dispersion": [1.0, 0.9, 1.1],
        "median log rate": [0.0, -0.05, 0.05],
        "removal share": [0.9, 0.7, 1.1],
    }
    found = {"residuals": {side: dict.fromkeys(QUANTITIES, CLOSE) for side in "AB"}, "gates": gates}
    return found | {"main": {"A": main, "B": main}, "legs": legs} | changes


def measured(plant, found, config=RULE):
    return measure_rule(plant, found, pooled_spread([found]), config)


class TestWorlds:
    @pytest.mark.parametrize(("name", "g"), [("H0", 0.0), ("H1a", 0.5), ("over", 1.0)])
    def test_truth_is_what_was_planted(self, name, g):
        sizes = WorldSizes(rate_sd=0.0, load_sd=0.0)
        a, b = (truth_of(draw_subject(as_trained(BY_NAME[name]), sizes, s, world=0, training=0)) for s in "AB")
        assert b.load == pytest.approx(a.load, abs=1e-6)
        assert ((a.bank - a.load) - (b.bank - b.load)) / math.log(4) == pytest.approx(g, abs=0.02)
        assert (a.causal - b.causal) / math.log(4) == pytest.approx(g, abs=0.04)

    def test_load_ratio_is_the_ratio_of_loads(self):
        sizes = WorldSizes(rate_sd=0.0, load_sd=0.0)
        a, b = (truth_of(draw_subject(BY_NAME["load .5, delta 1"], sizes, s, world=0, training=0)) for s in "AB")
        assert b.load - a.load == pytest.approx(math.log(0.5), abs=0.03)

    def test_room_of_tokens_is_the_truth(self):
        subject = draw_subject(as_trained(BY_NAME["H1a, noise"]), WorldSizes(), "A", world=0, training=0)
        x_TN = subject.draw(40_000, 0, 0).flatten(1).double()
        covariance = torch.cov(x_TN.T)
        room = float(covariance.trace() ** 2 / covariance.square().sum())
        assert math.log(room) == pytest.approx(truth_of(subject).room, abs=0.03)
        assert float(x_TN.square().mean()) == pytest.approx(1.0, abs=0.1)

    @pytest.mark.parametrize(("name", "alike"), [("H0", 1.0), ("load .5, delta 1", 1.0), ("disjoint features", 0.0)])
    def test_sides_fire_on_the_same_tokens_where_they_have_the_same_features(self, name, alike):
        sizes = WorldSizes(d_model=16, rate_sd=0.0, load_sd=0.0)
        a, b = (draw_subject(as_trained(BY_NAME[name]), sizes, side, world=0, training=0) for side in "AB")
        energy = [subject.draw(2000, 0, 0).flatten(1).square().sum(1) for subject in (a, b)]
        found = float(torch.corrcoef(torch.stack(energy))[0, 1])
        assert (found > 0.5) == (alike == 1.0), found

    def test_words_share_letters_evenly_and_none_comes_twice(self):
        rows_NLD = word_directions(96, 4, 8, torch.Generator().manual_seed(0))
        assert len(torch.unique(rows_NLD.flatten(1), dim=0)) == 96
        letters, counts = torch.unique(rows_NLD[:, 0], dim=0, return_counts=True)
        assert len(letters) == 9  # and the layer left empty
        assert sorted(counts.tolist()) == [6] * 8 + [48]
        with pytest.raises(ValueError, match="fewer than 129"):
            word_directions(129, 4, 8, torch.Generator())


class TestRule:
    @pytest.mark.parametrize("name", ["H1a", "over", "load .5, delta 1", "bigrams", "iso-N, beta .5"])
    def test_nothing_wrong_is_concluded_with_instruments_that_are_right(self, name):
        found = measured(BY_NAME[name], record())
        assert found["gated"]["wrong"] == 0
        assert found["gated"]["right"] >= 0.8, found["gated"]

    def test_a_bias_of_loads_gives_a_wrong_label_which_is_counted(self):
        off = record()["residuals"]
        off["B"] = off["B"] | {f"joint/{one}": [0.8 + x for x in CLOSE] for one in ("fvu", "loss")}
        found = measured(BY_NAME["H1a"], record(residuals=off))
        assert found["legs"]["labels"] == {"premise fails: load": 1.0}
        assert found["legs"]["wrong"] == 1
        assert found["coverage"]["q/fvu"] == 0

    def test_a_quantity_that_cannot_be_read_is_no_conclusion(self):
        unread = dict.fromkeys(QUANTITIES, "not enclosed")
        found = measured(BY_NAME["H1a"], record(residuals={"A": unread, "B": unread}))
        assert found["legs"]["open"] == 1
        assert "q/fvu" not in found["coverage"]

    def test_two_letters_a_feature_may_be_no_product_code_to_the_rule(self):
        """Loads of letters add to more than those of words, so that r leaves the range of H1b."""
        found = measure_rule(
            BY_NAME["H1b, 2 a neuron"], None, pooled_spread([record()]), RuleConfig(draws=4, studies=8)
        )
        assert found["label_of_truth"] == "undecided"  # and not "H2: partial", whose range r is in
        assert math.log(1.25) < found["truth"]["r/fvu"] < math.log(1.6)
        assert "legs" not in found

    def test_intervals_cover(self):
        found = measured(BY_NAME["load .5, delta 1"], record(), replace(RULE, studies=60, draws=12))
        assert all(0.7 <= share <= 1 for share in found["coverage"].values()), found["coverage"]

    def test_plants_are_consistent(self):
        names = [plant.name for plant in PLANTS]
        assert len(set(names)) == len(names)
        known = {*LABELS, *PREMISES, "undecided", "not testable"}
        for plant in PLANTS:
            assert {*plant.right, *plant.safe} <= known
            assert BY_NAME[instruments_of(plant)].trained_as is None


class TestInstruments:
    @pytest.fixture(scope="class")
    @classmethod
    def found(cls):
        calibration = rows_at(Place(role="calibration", seed=0), {"calibration_mcc": 0.95})
        rows = measure_study(as_trained(BY_NAME["H1a"]), TINY, world=0)
        return study_record(BY_NAME["H1a"], TINY, LongTable((*rows, *calibration)), world=0)

    def test_a_small_study_concludes_nothing(self, found):
        assert found["label"] == "pilot"
        assert json.loads(json.dumps(found, allow_nan=False))["plant"] == "H1a"
        assert found["gates"]["features found, planted"][0] == 0.95

    def test_room_needs_no_dictionary_and_is_near_the_truth(self, found):
        assert np.abs([*found["residuals"]["A"]["room"], *found["residuals"]["B"]["room"]]).max() < 0.1

    def test_planted_numbers_reach_the_rule(self, found):
        kappa = Estimate(*found["legs"]["kappa"])
        assert kappa.value == pytest.approx(0.5, abs=0.15)
        assert found["gates"]["loss over a trigram table's"][0] < 0

    def test_tables_of_tokens_predict_as_well_as_a_bigram_world(self):
        plant = as_trained(BY_NAME["bigrams"])
        subject = draw_subject(plant, TINY.sizes, "A", world=0, training=0)
        table = LongTable(tuple(planted_rows(plant, TINY, subject, 0, 2, truth_of(subject))))
        assert table.one("held_out_loss") > table.one("trigram_loss")
        assert table.one("lookup_share") > 0.8
