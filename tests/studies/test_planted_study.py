"""The planted-truth study: its estimators by hand, the traps they are known to fall into, and the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from crosscoder import Crosscoder
from crosscoder.cli import main
from crosscoder.data.order import seeded_generator
from crosscoder.data.world import Firing, World, WorldConfig
from crosscoder.data.world_pair import PairConfig
from crosscoder.measure import counting, recovery
from crosscoder.measure.reading import Reading
from crosscoder.report.planted import check_targets, name_of
from crosscoder.results.file import load_results
from crosscoder.results.table import LongTable, Place, rows_at
from crosscoder.studies import planted
from crosscoder.studies.calibration import FitConfig
from crosscoder.studies.planted import PlantedConfig

CI = replace(planted.PRESETS["ci"], fit=FitConfig(batch=256))
TINY = PlantedConfig(
    world=WorldConfig(n_features=12, d_model=8),
    fit=FitConfig(steps=30, batch=64, held_out=4096),
    sizes=(16,),
    bank_sizes=(12,),
    pair=PairConfig(n_features=12, d_model=8),
    pair_size=16,
    gammas=(0.5,),
)


def crosscoder_row(*, size=96, seed=0, world=None, **fit):
    """One crosscoder's scores by key; those of one kind of feature by (key, kind)."""
    config = replace(CI, world=replace(CI.world, **(world or {})), fit=replace(CI.fit, **fit))
    rows = planted.measure_arm(config, "crosscoder", size, seed)
    return {row.key if row.at.kind is None else (row.key, row.at.kind): row.value for row in rows}


@pytest.fixture(scope="module")
def good():
    """The right k, room enough, equal energy: what the traps are compared with."""
    return crosscoder_row()


def perfect_bank(world, n=20_000):
    """A bank that made no mistake: at every layer the directions that are there, active when they are there."""
    activations_BF = world.sample(n, seeded_generator("perfect bank"))[1].numpy()
    decoders, codes, layers = [], [], []
    for layer in range(world.config.n_layers):
        rows_FD = world.decoder_FLD[:, layer].numpy()
        there_F = np.linalg.norm(rows_FD, axis=1) > 0
        atoms_AD, atom_F = np.unique(rows_FD[there_F].round(3), axis=0, return_inverse=True)
        code_BA = np.zeros((n, len(atoms_AD)))
        np.add.at(code_BA.T, atom_F.ravel(), activations_BF[:, there_F].T)
        decoder_ALD = np.zeros((len(atoms_AD), *world.decoder_FLD.shape[1:]))
        decoder_ALD[:, layer] = atoms_AD
        decoders.append(decoder_ALD)
        codes.append(code_BA)
        layers += [layer] * len(atoms_AD)
    return bank_reading(np.concatenate(decoders), np.concatenate(codes, axis=1), np.array(layers))


def bank_reading(decoder_FLD, code_TF, layer_F):
    """The reading of a bank whose features of layer l are the l-th `size` of the dictionary."""
    n, n_layers = len(layer_F), decoder_FLD.shape[1]
    index_F = layer_F * n + np.arange(n)
    groups = {"index_F": index_F, "n_groups": n_layers, "size": n * n_layers}
    return Reading(0, np.asarray(decoder_FLD, dtype=float), sparse.csc_array(code_TF), 1.0, 0.0, 1.0, **groups)


class TestMergedBank:
    def test_a_chain_is_the_sum_of_its_members_by_activation(self):
        code = np.zeros((100, 3))
        code[:10, 0], code[:10, 1], code[50:70, 2] = 2.0, 6.0, 1.0
        decoder = np.zeros((3, 2, 2))
        decoder[0, 0, 0] = decoder[1, 1, 1] = decoder[2, 1, 0] = 1
        chains = planted.merged_decoders(bank_reading(decoder, code, np.array([0, 1, 1])), "mutual nearest")
        np.testing.assert_allclose(chains, [[[2, 0], [0, 6]], [[0, 0], [1, 0]]])

    @pytest.mark.parametrize("rule", list(counting.RULES))
    def test_a_perfect_bank_of_lasting_features_is_merged_rightly(self, rule):
        world = World(WorldConfig(n_features=48, kinds=("persistent", "drifting")))
        chains = planted.merged_decoders(perfect_bank(world), rule)
        assert len(chains) == 48

    def test_nothing_alive_is_no_feature(self):
        nothing = bank_reading(np.zeros((0, 2, 3)), np.zeros((10, 0)), np.zeros(0, dtype=int))
        assert len(planted.merged_decoders(nothing, "hungarian")) == 0


def test_a_good_crosscoder_is_near_the_truth(good):
    assert good["mcc"] >= 0.95
    assert abs(good["count_error"]) <= 0.08
    assert abs(good["rho_error"]) <= 0.05
    assert good["rho_error_matched"] <= 0.05
    assert abs(good["d_eff_error"]) <= 0.1
    assert not good["saturated"]
    assert good["l0"] == pytest.approx(good["l0_true"], rel=0.1), "inference does not keep training's k"


def test_an_untrained_crosscoder_finds_nothing():
    world = World(CI.world)
    fresh = Crosscoder(n_layers=4, d_model=16, n_features=96, seed=1).decoder_FLD().numpy()
    assert not recovery.assign(fresh, world.decoder_FLD.numpy()).recalled_F.any()


def test_trap_energy():
    """With one norm at every layer, lasting features have up to L times the energy; where k is short, they take it all.

    A study that planted only such a world would call local features unfindable; one that planted only equal energy
    would not know how they fare in a residual stream.
    """
    equal = crosscoder_row(k_factor=0.5)
    unequal = crosscoder_row(k_factor=0.5, world={"equal_energy": False})
    assert unequal["recall_by_kind", "persistent"] >= 0.9
    assert equal["recall_by_kind", "local"] >= 0.9
    assert unequal["recall_by_kind", "local"] <= 0.5
    assert unequal["rho_error"] > equal["rho_error"] + 0.05, "what is left looks wider than the truth"
    assert unequal["explained_variance"] > equal["explained_variance"], "and explains more"


def test_trap_wrong_k_and_high_explained_variance(good):
    """Four times the right k explains as much and finds less: explained variance does not tell."""
    row = crosscoder_row(k_factor=4)
    assert row["explained_variance"] >= good["explained_variance"]
    assert row["recall"] <= good["recall"] - 0.3
    assert row["mcc"] <= good["mcc"] - 0.1
    assert row["count_error"] >= 0.2


def test_trap_a_full_dictionary_returns_its_size():
    row = crosscoder_row(size=32, steps=300)
    assert row["count"] >= 0.95 * 32
    assert row["saturated"], "nothing said that the count is a lower bound"
    assert row["count_error"] <= -0.45


def test_trap_growth_with_the_dictionary(good):
    """Four times as large as the truth, the count stays."""
    row = crosscoder_row(size=256, steps=600)
    assert abs(row["count_error"]) <= 0.1
    assert row["mcc"] >= good["mcc"] - 0.05


def test_trap_threshold_percolation():
    """Features that fire together are linked in chains by every pair above a threshold, one to one by the others."""
    firing = Firing(dependence="correlated", strength=0.99, group=4)
    bank = perfect_bank(World(WorldConfig(n_features=64, kinds=("persistent",), p_min=0.05, firing=firing)))
    count = {rule: len(planted.merged_decoders(bank, rule)) for rule in counting.RULES}
    assert count["threshold"] <= 40
    assert 58 <= count["mutual nearest"] <= 70

    # By direction alone, a narrow space is enough: no feature here lasts, and 256 is right.
    local = perfect_bank(World(WorldConfig(n_features=256, d_model=8, kinds=("local",))))
    merged = counting.merged_counts(local)
    assert merged["cosine", "threshold"] <= 128
    assert merged["correlation", "threshold"] == 256


def test_trap_persistence_overcounts_and_product_codes_undercount():
    """What layers show, without mistake: more than there is of lasting features, fewer of split ones."""
    lasting = perfect_bank(World(WorldConfig(n_features=64, kinds=("persistent",))))
    assert len(lasting.decoder_FLD) >= 2 * 64
    split = perfect_bank(World(WorldConfig(n_features=64, kinds=("split",))))
    assert len(split.decoder_FLD) <= 44
    assert all(len(planted.merged_decoders(split, rule)) <= 44 for rule in counting.RULES)


@pytest.mark.parametrize(("gamma", "ratio"), [(0.0, 2.0), (1.0, 0.5)])
def test_pairs_return_the_planted_ratio(gamma, ratio):
    rows = LongTable(tuple(planted.measure_pair(replace(CI, fit=replace(CI.fit, steps=400)), gamma, seed=0)))
    assert rows.one("r_slots_true") == rows.one("r_density_true") == pytest.approx(ratio)
    assert rows.one("r_slots") == pytest.approx(ratio, rel=0.25)
    assert rows.one("r_density") == pytest.approx(ratio, rel=0.25)
    assert rows.one("count", subject="A") == pytest.approx(64, rel=0.25)


def test_targets_are_checked_in_every_world():
    good = {"mcc": 0.95, "count_error": -0.05, "rho_error": 0.0, "d_eff_error": 0.0}
    bad = {**good, "mcc": 0.92, "count_error": 0.09, "rho_error": None}
    at = Place(arm="crosscoder", n_features=8, k=2, seed=0)
    first = LongTable(tuple(rows_at(at, good)))
    bank = rows_at(replace(at, arm="layerwise", estimator="hungarian"), bad)
    assert [check["met"] for check in check_targets(LongTable((*first, *bank)))] == [True] * 4
    checks = {check["score"]: check for check in check_targets(LongTable((*first, *rows_at(replace(at, seed=1), bad))))}
    assert {score: check["met"] for score, check in checks.items()} == {
        "mcc": False,
        "count_error": False,
        "rho_error": False,
        "d_eff_error": True,
    }
    assert checks["mcc"]["worst"] == 0.92
    assert checks["count_error"]["mean"] == pytest.approx(0.07)


def test_the_command_writes_the_study(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(planted.PRESETS, "ci", TINY)
    arguments = ["synthetic", "--preset", "ci", "--out", str(tmp_path), "--workers", "1"]
    assert main([*arguments, "--dry-run"]) == 0
    assert "largest dictionary" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert main([*arguments, "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out)["study"]["sizes"] == [16]
    assert main(arguments) == 0
    (folder,) = tmp_path.iterdir()
    assert capsys.readouterr().out.strip() == str(folder / "report.md")
    rows = load_results(folder).rows
    estimators = {"crosscoder", *(f"bank, {rule}" for rule in counting.RULES)}
    assert {name_of(row.at) for row in rows.select("mcc", subject=None)} == estimators
    assert all(0 <= value <= 1 for value in rows.values("mcc"))
    assert rows.values("planted_gamma") == [0.5]
    text = (folder / "report.md").read_text()
    for word in (*estimators, "R of density", "MCC", "recovery.png"):
        assert word in text
    assert (folder / "recovery.png").read_bytes().startswith(b"\x89PNG")
    again = planted.measure_arm(TINY, "crosscoder", 16, 0)
    assert again == list(rows.select(arm="crosscoder", subject=None, n_features=16))[: len(again)], (
        "the same bits again"
    )
