"""Calibration at a study's sizes: the planted world fits the dictionary, scores are honest, results are kept."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from crosscoder.results.table import LongTable, Place, rows_at
from crosscoder.studies import calibration
from crosscoder.studies.budget import DictionaryBudget
from crosscoder.studies.calibration import CalibrationConfig, measure_calibration, planted_source
from crosscoder.studies.folder import StudyFolder
from crosscoder.studies.presets import PRESETS

BUDGET = DictionaryBudget(n_features=64, k_crosscoder=2, k_layerwise=2, steps=400, batch=256, learning_rate=1e-2)
CONFIG = CalibrationConfig(n_layers=4, d_model=16, budget=BUDGET, tokens_train=50_000, tokens_held_out=8000)


@pytest.fixture(scope="module")
def scores():
    torch.set_num_threads(1)
    return plain(measure_calibration(CONFIG))


def plain(rows):
    """Scores by key, those of one kind left out."""
    return {row.key: row.value for row in rows if row.at.kind is None}


def test_an_easy_world_is_found(scores):
    assert abs(scores["rho_error"]) < 0.15
    assert scores["mcc"] > 0.85
    assert scores["count_true"] == 32


def test_too_little_training_is_not_hidden(scores):
    hurried = plain(measure_calibration(replace(CONFIG, budget=replace(BUDGET, steps=10))))
    assert hurried["mcc"] < scores["mcc"] - 0.2
    assert hurried["explained_variance"] < scores["explained_variance"] - 0.2


def test_the_world_has_as_many_active_features_as_the_dictionary_and_the_usual_norms():
    source, world = planted_source(CONFIG)
    x_TLD = torch.cat(list(source.held_out()))
    assert x_TLD.shape == (8000, 4, 16)
    assert float(CONFIG.world().probability_F.sum()) == pytest.approx(2, rel=1e-5)
    norm_L = x_TLD.norm(dim=2).mean(0)
    torch.testing.assert_close(norm_L, torch.full((4,), 4.0), rtol=0.1, atol=0)
    assert [int((world.kind_F == kind).sum()) for kind in range(4)] == [8, 8, 8, 8]
    assert planted_source(replace(CONFIG, n_layers=1))[1].config.kinds == ("local",)


def test_tokens_come_again_after_as_many_as_the_study_has():
    tokens = planted_source(replace(CONFIG, tokens_train=3 * 256))[0]
    batches = [tokens.batch(index, 256, 0) for index in range(5)]
    assert torch.equal(batches[0], batches[3])
    assert not torch.equal(batches[0], batches[1])
    assert torch.equal(batches[4], batches[1])
    held_out = next(iter(tokens.held_out()))[:256]
    assert not any(torch.equal(held_out, batch) for batch in batches)


def test_a_result_is_kept_by_its_inputs_and_used_by_the_next_study(tmp_path, monkeypatch):
    asked = []

    def measure(config, device):
        asked.append(config)
        return rows_at(Place(role="calibration", seed=config.seed), {"mcc": 1 / len(asked)})

    monkeypatch.setattr(calibration, "measure_calibration", measure)
    monkeypatch.setattr(StudyFolder, "run", lambda _, jobs, label: {name: job() for name, job in jobs.items()})
    smoke = PRESETS["smoke"]
    first = calibration.calibrate_study(smoke, StudyFolder(tmp_path / "first"))
    assert [(row.at.subject, row.value) for row in first] == [("A", 1.0), ("B", 0.5)]
    assert calibration.calibrate_study(smoke, StudyFolder(tmp_path / "second")) == first
    assert len(asked) == 2
    other = replace(smoke.dictionaries, learning_rate=1e-3)
    for changed in (replace(smoke, tokens_held_out=5000), replace(smoke, dictionaries=other)):
        assert calibration.calibrate_study(changed, StudyFolder(tmp_path / "third")) != first
    assert len(asked) == 6


def test_the_gates_take_the_worst_world():
    at = Place(subject="A", role="calibration", seed=0)
    good = rows_at(at, {"count_error": 0.1, "rho_error": -0.04})
    bad = rows_at(replace(at, subject="B"), {"count_error": -0.3, "rho_error": 0.02})
    worst = calibration.worst_calibration(LongTable((*good, *bad)))
    assert (worst.count_error, worst.rho_error, worst.same_sizes) == (0.3, 0.04, True)
    undefined = rows_at(replace(at, seed=1), {"rho_error": None})
    assert calibration.worst_calibration(LongTable((*good, *undefined))).rho_error is None
    assert calibration.worst_calibration(LongTable(())).count_error is None


def test_a_k_that_no_world_can_have_is_refused():
    with pytest.raises(ValueError, match="raise n_features or lower k"):
        replace(CONFIG, budget=replace(BUDGET, k_crosscoder=30))


def test_scores_are_of_the_scaled_space():
    """With very unequal layers the dictionary sees them made equal, and so must the truth."""
    source, world = planted_source(CONFIG)
    energy_L, plain_L = (each.decoder_FLD.square().sum((0, 2)).numpy() for each in (world, CONFIG.world()))
    np.testing.assert_allclose(energy_L / plain_L, source.scale_L.numpy() ** 2, rtol=1e-4)
