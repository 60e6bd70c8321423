"""`torchrun -m crosscoder train`: the command, folder and files of one process."""

import json
import os
import subprocess
import sys

import pytest
import torch

from crosscoder.cli import main
from crosscoder.dictionary.shard import Shard
from tests.cli.conftest import FORTY, SMALL, K, measured


def torchrun(*arguments, size=2, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    given = [*command, "-m", "crosscoder", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(given, capture_output=True, text=True, timeout=240, env=environment, check=False)


LOGGER = """
import os, pathlib

class init:
    def __init__(self, **_):
        (pathlib.Path(__file__).parent / f"opened by {os.environ['RANK']}").touch()

    def log(self, data):
        pass

    finish = dict
"""


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(folder, other):
    a, b = read_metrics(folder), read_metrics(other)
    assert [entry.keys() for entry in a] == [entry.keys() for entry in b]
    for one, two in zip(a, b, strict=True):
        for name, value in two.items():
            own = one[name]
            if "explained_variance" in name:  # a difference: what is left unexplained has the accuracy
                own, value = 1 - own, 1 - value
            assert own == pytest.approx(value, rel=1e-6), (one["step"], name)


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


def test_ranks_share_out_features_and_tokens(pipeline, tmp_path, capsys):
    acts, out = str(pipeline / "acts"), tmp_path / "cc"
    given = ["train", "--activations", acts, "--out", str(out), *FORTY]
    refused = torchrun(*given, "--data-ranks", "3", size=4)
    assert refused.returncode != 0
    assert refused.stderr.count("4 ranks cannot be parted into 3 groups") == 1
    assert not out.exists()
    (tmp_path / "trackio.py").write_text(LOGGER)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = torchrun(*given, "--data-ranks", "2", "--log-to", "trackio", size=4, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert [one.name for one in tmp_path.glob("opened by *")] == ["opened by 0"]
    assert done.stdout.split() == [str(out / "dictionary")]
    assert_same_run(out, pipeline / "cc")
    names = [{str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()} for f in (out, pipeline / "cc")]
    assert names[0] == names[1]
    assert json.loads((out / "run.json").read_text())["mesh"] == {"features": 2, "data": 2}
    assert main([*given, "--data-ranks", "2"]) == 2
    assert "--data-ranks would change nothing here: torchrun started no other ranks" in capsys.readouterr().err


def test_one_rank_is_one_process(pipeline, tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Shard, "of", lambda *_: pytest.fail("divided over one rank"))
    assert main(["train", "--activations", str(pipeline / "acts"), "--out", str(tmp_path / "cc"), *FORTY]) == 0
    assert not torch.distributed.is_initialized()
    assert "mesh" not in json.loads((tmp_path / "cc/run.json").read_text())
    for name in ("metrics.jsonl", "dictionary/model.safetensors"):
        assert (tmp_path / "cc" / name).read_bytes() == (pipeline / "cc" / name).read_bytes()


def test_a_live_harvest_is_shared_out_and_other_commands_are_refused(pipeline, tmp_path, capsys):
    live = ["--subject", str(pipeline / "subject/step-62"), "--tokens-folder", str(pipeline / "tokens")]
    live += ["--max-held-out-tokens", "300", "--window-tokens", "1000", *SMALL, *FORTY[-6:]]
    live += ["--arm", "layerwise", *K["layerwise"]]
    assert main(["train", *live, "--out", str(tmp_path / "one")]) == 0
    done = torchrun("train", *live, "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert json.loads((tmp_path / "two/run.json").read_text())["mesh"] == {"layers": 2}
    assert main(["train", *live, "--out", str(tmp_path / "three"), "--divide", "layers"]) == 2
    assert "--divide would change nothing here: torchrun started no other ranks" in capsys.readouterr().err
    refused = torchrun("evaluate", "--activations", str(pipeline / "acts"), "--dictionary", str(tmp_path / "one"))
    assert refused.returncode != 0
    assert refused.stderr.count("`train` alone divides its work") == 1
