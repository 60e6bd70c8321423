"""Killed at any moment, run again: the bytes of an undisturbed run. The short form of `scripts/soak.py`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from crosscoder.foundation.failpoints import POINTS

ROOT = Path(__file__).parents[2]


def soak(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "soak.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_runs_that_are_killed_at_random_and_at_every_named_point_end_with_the_same_bytes(tmp_path):
    # Half of the cells, in which every two of their parts meet; `scripts/soak.py` has all.
    cells = ["crosscoder topk live", "crosscoder batch_topk store", "layerwise topk store", "layerwise batch_topk live"]
    soak("--kills", "2", "--cells", *cells, "--failpoints", "--out", str(tmp_path / "found"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["cells"]) == 4
    assert all(one["kills"] + one["stops"] >= 2 and not one["different"] for one in found["cells"])
    assert found["failpoints"].keys() == POINTS.keys()
    assert not any(one["different"] for one in found["failpoints"].values())
    assert "| crosscoder topk live | 1 |" in (tmp_path / "found.md").read_text()


def test_two_ranks_that_are_killed_together_or_one_by_one_end_with_the_same_bytes(tmp_path):
    soak("--ranks", "2", "--kills", "4", "--cells", "layerwise batch_topk live", "--out", str(tmp_path / "found"))
    found = json.loads((tmp_path / "found.json").read_text())
    (cell,) = found["cells"]
    assert (cell["ranks"], cell["kills"] + cell["stops"], cell["different"]) == (2, 4, [])


@pytest.fixture
def script(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import soak

    return soak


def test_ranks_that_do_not_end_as_one_are_a_fault(script, tmp_path):
    run = script.Run.__new__(script.Run)
    run.folder, run.home, run.size = tmp_path / "run-0", tmp_path, 2
    (tmp_path / "run-0/run/checkpoints/step-000000008").mkdir(parents=True)
    for rank in range(2):
        said = "stopped by SIGTERM after 8 of 24 steps; kept in /a/step-000000008"
        (tmp_path / f"stopped-{rank}").write_text(said)
    assert run.fault([75, 75], is_stop=True) == ""
    assert run.fault([-9, script.LOST], is_stop=False) == ""
    assert "none was gone" in run.fault([0, script.LOST], is_stop=False)
    assert "SIGTERM" in run.fault([75, script.LOST], is_stop=True)
    (tmp_path / "stopped-1").write_text(said.replace("after 8", "after 9"))
    assert "SIGTERM" in run.fault([75, 75], is_stop=True)


def test_what_is_done_again_takes_the_place_of_what_was_known(script):
    def row(cell, ranks, kills):
        return {"cell": cell, "ranks": ranks, "kills": kills}

    made = {"ranks": 2, "device": "a", "seconds": 10}
    before = {"cells": [row("x", 1, 1), row("x", 2, 1)], "failpoints": {"p": 1, "q": 1}, "made": [made]}
    found = script.merged(before, [row("x", 2, 5)], {"q": 2}, made)
    assert found["cells"] == [row("x", 1, 1), row("x", 2, 5)]
    assert found["failpoints"] == {"p": 1, "q": 2}
    assert found["made"] == [{**made, "seconds": 20}]


def test_every_failpoint_in_the_code_is_listed_and_every_one_listed_is_in_the_code():
    sources = [*ROOT.glob("crosscoder/**/*.py")]
    used = [name for path in sources for name in re.findall(r'\bfailpoint\("([\w.]+)"\)', path.read_text())]
    assert set(used) == POINTS.keys()
