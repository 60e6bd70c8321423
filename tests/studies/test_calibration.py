"""Calibration at a study's sizes: planted pairs fit the dictionaries, errors are honest, results are kept."""

from dataclasses import replace

import pytest
import torch

from crosscoder.data.world_pair import WorldPair
from crosscoder.results.table import Place, rows_at
from crosscoder.studies import calibration
from crosscoder.studies.budget import DictionaryBudget
from crosscoder.studies.calibration import CalibrationConfig, measure_calibration
from crosscoder.studies.folder import StudyFolder
from crosscoder.studies.presets import PRESETS, Shape

A = Shape(n_layers=4, d_model=32, k_crosscoder=(6,), k_layerwise=(3,))
B = Shape(n_layers=1, d_model=64, k_crosscoder=(6,), k_layerwise=(6,))
BUDGET = DictionaryBudget(n_features=128, k_crosscoder=6, k_layerwise=3, steps=400, batch=256, learning_rate=1e-2)
CONFIG = CalibrationConfig(a=A, b=B, budget=BUDGET, tokens_train=50_000, tokens_held_out=8000)


def plain(rows):
    """Values, or reasons, by key."""
    return {row.key: row.missing if row.value is None else row.value for row in rows}


@pytest.fixture(scope="module")
def errors():
    torch.set_num_threads(1)
    return plain(measure_calibration(CONFIG))


def test_an_easy_pair_is_found_and_its_loads_are_read(errors):
    assert errors["calibration_mcc"] > 0.85
    assert errors["calibration_q_error"] < 0.2
    assert 0.04 < errors["calibration_fvu"] < 0.2


def test_too_little_training_is_not_hidden(errors):
    hurried = plain(measure_calibration(replace(CONFIG, budget=replace(BUDGET, steps=10))))
    assert hurried["calibration_mcc"] < errors["calibration_mcc"] - 0.2
    assert (
        isinstance(hurried["calibration_q_error"], str)
        or hurried["calibration_q_error"] > errors["calibration_q_error"]
    )


def test_a_result_is_kept_by_its_inputs_and_used_by_the_next_study(tmp_path, monkeypatch):
    asked = []

    def measure(config, device, folder=None):
        asked.append(config)
        return rows_at(Place(role="calibration", seed=config.seed), {"calibration_mcc": 1 / len(asked)})

    monkeypatch.setattr(calibration, "measure_calibration", measure)
    monkeypatch.setattr(StudyFolder, "run", lambda _, jobs, label: {name: job() for name, job in jobs.items()})
    smoke = PRESETS["smoke"]
    first = calibration.calibrate_study(smoke, StudyFolder(tmp_path / "first"))
    assert [row.value for row in first] == [1.0]
    assert calibration.calibrate_study(smoke, StudyFolder(tmp_path / "second")) == first
    assert len(asked) == 1
    other = replace(smoke.dictionaries, learning_rate=1e-3)
    for changed in (replace(smoke, tokens_held_out=5000), replace(smoke, dictionaries=other)):
        assert calibration.calibrate_study(changed, StudyFolder(tmp_path / "third")) != first
    assert len(asked) == 3


def test_shapes_that_no_pair_has_are_not_calibrated(tmp_path):
    smoke = PRESETS["smoke"]
    wide = replace(smoke, subjects=replace(smoke.subjects, b=Shape(n_layers=1, d_model=48)))
    assert calibration.calibrate_study(wide, StudyFolder(tmp_path)) == []


@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - {"full"}))  # whose world is large
def test_every_preset_has_a_pair_of_its_own_sizes(preset):
    config = PRESETS[preset]
    shapes = {"a": config.subjects.a, "b": config.subjects.b}
    wanted = CalibrationConfig(**shapes, budget=config.dictionaries)
    pair = WorldPair(wanted.pair())
    assert pair.config.shape("B") == (shapes["b"].n_layers, shapes["b"].d_model)
    for arm in ("crosscoder", "layerwise"):
        assert len(wanted.budgets("A", arm)) >= 4  # k, as many as a fidelity is read from


def test_a_k_that_no_world_can_have_is_refused():
    with pytest.raises(ValueError, match="raise n_features or lower k"):
        replace(CONFIG, a=replace(A, k_crosscoder=(90,)), b=replace(B, k_crosscoder=(90,))).pair()
