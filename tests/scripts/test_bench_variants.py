"""Variants at one L0: how sizes are matched, coefficients found, rows read, and that a tiny table is written whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from crosscoder import Crosscoder, LayerwiseSAE, TopK
from crosscoder.data.world import WorldConfig
from crosscoder.dictionary import Diffing, WeaklyCausal

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import bench_variants as table  # noqa: E402
import bench_variants_fit as fit  # noqa: E402

WORLD = WorldConfig(n_features=48, n_layers=4, d_model=16, p_min=0.01, p_max=0.06, noise=0.05)
TINY = {"l0": 4, "n_features": 96, "steps": 100, "batch": 128, "learning_rate": 1e-2, "search_steps": 50}
TINY["dead_after_tokens"] = 2000


def test_weights_are_counted_without_those_that_do_not_exist():
    shape = {"n_layers": 3, "d_model": 8, "n_features": 6, "sparsity": TopK(k=2)}
    assert fit.count_weights(Crosscoder(**shape)) == 2 * 6 * 24 + 6 + 24
    causal = 6 * 8 + 2 * (3 + 2 + 1) * 8  # reads one layer each; writes 3, 2 and 1 layers, twice
    assert fit.count_weights(Crosscoder(**shape, structure=WeaklyCausal())) == causal + 6 + 24
    stacked = 2 * 6 * (2 * 8 + 5)
    assert fit.count_weights(Crosscoder(**shape, structure=Diffing((2, 1), (8, 5)))) == stacked + 6 + 24
    assert fit.count_weights(LayerwiseSAE(**shape)) == 3 * (2 * 6 * 8 + 6 + 8)
    assert fit.count_weights(LayerwiseSAE(**shape, shared=True)) == 2 * 6 * 8 + 6 + 8


@pytest.mark.parametrize("match", ["features", "parameters"])
def test_sizes_are_matched(match):
    config = fit.VariantsConfig(l0=8, n_features=480, match=match)
    counts = {}
    for name, variant in fit.VARIANTS.items():
        budget = fit.variant_budget(variant, config, n_layers=4, d_model=16)
        assert budget.k(variant.arm) == (8 if variant.arm == "crosscoder" else 2)
        settings = {"n_layers": 4, "d_model": 16, **budget.settings(variant.arm)}
        dictionary = (Crosscoder if variant.arm == "crosscoder" else LayerwiseSAE)(**settings)
        n_groups = dictionary.grouped().center_GN.shape[0]
        counts[name] = dictionary.config.n_features * n_groups if match == "features" else fit.count_weights(dictionary)
    expected = 480 if match == "features" else counts["batch_topk, acausal"]
    for name, count in counts.items():
        assert count == pytest.approx(expected, rel=0 if match == "features" else 0.03), name


@pytest.mark.parametrize("start", [1e-3, 1.0, 1e3])
def test_a_coefficient_is_found_from_either_side(start):
    found = fit.search_coefficient(lambda c: 100 * c**-0.7, 20.0, start=start, factor=4.0, tolerance=0.05, most=15)
    assert 100 * found**-0.7 == pytest.approx(20, rel=0.05)
    closest = fit.search_coefficient(lambda c: 100 / c, 20.0, start=1.0, factor=4.0, tolerance=1e-6, most=3)
    assert closest == 4.0  # of 1, 4 and 32, which give 100, 25 and 3.1, when the search ends


def test_windows_are_narrower_than_the_model():
    assert "window of 4" not in fit.applicable(4)
    assert set(fit.VARIANTS) - set(fit.applicable(4)) == {"window of 4"}
    assert fit.applicable(6) == fit.VARIANTS
    assert set(fit.VARIANTS) - set(fit.applicable(5)) == {"transcoder"}, "as many outputs as inputs"


def test_rows_are_averaged_and_placed():
    def row(variant, ev, seed=0, matched=True):
        numbers = {"l0": 4.0, "dead_share": 0.1, "alive": 9, "seconds": 1.0, "features": 10, "parameters": 1000}
        numbers |= {"explained_variance": ev, "explained_variance_later": ev}
        return {"variant": variant, "seed": seed, "matched": matched, **numbers}

    rows = [row("bank", 0.5), row("batch_topk, acausal", 0.7), row("batch_topk, acausal", 0.9, seed=1)]
    rows += [row("weakly causal", 0.6), row("window of 2", 0.85, matched=False)]
    averaged = table.average_rows(rows)
    assert averaged[1]["explained_variance"] == pytest.approx(0.8)
    assert (averaged[1]["low"], averaged[1]["high"], averaged[1]["seeds"]) == (0.7, 0.9, 2)
    assert table.lies_between(averaged) == {"weakly causal": True, "window of 2": False}
    assert table.lies_between(averaged[1:]) == {}
    text = "\n".join(table.markdown_table(averaged, fit.VariantsConfig(l0=4)))
    assert "weakly causal: lies between the bank and the acausal crosscoder" in text
    assert "window of 2: does not lie between" in text
    assert "| window of 2 | 4.0 * |" in text
    assert "off by more than 5%" in text


@pytest.fixture(scope="module")
def source():
    return fit.planted_source(WORLD, held_out_tokens=4096)


@pytest.mark.parametrize("name", ["strictly causal", "MLSAE"])
def test_a_variant_s_row_says_what_was_trained(source, name):
    row = fit.measure_variant(name, fit.VariantsConfig(**TINY), source, seed=0)
    assert row["features"] == 96
    assert row["alive"] == round(96 * (1 - row["dead_share"]))
    assert 0.2 < row["explained_variance"] < 1
    assert row["l0"] == pytest.approx(4, rel=0.1)
    assert row["matched"] == (abs(row["l0"] / 4 - 1) <= 0.05)
    assert row["searches"] == 0


def test_a_penalty_is_brought_to_the_l0_that_was_asked_for(source):
    config = fit.VariantsConfig(**{**TINY, "tolerance": 0.15, "most_searches": 12})
    row = fit.measure_variant("l2_of_norms", config, source, seed=0)
    assert row["matched"]
    assert row["l0"] == pytest.approx(4, rel=0.15)
    assert row["searches"] >= 1


def test_the_script_writes_tables_and_goes_on_where_it_stopped(tmp_path):
    environment, script = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}, SCRIPTS / "bench_variants.py"
    command = [sys.executable, str(script), "--out", str(tmp_path), "--threads", "1", "--steps", "20", "--batch", "64"]
    command += ["--world-l0", "4", "--world-n-features", "96", "--world-layers", "4", "--world-width", "16"]
    command += ["--world-planted", "48", "--dead-after-tokens", "1000", "--variants"]
    subprocess.run([*command, "bank"], check=True, capture_output=True, env=environment)
    first = json.loads((tmp_path / "variants_planted.json").read_text())
    further = [*command, "bank", "weakly causal", "batch_topk, acausal"]
    done = subprocess.run(further, check=True, capture_output=True, text=True, env=environment)
    record = json.loads((tmp_path / "variants_planted.json").read_text())
    assert record["rows"][0] == first["rows"][0]
    assert [row["variant"] for row in record["rows"]] == ["bank", "batch_topk, acausal", "weakly causal"]
    assert set(record["between"]) == {"weakly causal"}
    assert "bank, seed 0" not in done.stderr
    assert "| weakly causal |" in (tmp_path / "variants_planted.md").read_text()
