"""Statistics at common fidelity from rows: planted laws come back, nulls subtract, what is missing has its reason."""

import math
from dataclasses import replace

import numpy as np
import pytest
from planted_rows import BANK, JOINT, SHAPES, dictionary_rows, logs, null_rows, study_rows

from crosscoder.results.table import Estimate, LongTable, Row
from crosscoder.studies.judge import alpha_rows
from crosscoder.verdict import legs


@pytest.mark.parametrize("currency", ["fvu", "loss"])
def test_planted_laws_come_back_in_both_currencies(currency):
    found = legs.fidelity_statistics(study_rows(), SHAPES, "trained", currency)
    q, r, g = logs()
    values = {name: one.estimate for name, one in found.items()}
    assert [values[name].value for name in ("q", "r", "g")] == pytest.approx([q, r, g])
    assert values["room"].value == pytest.approx(q), "rooms of A and B are planted equal"
    assert values["dimension"].value == pytest.approx(q + math.log(100 / 55))
    assert values["g"].high - values["g"].low < 0.1 * (values["q"].high - values["q"].low), (
        "what trainings share cancels"
    )


def test_the_text_s_variance_is_that_of_the_whole_combination():
    """A document that moves all loads alike moves no difference of them, and each of them alone."""
    moved = np.exp(0.3 * np.random.default_rng(0).standard_normal(31))
    rows = [
        Row(row.at, f"{row.key}_left", (row.value * (moved if row.key == "entropy_load" else np.ones(31))).tolist())
        for row in study_rows()
        if row.key in ("entropy_load", "explained_variance")
    ]
    plain, found = (
        legs.fidelity_statistics(LongTable(tuple(one)), SHAPES, "trained", "fvu")
        for one in (study_rows(), [*study_rows(), *rows])
    )
    for name in ("q", "r", "g", "room"):
        assert found[name].estimate.high == pytest.approx(plain[name].estimate.high, rel=1e-3)
    for (_, group), (_, without) in zip(found["q"].terms, plain["q"].terms, strict=True):
        assert without.left_E is None
        assert group.left_E - group.value == pytest.approx(np.log(moved))
    alone, before = (legs.Contrast(one["q"].terms[:1]).estimate for one in (found, plain))
    assert alone.high - alone.low > 3 * (before.high - before.low)


def test_a_null_subtracts_and_the_shuffled_one_has_the_banks_of_the_subject():
    table = LongTable((*study_rows(), *dictionary_rows("A", "crosscoder", 40.0, state="shuffled"),
                       *dictionary_rows("B", "crosscoder", 12.0, state="shuffled")))  # fmt: skip
    real, null, shuffled = (
        legs.fidelity_statistics(table, SHAPES, s, "fvu") for s in ("trained", "gaussian", "shuffled")
    )
    excess = real["q"].less(null["q"]).estimate
    assert excess.value == pytest.approx(logs()[0] - math.log(24 / 25))
    assert excess.low < excess.value < excess.high
    assert shuffled["g"].estimate.value == pytest.approx(
        (math.log(8 * BANK["A"] / 40) - math.log(2 * BANK["B"] / 12)) / math.log(4)
    )


@pytest.mark.parametrize(
    ("rows", "name", "reason"),
    [
        (dictionary_rows("B", "crosscoder", 11.0), "r", "no layerwise of B was trained"),
        (
            [*dictionary_rows("A", "crosscoder", 20.0, ks=(2, 4, 8)), *dictionary_rows("B", "crosscoder", 11.0)],
            "q",
            "A0, crosscoder: 3 k were run",
        ),
        ([], "q", "no crosscoder"),
    ],
)
def test_what_cannot_be_read_says_why(rows, name, reason):
    found = legs.fidelity_statistics(LongTable(tuple(rows)), SHAPES, "trained", "fvu")[name].estimate
    assert isinstance(found, str)
    assert reason in found


def test_a_dictionary_that_was_not_spliced_has_no_loss_currency():
    rows = [row for row in dictionary_rows("A", "crosscoder", 20.0) if row.key != "clean_loss"]
    assert "not spliced" in legs.read_logs(LongTable(tuple(rows)), "A", "crosscoder", "loss")
    assert not isinstance(legs.read_logs(LongTable(tuple(rows)), "A", "crosscoder", "fvu"), str)


def test_a_target_beyond_the_dictionaries_is_not_extrapolated():
    rows = [
        replace(r, value=1 - (1 - r.value) / 3) if r.key == "explained_variance" else r for r in null_rows("gaussian")
    ]
    found = legs.read_logs(LongTable(tuple(rows)), "A", "crosscoder", "fvu", "gaussian")
    assert "train one of smaller k" in found


def test_trainings_of_one_quantity_alone_are_refused():
    assert legs.minus({0: 1.0, 1: 2.0}, {0: 0.5}) == "trainings [1] have one of two quantities"
    assert legs.minus({0: 1.0}, {0: 0.5, 1: 2.0}) == {0: 0.5}
    assert legs.minus("why", {0: 1.0}) == "why"
    assert JOINT["A"] > JOINT["B"]
    assert isinstance(legs.log_statistic(study_rows(), "causal_layers").estimate, Estimate)


def test_alpha_is_the_planted_exponent_of_width_where_the_grid_has_banks():
    grid = SHAPES | {"C": (2, 64), "D": (8, 128), "E": (4, 96)}
    off = {"A": 1.02, "B": 1.01, "C": 0.99, "D": 0.98, "E": 1.0}
    rows = {
        name: dictionary_rows(name, "layerwise", off[name] * width**1.5 * depth**-0.3)
        for name, (depth, width) in grid.items()
    }
    found = alpha_rows(LongTable(tuple(row for each in rows.values() for row in each)), grid)
    assert [row.at.estimator for row in found] == ["fvu", "loss"]
    for row in found:
        assert row.value.covers(1.5)
        assert row.value.high - row.value.low < 0.5
    compared = LongTable((*rows["A"], *rows["B"]))
    assert alpha_rows(compared, grid) == []
    few = alpha_rows(LongTable((*compared, *(row for row in rows["C"] if row.at.k != 2))), grid)
    assert few[0].value is None
    assert "C0, layerwise: 3 k were run" in few[0].missing
