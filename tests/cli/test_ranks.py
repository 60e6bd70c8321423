"""`torchrun -m crosscoder train`: the command, folder and files of one process."""

import json
import os
import subprocess
import sys

import pytest

from crosscoder.cli import main
from tests.cli.conftest import FORTY, measured

ONE_GRADIENT = 2e-5  # of forty steps: sums in another order


def torchrun(*arguments, size=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    given = [*command, "-m", "crosscoder", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(given, capture_output=True, text=True, timeout=240, env=environment, check=False)


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(folder, other):
    a, b = read_metrics(folder), read_metrics(other)
    assert [entry.keys() for entry in a] == [entry.keys() for entry in b]
    for one, two in zip(a, b, strict=True):
        assert one == pytest.approx(two, rel=ONE_GRADIENT, abs=1e-6)


def test_a_store_is_read_by_all_ranks_and_the_run_is_that_of_one(pipeline, tmp_path, capsys):
    acts, out = str(pipeline / "acts"), tmp_path / "cc"
    done = torchrun("train", "--activations", acts, "--out", str(out), *FORTY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(out / "dictionary")]  # said once
    assert done.stderr.count("trained on") == 1
    assert_same_run(out, pipeline / "cc")
    names = [{str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()} for f in (out, pipeline / "cc")]
    assert names[0] == names[1]
    assert json.loads((out / "run.json").read_text())["mesh"] == {"features": 2}
    assert measured(out, acts, capsys)["explained_variance"] > 0
    again = torchrun("train", "--activations", acts, "--out", str(out), *FORTY)
    assert again.returncode != 0
    assert again.stderr.count("already holds step-") == 1  # by one rank
    assert "Traceback" not in again.stderr.split("torch")[0]


def test_a_live_harvest_is_shared_out_and_other_commands_are_refused(pipeline, tmp_path, capsys):
    live = ["--subject", str(pipeline / "subject/step-62"), "--tokens-folder", str(pipeline / "tokens")]
    live += ["--max-held-out-tokens", "300", "--window-tokens", "1000", *FORTY]
    assert main(["train", *live, "--out", str(tmp_path / "one")]) == 0
    done = torchrun("train", *live, "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "two", tmp_path / "one")
    refused = torchrun("evaluate", "--activations", str(pipeline / "acts"), "--dictionary", str(tmp_path / "one"))
    assert refused.returncode != 0
    assert refused.stderr.count("`train` alone divides its work") == 1
