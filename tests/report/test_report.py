"""The report: complete, self-contained, deterministic, and safe against the strings it prints."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from committed import PAIR, SINGLE, change, first_seeds, keep

from crosscoder.report import page as report
from crosscoder.report import tables, verdict_tables
from crosscoder.report.answer import WORDS, answer
from crosscoder.report.page import PICTURES, render_report
from crosscoder.report.table import format_number, format_range
from crosscoder.results.file import Results, document, load_results
from crosscoder.results.quantities import definition
from crosscoder.results.table import Estimate, LongTable, Place, Row

SECTIONS = ("table", "pictures", "verdict", "matched", "subjects", "quality", "counts", "pairs", "spread", "splice")
SECTIONS += ("definitions", "provenance")
UNDRAWN = {"verdict", "loss"}  # of one model that was not trained here
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
    return render_report(PAIR, tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    return render_report(SINGLE, tmp_path_factory.mktemp("single"))


@pytest.fixture
def undrawn(monkeypatch):
    """Without the pictures, which take seconds and are tested elsewhere."""
    monkeypatch.setattr(report, "PICTURES", dict.fromkeys(PICTURES, lambda results: None))


def attacked(results: Results) -> Results:
    """The study with a hostile text wherever a text may stand."""
    for key in ("name", "description"):
        results = change(results, key, INJECTION)
    results = change(results, "layers", lambda row: [INJECTION] * len(row.value))
    results = change(results, "spliced_ablation", INJECTION)
    rows = [*results.rows, Row(Place(subject=results.subjects[0], site="write"), "F_inf", None, INJECTION)]
    rows = [row for row in rows if row.key != "F_inf" or row.missing == INJECTION]
    verdict = results.verdict and replace(results.verdict, sentence=INJECTION, notes=(INJECTION,))
    provenance = replace(results.provenance, text=INJECTION, config={INJECTION: INJECTION})
    return replace(results, rows=LongTable(tuple(rows)), verdict=verdict, provenance=provenance)


@pytest.mark.parametrize("study", ["pair", "single"])
def test_every_section_and_picture_is_there(study, request):
    path = request.getfixturevalue(study)
    page = Page(path.read_text())
    markdown = (path.parent / "report.md").read_text()
    assert [i for i in page.ids if i in SECTIONS] == list(SECTIONS)
    assert [i for i in page.ids if i.startswith("figure-")] == [f"figure-{slug}" for slug in PICTURES]
    images = [a["src"] for tag, a in page.tags if tag == "img"]
    drawn = [slug for slug in PICTURES if study == "pair" or slug not in UNDRAWN]
    assert len(images) == len(drawn)
    for slug in drawn:
        assert (path.parent / "figures" / f"{slug}.png").read_bytes().startswith(b"\x89PNG")
        assert f"(figures/{slug}.png)" in markdown
    for sentence in answer(load_results(path.parent)):
        assert sentence in page.text
        assert f"**{sentence}**" in markdown
    assert {p.name for p in path.parent.iterdir()} == {"figures", "report.html", "report.md", "results.json"}


PRINTED = ("dictionary_size", "alive", "distinct", "merged", "entropy_load", "effective_dimension", "ultra_dense")
PRINTED += ("features_per_layer", "per_neuron_layer", "per_neuron_joint", "tokens_held_out", "p_min", "dead_share")
PRINTED += ("matched", "matched_share", "chapman", "q_adjacent", "q_same", "survival", "seed_corrected_lifespan")
PRINTED += ("corrected", "explained_variance", "l0_token", "l0_token_layer", "mean_rho", "mean_rho_share", "probed")
PRINTED += ("mean_lifespan", "single_layer_share", "mean_adjacent_cosine", "functional_rho", "decoder_rho", "joint_auc")
PRINTED += ("best_layer_auc", "joint_gain", "best_layer_precision", "joint_precision", "genuine_share", "clean_loss")
BY_ITSELF = ("parameters_non_embedding", "parameters_embedding", "parameters_norms", "training_tokens")
BY_ITSELF += ("held_out_loss", "untrained_loss", "ratio", "gamma", "delta", "headroom", "u", "u_null", "u_ceiling")
BY_ITSELF += ("u_floor", "rate_pairs", "spliced_loss", "ablated_loss", "loss_recovered", "kl", "mcc", "count_true")
BY_ITSELF += ("count_error", "rho_error", "exclusive_first", "hidden_second", "cross_layer", "count_gain")
BY_ITSELF += ("identity_residual", "exclusive_share")


def expected_numbers(results: Results) -> set[str]:
    rows = [row for group in WORDS["groups"] for row in tables.paper_rows(results, group)]
    shown = [format_range(value) for row in rows for value in row.values.values()]
    for at, cell in results.rows.cells("alive").items():
        keys = [key for key in PRINTED if at.role == "main" or key not in tables.COLUMNS["spread"]]
        shown += [format_range(cell.known_range(key)) for key in keys]
    shown += [format_range(row.value) for key in BY_ITSELF for row in results.rows.select(key)]
    return {text for value in shown for text in (value.text, value.detail)} - {""}


@pytest.mark.parametrize("study", ["pair", "single"])
def test_every_number_of_the_tables_is_printed_in_both_forms(study, request):
    path = request.getfixturevalue(study)
    page = Page(path.read_text())
    markdown = (path.parent / "report.md").read_text()
    numbers = expected_numbers(load_results(path.parent))
    assert len(numbers) > 150
    assert [n for n in numbers if n not in page.text] == []
    assert [n for n in numbers if n not in markdown] == []


def test_markdown_tables_are_well_formed(pair):
    found = re.findall(r"(?:^\|.*\n)+", (pair.parent / "report.md").read_text(), re.M)
    assert len(found) == 20
    for lines in (table.splitlines() for table in found):
        assert re.fullmatch(r"\|( (:--|--:) \|)+", lines[1])
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_rows_of_one_place_share_a_heading(pair):
    assert pair.read_text().count(">residual stream</th>") == 4
    assert "| residual stream: distinct features after merging layers |" in (pair.parent / "report.md").read_text()


def test_each_group_says_over_which_seeds_it_is():
    results = keep(PAIR, lambda row: (row.at.arm, row.at.subject, row.at.seed) != ("layerwise", "B", 1))
    notes = {group: tables.measured_table(results, group).note for group in WORDS["groups"]}
    assert "not a unit of an MLP" in notes["subject"]
    assert notes["cross-layer"] == "Over 2 training seeds, 2 dictionary seeds each."
    both = "2 training seeds, {} each"
    assert notes["per-layer"] == (
        f"A over {both.format('1 to 2 dictionary seeds')}; B over {both.format('1 dictionary seed')}."
    )
    nothing = keep(PAIR, lambda row: row.at.arm is None)
    assert tables.measured_table(nothing, "control").note == ""


def test_a_line_of_one_training_is_not_said_to_be_over_training_seeds(pair):
    assert "over training seeds and" not in Page(pair.read_text()).text.split("Definitions")[1].split("seed_range")[0]
    quality = tables.TABLES["quality"](PAIR)
    assert "one training seed" in quality.note
    assert "over its dictionary seeds" in quality.note


def test_intervals_of_a_formula_are_excepted_where_coverage_is_claimed(pair):
    for text in (Page(pair.read_text()).text, (pair.parent / "report.md").read_text()):
        claims = [line for line in text.split("\n") if "cover 90 %" in line]
        assert claims
        assert all("capture-recapture" in line and "headroom" in line for line in claims)


@pytest.mark.usefixtures("undrawn")
def test_what_features_are_read_from_is_a_table_where_it_was_measured(pair, tmp_path):
    title = "Read from one layer, or from all"
    assert title in pair.read_text()
    path = render_report(keep(SINGLE, lambda row: row.key != "probed"), tmp_path)
    assert title not in path.read_text() + (tmp_path / "report.md").read_text()
    untold = change(SINGLE, "joint_auc", None)
    for row in tables.TABLES["read"](untold).rows:
        assert [cell.text for cell in row.cells[:2]] == ["S0", "block writes"]
        assert row.cells[6].text == "–"  # an AUC that no seed has
    half = change(SINGLE, "joint_auc", None, seed=0, state="trained")
    known = SINGLE.rows.one("joint_auc", seed=1, state="trained")
    assert format_number(known) in [row.cells[6].text for row in tables.TABLES["read"](half).rows]


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
    links = {a["href"]: a["title"] for tag, a in page.tags if tag == "a" and a.get("class") == "def"}
    assert {"#def-alive", "#def-distinct", "#def-merged", "#def-explained_variance"} <= set(links)
    for target, title in links.items():
        assert title == definition(target.removeprefix("#def-"))
    defined = {f"#{i}" for i in page.ids if i.startswith("def-")}
    assert defined == set(links)  # none is printed that nothing cites
    assert len(defined) > 80


def test_the_embedded_numbers_are_the_results(pair):
    body = re.search(r'<script type="application/json" id="results">(.*?)</script>', pair.read_text(), re.S)
    assert body is not None
    assert json.loads(body[1]) == json.loads((pair.parent / "results.json").read_text())
    assert document(load_results(pair.parent)) == document(PAIR)


def test_equal_results_give_equal_bytes(single, tmp_path):
    again = render_report(SINGLE, tmp_path)
    for path in sorted(single.parent.rglob("*")):
        if path.is_file():
            assert (again.parent / path.relative_to(single.parent)).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("study", [PAIR, SINGLE], ids=["undrawn pair", "drawn single"])
def test_strings_of_the_results_cannot_become_markup(study, tmp_path, monkeypatch):
    if study is PAIR:
        monkeypatch.setattr(report, "PICTURES", {})
    path = render_report(attacked(study), tmp_path)
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
    assert document(load_results(tmp_path)) == document(attacked(study))


def test_what_is_missing_is_said(tmp_path):
    results = keep(SINGLE, lambda row: row.at.arm is None)
    for key in ("curve_tokens", "curve_loss", "epochs"):  # a model that the study did not train
        assert not list(results.rows.select(key))
    results = change(results, "held_out_loss", None)
    results = replace(results, provenance=replace(results.provenance, git_commit=None))
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
    pairs_and_splices = {"matched", "chapman", "clean_loss", "spliced_loss"}
    results = first_seeds(SINGLE)
    results = keep(results, lambda row: row.at.site in (None, "residual") and row.key not in pairs_and_splices)
    page = Page(render_report(results, tmp_path).read_text())
    missing = UNDRAWN | {"splice"}
    assert len([tag for tag, _ in page.tags if tag == "img"]) == len(PICTURES) - len(missing)
    assert "from one dictionary seed" in page.text


def test_degenerate_numbers_are_drawn(tmp_path):
    results = SINGLE
    for key, value in (("alive", 0), ("dead_share", 1.0), ("distinct", 0), ("effective_dimension", None)):
        results = change(results, key, value)
    for key in ("merged", "merged_low", "merged_high"):
        results = change(results, key, None)
    for key, value in (("explained_variance", -3.0), ("explained_variance_per_layer", []), ("l0_token", 0.0)):
        results = change(results, key, value)
    results = change(change(results, "profile_heatmap", []), "rho_histogram", [0] * 20)
    results = keep(results, lambda row: row.key != "spliced_loss")
    render_report(results, tmp_path)
    drawn = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert drawn == set(PICTURES) - UNDRAWN - {"profiles", "splice"}


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
    verdict = replace(PAIR.verdict, notes=("universality of A and B is not measured",))
    path = render_report(replace(PAIR, verdict=verdict), tmp_path)
    for text in (path.read_text(), (tmp_path / "report.md").read_text()):
        assert "Universality of A and B is not measured." in text


def test_the_paper_table_leaves_out_what_some_subject_lacks():
    def words(results: Results) -> list[tuple[str, str]]:
        return [(row.where, row.words) for row in tables.paper_rows(results, "per-layer")]

    one = keep(PAIR, lambda row: not (row.key == "survival" and row.at.subject == "B" and row.at.site == "write"))
    assert set(words(PAIR)) - set(words(one)) == {("block writes", "survival to the next layer, seed-corrected")}
    assert all(row.values["C"] is None for row in tables.paper_rows(PAIR, "per-layer"))  # C has crosscoders only
    assert all(row.values["C"] is not None for row in tables.paper_rows(PAIR, "cross-layer"))


def test_a_ratio_has_the_widest_interval_and_none_where_a_may_be_zero():
    b = Estimate(6.0, 5.0, 8.0)
    assert tables.ratio_range(Estimate(2.0, 1.0, 4.0), b) == Estimate(3.0, 1.25, 8.0)
    assert tables.ratio_range(Estimate(2.0, 0.0, 4.0), b) is None


def test_the_floor_is_shown_on_the_scale_of_universality():
    assert verdict_tables.scaled_floor(0.5, 0.1, Estimate(0.9, 0.8, 1.0)) == pytest.approx(0.5)
    assert verdict_tables.scaled_floor(0.5, 0.9, Estimate(0.9, 0.8, 1.0)) is None


def test_a_study_of_planted_worlds_is_refused(tmp_path):
    planted = replace(SINGLE, provenance=replace(SINGLE.provenance, kind="synthetic"))
    with pytest.raises(ValueError, match="has a report of its own"):
        render_report(planted, tmp_path)
