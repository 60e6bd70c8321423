"""Loads at common fidelity from rows: planted power laws come back, and what cannot be read has its reason."""

import math
from dataclasses import replace

import numpy as np
import pytest

from crosscoder.results.table import Estimate, LongTable, Place, Row
from crosscoder.verdict.loads import load_legs

SHAPES = {"A": (8, 64), "B": (2, 128)}
K = (2, 4, 8, 16)
JOINT, BANK = {"A": 20.0, "B": 11.0}, {"A": 9.0, "B": 7.0}
"""ln-ln laws `load = factor * fvu^-.5`, of a layer in a bank."""
TRAININGS = (0.97, 1.0, 1.04)


def rows(subject, arm, factor, *, ks=K, seeds=(0, 1)):
    found = []
    for t, own in enumerate(TRAININGS):
        for k in ks:
            for seed in seeds:
                fvu, share = (0.3, 0.2, 0.12, 0.05)[K.index(k)], (0.2, 0.1, 0.06, 0.02)[K.index(k)]
                where = {"subject": subject, "training_seed": t, "state": "trained", "site": "write", "arm": arm}
                at = Place(**where, role="k", n_features=99, k=k, seed=seed)
                varies = own ** (1.1 if arm == "layerwise" else 1.0)
                load = varies * factor * fvu**-0.5 * (1.02 if seed else 1 / 1.02)
                spliced = replace(at, layer="all")
                found += [
                    Row(at, "entropy_load", load),
                    Row(at, "explained_variance", 1 - fvu),
                    Row(at, "clean_loss", 2.5),
                    Row(spliced, "spliced_loss", 2.5 + 2 * share),
                    Row(spliced, "ablated_loss", 4.5),
                    Row(replace(at, layer="3"), "spliced_loss", 9.0),
                ]
    return found


def table(**changes):
    every = [rows(name, "crosscoder", JOINT[name]) for name in SHAPES]
    every += [changes.get(f"bank_{name}", rows(name, "layerwise", BANK[name])) for name in SHAPES]
    return LongTable(tuple(row for one in every for row in one))


def test_planted_laws_come_back_in_both_currencies():
    found = load_legs(table(), SHAPES)
    q, bank = math.log(11 / 20), math.log(2 * 7 / (8 * 9))
    g = (math.log(8 * 9 / 20) - math.log(2 * 7 / 11)) / math.log(4)
    for legs in found.values():
        values = [one.value for one in (legs.q, legs.g, legs.r)]
        assert values == pytest.approx([q, g, math.log(2) + bank])
        assert legs.r.value == pytest.approx(math.log(2) + legs.q.value - legs.g.value * math.log(4))
        assert legs.g.high - legs.g.low < 0.1 * (legs.q.high - legs.q.low)  # what a training's loads share cancels
        assert all(isinstance(one, Estimate) and one.low < one.value < one.high for one in (legs.q, legs.r))
    at_targets = np.mean([math.log(20 * fvu**-0.5) for fvu in (0.15, 0.1)])
    assert found["fvu"].joint["A"] == pytest.approx(at_targets + np.log(TRAININGS))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ([], "no layerwise of A was trained"),
        (rows("A", "layerwise", 9.0, ks=K[:3]), r"A0, layerwise: 3 k were run"),
        ([row for row in rows("A", "layerwise", 9.0) if row.key != "ablated_loss"], "k 2: its reconstructions"),
        (
            [replace(row, value=4.0) if row.at.layer == "all" and row.key == "spliced_loss" else row
             for row in rows("A", "layerwise", 9.0)],
            r"0.08 is not enclosed",
        ),
        ([row for row in rows("A", "layerwise", 9.0) if row.at.training_seed != 2], "2 trainings of A have banks"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_has_a_reason_and_leaves_the_rest(changed, reason):
    legs = load_legs(table(bank_A=changed), SHAPES)["loss"]
    assert isinstance(legs.q, Estimate)
    assert isinstance(legs.g, str)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(legs.g)


def test_shapes_of_one_depth_have_no_sharing():
    legs = load_legs(table(), {"A": (8, 64), "B": (8, 128)})["fvu"]
    assert isinstance(legs.q, Estimate)
    assert "equally many layers" in legs.g
