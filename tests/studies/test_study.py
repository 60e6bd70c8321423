"""The main job at its smallest: it goes on where it was stopped to the same bytes, and says only what it knows."""

import html
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from crosscoder.cli import main
from crosscoder.data.subject_training import SubjectCheckpoint, SubjectConfig, SubjectRun
from crosscoder.data.text import Documents
from crosscoder.foundation.artifact import read_json
from crosscoder.results.file import OLD_SCHEMA, SCHEMA, document, load_results, read_results
from crosscoder.results.quantities import QUANTITIES
from crosscoder.results.table import Place
from crosscoder.studies import baselines
from crosscoder.studies.cells import fit_many
from crosscoder.studies.presets import PRESETS
from crosscoder.studies.shapes import Part, choose_checkpoints, dictionary_cells, rate_share, study_cells
from crosscoder.studies.single import SubjectStudyConfig
from crosscoder.studies.single import study_cells as subject_cells
from crosscoder.verdict.rule import GATES

SMOKE = ["compare", "--preset", "smoke", "--steps", "20"]
TIMES = ("started", "seconds", "command", "git_commit")


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """The smoke preset run from nothing, and a copy that lost one training of A and much else and was run again.

    Every kind of cell is among those lost: both arms, nulls, rooms, spliced and ablated ones.
    """
    roots = [tmp_path_factory.mktemp(name) for name in ("first", "second", "texts")]
    for number, speech in enumerate(Documents("sotu")):
        if number % 10 == 0:  # in ten parts, so that thirty documents are held out
            for part, words in enumerate(np.array_split(speech.split(" "), 10)):
                (roots[2] / f"{number}-{part}.txt").write_text(" ".join(words))
    smoke = [*SMOKE, "--text", str(roots[2]), "--out"]
    assert main([*smoke, str(roots[0])]) == 0
    first = next(roots[0].glob("smoke-*"))
    second = shutil.copytree(first, roots[1] / first.name)
    for folder in (second / "tokens", second / "figures", second / "subjects" / "A1"):
        shutil.rmtree(folder)
    for folder in ("cells", "dictionaries", "readings"):
        for path in (second / folder).iterdir():
            if "A1" in path.name or "B0-trained-residual" in path.name:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in ("results.json", "report.html", "report.md"):
        (second / name).unlink()
    assert main([*smoke, str(roots[1])]) == 0
    return [first, second]


def without_times(folder):
    results = document(load_results(folder))
    for key in TIMES:
        results["provenance"].pop(key, None)
    return json.dumps(results, sort_keys=True)


def test_what_was_lost_is_made_again_to_the_same_bytes(studies):
    for lost in ("tokens", "subjects/A1", "cells", "dictionaries", "readings"):
        names = [sorted(path.name for path in (study / lost).iterdir()) for study in studies]
        assert names[0] == names[1]
    assert without_times(studies[0]) == without_times(studies[1])


def test_every_dictionary_is_given_the_same_steps_and_tokens(studies):
    rows = load_results(studies[0]).rows.select("tokens_train", role="main")
    # of 2 shapes: crosscoder and bank of 2 trainings; of the first 4 nulls, a bank of one, a residual; a bank of C
    assert len(rows) == 2 * (2 * 2 + 4 + 1 + 1) + 1
    assert {row.value for row in rows} == {20 * 256}


def test_dictionary_seeds_have_orders_of_their_own_alike_for_both_arms():
    cell = next(cell for cell in dictionary_cells(PRESETS["smoke"]) if cell.role == "main")
    orders = {}

    class Recorder:
        n_layers, d_model, scale_L, reads, fingerprint = 4, 32, torch.ones(4), None, ""

        def batches(self, size, *, seed, steps):
            orders.setdefault(seed, 0)
            orders[seed] += 1
            return lambda start: (torch.randn(size, 4, 32) for _ in range(start, 2))

    budget = replace(cell.budget, steps=2)
    plans = [(replace(budget, data_seed=seed), seed) for seed in (0, 1)] + [(replace(budget, k_crosscoder=5), 0)]
    found = fit_many("crosscoder", Recorder(), plans)
    assert orders == {0: 1, 1: 1}
    assert [one.config.sparsity.k for one in found] == [12, 12, 5]


def test_outliers_are_counted_beside_both_explained_variances(studies):
    rows = load_results(studies[0]).rows.select(role="main", state="trained", arm="crosscoder")
    keys = ("explained_variance", "explained_variance_usual", "explained_variance_every")
    kept, usual, every = (rows.values(key) for key in keys)
    assert kept == usual
    shares = rows.values("outlier_share")
    assert len(shares) == len(every) == len(kept) > 0
    for one, with_outliers, share in zip(kept, every, shares, strict=True):
        assert one == with_outliers or share > 0


def test_every_training_of_both_has_four_k_and_loads_at_common_fidelity_or_a_reason(studies):
    rows = load_results(studies[0]).rows
    for name in ("A", "B"):
        for t in (0, 1):
            for arm in ("crosscoder", "layerwise"):
                where = {"subject": name, "training_seed": t, "state": "trained", "site": "write", "arm": arm}
                cells = rows.cells("entropy_load", **where, role=("main", "k"))
                assert len({at.k for at in cells}) == 4
                assert all(cell.values("spliced_loss") for cell in cells.values())
    assert {row.at.subject for row in rows.select("clean_loss")} == {"A", "B", "C"}
    for key in ("load_log_ratio", "sharing", "bank_log_ratio"):
        found = rows.select(key, state="trained")
        assert [row.at.estimator for row in found] == ["fvu", "loss"]
        assert all(row.value is not None or "spliced into" not in row.missing for row in found)


def test_subjects_have_equal_parameters_and_the_deep_one_twice_the_neurons(studies):
    results = load_results(studies[0])
    n = {name: results.of(name, "parameters_non_embedding") for name in results.subjects}
    assert abs(n["A"] - n["B"]) / n["A"] < 0.02
    neurons = {name: results.of(name, "n_layers") * results.of(name, "d_model") for name in results.subjects}
    assert neurons["A"] == 2 * neurons["B"]


def test_every_subject_stands_beside_tables_of_what_it_read(studies):
    results = load_results(studies[0])
    bigram, trigram, loss = (results.rows.select(key) for key in ("bigram_loss", "trigram_loss", "held_out_loss"))
    assert [row.at for row in bigram] == [row.at for row in trigram]
    assert {(row.at.subject, row.at.training_seed) for row in bigram} == {(name, t) for name in "AB" for t in (0, 1)}
    loss = loss.select(subject=("A", "B"))
    assert all(table.value < one.value for table, one in zip(bigram, loss, strict=True))  # after 30,000 tokens
    assert all(row.value is not None or row.missing for row in results.rows.select("lookup_share"))


def test_a_model_too_large_for_a_table_of_tokens_has_a_reason_and_the_study_goes_on(studies, monkeypatch):
    monkeypatch.setattr("crosscoder.measure.baselines.TABLE_BYTES", 1)
    run = SubjectRun.load(studies[0] / "subjects" / "A0")
    checkpoint = run.folder / run.checkpoints[-1].folder
    at = Place(subject="A", training_seed=0)
    rows = baselines._measure(at, run.config, run.checkpoints[-1].step, checkpoint, studies[0] / "tokens", "cpu")
    found = {row.key: row for row in rows}
    assert found["bigram_loss"].value > 0
    assert found["lookup_share"].value is None
    assert "token lookup is for small subjects" in found["lookup_share"].missing


def test_a_finished_study_is_not_run_again(studies, capsys):
    text = load_results(studies[0]).provenance.text
    assert main([*SMOKE, "--text", text, "--out", str(studies[0].parent)]) == 0
    said = capsys.readouterr()
    assert "training subjects" not in said.err
    assert "dictionaries in" not in said.err
    assert said.out.strip() == str(studies[0] / "report.html")


def test_the_report_can_be_written_again_from_results_alone(studies, capsys):
    before = (studies[0] / "report.html").read_bytes()
    (studies[0] / "report.html").unlink()
    assert main(["report", str(studies[0])]) == 0
    assert (studies[0] / "report.html").read_bytes() == before


def run_of(*losses, decayed=2):
    """A run whose last `decayed` checkpoints have a decayed rate."""
    config = SubjectConfig(n_layers=1, d_model=32, context=2, tokens=2000, batch=1, n_checkpoints=len(losses) - 1)
    first = 850 if decayed else 400
    steps = [0, *range(100, 100 * (len(losses) - decayed), 100), *(first + 50 * i for i in range(decayed))]
    kept = [
        SubjectCheckpoint(step=step, tokens=2 * step, held_out_loss=loss, folder=f"step-{step}")
        for step, loss in zip(steps, losses, strict=True)
    ]
    return SubjectRun(
        folder=Path(),
        config=config,
        checkpoints=tuple(kept),
        epochs=1.0,
        tokens_per_second=1.0,
        train_fingerprint="",
    )


def test_checkpoints_have_equal_means_and_a_decayed_rate():
    runs = {("A", 0): run_of(6, 3.0, 2.6, 2.52), ("B", 0): run_of(6, 2.52, 2.53, 2.4), ("C", 0): run_of(6, 5, 4, 3)}
    found = choose_checkpoints(runs)
    assert found.index == {("A", 0): 3, ("B", 0): 2, ("C", 0): 3}, "B's equal loss at a high rate is not taken"
    assert found.log_ratio == pytest.approx(math.log(2.53 / 2.52))
    assert all(rate_share(runs[run], i) <= 0.2 for run, i in found.index.items())


def test_of_equal_means_the_least_spread_is_chosen():
    runs = {("A", 0): run_of(6, 3, 2.7, 2.6), ("A", 1): run_of(6, 3, 2.6, 2.5)}
    runs |= {("B", 0): run_of(6, 3, 2.6, 2.55), ("B", 1): run_of(6, 3, 2.6, 2.5)}
    found = choose_checkpoints(runs)
    assert [run.held_out_loss for run in found.checkpoints.values()] == [2.6, 2.6, 2.6, 2.6]
    runs = {("A", 0): run_of(6, 3, 2.6, 2.55), ("B", 0): run_of(6, 3, 2.6, 2.551)}
    assert set(choose_checkpoints(runs).index.values()) == {3}, "of spreads that are as good the least loss"


def test_the_longest_cells_come_first_and_names_differ():
    cells = study_cells(PRESETS["standard"])
    assert len({cell.name for cell in cells}) == len(cells)
    assert (cells[0].arm, cells[0].subject) == ("crosscoder", "A")


def test_the_verdict_opens_the_report_and_says_what_would_decide(studies):
    verdict = load_results(studies[0]).verdict
    page = html.unescape((studies[0] / "report.html").read_text())
    assert page.index(verdict.sentence) < page.index("How the answer was reached")
    assert (studies[0] / "report.md").stat().st_size > 1000
    assert verdict.label == "pilot"
    assert "5 trainings of A instead of 2" in verdict.decides
    assert {gate.name for gate in verdict.gates} == GATES.keys()


def test_every_quantity_is_measured_by_this_study_or_a_committed_one(studies):
    committed = Path(__file__).parents[2].glob("benchmarks/*/results.json")
    known = [read_results(path) for path in committed if read_json(path).get("schema") in (SCHEMA, OLD_SCHEMA)]
    measured = {row.key for results in (load_results(studies[0]), *known) for row in results.rows}
    elsewhere = {"dictionary_rule", "features_page", "top_feature_examples"}  # tests/cli: dictionaries, one model
    assert sorted(QUANTITIES.keys() - measured - elsewhere) == []


def test_readings_of_every_dictionary_are_kept(studies):
    kept = {path.stem for path in (studies[0] / "readings").iterdir()}
    for cell in dictionary_cells(PRESETS["smoke"]):
        for part in cell.sweep:
            assert {f"{part.name}-seed{seed}" for seed in part.seeds} <= kept


def test_a_null_can_be_of_the_main_k_alone():
    cells = dictionary_cells(PRESETS["quick"])
    beside = {state: {len(cell.beside) for cell in cells if cell.state == state} for state in PRESETS["quick"].nulls}
    assert beside == {"gaussian": {3}, "frozen_encoder": {0}}
    assert all(cell.causal for cell in cells if cell.state == "frozen_encoder")
    with pytest.raises(ValueError, match="shuffled, of which no null is asked"):
        replace(PRESETS["quick"], null_single_k=("shuffled",))


def test_controls_are_the_pilot_s_models_beside_every_null_on_every_training():
    config, pilot = PRESETS["controls"], PRESETS["quick"]
    assert config.dictionaries == pilot.dictionaries
    for name in "AB":
        ours, theirs = (one.subjects.shapes()[name] for one in (config, pilot))
        assert replace(ours, k_crosscoder=theirs.k_crosscoder) == theirs
    cells = [cell for cell in dictionary_cells(config) if cell.subject in "AB" and cell.role == "main"]
    per = {(cell.arm, cell.state): 0 for cell in cells}
    for cell in cells:
        per[cell.arm, cell.state] += 1
        assert len(cell.sweep) >= 4, "loads are read at common fidelity"
    both = [("layerwise", one) for one in ("trained", "gaussian", "frozen_encoder", "untrained")]
    assert per == dict.fromkeys([*both, ("crosscoder", "shuffled"), *(("crosscoder", one) for _, one in both)], 4)


def test_a_null_that_is_left_out_has_no_bank_either():
    cells = dictionary_cells(replace(PRESETS["standard"], nulls=("shuffled",)))
    assert {cell.state for cell in cells} == {"trained", "shuffled"}


def test_the_grid_has_banks_where_they_are_asked_for_and_nothing_else():
    config = PRESETS["standard"]
    more = dictionary_cells(replace(config, grid_banks=True))
    grid = [cell for cell in more if cell.subject not in "AB"]
    assert [cell for cell in more if cell.subject in "AB"] == dictionary_cells(config)
    assert sorted((cell.subject, cell.training_seed) for cell in grid) == [(s, t) for s in "CDEF" for t in range(3)]
    assert {(cell.arm, cell.state, len(cell.seeds), len(cell.beside)) for cell in grid} == {
        ("layerwise", "trained", 1, 3)
    }


def test_parts_share_the_runs_and_miss_none():
    runs = [(name, t) for name in "ABC" for t in range(2)]
    held = [[run for run in runs if Part(i, 4).holds(run, runs)] for i in range(4)]
    assert sorted(run for share in held for run in share) == sorted(runs)
    assert max(map(len, held)) - min(map(len, held)) <= 1
    with pytest.raises(ValueError, match="from 0 to 3"):
        Part(4, 4)


def test_a_seed_given_twice_is_refused():
    with pytest.raises(ValueError, match="all different"):
        replace(PRESETS["smoke"], seeds=(1, 1))


@pytest.mark.parametrize(("layers", "n_nulls"), [((4, 5, 6), 3), ((4, 5), 0), ((4, 6, 8), 0)])
def test_one_model_has_nulls_where_writes_of_several_layers_can_be_joined(layers, n_nulls):
    config = SubjectStudyConfig(subject="any")
    nulls = [cell for cell in subject_cells(config, layers) if cell.state not in ("trained", "untrained")]
    assert len(nulls) == n_nulls
    for cell in nulls:
        assert (cell.site, cell.arm, cell.seeds) == ("write", "crosscoder", config.seeds[:1])
        assert cell.budget.frozen == ("encoder" if cell.state == "frozen_encoder" else "none")
    assert not [c for c in subject_cells(replace(config, nulls=()), layers) if c.state != "trained"]
