"""The report of results that are not whole: what is missing is left out, what is damaged is named and kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
from committed import SINGLE, change, keep
from made import made
from pages import Page

from crosscoder.report import page as report
from crosscoder.report.figures import SPREADS
from crosscoder.report.page import SECTIONS, render_report
from crosscoder.results.file import load_results


@pytest.mark.parametrize("study", [made(), SINGLE], ids=["pair", "single"])
def test_what_is_missing_is_not_there(study, tmp_path):
    results = keep(study, lambda row: (row.at.arm is None and row.key in ("name", "n_layers", "d_model")) or (
        row.key.startswith("parameters_")))  # fmt: skip
    results = replace(results, provenance=replace(results.provenance, git_commit=None, config={}))
    stale = tmp_path / "figures" / "profiles.png"
    stale.parent.mkdir()
    stale.write_bytes(b"an older run's")
    page = Page(render_report(results, tmp_path).read_text())
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not stale.exists()
    assert {slug for slug in SECTIONS if slug in page.ids} == {"models", "run"} | ({"rule"} if study.verdict else set())
    assert "Ten features" not in page.text
    if study.verdict:
        assert page.text.count("not measured") >= 3  # the three numbers


@pytest.mark.parametrize("study", [made(), SINGLE], ids=["pair", "single"])
def test_degenerate_numbers_are_drawn(study, tmp_path):
    results = change(study, "explained_variance", -3.0)
    results = change(results, "profile_heatmap", [])
    for key in SPREADS:
        results = change(results, key, None) if results.rows.select(key) else results
    for key in ("load_log_ratio", "room_log_ratio"):
        if results.rows.select(key):
            results = change(results, key, None)
    render_report(results, tmp_path)
    drawn = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert drawn == ({"ratios", "loads"} if study.verdict else set())


@pytest.mark.usefixtures("undrawn")
def test_results_too_long_to_embed_stay_beside_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "EMBED_LIMIT", 1000)
    page = Page(render_report(SINGLE, tmp_path).read_text())
    assert "too large to embed" in page.text
    assert not [tag for tag, _ in page.tags if tag == "script"]


@pytest.mark.usefixtures("undrawn")
def test_refused_results_are_kept_on_disk_and_named(tmp_path):
    results = change(SINGLE, "alive", "sixteen", arm="crosscoder", site="write", state="trained", seed=0)
    for give in (lambda: render_report(results, tmp_path), lambda: load_results(tmp_path)):
        with pytest.raises(ValueError, match=r"results\.rows\[\d+\]\.values\.alive: .*'sixteen'"):
            give()
        assert (tmp_path / "results.json").is_file()
        assert not (tmp_path / "report.html").exists()


@pytest.mark.usefixtures("undrawn")
def test_a_value_that_json_cannot_hold_is_named(tmp_path):
    results = change(SINGLE, "l0_token", float("nan"), arm="crosscoder", site="write", state="trained", seed=0)
    with pytest.raises(ValueError, match=r"values\.l0_token.*nan"):
        render_report(results, tmp_path)


@pytest.mark.usefixtures("undrawn")
def test_a_note_keeps_its_capitals(tmp_path):
    verdict = replace(made().verdict, notes=("universality of A and B is not measured",))
    path = render_report(replace(made(), verdict=verdict), tmp_path)
    for text in (path.read_text(), (tmp_path / "report.md").read_text()):
        assert "Universality of A and B is not measured." in text


def test_a_study_of_planted_worlds_is_refused(tmp_path):
    planted = replace(SINGLE, provenance=replace(SINGLE.provenance, kind="synthetic"))
    with pytest.raises(ValueError, match="has a report of its own"):
        render_report(planted, tmp_path)
