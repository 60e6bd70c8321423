"""The registry: each number defined once, in whole sentences, and nothing defined that nobody computes."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from crosscoder.report import tables, verdict_tables
from crosscoder.report.answer import WORDS
from crosscoder.report.page import cited_definitions
from crosscoder.results.file import SCHEMA, from_document
from crosscoder.results.quantities import ESTIMATORS, GROUPS, NOTES, QUANTITIES, TERMS, definition, read_once

ROOT = Path(__file__).parents[2]
STUDIES = [
    from_document(value)
    for value in (json.loads(path.read_text()) for path in sorted(ROOT.glob("benchmarks/*/results.json")))
    if value.get("schema") == SCHEMA
]
SHOWN = [
    [tables.measured_table(study, group) for group in WORDS["groups"]]
    + [table(study) for table in (*tables.TABLES.values(), *verdict_tables.VERDICT_TABLES.values())]
    for study in STUDIES
    if study.provenance.kind != "synthetic"
]


@pytest.mark.parametrize("key", [*QUANTITIES, *NOTES])
def test_keys_are_anchors_and_definitions_are_sentences(key):
    sentence = definition(key)
    assert re.fullmatch(r"[A-Za-z][\w.-]{0,63}", key)
    assert re.fullmatch(r"\S.*\.", sentence)
    assert "  " not in sentence


def test_a_key_has_one_meaning(tmp_path):
    assert len(QUANTITIES) == sum(map(len, GROUPS.values()))
    assert len(NOTES) == sum(map(len, TERMS.values()))
    assert not QUANTITIES.keys() & NOTES.keys()
    twice = tmp_path / "twice.toml"
    twice.write_text('[one.alive]\nunit = "x"\n[two.alive]\nunit = "y"\n')
    with pytest.raises(ValueError, match=r"'alive' is defined in \[one\] and in \[two\]"):
        read_once(twice)


def test_every_quantity_is_measured_by_some_committed_study():
    measured = {row.key for study in STUDIES for row in study.rows}
    assert not QUANTITIES.keys() - measured


def test_every_term_is_cited_where_it_is_used():
    cited = {key for shown in SHOWN for key in cited_definitions(shown)}
    assert NOTES.keys() - cited == TERMS["planted"].keys()  # which the reports of planted pairs print


def test_the_identity_of_features_links_to_its_own_definition():
    """Not to the residual stream, which is a residual of another kind."""
    study = next(study for study in STUDIES if study.verdict is not None)
    cells = [row.cells[0] for row in verdict_tables.statistic_table(study).rows]
    linked = {cell.text: cell.definition for cell in cells}["alpha + 2 gamma - 2"]
    assert linked is not None
    assert QUANTITIES[linked].definition.startswith("alpha + 2 gamma - 2: 0 where")
    assert NOTES["residual"].startswith("Site 'residual'")


def test_the_document_is_printed_from_the_registry(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import write_results_docs

    committed = write_results_docs.DOCUMENT.read_text()
    assert committed == write_results_docs.render(committed)
    assert set(GROUPS) <= write_results_docs.TITLES.keys()
    for key in (*QUANTITIES, *NOTES):
        assert re.search(rf"`{key}`|\*\*{key}\*\*", committed)


@cache
def constants() -> dict[str, Any]:
    """Numbers that modules name, wherever they live; those of an `Estimate` as a list."""
    found = {}
    for path in ROOT.glob("crosscoder/*/*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                value = ast.List(node.value.args) if isinstance(node.value, ast.Call) else node.value
                with contextlib.suppress(ValueError):
                    found[node.targets[0].id] = ast.literal_eval(value)
    return found


@pytest.mark.parametrize(
    ("key", "names", "said"),
    [
        ("distinct", ("DUPLICATE",), "above {0}"),
        ("merged", ("LINK",), ">= {0}"),
        ("matched", ("LINK",), ">= {0}"),
        ("chapman", ("LINK",), ">= {0}"),
        ("ultra_dense", ("ULTRA_DENSE",), "more than {0:.0%} of"),
        ("genuine_share", ("GAIN", "DECODABLE"), "J > {0} and every one-layer AUC below {1}"),
        ("cross_layer", ("GAIN", "DECODABLE"), "J > {0} and every one-layer AUC below {1}"),
        ("best_layer_precision", ("RECALL",), "recall {0}:"),
        ("d_eff_debiased", ("SELF_COSINE",), "below {0}"),
        ("exclusive_share", ("EXCLUSIVE",), "more than {0:.0%} of"),
        ("hidden_first", ("DECODABLE",), "below {0} everywhere"),
        ("F_inf", ("NO_SATURATION", "EXTRAPOLATION"), "exceeds {0} or the interval ends beyond {1:g} times"),
        ("recall", ("MATCH",), ">= {0}"),
        ("saturated", ("SATURATED",), "At least {0:.0%}"),
        ("calibration", ("PLANTED_SHARE", "PROBABILITY_RANGE"), "{0:g} n features.*a factor {1:g} and"),
    ],
)
def test_numbers_in_definitions_are_those_of_the_code(key, names, said):
    known = constants()
    assert re.search(said.format(*(known[name] for name in names)).replace("(", r"\("), definition(key))


def test_the_ceiling_of_headroom_is_the_measured_one():
    known = constants()
    value, low, high = known.get("CEILING", known.get("MEASURED"))
    assert f"{value:.3g} [{low:.3g}, {high:.3g}]" in definition("headroom")


def test_the_first_estimator_decides():
    assert ESTIMATORS[0] == "load_debiased"
    assert "primary" in TERMS["estimators"][ESTIMATORS[0]]
