"""Planted answers through the whole chain: the rule returns them, and a broken gate is named.

Most tests read planted features as a good dictionary would, without training one; the slow one trains.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse

from crosscoder.foundation.artifact import read_json
from crosscoder.measure.density import Subject
from crosscoder.measure.reading import Reading
from crosscoder.measure.statistics import Estimate
from crosscoder.report import planted as synthetic_report
from crosscoder.studies import planted_verdict, synthetic
from crosscoder.studies.planted_readings import PLANTS, Plant, Planted, VerdictConfig
from crosscoder.studies.planted_verdict import Case, judge, measure_case
from crosscoder.verdict import evidence, gain

CONFIG = VerdictConfig(held_out=4096)


class WellRead(Planted):
    """Readings that a good dictionary would give: the planted features, with errors of its own seed."""

    def read(self, pair, side, dictionary_seed):
        rng = np.random.default_rng([self.seed, pair.config.training_seed, dictionary_seed, ord(side)])
        truth = pair.decoder_FLD[side].numpy()
        error = rng.normal(size=truth.shape) * (truth != 0)
        error *= 0.1 / np.linalg.norm(error, axis=(1, 2), keepdims=True)
        activations_BF = pair.sample(self.config.held_out, seed=2 * self.seed + 1)[1].numpy()
        explained = 0.97 + 0.004 * rng.random()
        return Reading(dictionary_seed, truth + error, sparse.csc_array(activations_BF), explained, 0.03, 6.0)

    def bank(self, pair, k):
        """A bank needs one active feature for each layer that a planted one lives in."""
        slots = self.config.active * pair.config.shape("A")[0] ** pair.config.gamma
        l0 = k * pair.config.n_layers
        return gain.Point(float(l0), float(1 - 0.028 * (slots / l0) ** 2))


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
    _, found, decided = judge(case)
    assert decided.label == plant.label, decided.sentence
    assert decided.kinds == plant.kinds
    assert found.gamma.value == pytest.approx(plant.gamma, abs=0.05)
    assert found.delta.value == pytest.approx(plant.delta, abs=0.15)
    assert decided.universality == "universal"
    row = planted_verdict.describe_verdict(plant, planted(plant), case)
    assert row["right"]
    assert row["statistics"]["R"]["covers_drawn"]
    assert found.ratio.value == pytest.approx(row["statistics"]["R"]["planted"], rel=0.2)
    (entry,) = planted_verdict.summarize_verdicts([row])
    assert (entry["right"], entry["n"]) == (1, 1)
    assert (entry["R"]["largest_miss"] == 0) == row["statistics"]["R"]["covers"]


def test_how_far_an_interval_misses_is_said():
    def row(seed, low, high):
        found = {"found": {"mean": low, "low": low, "high": high}, "planted": 1.0}
        one = {**found, "covers": low <= 1 <= high, "covers_drawn": True}
        names = {"plant": "persistent", "label": "H1a", "kinds": [], "expected": ["H1a"], "right": True, "reasons": []}
        return {**names, "seed": seed, "statistics": dict.fromkeys(("R", "gamma", "delta"), one)}

    rows = [row(0, 0.9, 1.1), row(1, 0.7, 0.96), row(2, 1.02, 1.3)]
    summary = planted_verdict.summarize_verdicts(rows)
    assert summary[0]["R"]["covered"] == 1
    assert summary[0]["R"]["largest_miss"] == pytest.approx(0.04)
    table = "\n".join(synthetic_report.verdict_lines({"rows": rows, "summary": summary}))
    assert "1, 3 of 3; by at most 0.04" in table
    assert synthetic_report.render_verdicts({"rows": rows, "summary": summary}).startswith(b"\x89PNG")


def test_another_way_to_the_same_answer():
    """Features that last through all layers and turn as they go: R is 1 too."""
    plant = Plant(name="turning", gamma=1.0, delta=0.5, label="H1a")
    assert judge(case_of(plant))[2].label == "H1a"


def test_a_third_shape_joins_the_slopes():
    config = replace(CONFIG, sides=("A", "B", "C"), held_out=2048, training_seeds=2)
    _, found, _ = judge(case_of(PLANTS[2], config=config))
    assert found.gamma.value == pytest.approx(1, abs=0.02)
    assert found.delta.value == pytest.approx(0, abs=0.15)


def changed(case, change, names=("A", "B")):
    """The case with every trained reading of some shapes changed."""
    trained = dict(case.readings.trained)
    for name in names:
        subject = trained[name]
        seeds = tuple(tuple(change(reading) for reading in group) for group in subject.seeds)
        trained[name] = Subject(name, subject.n_layers, subject.d_model, seeds)
    return Case(replace(case.readings, trained=trained), case.conditions)


def noisy(reading):
    rng = np.random.default_rng(reading.seed)
    error = rng.normal(size=reading.decoder_FLD.shape)
    return replace(
        reading, decoder_FLD=reading.decoder_FLD + 0.6 * error / np.linalg.norm(error, axis=(1, 2))[:, None, None]
    )


def conditions(case, **values):
    return Case(case.readings, replace(case.conditions, **values))


def calibration(case, **values):
    return conditions(case, calibration=replace(case.conditions.calibration, **values))


BREAKS = {
    "loss gap": lambda case: conditions(case, loss_gap=0.03),
    "explained variance": lambda case: changed(case, lambda r: replace(r, explained_variance=0.8), names=("B",)),
    "dead features": lambda case: changed(case, lambda r: replace(r, dead_share=0.2)),
    "self-cosine": lambda case: changed(case, noisy, names=("A",)),
    "calibration count": lambda case: calibration(case, count_error=0.15),
    "calibration rho": lambda case: calibration(case, rho_error=None),
    "calibration sizes": lambda case: calibration(case, same_sizes=False),
    "trained against untrained": lambda case: Case(
        replace(case.readings, untrained=case.readings.trained), case.conditions
    ),
    "statistics measured": lambda case: conditions(case, count_gain=None),
    "confidence": lambda case: conditions(
        case, cross_layer=replace(case.conditions.cross_layer, estimate=Estimate(0.0, 0.0, 0.0, confidence=0.8))
    ),
}


@pytest.mark.parametrize("gate", BREAKS)
def test_a_broken_gate_makes_it_not_testable_and_is_named(persistent, gate):
    _, _, decided = judge(BREAKS[gate](persistent))
    assert decided.label == "not testable"
    assert gate in decided.sentence
    assert gate in [one.name for one in decided.gates if not one.passed]


def test_the_same_case_unbroken_passes_every_gate(persistent):
    assert all(gate.passed for gate in judge(persistent)[2].gates)


def test_errors_of_the_readings_are_those_of_the_worst():
    one = planted(PLANTS[0])
    subjects = one.subjects()
    assert planted_verdict.measure_errors(one, subjects).count_error == 0
    seeds = subjects["B"].seeds
    fewer = ((seeds[0][0].only(np.arange(round(0.9 * CONFIG.n_features))), *seeds[0][1:]), *seeds[1:])
    subjects["B"] = replace(subjects["B"], seeds=fewer)
    assert planted_verdict.measure_errors(one, subjects).count_error == pytest.approx(0.1)


def test_the_scale_makes_the_mean_square_one():
    one = planted(PLANTS[1])
    for side in ("A", "B"):
        x = torch.cat(one.held_out(one.pairs[0], side))
        assert x.square().mean().item() == pytest.approx(1, rel=0.03)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="training_seeds is 0"):
        VerdictConfig(training_seeds=0)
    with pytest.raises(ValueError, match="probability_range is 1"):
        VerdictConfig(probability_range=1)


def test_the_study_shows_them(tmp_path):
    small = VerdictConfig(
        n_features=12, d_model=8, active=2.0, training_seeds=2, steps=40, batch=64, held_out=2048, plants=PLANTS[1:2]
    )
    config = replace(synthetic.PRESETS["ci"], sizes=(), bank_sizes=(), gammas=(), verdicts=1, verdict=small)
    results = synthetic.run_synthetic(config, folder=tmp_path, preset="ci")
    (entry,) = results["verdicts"]["summary"]
    assert entry["n"] == 1
    page = (tmp_path / "report.md").read_text()
    assert "| persistent | H1a | " in page
    assert "coverage" in page
    assert read_json(tmp_path / "results.json")["verdicts"]["rows"] == results["verdicts"]["rows"]


@pytest.mark.slow
def test_trained_dictionaries_return_the_planted_ratio_and_lifespan():
    """One training seed, A and B, two dictionary seeds each: the readings are near the truth."""
    torch.set_num_threads(1)
    plant = PLANTS[1]
    one = Planted(replace(CONFIG, training_seeds=1), plant.gamma, plant.delta, 7)
    subjects = one.subjects()
    errors = planted_verdict.measure_errors(one, subjects)
    assert errors.count_error <= 0.1
    assert errors.rho_error <= 0.1
    assert evidence.worst_self_cosine(list(subjects.values())) >= 0.9
    d_eff = {side: np.mean([pair.debiased.value for pair in subjects[side].pairs[0]]) for side in ("A", "B")}
    assert d_eff["A"] / d_eff["B"] == pytest.approx(planted_verdict.drawn_truth(one)["R"], rel=0.1)
