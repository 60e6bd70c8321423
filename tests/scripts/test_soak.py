"""Killed at any moment, run again: the bytes of an undisturbed run. The short form of `scripts/soak.py`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from crosscoder.foundation.failpoints import POINTS

ROOT = Path(__file__).parents[2]


def soak(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "soak.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_runs_that_are_killed_at_random_and_at_every_named_point_end_with_the_same_bytes(tmp_path):
    soak("--kills", "2", "--failpoints", "--out", str(tmp_path / "found"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["cells"]) == 8
    assert all(one["kills"] + one["stops"] >= 2 and not one["different"] for one in found["cells"])
    assert found["failpoints"].keys() == POINTS.keys()
    assert not any(one["different"] for one in found["failpoints"].values())
    assert "| crosscoder topk live |" in (tmp_path / "found.md").read_text()


def test_every_failpoint_in_the_code_is_listed_and_every_one_listed_is_in_the_code():
    sources = [*ROOT.glob("crosscoder/**/*.py")]
    used = [name for path in sources for name in re.findall(r'\bfailpoint\("([\w.]+)"\)', path.read_text())]
    assert set(used) == POINTS.keys()
