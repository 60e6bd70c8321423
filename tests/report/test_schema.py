"""The results schema: a plausible study passes, and every kind of damage is refused by its path."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from study_results import make_results, span

from crosscoder.results.schema import validate_results


def reach(results: Any, path: list[Any]) -> Any:
    for step in path:
        results = results[step]
    return results


def set_at(*path: Any, to: Any) -> Any:
    def damage(results: Any) -> None:
        reach(results, list(path[:-1]))[path[-1]] = to

    return damage


def drop(*path: Any) -> Any:
    def damage(results: Any) -> None:
        del reach(results, list(path[:-1]))[path[-1]]

    return damage


@pytest.mark.parametrize("subjects", [("A", "B"), ("S",)])
def test_a_plausible_study_passes(subjects):
    validate_results(make_results(subjects))


def test_a_spread_cell_may_name_its_role():
    results = make_results()
    results["spread"]["cells"][0]["role"] = "size"
    validate_results(results)
    results["spread"]["cells"][0]["role"] = "other"
    with pytest.raises(ValueError, match=r"spread\.cells\[0\]\.role"):
        validate_results(results)


def test_empty_lists_pass():
    results = make_results()
    results["counts"] |= {"table": [], "cells": []}
    results["spread"]["cells"] = results["quality"]["cells"] = results["matched"]["items"] = []
    results["subjects"]["A"]["curve"] = []
    validate_results(results)


CELL = ("counts", "cells", 0)
DAMAGE = {
    "a missing top-level key": (drop("spread"), "results: expected the key 'spread'"),
    "a ninth top-level key": (set_at("opinion", to={}), "unknown key 'opinion'"),
    "a verdict without a version": (set_at("verdict", to={}), "expected the key 'version'"),
    "a missing key": (drop(*CELL, "p_min"), r"results\.counts\.cells\[0\]: expected the key 'p_min'"),
    "an unknown key": (
        set_at(*CELL, "colour", to=1),
        r"results\.counts\.cells\[0\]: got the unknown key 'colour'",
    ),
    "NaN": (
        set_at(*CELL, "per_seed", 1, "entropy_load", to=float("nan")),
        r"per_seed\[1\]\.entropy_load.*nan",
    ),
    "infinity": (
        set_at("subjects", "B", "held_out_loss", to=float("inf")),
        r"subjects\.B\.held_out_loss.*inf",
    ),
    "a huge integer": (set_at(*CELL, "k", to=10**400), r"cells\[0\]\.k: expected a whole number"),
    "a string for a number": (
        set_at(*CELL, "n_features", to="many"),
        r"n_features: expected a whole.*'many'",
    ),
    "true for a number": (set_at(*CELL, "k", to=True), r"cells\[0\]\.k: .*got True"),
    "a share above one": (
        set_at(*CELL, "per_seed", 0, "dead_share", to=1.5),
        r"dead_share: .*between 0 and 1.*1\.5",
    ),
    "a table for a list": (set_at(*CELL, "per_seed", to={}), r"cells\[0\]\.per_seed: expected a list, got"),
    "no seed": (set_at(*CELL, "per_seed", to=[]), r"cells\[0\]\.per_seed: expected a list of at least 1"),
    "a site that is none": (set_at(*CELL, "site", to="head"), r"cells\[0\]\.site: expected one of .*'head'"),
    "an unknown subject": (set_at(*CELL, "subject", to="Z"), r"cells\[0\]\.subject: expected one of .*'Z'"),
    "one sentence": (set_at("counts", "answer", to=["Yes."]), r"counts\.answer: expected a list of 2"),
    "an unknown definition": (
        set_at("counts", "table", 2, "definition", to="nothing"),
        r"counts\.table\[2\]\.definition: expected null or one of .*'nothing'",
    ),
    "a value for no subject": (
        set_at("counts", "table", 0, "values", "Z", to=span(1.0)),
        r"values: expected only.*'Z'",
    ),
    "low above high": (
        set_at("counts", "table", 0, "ratio", to={"mean": 1, "low": 2, "high": 1}),
        r"table\[0\]\.ratio: expected low <= high",
    ),
    "a long heat map": (
        set_at("spread", "cells", 0, "heatmap", to=[[0.125] * 8] * 201),
        r"spread\.cells\[0\]\.heatmap: expected at most 200",
    ),
    "a heat map row of another length": (
        set_at("spread", "cells", 0, "heatmap", 3, to=[1.0]),
        r"heatmap\[3\]: expected 8 shares",
    ),
    "a heat map row that is no profile": (
        set_at("spread", "cells", 0, "heatmap", 3, to=[0.5] * 8),
        r"heatmap\[3\]: expected shares that sum to 1, got 4",
    ),
    "a histogram of another length": (
        set_at("spread", "cells", 0, "per_seed", 0, "rho_histogram", "counts", to=[1]),
        r"rho_histogram\.counts: expected 20 counts",
    ),
    "edges that fall": (
        set_at("spread", "cells", 0, "per_seed", 0, "rho_histogram", "edges", 3, to=0.9),
        r"rho_histogram\.edges: expected increasing",
    ),
    "a key that is markup": (
        set_at("definitions", "<b>", to="bold"),
        r"results\.definitions: expected keys of letters",
    ),
    "another schema": (set_at("provenance", "schema", to="other/2"), r"provenance\.schema: expected one of"),
    "NaN in the configuration": (
        set_at("provenance", "config", "seed", to=float("nan")),
        r"provenance\.config\.seed: expected a finite",
    ),
    "a lone surrogate": (set_at("subjects", "A", "name", to="\ud800"), r"subjects\.A\.name: .*UTF-8"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_by_its_path(name):
    damage, message = DAMAGE[name]
    results = copy.deepcopy(make_results())
    damage(results)
    with pytest.raises(ValueError, match=message):
        validate_results(results)


def test_something_else_than_a_table_is_refused():
    with pytest.raises(ValueError, match=r"^results: expected a table .*got \[\]"):
        validate_results([])


def test_deep_nesting_is_refused():
    results = make_results()
    nested: Any = 0
    for _ in range(50):
        nested = [nested]
    results["provenance"]["config"] = nested
    with pytest.raises(ValueError, match="at most 32 levels"):
        validate_results(results)


def test_a_long_value_is_cut_in_the_message():
    results = make_results()
    results["subjects"]["A"]["n_layers"] = "x" * 10_000
    with pytest.raises(ValueError, match="n_layers") as caught:
        validate_results(results)
    assert len(str(caught.value)) < 300
