"""Planted answers through the whole chain: the rule returns them, and a broken gate is named.

Most tests read planted features as a good dictionary would, without training one; the slow one trains.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

from crosscoder.measure.density import ShapeReadings
from crosscoder.measure.reading import Reading
from crosscoder.results.file import load_results
from crosscoder.results.table import Estimate, LongTable, Place, rows_at
from crosscoder.studies.calibration import FitConfig
from crosscoder.verdict import evidence

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench_verdicts
import bench_verdicts_worlds as worlds
from bench_verdicts import draw_verdicts, verdict_lines
from bench_verdicts_worlds import PLANTS, Plant, Planted, VerdictConfig, judge, measure_case

FIT = VerdictConfig().fit
CONFIG = VerdictConfig(fit=replace(FIT, held_out=2048))


class WellRead(Planted):
    """Readings that a good dictionary would give: the planted features, with errors of its own seed."""

    def read(self, pair, side, dictionary_seed):
        rng = np.random.default_rng([self.seed, pair.config.training_seed, dictionary_seed, ord(side)])
        truth = pair.decoder_FLD[side].numpy()
        error = rng.normal(size=truth.shape) * (truth != 0)
        error *= 0.1 / np.linalg.norm(error, axis=(1, 2), keepdims=True)
        activations_BF = pair.activations(self.config.fit.held_out, 2 * self.seed + 1, 0).numpy()
        explained = 0.97 + 0.004 * rng.random()
        return Reading(
            dictionary_seed,
            truth + error,
            sparse.csc_array(activations_BF),
            explained,
            0.03,
            6.0,
            np.arange(len(truth)),
        )

    def bank(self, pair, k):
        """A bank needs one active feature for each layer that a planted one lives in."""
        slots = self.config.active * pair.config.shape("A")[0] ** pair.config.gamma
        l0 = k * pair.config.n_layers
        return evidence.point_of_l0(float(1 - 0.028 * (slots / l0) ** 2), float(l0))


def planted(plant, seed=0, config=CONFIG):
    return WellRead(config, plant.gamma, plant.delta, seed)


def case_of(plant, seed=0, config=CONFIG):
    control = WellRead(config, 0.0, None, seed, "cpu", config.control_crowding)
    return measure_case(planted(plant, seed, config), control, control.subjects())


@pytest.fixture(scope="module", params=PLANTS, ids=lambda plant: plant.name)
def read_well(request):
    torch.set_num_threads(1)
    return request.param, case_of(request.param)


@pytest.fixture(scope="module")
def persistent():
    return case_of(PLANTS[1])


def test_the_planted_verdict_is_returned(read_well):
    plant, case = read_well
    found, decided = judge(case)
    assert decided.label == plant.label, decided.sentence
    assert decided.kinds == plant.kinds
    assert found.gamma.value == pytest.approx(plant.gamma, abs=0.05)
    assert found.delta.value == pytest.approx(plant.delta, abs=0.15)
    assert decided.universality == "universal"
    rows = LongTable(tuple(worlds.verdict_rows(plant, planted(plant), case)))
    assert rows.one("right_verdict")
    assert rows.one("found", estimator="R").covers(rows.one("drawn", estimator="R"))
    assert found.ratio.value == pytest.approx(rows.one("planted", estimator="R"), rel=0.2)
    assert f"| {plant.name} | {' '.join((plant.label, *plant.kinds))} | 1 of 1 |" in "\n".join(verdict_lines(rows))


def test_how_far_an_interval_misses_is_said():
    rows = []
    for seed, (low, high) in enumerate([(0.9, 1.1), (0.7, 0.96), (1.02, 1.3)]):
        at = Place(kind="persistent", seed=seed)
        rows += rows_at(at, {"expected_verdict": "H1a", "found_verdict": "H1a", "right_verdict": seed < 2})
        rows += rows_at(at, {"verdict_reasons": ["R is too high"]})
        for name in ("R", "gamma", "delta"):
            values = {"found": Estimate(low, low, high), "planted": 1.0, "drawn": (low + high) / 2}
            rows += rows_at(replace(at, estimator=name), values)
    table = LongTable(tuple(rows))
    page = "\n".join(verdict_lines(table))
    assert "1, 3 of 3; by at most 0.04" in page
    assert "- persistent, seed 2: H1a: R is too high" in page
    assert draw_verdicts(table).startswith(b"\x89PNG")


def test_another_way_to_the_same_answer():
    """Features that last through all layers and turn as they go: R is 1 too."""
    plant = Plant(name="turning", gamma=1.0, delta=0.5, label="H1a")
    assert judge(case_of(plant))[1].label == "H1a"


def test_a_third_shape_joins_the_slopes():
    config = replace(CONFIG, sides=("A", "B", "C"), training_seeds=2)
    found, _ = judge(case_of(PLANTS[2], config=config))
    assert found.gamma.value == pytest.approx(1, abs=0.02)
    assert found.delta.value == pytest.approx(0, abs=0.15)


def changed(case, change, names=("A", "B")):
    """The case with every trained reading of some shapes changed."""
    trained = dict(case.readings.trained)
    for name in names:
        subject = trained[name]
        seeds = tuple(tuple(change(reading) for reading in group) for group in subject.seeds)
        trained[name] = ShapeReadings(name, subject.n_layers, subject.d_model, seeds)
    return replace(case, readings=replace(case.readings, trained=trained))


def noisy(reading):
    rng = np.random.default_rng(reading.seed)
    error = rng.normal(size=reading.decoder_FLD.shape)
    return replace(
        reading, decoder_FLD=reading.decoder_FLD + 0.6 * error / np.linalg.norm(error, axis=(1, 2))[:, None, None]
    )


def inputs(case, **values):
    return replace(case, inputs=replace(case.inputs, **values))


def calibration(case, **values):
    return inputs(case, calibration=replace(case.inputs.calibration, **values))


def measured(case, key, value):
    """The case with another value of X or of the count gain."""
    return replace(case, measured=tuple(replace(row, value=value) if row.key == key else row for row in case.measured))


BREAKS = {
    "loss gap": lambda case: inputs(case, loss_gap=0.03),
    "explained variance": lambda case: changed(case, lambda r: replace(r, explained_variance=0.8), names=("B",)),
    "dead features": lambda case: changed(case, lambda r: replace(r, dead_share=0.2)),
    "self-cosine": lambda case: changed(case, noisy, names=("A",)),
    "calibration count": lambda case: calibration(case, count_error=0.15),
    "calibration rho": lambda case: calibration(case, rho_error=None),
    "calibration sizes": lambda case: calibration(case, same_sizes=False),
    "trained against untrained": lambda case: replace(
        case, readings=replace(case.readings, untrained=case.readings.trained)
    ),
    "statistics measured": lambda case: measured(case, "count_gain", None),
}


@pytest.mark.parametrize("gate", BREAKS)
def test_a_broken_gate_makes_it_not_testable_and_is_named(persistent, gate):
    _, decided = judge(BREAKS[gate](persistent))
    assert decided.label == "not testable"
    assert gate in decided.sentence
    assert gate in [one.name for one in decided.gates if not one.passed]


def test_the_same_case_unbroken_passes_every_gate(persistent):
    assert all(gate.passed for gate in judge(persistent)[1].gates)


def test_errors_of_the_readings_are_those_of_the_worst():
    one = planted(PLANTS[0])
    subjects = one.subjects()
    assert worlds.measure_errors(one, subjects).count_error == 0
    seeds = subjects["B"].seeds
    fewer = ((seeds[0][0].only(np.arange(round(0.9 * CONFIG.n_features))), *seeds[0][1:]), *seeds[1:])
    subjects["B"] = replace(subjects["B"], seeds=fewer)
    assert worlds.measure_errors(one, subjects).count_error == pytest.approx(0.1)


def test_the_scale_makes_the_mean_square_one():
    one = planted(PLANTS[1])
    for side in ("A", "B"):
        x = torch.cat(list(one.source(one.pairs[0], side).held_out()))
        assert x.square().mean().item() == pytest.approx(1, rel=0.03)


def test_the_script_runs_the_missing_worlds_and_shows_all(tmp_path, monkeypatch, capsys):
    small = VerdictConfig(
        n_features=12,
        d_model=8,
        active=2.0,
        training_seeds=2,
        fit=FitConfig(steps=40, batch=64, held_out=2048),
        plants=PLANTS[1:2],
    )
    monkeypatch.setattr(bench_verdicts, "VerdictConfig", lambda: small)
    for n_worlds in (1, 2):
        arguments = ["bench_verdicts.py", "--worlds", str(n_worlds), "--workers", "1", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", arguments)
        bench_verdicts.main()
        page = capsys.readouterr().out
        assert "| persistent | H1a | " in page
        assert "coverage" in page
        assert load_results(tmp_path).rows.seeds() == list(range(n_worlds))


@pytest.mark.slow
def test_trained_dictionaries_return_the_planted_ratio_and_lifespan():
    """One training seed, A and B, two dictionary seeds each: the readings are near the truth."""
    torch.set_num_threads(1)
    plant = PLANTS[1]
    one = Planted(replace(CONFIG, training_seeds=1), plant.gamma, plant.delta, 7)
    subjects = one.subjects()
    errors = worlds.measure_errors(one, subjects)
    assert errors.count_error <= 0.1
    assert errors.rho_error <= 0.1
    assert evidence.worst_self_cosine(list(subjects.values())) >= 0.9
    d_eff = {side: np.mean([pair.debiased.value for pair in subjects[side].pairs[0]]) for side in ("A", "B")}
    assert d_eff["A"] / d_eff["B"] == pytest.approx(worlds.truth(one.pairs, worlds.drawn_dimension)["R"], rel=0.1)


def test_area_under_curve_by_hand():
    score = np.array([[1.0, 0], [2, 0], [3, 0], [4, 0]])
    np.testing.assert_allclose(worlds.area_under_curve(score, np.array([0, 1, 0, 1])), [0.75, 0.5])
    assert np.isnan(worlds.area_under_curve(score, np.ones(4))).all()


def test_area_under_curve_of_shifted_normals():
    rng = np.random.default_rng(2)
    label = rng.random(20000) < 0.3
    score = rng.standard_normal((20000, 1)) + label[:, None]
    assert worlds.area_under_curve(score, label)[0] == pytest.approx(0.7602, abs=0.01)  # Phi(1 / sqrt 2)
