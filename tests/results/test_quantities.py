"""The registry: each number defined once, in whole sentences, and nothing defined that nobody computes."""

from __future__ import annotations

import ast
import contextlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from crosscoder.measure.fidelity import TARGETS
from crosscoder.results.quantities import GROUPS, NOTES, QUANTITIES, TERMS, definition, read_once

ROOT = Path(__file__).parents[2]


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
        ("conjunctive_share", ("BEYOND",), "below 1 / {0}:"),
        ("redundant_share", ("BEYOND",), "above {0}:"),
        ("twin_share", ("ALIKE", "JOINT", "JOINT_OF_TWO"), "cosine {0} or.*cosine of {1} or.*({2} where"),
        ("d_eff_debiased", ("SELF_COSINE",), "below {0}"),
        ("recall", ("MATCH",), ">= {0}"),
        ("saturated", ("SATURATED",), "At least {0:.0%}"),
        ("calibration", ("GAMMA",), "windows of L.{0} layers"),
    ],
)
def test_numbers_in_definitions_are_those_of_the_code(key, names, said):
    known = constants()
    numbers = said.format(*(known[name] for name in names)).replace("(", r"\(")
    assert re.search(re.sub(r"\b0\.", r"0?\.", numbers), definition(key))


def test_the_ceiling_of_headroom_is_the_measured_one():
    known = constants()
    value, low, high = known.get("CEILING", known.get("MEASURED"))
    assert f"{value:.3g} [{low:.3g}, {high:.3g}]" in definition("headroom")


def test_the_targets_of_fidelity_are_those_of_the_code():
    for values in TARGETS.values():
        said = " and ".join(f"{value:.3f}".rstrip("0").ljust(4, "0").lstrip("0") for value in values)
        assert f"{said})" in definition("fidelity")
