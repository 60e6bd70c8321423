"""The check against SAELens: its verdicts without SAELens, and a small run where it is installed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
BENCHMARK = SCRIPTS.parent / "benchmarks" / "saelens_check.json"


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import check_common

    return check_common


def row(common, ours, theirs, expect="same"):
    return common.Row(case="a case", quantity="a quantity", ours=ours, theirs=theirs, expect=expect)


@pytest.mark.parametrize(
    ("ours", "theirs", "expect", "passed"),
    [
        (0.801, 0.8, "same", True),
        (0.809, 0.8, "same", False),
        (0.0, 0.0, "same", True),
        (1e-9, 0.0, "same", False),
        (None, 0.8, "same", False),
        (0.5, 0.8, "different", True),
        (0.8, 0.8, "different", False),
        (0.1, None, "shown", None),
    ],
)
def test_a_row_is_judged_by_its_relative_difference(common, ours, theirs, expect, passed):
    assert row(common, ours, theirs, expect).passed is passed


def test_the_report_fails_with_one_bad_row_and_writes_both_files(common, tmp_path, capsys):
    good, bad = row(common, 1.0, 1.0), row(common, 2.0, 1.0)
    assert common.report([good], ["a note"], {}, tmp_path, "check", 1) == 0
    assert common.report([good, bad], [], {}, tmp_path, "check", 1) == 1
    assert "not as expected: a case: a quantity" in capsys.readouterr().out
    record = json.loads((tmp_path / "check.json").read_text())
    assert (record["failed"], [entry["passed"] for entry in record["rows"]]) == (1, [True, False])
    assert "| a quantity | 2 | 1 | 1 | NO |" in (tmp_path / "check.md").read_text()


def test_without_saelens_the_reason_is_said(common):
    with pytest.raises(common.UnavailableError, match=r"install_peers\.sh"):
        common.peer("sae_lens_that_does_not_exist")


def test_the_committed_measurement_has_no_failure():
    record = json.loads(BENCHMARK.read_text())
    assert record["failed"] == 0
    judged = [entry for entry in record["rows"] if entry["expect"] == "same"]
    assert all(abs(entry["ours"] - entry["theirs"]) <= 0.01 * abs(entry["theirs"]) for entry in judged)
    assert {"explained variance", "L0", "loss recovered", "MCC"} <= {entry["quantity"] for entry in judged}


@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="SAELens is not installed")
def test_a_small_run_agrees(tmp_path):
    command = [sys.executable, str(SCRIPTS / "check_saelens.py"), "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert json.loads((tmp_path / "saelens_check.json").read_text())["failed"] == 0
