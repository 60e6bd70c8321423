"""The recheck agrees with the library on a planted study whose legs can all be read, and finds what was changed."""

import json
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from scipy import sparse

from crosscoder.data.tokens import TokenBlocks
from crosscoder.foundation.config import to_mapping
from crosscoder.measure.counting import count_features
from crosscoder.measure.profile import layer_profile, lifespan
from crosscoder.measure.reading import Reading, load_reading, save_reading
from crosscoder.results.file import Provenance, Results, save_results, write_rows
from crosscoder.results.table import LongTable, Place, Row, rows_at
from crosscoder.studies import judge
from crosscoder.studies.cells import dictionary_rows, file_name
from crosscoder.studies.presets import PRESETS

ROOT = Path(__file__).parents[2]
SHAPES = {"A": (8, 4), "B": (2, 8), "C": (2, 5), "D": (4, 5)}
N_TRAININGS, N_FEATURES, CONTEXT = 5, 64, 20
KS = {1: 0.18, 2: 0.11, 4: 0.08, 8: 0.05}
"""Variance unexplained of each k, about; the share of harm is about a third of it."""
SCALE_L = np.array([2.0, 0.5, 1.0, 3.0, 0.7, 1.5, 1.0, 0.2])
DOCUMENT_B = np.arange(31) + 5


TEXT = TokenBlocks(torch.zeros(31, CONTEXT, dtype=torch.int64), vocab_size=8, tokenizer_hash="", documents=DOCUMENT_B)


def of_text(at):
    return at.subject in "AB" and at.state not in ("gaussian", "shuffled")


def planted_reading(draw, shared_TF, at, fvu):
    """A dictionary whose features fire with a shared pattern; more of them with larger k, and some dead or doubled."""
    n_layers, d_model = SHAPES[at.subject]
    n_groups = n_layers if at.arm == "layerwise" else 1
    own = draw.random((len(shared_TF), N_FEATURES)) < 0.005
    p = 0.011 / KS[at.k] * (1 if at.subject == "A" else 0.65) * draw.uniform(0.99, 1.01)
    kept = shared_TF < p
    active = (kept | own) * draw.lognormal(0, 0.1, kept.shape)
    rows = draw.standard_normal((N_FEATURES, n_layers, d_model)) * draw.lognormal(0, 1, (N_FEATURES, n_layers, 1))
    if n_groups > 1:
        group_F = np.arange(N_FEATURES) * n_groups // N_FEATURES
        rows[group_F[:, None] != np.arange(n_layers)] = 0
    else:
        rows[1], active[:, 1] = 1.01 * rows[0], active[:, 0]
        # A twin: what feature 2 writes on two layers, 3 and 4 write one layer each of, and more elsewhere.
        x, y, u, v = 9 * np.linalg.qr(draw.standard_normal((d_model, d_model)))[0][:4]
        rows[2:5] = 0
        rows[2, :2], rows[3, 0], rows[4, 1] = (x, y), x, y
        rows[3, 2 if n_layers > 2 else 1], rows[4, 2 if n_layers > 2 else 0] = 1.2 * u, 1.2 * v
    alive = np.flatnonzero((active > 0).sum(0) > 10)
    code = sparse.csc_array(active[:, alive].astype(np.float32))
    return Reading(
        seed=at.seed or 0,
        decoder_FLD=rows[alive].astype(np.float32),
        code=code,
        explained_variance=1 - fvu,
        dead_share=1 - len(alive) / N_FEATURES,
        l0=float((active > 0).sum() / len(active)),
        l0_layer=float((active > 0).sum(0) @ lifespan(layer_profile(rows)) / len(active) / n_layers),
        index_F=alive,
        n_groups=n_groups,
        size=N_FEATURES,
        explained_variance_L=np.full(n_layers, 1 - fvu),
        token_T=np.arange(len(active)),
        explained_left_E=1 - fvu * draw.lognormal(0, 0.001, len(TEXT)) if of_text(at) else None,
    )


def cell_rows(draw, shared_TF, folder, at, *, seeds, varies):
    """The rows and readings of one cell, as a study leaves them."""
    rows = []
    for seed in seeds:
        one = replace(at, seed=seed)
        lost = KS[at.k] * varies * draw.uniform(0.997, 1.003) * (1 if at.arm == "crosscoder" else 1.1)
        reading = planted_reading(draw, shared_TF, one, lost)
        n_layers = SHAPES[at.subject][0]
        scale = torch.from_numpy(SCALE_L[:n_layers].copy())
        planted = SimpleNamespace(config=SimpleNamespace(sparsity=None), input_scale=scale)
        rows += dictionary_rows(one, planted, reading, TEXT if of_text(at) else None)
        if at.state in ("trained", "frozen_encoder"):
            spliced = replace(one, layer="all")
            rows += [Row(one, "clean_loss", 2.5), Row(spliced, "ablated_loss", 4.5)]
            rows.append(Row(spliced, "spliced_loss", 2.5 + 0.7 * lost))
            for whole in rows[-3:] if of_text(at) else ():
                without_E = whole.value * draw.lognormal(0, 0.00003, len(TEXT))
                rows.append(replace(whole, key=f"{whole.key}_left", value=without_E.tolist()))
        if at.arm == "crosscoder" and at.role == "main" and seed == 0 and at.state not in ("gaussian", "shuffled"):
            layers, share = 1 + draw.uniform(0.2, 0.4) * (n_layers - 1) ** 0.5, draw.uniform(0.05, 0.15)
            for key, value in (("causal_layers", layers), ("conjunctive_share", share)):
                without_E = value * draw.lognormal(0, 0.01, len(TEXT))
                rows += [Row(one, key, value), Row(one, f"{key}_left", without_E.tolist())]
        (folder / "readings").mkdir(exist_ok=True)
        save_reading(reading, folder / "readings" / f"{file_name(one)}.safetensors")
    return rows


def planted_cells(draw, folder):
    """Every cell by its file name: A and B trained, with nulls of the first two trainings; rooms of all shapes."""
    shared_TF, cells = draw.random((len(DOCUMENT_B) * CONTEXT, N_FEATURES)), {}
    for name, (n_layers, d_model) in SHAPES.items():
        for t in range(N_TRAININGS if name in "AB" else 2):
            at = Place(subject=name, training_seed=t, state="trained", site="write")
            jitter = draw.lognormal(0, 0.05, n_layers)
            for state in ("trained", *(["untrained"] if name in "AB" and t < 2 else [])):
                for units, scale in (("model", np.ones(n_layers)), ("scaled", SCALE_L[:n_layers])):
                    energy = jitter * scale**2
                    room = d_model**0.8 * n_layers**0.6 * draw.lognormal(0, 0.05)
                    values = {"room": room, "energy_per_layer": (energy / energy.sum()).tolist()}
                    where = replace(at, state=state, estimator=units)
                    cells.setdefault(f"{name}{t}-{state}-room", []).extend(rows_at(where, values))
            states = {"trained": ("crosscoder", "layerwise") if name in "AB" else ("layerwise",)}
            if name in "AB" and t < 2:
                states |= {"gaussian": ("crosscoder", "layerwise")}
                states |= dict.fromkeys(("frozen_encoder", "untrained", "shuffled"), ("crosscoder",))
            for state, arms in states.items():
                for arm in arms:
                    varies = draw.uniform(0.97, 1.03)
                    for k in KS:
                        role = "main" if k == 2 else "k"
                        place = replace(at, state=state, arm=arm, role=role, n_features=N_FEATURES, k=k)
                        seeds = (0, 1) if (state, arm, role) == ("trained", "crosscoder", "main") else (0,)
                        found = cell_rows(draw, shared_TF, folder, place, seeds=seeds, varies=varies)
                        cells[file_name(place)] = found
            if name in "AB" and t < 2:
                place = replace(at, arm="crosscoder", role="size", n_features=2 * N_FEATURES, k=2)
                cells[file_name(place)] = cell_rows(draw, shared_TF, folder, place, seeds=(0,), varies=1.0)
    return cells


def subject_rows(draw):
    rows = []
    for name, (n_layers, d_model) in SHAPES.items():
        rows += rows_at(Place(subject=name), {"n_layers": n_layers, "d_model": d_model, "parameters_norms": 1,
                                              "parameters_non_embedding": 1, "parameters_embedding": 1})  # fmt: skip
        for t in range(N_TRAININGS if name in "AB" else 2):
            values = {"held_out_loss": 2.5 * draw.lognormal(0, 0.002), "rate_share": 0.1}
            values["held_out_loss_left"] = (values["held_out_loss"] * draw.lognormal(0, 0.0002, len(TEXT))).tolist()
            rows += rows_at(Place(subject=name, training_seed=t), values)
    errors = {"calibration_q_error": 0.02, "calibration_g_error": 0.03, "calibration_room_error": 0.2}
    return [*rows, *rows_at(Place(role="calibration", seed=0), errors | {"calibration_mcc": 0.95})]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study's folder as the library leaves it, of planted readings; every leg can be read in it."""
    folder, draw = tmp_path_factory.mktemp("run"), np.random.default_rng(1)
    cells, rows = planted_cells(draw, folder), subject_rows(draw)
    baselines = {}
    for name, t in product("AB", range(N_TRAININGS)):
        values = {"trigram_loss": 2.6 * draw.lognormal(0, 0.002), "lookup_share": draw.uniform(0.6, 0.65)}
        for key in ("trigram_loss", "lookup_share"):
            values[f"{key}_left"] = (values[key] * draw.lognormal(0, 0.0002, len(TEXT))).tolist()
        baselines[f"{name}{t}"] = rows_at(Place(subject=name, training_seed=t), values)
    for home, each in (("cells", cells), ("baselines", baselines)):
        (folder / home).mkdir()
        for name, found in each.items():
            write_rows(folder / home / f"{name}.json", found)
            rows += found
    TEXT.save(folder / "tokens" / "held_out")
    config = PRESETS["smoke"]
    first = config.subjects.a
    shapes = {name: replace(first, n_layers=n_layers, d_model=d_model) for name, (n_layers, d_model) in SHAPES.items()}
    subjects = replace(config.subjects, a=shapes["A"], b=shapes["B"], grid=(shapes["C"], shapes["D"]), context=CONTEXT)
    config = replace(config, subjects=subjects)
    measured, verdict = judge.judge(config, LongTable(tuple(rows)), folder, documents=DOCUMENT_B)
    known = {"git_commit": None, "python": "", "started": "", "device": {}, "text": "", "command": []}
    origin = Provenance(kind="aspect_ratio", preset="smoke", seconds={}, tokens_fingerprint="",
                        config=to_mapping(config), **known)  # fmt: skip
    save_results(Results(LongTable((*rows, *measured)), verdict, origin), folder)
    return folder


@pytest.fixture(scope="module")
def recheck():
    sys.path.insert(0, str(ROOT / "scripts"))
    import recheck

    yield recheck
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture
def copied(study, tmp_path):
    """A copy of the study that a test may change."""
    shutil.copytree(study, tmp_path / "run")
    return tmp_path / "run"


def test_every_leg_of_a_planted_study_is_made_again(study, recheck):
    found, missing = recheck.recheck(study, 1e-6)
    assert found.differing == []
    assert missing == []
    by_key = defaultdict(list)
    for line in found.lines:
        by_key[line.key].append(line.ours)
    interval = recheck.Interval
    for key in (*recheck.KEYS.values(), "kappa", "removal_share", "conjunctive_excess", "universality", "room_beta",
                "median_log_rate", "rate_dispersion", "share_of_ln2", "null_excess",
                "load_alpha"):  # fmt: skip
        assert any(isinstance(one, interval) for one in by_key[key]), key
    assert by_key["label"] == ["premise fails: load"]
    assert by_key["explained"][
        0
    ]  # nulls are planted like the subjects, and two trainings of each hardly tell them apart
    assert any(by_key["twin_share"])
    assert max(by_key["distinct"]) < N_FEATURES  # the planted duplicate is joined


CHANGED = {
    "entropy_load": 1e-5,
    "effective_dimension": 1e-5,
    "mean_rho_model": 1e-5,
    "twin_share": 1e-2,
    "explained_variance": 1e-5,
    "spliced_loss": 1e-12,
    "load_log_ratio": 1e-5,
    "null_excess": 1e-5,
    "share_of_ln2": 1e-5,
    "kappa": 1e-5,
    "conjunctive_excess": 1e-5,
    "removal_share": 1e-5,
    "raw_density_rest_left": 1e-5,
    "median_log_rate": 1e-5,
    "u_null": 1e-5,
    "universality": 1e-5,
    "rate_dispersion": 1e-5,
    "self_cosine": 1e-5,
    "room_delta": 1e-5,
    "room_misfit": 1e-5,
    "load_alpha": 1e-5,
    "headroom": 1e-5,
}
"""How much of a number of each quantity is changed; of an interval, its upper end."""


def test_each_changed_number_is_found_and_no_other(copied, recheck):
    results = json.loads((copied / "results.json").read_text())
    for key, change in CHANGED.items():
        values = next(block["values"] for block in reversed(results["rows"]) if _number(block["values"].get(key)))
        if isinstance(values[key], dict):
            values[key]["high"] *= 1 + change
        elif isinstance(values[key], list):
            values[key][3] *= 1 + change
        else:
            values[key] *= 1 + change
    results["verdict"]["label"] = "H1b"
    (copied / "results.json").write_text(json.dumps(results))
    found, missing = recheck.recheck(copied, 1e-6)
    assert sorted(key for key, _ in {(line.key, line.place) for line in found.differing}) == sorted([*CHANGED, "label"])
    assert not missing


def _number(value):
    return value.get("high") if isinstance(value, dict) else value


def test_a_missing_reading_is_said(copied, recheck, capsys):
    gone = sorted((copied / "readings").iterdir())[0]
    gone.unlink()
    assert recheck.main([str(copied)]) == 1
    assert f"MISSING {gone}" in capsys.readouterr().out


def test_a_reading_with_one_activation_less_is_found(copied, recheck, capsys):
    path = next((copied / "readings").glob("A0-trained-write-crosscoder-*k4-*"))
    found = load_file(path)
    column = int(np.argmax(np.diff(found["starts"])))
    at = int(found["starts"][column])
    found["values"], found["rows"] = (np.delete(found[name], at) for name in ("values", "rows"))
    found["starts"] = found["starts"] - (np.arange(len(found["starts"])) > column)
    save_file(found, path)
    assert recheck.main([str(copied)]) == 1
    said = capsys.readouterr().out
    assert "| entropy_load | A0 trained" in said
    assert "| load_log_ratio |" in "\n".join(line for line in said.splitlines() if "DIFFERS" in line)


def test_nothing_of_the_library_is_loaded():
    code = "import sys, recheck; print([name for name in sys.modules if name.split('.')[0] in ('crosscoder', 'torch')])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_definitions_are_those_of_small_cases_by_hand(recheck):
    from recheck_legs import highest_probability, read_at
    from recheck_readings import dimension, find_twins, spread

    assert dimension(np.array([[1.0, 0.0], [0.6, 0.8]])) == pytest.approx(1 / 0.36)
    assert spread(np.array([[[1.0], [1.0], [0.0]]])) == pytest.approx(2)
    code = np.array([[[1, 0], [1, 0]], [[1, 0], [0, 1.2]], [[0, 1.2], [1, 0.0]]])  # the first shares a layer with each
    assert find_twins(code).tolist() == [True, False, False]
    assert find_twins(code[:2]).tolist() == [False, False]
    p = highest_probability(5.0)
    assert 5 * p * np.log(1 / p) == pytest.approx(1)
    law = np.array([([np.log(0.4 / k)], [np.log(k**0.5)]) for k in (1, 2, 4, 8)])
    at = read_at(law, 0.15)
    assert (np.exp(at.log_value[0]), at.slope, at.bend) == pytest.approx(((0.4 / 0.15) ** 0.5, -0.5, 0))
    assert read_at(law[:3], 0.15) is None
    assert read_at(law, 0.5) is None
    assert read_at(law[[0, 2, 1, 3]], 0.15) is None


def test_the_planted_readings_are_read_alike(study):
    """The file format is the library's: what the recheck reads from it the library reads too."""
    path = next((study / "readings").glob("A0-trained-write-crosscoder-*k2-seed0*"))
    assert count_features(load_reading(path))["alive"] == len(load_file(path)["index_F"])
