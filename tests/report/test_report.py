"""The report: complete, self-contained, deterministic, and safe against the strings it prints."""

from __future__ import annotations

import copy
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from study_results import make_results

from crosscoder.report import figures, spread_tables, tables
from crosscoder.report import page as report
from crosscoder.report.page import PICTURES, load_results, render_report
from crosscoder.report.tables import format_number, format_range

SECTIONS = ("table", "pictures", "verdict", "matched", "subjects", "quality", "counts", "pairs", "spread", "splice")
SECTIONS += ("definitions", "provenance")
INJECTION = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202e $x^{$ | `a` **b** 模型"


class Page(HTMLParser):
    """Every tag with its attributes, every id, and the visible text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str | None] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])

    def handle_data(self, data):
        if self.tags and self.lasttag not in ("style", "script"):
            self.text += data


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    return render_report(make_results(), tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    return render_report(make_results(("S",)), tmp_path_factory.mktemp("single"))


@pytest.fixture
def undrawn(monkeypatch):
    """Without the pictures, which take seconds and are tested elsewhere."""
    monkeypatch.setattr(report, "PICTURES", dict.fromkeys(PICTURES, lambda results: None))


def attacked() -> dict[str, Any]:
    results = make_results(("S",))
    subject = results["subjects"]["S"]
    subject["name"] = subject["description"] = subject["held_out_loss_unit"] = INJECTION
    results["counts"]["answer"][0] = results["counts"]["table"][0]["quantity"] = INJECTION
    results["definitions"]["alive"] = results["provenance"]["text"] = INJECTION
    results["provenance"]["config"] = {INJECTION: INJECTION}
    for cell in results["spread"]["cells"]:
        cell["layers"] = [INJECTION] * len(cell["layers"])
    return results


@pytest.mark.parametrize("study", ["pair", "single"])
def test_every_section_and_picture_is_there(study, request):
    path = request.getfixturevalue(study)
    page = Page(path.read_text())
    markdown = (path.parent / "report.md").read_text()
    assert [i for i in page.ids if i in SECTIONS] == list(SECTIONS)
    assert [i for i in page.ids if i.startswith("figure-")] == [f"figure-{slug}" for slug in PICTURES]
    images = [a["src"] for tag, a in page.tags if tag == "img"]
    drawn = [slug for slug in PICTURES if slug != "verdict" or study == "pair"]  # one model has no pair to compare
    assert len(images) == len(drawn)
    for slug in drawn:
        assert (path.parent / "figures" / f"{slug}.png").read_bytes().startswith(b"\x89PNG")
        assert f"(figures/{slug}.png)" in markdown
    for sentence in load_results(path.parent)["counts"]["answer"]:
        assert sentence in page.text
        assert f"**{sentence}**" in markdown
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "figures",
        "report.html",
        "report.md",
        "results.json",
    ]


def expected_numbers(results: dict[str, Any]) -> set[str]:
    numbers = set()
    for row in results["counts"]["table"]:
        for entry in [*row["values"].values(), row["ratio"]]:
            if entry is not None:
                shown = format_range((entry["mean"], entry["low"], entry["high"]))
                numbers |= {shown.text, shown.detail}
    for cell in results["counts"]["cells"]:
        for value in (cell["pair"] or {}).values():
            numbers.add(format_number(value))
        numbers |= {format_number(cell["tokens_held_out"]), format_number(cell["p_min"])}
        for quantity in (
            "dictionary_size",
            "alive",
            "distinct",
            "merged",
            "entropy_load",
            "effective_dimension",
        ):
            low, high = (f(s[quantity] or 0 for s in cell["per_seed"]) for f in (min, max))
            numbers.add(format_range(((low + high) / 2, low, high)).text if high else "–")
    for cell in results["quality"]["cells"]:
        for quantity in ("explained_variance", "l0_token", "l0_token_layer", "dead_share"):
            values = [s[quantity] for s in cell["per_seed"]]
            shown = format_range((sum(values) / len(values), min(values), max(values)))
            numbers |= {shown.text, shown.detail}
        for splice in filter(None, (s["splice"] for s in cell["per_seed"])):
            numbers |= {format_number(site["ablated_loss"]) for site in splice["sites"]}
    numbers |= {format_number(p) for s in results["subjects"].values() for p in s["parameters"].values()}
    return numbers - {""}


@pytest.mark.parametrize("study", ["pair", "single"])
def test_every_number_of_the_tables_is_printed_in_both_forms(study, request):
    path = request.getfixturevalue(study)
    page = Page(path.read_text())
    markdown = (path.parent / "report.md").read_text()
    numbers = expected_numbers(load_results(path.parent))
    assert len(numbers) > 60
    assert [n for n in numbers if n not in page.text] == []
    assert [n for n in numbers if n not in markdown] == []


def test_markdown_tables_are_well_formed(pair):
    found = re.findall(r"(?:^\|.*\n)+", (pair.parent / "report.md").read_text(), re.M)
    assert len(found) == 18
    for lines in (table.splitlines() for table in found):
        assert re.fullmatch(r"\|( (:--|--:) \|)+", lines[1])
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_rows_of_one_place_share_a_heading(pair):
    source = pair.read_text()
    assert source.count(">residual stream</th>") == 2
    assert "| residual stream: distinct features, merged |" in (pair.parent / "report.md").read_text()


def test_each_group_says_over_which_seeds_it_is():
    results = make_results()
    for cell in figures.select(results["counts"]["cells"], arm="crosscoder", role="main", state="trained"):
        results["counts"]["cells"].append(cell | {"training_seed": 1})
    for cell in figures.select(results["counts"]["cells"], arm="layerwise", role="main", subject="B"):
        cell["per_seed"] = cell["per_seed"][:1]
    notes = {group: tables.measured_table(results, group).note for group in tables.GROUP_TITLE}
    assert "not a unit of an MLP" in notes["subject"]
    assert notes["cross-layer"] == "Over 2 training seeds, 2 dictionary seeds each."
    seeds = "1 training seed, {} each"
    assert notes["per-layer"] == (
        f"A over {seeds.format('2 dictionary seeds')}; B over {seeds.format('1 dictionary seed')}."
    )
    assert notes["control"] == (
        f"A over {seeds.format('2 dictionary seeds')}; B over {seeds.format('1 to 2 dictionary seeds')}."
    )
    results["counts"]["cells"] = []
    assert tables.measured_table(results, "control").note == ""


def test_a_line_of_one_training_is_not_said_to_be_over_training_seeds(pair):
    text = Page(pair.read_text()).text
    assert "over training seeds and" not in text
    quality = tables.quality_table(make_results())
    assert "one training seed" in quality.note
    assert "over its dictionary seeds" in quality.note


def test_intervals_of_a_formula_are_excepted_where_coverage_is_claimed(pair):
    for text in (Page(pair.read_text()).text, (pair.parent / "report.md").read_text()):
        claims = [line for line in text.split("\n") if "cover 90 %" in line]
        assert claims
        assert all("capture-recapture" in line and "headroom" in line for line in claims)
        assert "moves more with the estimator than with the models" not in text


@pytest.mark.usefixtures("undrawn")
def test_what_features_are_read_from_is_a_table_where_it_was_measured(pair, tmp_path):
    results = make_results()
    title = "Read from one layer, or from all"
    assert title not in pair.read_text() + (pair.parent / "report.md").read_text()
    cell = figures.select(results["spread"]["cells"], subject="A", site="write", state="untrained")[0]
    for seed, precision in zip(cell["per_seed"], (0.70125, 0.80125), strict=True):
        seed["functional"] = {"probed": 98.0, "joint_precision": precision, "joint_auc": None, "functional_rho": 4.75}
    path = render_report(results, tmp_path)
    for text in (Page(path.read_text()).text, (tmp_path / "report.md").read_text()):
        assert title in text
        for shown in ("0.7512", "[0.7013, 0.8013]", "4.75", "saturated"):
            assert shown in text
    rows = spread_tables.read_table(results).rows
    assert [[cell.text for cell in row.cells[:3]] for row in rows] == [["A0", "block writes", "98"]]
    assert rows[0].cells[0].detail == "untrained"
    assert rows[0].cells[6].text == "–"  # an AUC that no seed has


def test_nothing_is_fetched(pair):
    source = pair.read_text()
    page = Page(source)
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object", "base", "form"}
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "srcset", "data", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
        if tag == "script":
            assert attributes["type"] == "application/json"
    links = {a["href"] for tag, a in page.tags if tag == "a"}
    assert {link for link in links if not link.startswith("#")} == {"https://arxiv.org/abs/2407.01459"}
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert "url(" not in source
    assert len(source) < 3_000_000


def test_every_definition_link_leads_to_a_definition(pair):
    page = Page(pair.read_text())
    targets = {a["href"] for tag, a in page.tags if tag == "a" and a["href"].startswith("#")}
    assert {target[1:] for target in targets} <= set(page.ids)
    definitions = load_results(pair.parent)["definitions"]
    links = {a["href"]: a["title"] for tag, a in page.tags if tag == "a" and a.get("class") == "def"}
    assert {"#def-alive", "#def-distinct", "#def-merged", "#def-explained_variance"} <= set(links)
    for target, title in links.items():
        assert title == definitions[target.removeprefix("#def-")]
    assert all(sentence in page.text for sentence in definitions.values())


def test_the_embedded_numbers_are_the_results(pair):
    body = re.search(r'<script type="application/json" id="results">(.*?)</script>', pair.read_text(), re.S)
    assert body is not None
    assert json.loads(body[1]) == make_results() == load_results(pair.parent)


def test_equal_results_give_equal_bytes(single, tmp_path):
    again = render_report(make_results(("S",)), tmp_path)
    for path in sorted(single.parent.rglob("*")):
        if path.is_file():
            assert (again.parent / path.relative_to(single.parent)).read_bytes() == path.read_bytes(), path.name


def test_strings_of_the_results_cannot_become_markup(tmp_path):
    path = render_report(attacked(), tmp_path)
    source, markdown = path.read_text(), (tmp_path / "report.md").read_text()
    page = Page(source)
    assert [a["type"] for tag, a in page.tags if tag == "script"] == ["application/json"]
    assert all(a["src"].startswith("data:") for tag, a in page.tags if tag == "img")
    assert source.count("</script>") == 1
    body = source.split('id="results">')[1].split("</script>")[0]
    assert not set("<>&") & set(body)
    assert html.escape("<script>alert(1)</script>") in source
    outside_code = [line for line in markdown.split("\n") if not line.startswith("    ")]
    assert not any(re.search(r"<[A-Za-z/!?]", line) for line in outside_code)
    for text in (source, markdown):
        assert "\x1b" not in text
        assert "\u202e" not in text
    assert load_results(tmp_path) == attacked()


def test_what_is_missing_is_said(tmp_path):
    results = make_results(("S",))
    results["counts"] |= {"table": [], "cells": []}
    results["spread"]["cells"] = results["quality"]["cells"] = []
    results["subjects"]["S"] |= {"curve": [], "tokens": None, "held_out_loss": None, "epochs": None}
    results["definitions"] = {}
    results["provenance"]["git_commit"] = None
    stale = tmp_path / "figures" / "counts.png"
    stale.parent.mkdir()
    stale.write_bytes(b"an older run's")
    path = render_report(results, tmp_path)
    page = Page(path.read_text())
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not stale.exists()
    for said in ("No training curve was recorded", "No reconstruction was spliced", "no untrained control"):
        assert said in page.text
        assert said in (tmp_path / "report.md").read_text()


def test_a_study_without_sweeps_pairs_splices_or_writes_is_drawn(tmp_path):
    results = make_results(("S",))
    for name in ("counts", "quality"):
        cells = figures.select(results[name]["cells"], role="main", site="residual")
        results[name]["cells"] = cells
    for cell in results["counts"]["cells"]:
        cell["pair"] = None
        cell["per_seed"] = cell["per_seed"][:1]
        cell["summary"] = {}
    for cell in results["quality"]["cells"]:
        cell["per_seed"] = [seed | {"splice": None} for seed in cell["per_seed"][:1]]
    results["spread"]["cells"] = figures.select(results["spread"]["cells"], site="write", state="trained")
    page = Page(render_report(results, tmp_path).read_text())
    assert len([tag for tag, _ in page.tags if tag == "img"]) == len(PICTURES) - 2
    assert "from one dictionary seed" in page.text


def test_degenerate_numbers_are_drawn(tmp_path):
    results = make_results(("S",))
    for cell in results["counts"]["cells"]:
        cell["summary"] = {}
        for seed in cell["per_seed"]:
            seed |= {"alive": 0, "dead_share": 1.0, "distinct": seed["distinct"] and 0, "effective_dimension": None}
            seed |= dict.fromkeys(("merged", "merged_low", "merged_high"))
    for cell in results["quality"]["cells"]:
        for seed in cell["per_seed"]:
            seed |= {"explained_variance": -3.0, "explained_variance_per_layer": [], "l0_token": 0.0, "splice": None}
    for cell in results["spread"]["cells"]:
        cell["heatmap"] = []
        for seed in cell["per_seed"]:
            seed["rho_histogram"]["counts"] = [0] * 20
    results["spread"]["cells"] = results["spread"]["cells"][1:]
    results["subjects"]["S"]["curve"] = results["subjects"]["S"]["curve"][:1]
    render_report(results, tmp_path)
    drawn = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert drawn == set(PICTURES) - {"verdict", "profiles", "splice"}


@pytest.mark.usefixtures("undrawn")
def test_results_too_long_to_embed_stay_beside_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "EMBED_LIMIT", 1000)
    page = Page(render_report(make_results(), tmp_path).read_text())
    assert "too large to embed" in page.text
    assert not [tag for tag, _ in page.tags if tag == "script"]


@pytest.mark.usefixtures("undrawn")
def test_refused_results_are_kept_on_disk_and_named(tmp_path):
    results = make_results()
    results["counts"]["cells"][3]["k"] = "sixteen"
    with pytest.raises(ValueError, match=r"results\.counts\.cells\[3\]\.k"):
        render_report(results, tmp_path)
    assert (tmp_path / "results.json").is_file()
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(ValueError, match=r"results\.counts\.cells\[3\]\.k"):
        load_results(tmp_path)


@pytest.mark.usefixtures("undrawn")
def test_a_value_that_json_cannot_hold_is_named(tmp_path):
    results = copy.deepcopy(make_results())
    results["quality"]["cells"][0]["per_seed"][0]["l0_token"] = float("nan")
    with pytest.raises(ValueError, match=r"quality\.cells\[0\]\.per_seed\[0\]\.l0_token.*nan"):
        render_report(results, tmp_path)


@pytest.mark.usefixtures("undrawn")
def test_a_note_keeps_its_capitals(tmp_path):
    results = make_results()
    results["verdict"]["notes"] = ["universality of A and B is not measured"]
    path = render_report(results, tmp_path)
    for text in (path.read_text(), (tmp_path / "report.md").read_text()):
        assert "Universality of A and B is not measured." in text
