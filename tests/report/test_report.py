"""The report: the answer first, self-contained, deterministic, and safe against the strings it prints."""

from __future__ import annotations

import html
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from committed import PAIR, SINGLE, change, keep
from made import LOADS, NULLS, made
from pages import Page
from scipy import stats

from crosscoder.report import page as report
from crosscoder.report.answer import beside_nulls
from crosscoder.report.page import ALL_TABLES, SECTIONS, render_report
from crosscoder.report.table import WORDS, format_range, state_term
from crosscoder.report.tables import LAYERS, TABLES, null_table
from crosscoder.report.verdict_tables import label_term
from crosscoder.results.file import Results, document, load_results
from crosscoder.results.quantities import NOTES, QUANTITIES, definition
from crosscoder.results.table import LongTable, State
from crosscoder.results.verdict import Asked
from crosscoder.verdict import rule

INJECTION = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202e $x^{$ | `a` **b** 模型"
WORD_LIMITS = {"pair": 5000, "single": 3000}
"""About half of what the report had when it began with its tables."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    return render_report(made(), tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    return render_report(SINGLE, tmp_path_factory.mktemp("single"))


def attacked(results: Results) -> Results:
    """The study with a hostile text wherever a text may stand."""
    for key in ("name", "description"):
        results = change(results, key, INJECTION)
    results = change(results, "layers", lambda row: [INJECTION] * len(row.value))
    if results.rows.select("top_feature_tokens"):
        for key in ("top_feature_tokens", "top_feature_examples"):
            if results.rows.select(key):
                results = change(results, key, [INJECTION] * 10)
        if results.rows.select("features_page"):
            results = change(results, "features_page", INJECTION)
    gone = ("dimension_log_ratio", "headroom", "calibration_q_error")
    rows = [replace(row, value=None, missing=INJECTION) if row.key in gone else row for row in results.rows]
    verdict = results.verdict
    if verdict is not None:
        leg, said = Asked(INJECTION, INJECTION, INJECTION, "met"), (INJECTION, f"q/fvu: {INJECTION}")
        texts = {"sentence": INJECTION, "label": INJECTION, "notes": said, "reasons": said, "decides": said}
        verdict = replace(verdict, **texts, gates=(leg, *verdict.gates), legs={INJECTION: (leg,)})
    config = {INJECTION: INJECTION, "text": INJECTION, "nulls": [INJECTION], "subjects": {"seeds": INJECTION}}
    provenance = replace(results.provenance, text=INJECTION, config=config, preset=INJECTION, command=[INJECTION])
    return replace(results, rows=LongTable(tuple(rows)), verdict=verdict, provenance=provenance)


def first_screen(source: str) -> str:
    """The page up to what is folded."""
    return source[: source.index("<details ")]


def test_the_first_screen_asks_answers_draws_once_and_gives_three_numbers_with_their_nulls(pair):
    source = first_screen(pair.read_text())
    page, results = Page(source), made()
    for said in ("8 layers of 64", "2 layers of 128", "1/2 of A's neurons", results.verdict.sentence, "Why"):
        assert said in page.text
    assert [tag for tag, _ in page.tags].count("img") == 1
    numbers = source.split('<div class="number">')[1:]
    assert len(numbers) == 3
    for number, key in zip(numbers, ("load_log_ratio", "bank_log_ratio"), strict=False):
        value = results.rows.one(key, state="trained", estimator="fvu")
        assert f"<b>{math.exp(value.value):.2f} [" in number
        for state in ("gaussian", "frozen_encoder", "untrained"):
            assert f">{WORDS['states'][state]}</a>" in number
    assert "of A's 8 layers" in html.unescape(numbers[2])
    assert "The argument says 2." in numbers[1]


def test_a_verdict_that_is_none_says_what_would_decide_it(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PICTURES", {})
    gates = tuple(replace(gate, met="missed") for gate in made().verdict.gates)
    decides = ("5 trainings of A instead of 2", *(f"{gate.name}: 3, where 4 is asked" for gate in gates))
    verdict = replace(made().verdict, label="pilot", reasons=("2 of 5 trainings of A",), decides=decides, gates=gates)
    text = Page(first_screen(render_report(replace(made(), verdict=verdict), tmp_path).read_text())).text
    assert "2 of 5 trainings of A" in text
    assert "5 trainings of A instead of 2" in text
    assert "both models predict better than a table of three-token counts (measured" in text
    assert f"Requirements not met beside these: {len(decides) - 4}" in text


def test_reasons_name_statistics_in_words(pair):
    text = Page(first_screen(pair.read_text())).text
    assert "q, load of B over A, ln at equal variance unexplained: " in text
    assert "; asked: outside [-0.223, 0.223]" in text
    assert "q/fvu" not in text


def test_one_model_has_ten_features_where_they_are_known(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PICTURES", {})
    one = keep(made(), lambda row: row.at.subject in (None, "A"))
    one = replace(one, verdict=None, provenance=replace(one.provenance, kind="subject_study"))
    page = Page(first_screen(render_report(one, tmp_path).read_text()))
    assert "Ten features" in page.text
    for said in ("' token9'", "10.0%", "1.8", "2.2"):
        assert said in page.text
    source = (tmp_path / "report.html").read_text()
    assert 'href="features/index.html#feature=10"' in source
    assert "<p>before3<mark> token3</mark> behind</p><p>another<mark> token3</mark></p>" in source
    assert "- 30: before3⟦ token3⟧ behind / another⟦ token3⟧" in (tmp_path / "report.md").read_text()
    for wrong in ("javascript:alert(1)//index.html", "https://example.org/index.html", "../index.html", "/index.html"):
        attacked = change(one, "features_page", wrong)
        page = Page(first_screen(render_report(attacked, tmp_path).read_text()))
        assert all(str(values.get("href", "#"))[0] == "#" for _, values in page.tags)
    without = keep(one, lambda row: row.key != "top_features")
    assert "Ten features" not in render_report(without, tmp_path).read_text()


def test_the_answer_on_one_model_says_how_its_nulls_do():
    causal = {row.at.state: row.value for row in SINGLE.rows.select("causal_layers")}
    assert "below every null" in report.first_screen(SINGLE).answer[1]
    assert causal["trained"] < causal["frozen_encoder"]
    others = ("causal_layers", "conjunctive_share", "label_gain", "mean_rho_model")
    by_norm = keep(SINGLE, lambda row: row.key not in others)

    def said(value: float) -> str:
        results = change(by_norm, "mean_rho", value, site="write", state="trained", role="main")
        return report.first_screen(results).answer[1]

    assert "above every null" in said(6.5)
    assert "below every null" in said(1.5)
    assert "among its nulls" in said(5.0)
    alone = keep(SINGLE, lambda row: row.at.state in (None, "trained"))
    assert "no null was measured" in report.first_screen(alone).answer[1]


@pytest.mark.parametrize("study", WORD_LIMITS)
def test_the_report_is_short_and_folded(study, request):
    path = request.getfixturevalue(study)
    words = [word for word in (path.parent / "report.md").read_text().split() if re.search(r"\w", word)]
    assert len(words) < WORD_LIMITS[study]
    page = Page(path.read_text())
    folded = [attributes for tag, attributes in page.tags if tag == "details"]
    assert folded
    assert not any("open" in attributes for attributes in folded)
    assert [attributes["id"] for attributes in folded] == [slug for slug in SECTIONS if slug in page.ids]


def test_every_section_and_picture_of_a_pair_is_there(pair):
    page, markdown = Page(pair.read_text()), (pair.parent / "report.md").read_text()
    assert {slug for slug in SECTIONS if slug in page.ids} == set(SECTIONS)
    drawn = ["ratios", "profiles", "loads"]
    assert sorted(i for i in page.ids if i and i.startswith("figure-")) == sorted(f"figure-{slug}" for slug in drawn)
    for slug in drawn:
        assert (pair.parent / "figures" / f"{slug}.png").read_bytes().startswith(b"\x89PNG")
        assert f"(figures/{slug}.png)" in markdown
    assert {p.name for p in pair.parent.iterdir()} == {"figures", "report.html", "report.md", "results.json"}


def test_numbers_of_the_tables_are_printed_in_both_forms(pair):
    results = load_results(pair.parent)
    page, markdown = Page(pair.read_text()), (pair.parent / "report.md").read_text()
    values = [gate.measured for gate in results.verdict.gates if gate.met != "not measured"]
    where = {"site": "write", "arm": "crosscoder", "role": "main", "layer": None}
    for name in ("A", "B"):
        for state in ("trained", *NULLS):
            for key in LAYERS:
                found = results.rows.known_range(key, subject=name, state=state, **where)
                values += [format_range(found).text, format_range(found).detail] if found else []
    for key in ("sharing", "room_log_ratio", "room_beta", "room_delta", "kappa", "universality", "share_of_ln2"):
        values += [format_range(row.value).text for row in results.rows.select(key) if row.value is not None]
    numbers = {value for value in values if value}
    assert len(numbers) > 40
    assert [n for n in numbers if n not in page.text] == []
    assert [n for n in numbers if n not in markdown] == []


def test_loads_fidelity_and_k_of_every_dictionary_are_means_over_trainings():
    rows = TABLES["loads"](made()).rows
    assert len(rows) == 2 * len(LOADS) * (1 + len(NULLS))
    first = rows[0].cells
    assert (first[0].text, first[0].detail) == ("A, trained", "crosscoder, n 1,024")
    cells = [cell for at, cell in made().rows.cells("entropy_load", subject="A", state="trained", k=8).items()
             if at.arm == "crosscoder"]  # fmt: skip
    loads = [value for cell in cells for value in cell.values("entropy_load")]
    assert len(loads) == 5
    assert first[2].text == f"{sum(loads) / 5:.3g}"
    assert first[2].detail == "k 8, 0.120/0.060"
    null = next(row.cells for row in rows if row.cells[0].text.endswith(WORDS["states"]["gaussian"]))
    assert null[2].detail == "k 8, 0.120"  # nobody's tokens have no loss


def test_full_dictionaries_are_not_counted(pair):
    def shown(results: Results) -> set[str]:
        return {row.cells[0].definition for row in TABLES["found"](results).rows}

    assert "chapman" not in shown(made())
    assert {"matched_share", "self_cosine", "stable_share"} <= shown(made())
    assert "Chapman" not in (pair.parent / "report.md").read_text()
    half = change(made(), "dead_share", 0.5, arm="crosscoder", role="main", state="trained")
    assert "chapman" in shown(half)


def test_what_was_cut_is_said():
    said = {row.cells[0].text: row.cells[1].text for row in TABLES["run"](made()).rows}
    assert said["trainings read on the residual stream"] == "none: cut"
    assert said["trainings of A and of B"] == "5"
    assert said["further shapes, for room and loss"] == "2"
    assert said["nulls"].startswith("Gaussian noise, encoder not learnt")


def test_every_gate_and_label_of_the_rule_has_words():
    assert set(WORDS["gates"]) == set(rule.GATES)
    assert all(key in QUANTITIES or key in NOTES for _, key in WORDS["gates"].values())
    for label in (*rule.PREMISES, *rule.LABELS, "pilot", "undecided", "not testable"):
        assert label_term(label) in NOTES


def test_every_term_is_cited_where_it_is_used():
    """By the page of a study, or as the definition of a label that a verdict may have."""
    cited = {label_term(label) for label in (*rule.PREMISES, *rule.LABELS, "pilot", "undecided", "not testable")}
    for study in (made(), PAIR, SINGLE):
        tables = [table(study) for table in ALL_TABLES.values()]
        cited |= set(report.cited_definitions(tables, report.first_screen(study).cited()))
    cited |= {state_term(state) for state in get_args(State)}
    assert not NOTES.keys() - cited


def test_an_older_verdict_is_shown_with_its_own_words(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PICTURES", {})
    path = render_report(PAIR, tmp_path)
    text = Page(path.read_text()).text
    for said in (PAIR.verdict.sentence, "self-cosine", "R inside [1.6, 2.5]", "R inside [0.8, 1.25]"):
        assert said in text
    assert render_report(load_results(tmp_path), tmp_path / "again").read_bytes() == path.read_bytes()


def test_markdown_tables_are_well_formed(pair):
    found = re.findall(r"(?:^\|.*\n)+", (pair.parent / "report.md").read_text(), re.M)
    assert len(found) == len([name for name, table in ALL_TABLES.items() if table(made()).rows])
    for lines in (table.splitlines() for table in found):
        assert re.fullmatch(r"\|( (:--|--:) \|)+", lines[1])
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_a_telephone_shows_all_of_it(pair):
    """Tables scroll in boxes of their own, pictures shrink, and nothing else has a width."""
    source = pair.read_text()
    assert source.count("<table") == source.count('<div class="scroll" tabindex="0"><table')
    style = source[source.index("<style>") : source.index("</style>")]
    assert "figure img { display: block; max-width: 100%; height: auto;" in style
    assert ".scroll { overflow-x: auto;" in style
    assert "pre { overflow-x: auto;" in style
    page = Page(source)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [a for t, a in page.tags]
    for tag, attributes in page.tags:
        assert "style" not in attributes
        assert "width" not in attributes or tag == "img"
    narrow = style[style.index("@media (max-width: 760px)") :]
    assert ".evidence { grid-template-columns: minmax(0, 1fr); }" in narrow
    assert not re.search(r"(?<![-\w])(?:width|min-width): *(?:[4-9]\d\d|\d{4,})px", style.replace(narrow, ""))


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
    assert {"#def-entropy_load", "#def-causal_layers", "#def-feature", "#def-gaussian", "#def-fidelity"} <= set(links)
    for target, title in links.items():
        assert title == definition(target.removeprefix("#def-"))
    defined = {f"#{i}" for i in page.ids if i.startswith("def-")}
    assert defined == set(links)  # none is printed that nothing cites
    assert len(defined) > 40


def test_the_embedded_numbers_are_the_results(pair):
    body = re.search(r'<script type="application/json" id="results">(.*?)</script>', pair.read_text(), re.S)
    assert body is not None
    assert json.loads(body[1]) == json.loads((pair.parent / "results.json").read_text())
    assert document(load_results(pair.parent)) == document(made())


def test_equal_results_give_equal_bytes(single, tmp_path):
    again = render_report(SINGLE, tmp_path)
    for path in sorted(single.parent.rglob("*")):
        if path.is_file():
            assert (again.parent / path.relative_to(single.parent)).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("study", [made(), SINGLE], ids=["undrawn pair", "drawn single"])
def test_strings_of_the_results_cannot_become_markup(study, tmp_path, monkeypatch):
    if study is made():
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


def test_layers_that_features_act_on_have_intervals_where_the_text_s_part_is_known(tmp_path):
    plain, keys = made(), ("causal_layers", "additivity", "conjunctive_share")
    left = [
        replace(row, key=f"{row.key}_left", value=[row.value + (e - 15) / 100 for e in range(31)])
        for row in plain.rows
        if row.key in keys and row.at.state == "trained"
    ]
    known = replace(plain, rows=LongTable((*plain.rows, *left)))
    where = {"subject": "A", "site": "write"}
    values = [1.3 + t / 20 for t in range(5)]
    text = 30 / 31 * sum((e - 15) ** 2 for e in range(31)) / 1e4
    between = np.var(values, ddof=1) / 5
    freedom = (between + text) ** 2 / (between**2 / 4 + text**2 / 30)
    found = beside_nulls(known, "causal_layers", **where)
    assert found["trained"].value == pytest.approx(np.mean(values))
    assert found["trained"].high - found["trained"].value == pytest.approx(
        stats.t.ppf(0.95, freedom) * math.sqrt(between + text)
    )
    ranges = beside_nulls(plain, "causal_layers", **where)
    assert found["gaussian"] == ranges["gaussian"]  # nothing of its text is known
    assert (ranges["trained"].low, ranges["trained"].high) == (1.3, 1.5)
    notes = [WORDS["notes"]["with_text"] in null_table(one).note for one in (plain, known)]
    assert notes == [False, True]
    page = render_report(known, tmp_path).read_text(encoding="utf-8")
    assert WORDS["numbers"]["causal_layers"]["argument_with_text"] in page
    assert WORDS["numbers"]["causal_layers"]["argument"] not in page
