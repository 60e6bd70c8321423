"""Commands that are stopped: their status, the command line that they print, and that it goes on."""

import json
import os
import shlex
import shutil
import signal

import pytest
import torch

from crosscoder import load_dictionary
from crosscoder.cli import main
from crosscoder.data import shard_files, subject_training
from crosscoder.foundation.lock import locked
from crosscoder.training import trainer
from tests.cli.conftest import FORTY, K


@pytest.fixture(autouse=True)
def _called_crosscoder(monkeypatch):
    monkeypatch.setattr("sys.argv", ["crosscoder"])


def stop_at(monkeypatch, module, point, call):
    """A signal at the `call`-th time that a module passes one of its points."""
    passed = []

    def failpoint(name):
        passed.append(name)
        if name == point and passed.count(point) == call:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(module, "failpoint", failpoint)


def go_on(said):
    """Runs the command line that was printed."""
    line = said.split("go on with:\n")[1].strip()
    program, *arguments = shlex.split(line)
    assert program == "crosscoder"
    return main(arguments)


def weights(folder):
    return (folder / "dictionary" / "model.safetensors").read_bytes()


def test_train_stops_with_75_and_prints_what_goes_on(pipeline, tmp_path, monkeypatch, capsys):
    out = tmp_path / "with space"
    arguments = ["train", "--activations", str(pipeline / "acts"), "--out", str(out), *FORTY]
    stop_at(monkeypatch, trainer, "train.step", 13)
    assert main(arguments) == 75
    said = capsys.readouterr().err
    assert "stopped by SIGTERM after 13 of 40 steps; kept in" in said
    assert f"--out '{out}'" in said
    assert said.strip().endswith("--resume")
    assert "Traceback" not in said
    monkeypatch.setattr(trainer, "failpoint", lambda _: None)
    assert go_on(said) == 0
    assert weights(out) == weights(pipeline / "cc")
    assert (out / "metrics.jsonl").read_bytes() == (pipeline / "cc" / "metrics.jsonl").read_bytes()
    with locked(out):
        assert main([*arguments, "--resume"]) == 2
    assert "is in use by process" in capsys.readouterr().err


def test_harvest_and_train_subject_stop_and_go_on_by_themselves(pipeline, tmp_path, monkeypatch, capsys):
    tokens = ["--tokens-folder", str(pipeline / "tokens")]
    given = {
        "harvest": [
            *["harvest", "--subject", str(pipeline / "subject/step-62"), *tokens, "--out", str(tmp_path / "acts")],
            *["--max-tokens", "3000", "--max-held-out-tokens", "500"],
        ],
        "subject": [
            *["train-subject", *tokens, "--out", str(tmp_path / "subject"), "--n-layers", "2", "--d-model", "32"],
            *["--tokens", "8000", "--batch", "4", "--n-checkpoints", "2"],
        ],
    }
    monkeypatch.setattr("crosscoder.data.stream.HARVEST_TOKENS", 512)
    for name, module, point in (("harvest", shard_files, "shard.batch"), ("subject", subject_training, "subject.step")):
        stop_at(monkeypatch, module, point, 2)
        assert main(given[name]) == 75
        said = capsys.readouterr().err
        assert "kept in" in said
        monkeypatch.setattr(module, "failpoint", lambda _: None)
        assert go_on(said) == 0
        capsys.readouterr()
    weights = [(root / "subject/step-62/model.safetensors").read_bytes() for root in (pipeline, tmp_path)]
    assert weights[0] == weights[1]
    assert main(given["harvest"]) == 0
    assert "holds these activations already" in capsys.readouterr().err


def test_a_finished_run_takes_more_steps(pipeline, tmp_path, capsys):
    shutil.copytree(pipeline / "cc", tmp_path / "cc")
    more = [*FORTY]
    more[more.index("--budget.steps") + 1] = "60"
    arguments = ["train", "--activations", str(pipeline / "acts"), "--out", str(tmp_path / "cc"), *more]
    assert main(arguments) == 2
    assert "pass resume=True" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    said = capsys.readouterr().err
    assert "40 steps become 60, of which 40 are done; the learning rate rises again over 8 steps" in said
    assert "trained on 7,6" in said  # 60 batches of 128, less outliers
    last = json.loads((tmp_path / "cc" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 60
    assert weights(tmp_path / "cc") != weights(pipeline / "cc")
    assert main([*arguments, "--resume"]) == 0  # and once more is nothing


def test_a_new_run_starts_from_a_finished_dictionary(pipeline, tmp_path, capsys):
    start = pipeline / "cc" / "dictionary"
    few = ("--budget.steps", "20", "--budget.batch", "128", "--start-from", str(start), "--checkpoint-every", "10")
    arguments = ["train", "--activations", str(pipeline / "acts"), "--out", str(tmp_path / "on"), *few]
    assert main([*arguments, *K["crosscoder"]]) == 2
    assert "--budget.k-crosscoder would change nothing here: the dictionary of --start-from" in capsys.readouterr().err
    assert main(arguments) == 0
    before, after = load_dictionary(start), load_dictionary(tmp_path / "on" / "dictionary")
    assert after.config == before.config
    assert torch.equal(after.input_scale, before.input_scale)
    assert not torch.equal(after.encoder, before.encoder)
    steps = [json.loads(line) for line in (tmp_path / "on" / "metrics.jsonl").read_text().splitlines()]
    first = json.loads((pipeline / "cc" / "metrics.jsonl").read_text().splitlines()[0])
    assert steps[0]["step"] == 1
    assert steps[0]["loss"] < first["loss"]
    assert main([*arguments, "--resume"]) == 0
    capsys.readouterr()
    other = [part for part in arguments if part not in ("--start-from", str(start))]
    assert main([*other, "--resume", "--budget.n-features", "64", *K["crosscoder"]]) == 2
    assert "data: checkpoint" in capsys.readouterr().err  # began from somewhere else


def test_the_help_says_what_a_status_means(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "75 stopped and can be gone on with, 130 stopped at once" in shown
