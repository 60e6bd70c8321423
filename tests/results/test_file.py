"""The results file: what was written is read again, and every kind of damage is refused by its path."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest

from crosscoder.foundation.artifact import SEAL, seal_of
from crosscoder.results.file import (
    OLD_SCHEMA,
    SCHEMA,
    document,
    from_blocks,
    from_document,
    load_results,
    read_rows,
    save_results,
    to_blocks,
    write_rows,
)
from crosscoder.results.table import Estimate, LongTable, Place, Row, rows_at
from crosscoder.results.verdict import Asked

STUDIES = [Path(__file__).parents[2] / "benchmarks" / name for name in ("default-study", "smollm2-135m")]
AT = Place(subject="A", training_seed=0, state="trained", site="write", arm="crosscoder", role="main")
OLD = json.loads((STUDIES[0] / "results.json").read_text())
WRITTEN = json.loads(json.dumps(document(load_results(STUDIES[0]))))
"""As of today's schema, whichever it was written in."""


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_committed_studies_are_read_and_written_alike(folder):
    results = load_results(folder)
    written = json.loads(json.dumps(document(results)))
    assert written["schema"] == SCHEMA
    assert from_document(written) == results
    kept = json.loads((folder / "results.json").read_text())
    if kept["schema"] == SCHEMA:
        assert kept.pop(SEAL, None) in (None, seal_of(written))
        assert written == kept


def test_results_of_version_3_lose_what_is_not_measured_any_more_and_say_so(capsys):
    at = {"subject": "A", "training_seed": 0, "site": "write"}
    gone = [{"at": at, "values": {"gamma": 0.5, "room": 3.0}}, {"at": {**at, "other": "B0"}, "values": {"alive": 3}}]
    old = {**WRITTEN, "schema": OLD_SCHEMA, "rows": [*WRITTEN["rows"], *gone]}
    old["provenance"] = {**WRITTEN["provenance"], "schema": OLD_SCHEMA}
    rows = from_document(old).rows
    assert len(rows) == len(from_document(WRITTEN).rows) + 1
    assert rows.one("room", subject="A", estimator=None) == 3.0
    assert "2 quantities that are not measured any more are left out" in capsys.readouterr().err


def test_a_verdict_of_version_2_has_the_form_of_todays():
    old = {
        "version": "crosscoder.verdict/2",
        "label": "undecided",
        "sentence": "Undecided.",
        "kinds": ["split"],
        "universality": "high",
        "reasons": ["R crosses"],
        "notes": ["a note"],
        "rule": {"loss_gap": 0.01},
        "gates": [{"name": "loss gap", "requirement": "at most 0.01", "value": None, "passed": None}],
        "conditions": [{"hypothesis": "H0", "statistic": "R", "requirement": "in", "measured": "1", "met": False}],
    }
    verdict = from_document({**WRITTEN, "verdict": old}).verdict
    assert verdict.legs == {"H0": (Asked("R", "in", "1", "missed"),)}
    assert verdict.gates == (Asked("loss gap", "at most 0.01", "not measured", "not measured"),)
    assert verdict.notes == ("a note", "universality: high", "kind: split")


def test_rows_of_a_cell_come_back_as_they_were(tmp_path):
    rows = rows_at(AT, {"alive": 3, "chapman": Estimate(1.0, 0.5, 2.0), "dead_share": float("nan")})
    rows += [Row(AT, "room", None, "not identified"), Row(AT, "layers", ["1", "2"]), Row(AT, "saturated", True)]
    write_rows(tmp_path / "cell.json", rows)
    assert read_rows(tmp_path / "cell.json") == rows
    assert {row.key: row.value for row in rows}["dead_share"] is None


def test_results_come_back_as_they_were(tmp_path):
    known = load_results(STUDIES[0])
    in_no_order = {"survival": 0.5, "alive": 3, "chapman": Estimate(1.0, 0.5, 2.0)}
    rows = rows_at(replace(AT, n_features=7), in_no_order)
    results = replace(known, rows=LongTable((*rows, *known.rows)[::-1]))
    save_results(results, tmp_path)
    assert load_results(tmp_path) == results


def test_a_cell_of_another_schema_is_refused_with_the_mend(tmp_path):
    (tmp_path / "cell.json").write_text('{"schema": "crosscoder.cell/2", "rows": []}')
    with pytest.raises(
        ValueError, match=r"cell\.schema: expected 'crosscoder.cell/4', got 'crosscoder.cell/2'; delete"
    ):
        read_rows(tmp_path / "cell.json")


@pytest.mark.parametrize(
    ("at", "values", "message"),
    [
        ({}, {"alive": "many"}, r"rows\[0\]\.values\.alive: expected a valid integer, got 'many'"),
        ({}, {"alive": 3.5}, "expected a valid integer, got 3.5"),
        ({}, {"alive": True}, "expected a valid integer, got True"),
        ({}, {"alive": 10**400}, r"values\.alive: expected less than 10+, got 10+\.\.\."),
        ({}, {"allive": 3}, "'allive' is no quantity; the nearest is 'alive'"),
        ({}, {"dead_share": 1.5}, r"dead_share: expected less than or equal to 1[.0]+1, got 1\.5"),
        ({}, {"sharing": float("nan")}, r"sharing: expected a finite number, got nan"),
        ({}, {"sharing": float("inf")}, r"sharing: expected a finite number, got inf"),
        ({}, {"sharing": {"value": 1, "low": 2, "high": 3}}, None),
        ({}, {"sharing": {"value": 1, "low": 3, "high": 2}}, "sharing: the interval runs from 3.0 down to 2.0"),
        ({}, {"sharing": {"value": 1, "low": "0", "high": 2}}, r"sharing\.low: expected a valid number, got '0'"),
        ({}, {"sharing": {"value": 1, "low": 1, "high": 1, "confidence": 0.8}}, r"sharing\.confidence: Unexpected"),
        ({}, {"sharing": {"missing": 3}}, r"sharing\.missing: expected a valid string, got 3"),
        ({}, {"name": 3}, "expected a valid string, got 3"),
        ({}, {"name": "\ud800"}, "unable to parse raw data as a unicode string"),
        ({}, {"saturated": 1}, "expected a valid boolean, got 1"),
        ({}, {"rho_histogram": [1]}, "List should have at least 20 items"),
        ({}, {"rho_histogram": ["x"] * 20}, r"rho_histogram\[0\]: expected a valid integer or"),
        ({}, {"layers": [1, 2]}, r"layers\[0\]: expected a valid string, got 1"),
        ({}, {"profile_heatmap": [[0.5, 0.5], [1.0]]}, "expected lists of equally many numbers"),
        ({"site": "head"}, {}, r"rows\[0\]\.at\.site: expected 'write' or 'residual', got 'head'"),
        ({"k": "4"}, {}, r"rows\[0\]\.at\.k: expected a valid integer, got '4'"),
        ({"k": True}, {}, r"rows\[0\]\.at\.k: .*got True"),
        ({"colour": 1}, {}, r"rows\[0\]\.at\.colour"),
        ({"subject": "<b>"}, {}, r"rows\[0\]\.at\.subject: .*pattern"),
        ({"layer": "x" * 65}, {}, r"rows\[0\]\.at\.layer"),
    ],
)
def test_a_damaged_block_is_refused_by_its_path(at, values, message):
    blocks = [{"at": at, "values": values}]
    if message is None:
        assert len(from_blocks(blocks)) == len(values)
        return
    with pytest.raises(ValueError, match=message) as caught:
        from_blocks(blocks)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("blocks", [{}, [3], [{"at": {}}], [{"at": {}, "values": []}], [{"at": 3, "values": {}}]])
def test_blocks_of_another_form_are_refused(blocks):
    with pytest.raises(ValueError, match=r"^rows"):
        from_blocks(blocks)


def test_a_key_stands_once_at_a_place():
    with pytest.raises(ValueError, match="alive stands twice"):
        to_blocks([Row(AT, "alive", 3), Row(AT, "alive", 4)])
    block = {"at": {"subject": "A"}, "values": {"alive": 3}}
    with pytest.raises(ValueError, match=r"rows\[2\]\.values: alive stands twice"):
        from_blocks([block, {"at": {}, "values": {}}, block])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema",), "other/1", "it is another kind of artifact"),
        (("opinion",), {}, r"results\.opinion: Extra inputs are not permitted"),
        (("rows",), {}, r"results\.rows: expected a valid list, got {}"),
        (("verdict", "label"), 9, r"results\.verdict\.label: .*got 9"),
        (("verdict", "gates", 0, "met"), "so-so", r"results\.verdict\.gates\[0\]\.met"),
        (("verdict", "colour"), 1, r"results\.verdict\.colour"),
        (("verdict", "rule", "loss_gap"), float("inf"), r"results\.verdict\.rule\.loss_gap: expected a finite"),
        (("provenance", "kind"), "poem", r"results\.provenance\.kind: .*got 'poem'"),
        (("provenance", "seconds"), {"<b>": 1.0}, r"results\.provenance\.seconds"),
        (("provenance", "config", "seed"), float("nan"), r"results\.provenance\.config\.seed: expected a finite"),
        (
            ("provenance", "config"),
            json.loads("[" * 400 + "]" * 400),
            r"results\.provenance\.config.*maximum validation depth",
        ),
    ],
)
def test_a_damaged_file_is_refused_by_its_path(path, value, message):
    damaged = copy.deepcopy(WRITTEN)
    here = damaged
    for step in path[:-1]:
        here = here[step]
    here[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        from_document(damaged)


def test_version_2_is_named_and_something_else_refused():
    with pytest.raises(ValueError, match=r"got 'crosscoder.results/2'; crosscoder 0\.1 wrote it and reads it"):
        from_document({"provenance": {"schema": "crosscoder.results/2"}, "counts": {}})
    with pytest.raises(ValueError, match=r"^results: expected a valid dictionary, got \[\]"):
        from_document([])


def test_rows_of_an_unknown_subject_are_refused():
    stranger = {"at": {"subject": "Z"}, "values": {"room": None}}
    with pytest.raises(ValueError, match=r"rows of {'Z'}; expected subjects whose layers are known: \['A', 'B', 'C'\]"):
        from_document({**WRITTEN, "rows": [*WRITTEN["rows"], stranger]})


def test_a_subject_without_its_sizes_is_refused():
    lacking = copy.deepcopy(WRITTEN)
    at_b = next(block for block in lacking["rows"] if block["at"] == {"subject": "B"})
    at_b["values"]["d_model"] = None
    with pytest.raises(ValueError, match=r"d_model of B is missing; expected a whole number"):
        from_document(lacking)
    alone = document(load_results(STUDIES[1]))
    with pytest.raises(ValueError, match=r"the subjects are \('S',\); expected \('A', 'B'\) where there is a verdict"):
        from_document({**alone, "verdict": WRITTEN["verdict"]})


def test_estimates_refuse_to_be_the_wrong_way_round():
    with pytest.raises(ValueError, match="from 2 down to 1"):
        Estimate(1.5, 2, 1)
    assert Estimate(1, 0.8, 1.25).inside(0.8, 1.25)
    assert not Estimate(1, 0.79, 1.25).inside(0.8, 1.25)


def test_ranges_over_seeds_take_every_seed_once_or_say_nothing():
    table = LongTable(tuple(Row(Place(subject="A", seed=s), "sharing", v) for s, v in enumerate((1.0, 2.0, 6.0))))
    assert table.seed_range("sharing") == Estimate(3.0, 1.0, 6.0)
    broken = LongTable((*table, Row(Place(subject="A", seed=3), "sharing", None)))
    assert broken.seed_range("sharing") is None
    assert broken.known_range("sharing") == Estimate(3.0, 1.0, 6.0)
    assert table.seed_range("room") is None
    with pytest.raises(ValueError, match="3 values of sharing where one was asked for"):
        table.one("sharing")


def test_dictionaries_are_no_planted_worlds():
    one = Place(**{**AT.known(), "n_features": 8, "k": 2, "seed": 0})
    world = Place(subject="A", role="calibration", seed=0, n_features=8, k=2)
    table = LongTable(tuple(Row(at, "alive", 1) for at in (one, replace(one, seed=1), world)))
    assert [len(cell) for cell in table.cells().values()] == [2]
    assert table.cells("distinct") == table.cells(site="residual") == {}
