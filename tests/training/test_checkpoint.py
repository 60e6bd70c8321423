"""What a run keeps: damaged checkpoints, lost and torn metrics, parameters that are not finite, and their mend."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from crosscoder import Crosscoder, TopK
from crosscoder.foundation import artifact
from crosscoder.foundation.artifact import MANIFEST, DamagedArtifactError, file_sha256, read_json, write_json
from crosscoder.training import NonFiniteError, TrainConfig, train
from crosscoder.training.checkpoint import checkpoints_in, fault_of, latest_checkpoint

L, D, F = 2, 4, 8
CONFIG = TrainConfig(steps=8, checkpoint_every=2, log_every=1, learning_rate=3e-3)
DATA = [torch.randn(16, L, D, generator=torch.Generator().manual_seed(i)) for i in range(8)]


class KilledError(Exception):
    pass


def make():
    return Crosscoder(n_layers=L, d_model=D, n_features=F, sparsity=TopK(k=2))


def run(folder, *, stop_at=8, resume=False, config=CONFIG):
    def batches(start):
        for i in range(start, 8):
            if i == stop_at:
                raise KilledError
            yield DATA[i]

    return train(make(), batches, config=config, folder=folder, resume=resume, quiet=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


@pytest.fixture
def stopped(tmp_path):
    """Checkpoints of steps 2 and 4, and metrics up to step 5."""
    with pytest.raises(KilledError):
        run(tmp_path / "run", stop_at=5)
    return tmp_path / "run"


def assert_equals(folder, whole):
    for name in ("checkpoints/step-000000008/model.safetensors", "metrics.jsonl", "dictionary/model.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


def reseal(folder):
    manifest = read_json(folder / MANIFEST)
    manifest["files"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in folder.iterdir()
        if path.name != MANIFEST
    }
    write_json(folder / MANIFEST, manifest)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "no manifest", "torn manifest"])
def test_a_damaged_newest_checkpoint_is_passed_over_reached_again_and_replaced(stopped, whole, damage, capsys):
    newest = stopped / "checkpoints" / "step-000000004"
    path = newest / ("optimizer.safetensors" if damage in ("flip", "cut", "remove") else MANIFEST)
    content = path.read_bytes()
    if damage in ("remove", "no manifest"):
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage != "flip" else content[:-1] + bytes([content[-1] ^ 1]))
    run(stopped, resume=True)
    assert "is kept as" in capsys.readouterr().err
    assert_equals(stopped, whole)
    assert [path.name for path in checkpoints_in(stopped / "checkpoints")] == ["step-000000006", "step-000000008"]
    assert len(list((stopped / "checkpoints").glob("damaged-step-000000004-*"))) == 1


def test_damaged_checkpoints_of_later_steps_cost_no_whole_one(stopped, whole):
    """New ones are not the first to be removed."""
    for step in (6, 8):
        later = stopped / "checkpoints" / f"step-{step:09d}"
        shutil.copytree(stopped / "checkpoints" / "step-000000004", later)
        (later / "state.json").write_text("{}")
    with pytest.raises(KilledError):
        run(stopped, resume=True, stop_at=7)
    kept = checkpoints_in(stopped / "checkpoints")
    assert [path.name for path in kept if not fault_of(path)] == ["step-000000004", "step-000000006"]
    run(stopped, resume=True)
    assert_equals(stopped, whole)


def test_a_checkpoint_that_is_cut_while_the_run_goes_on_is_not_counted_among_the_two(tmp_path):
    def batches(start):
        for i in range(start, 8):
            if i == 7:
                (tmp_path / "checkpoints" / "step-000000006" / "model.safetensors").write_bytes(b"")
            yield DATA[i]

    train(make(), batches, config=CONFIG, folder=tmp_path, quiet=True)
    assert [path.name for path in checkpoints_in(tmp_path / "checkpoints")] == ["step-000000004", "step-000000008"]


def test_where_no_checkpoint_can_be_read_nothing_is_begun_again(stopped):
    before = (stopped / "metrics.jsonl").read_bytes()
    for path in checkpoints_in(stopped / "checkpoints"):
        (path / MANIFEST).write_text("{")
    with pytest.raises(DamagedArtifactError, match=r"none of the 2 checkpoints .* can be read; restore one"):
        run(stopped, resume=True)
    with pytest.raises(ValueError, match="already holds step-000000004; pass resume=True"):
        run(stopped)
    assert (stopped / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("damage", ["missing", "null", "no step", "torn", "digit", "latin"])
def test_metrics_come_back_from_the_checkpoint(stopped, whole, damage):
    path = stopped / "metrics.jsonl"
    content = path.read_bytes()
    after = {
        "null": b"null\n" + content,
        "no step": b'{"loss": 1}\n' + content,
        "torn": content[: len(content) // 2],
        "digit": content.replace(b'"loss": 0', b'"loss": 9').replace(b'"loss": 1', b'"loss": 9'),
        "latin": b"\xff" + content,
    }
    if damage == "missing":
        path.unlink()
    else:
        assert after[damage] != content
        path.write_bytes(after[damage])
    result = run(stopped, resume=True)
    assert_equals(stopped, whole)
    assert [entry["step"] for entry in result.metrics] == list(range(1, 9))


def test_metrics_are_whole_at_every_moment_of_a_resume(stopped, monkeypatch):
    """They are written anew beside the old ones; where that fails, the old ones are there."""
    before = (stopped / "metrics.jsonl").read_bytes()
    write = artifact.os.fsync

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact.os, "fsync", full)
    with pytest.raises(OSError, match=r"no room for the rest of .*free on the disk"):
        run(stopped, resume=True)
    monkeypatch.setattr(artifact.os, "fsync", write)
    assert (stopped / "metrics.jsonl").read_bytes() == before
    assert run(stopped, resume=True).steps == 8


@pytest.mark.parametrize("live", ["there", "torn", "missing"])
def test_a_checkpoint_of_the_past_holds_no_metrics_and_what_is_lost_is_said(stopped, whole, live, capsys):
    for path in checkpoints_in(stopped / "checkpoints"):
        (path / "metrics.jsonl").unlink()
        reseal(path)
    path = stopped / "metrics.jsonl"
    if live == "missing":
        path.unlink()
    elif live == "torn":
        path.write_text("null\n" + path.read_text() + '{"step"')
    result = run(stopped, resume=True)
    said = capsys.readouterr().err
    if live == "there":
        assert_equals(stopped, whole)
    else:
        assert {"torn": "2 of 7 lines are not whole", "missing": "is missing, so what was logged before step 4"}[
            live
        ] in said
    assert result.steps == 8


def alter_state(folder, change):
    state = read_json(folder / "state.json")
    change(state)
    write_json(folder / "state.json", state)


def alter_moments(folder, change):
    tensors = load_file(folder / "optimizer.safetensors")
    change(tensors)
    save_file(tensors, folder / "optimizer.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: alter_state(folder, lambda state: state.pop("step")),
        lambda folder: alter_state(folder, lambda state: state.update(step=3)),
        lambda folder: alter_state(folder, lambda state: state.update(tokens="many")),
        lambda folder: (folder / "state.json").write_text("[]"),
        lambda folder: (folder / "state.json").write_text("[" * 100_000),
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "optimizer.safetensors"),
        lambda folder: shutil.copy(folder / "optimizer.safetensors", folder / "model.safetensors"),
        lambda folder: (folder / "optimizer.safetensors").write_bytes(b"{}"),
        lambda folder: alter_moments(folder, lambda tensors: tensors.pop("adam.exp_avg_sq.encoder")),
        lambda folder: (folder / "metrics.jsonl").write_text("null\n"),
    ],
)
def test_a_checkpoint_that_holds_something_else_is_refused_in_one_line(stopped, change):
    folder = latest_checkpoint(stopped / "checkpoints")
    change(folder)
    reseal(folder)
    before = (stopped / "metrics.jsonl").read_bytes()
    with pytest.raises(DamagedArtifactError, match="step-000000004"):
        run(stopped, resume=True)
    assert (stopped / "metrics.jsonl").read_bytes() == before


def test_parameters_that_a_last_step_made_infinite_are_not_kept_as_finished(tmp_path):
    config = TrainConfig(steps=8, checkpoint_every=1, learning_rate=1e39, warmup_steps=0, decay_fraction=0)
    with pytest.raises(NonFiniteError, match=r"step \d+: \w+ holds NaN or infinity"):
        run(tmp_path, config=config)
    assert not (tmp_path / "dictionary").exists()
    assert not checkpoints_in(tmp_path / "checkpoints")
    one = TrainConfig(steps=1, learning_rate=1e39, warmup_steps=0, decay_fraction=0)
    with pytest.raises(NonFiniteError, match="a lower learning_rate"):
        train(make(), DATA, config=one, quiet=True)


def test_a_checkpoint_that_cannot_be_pruned_stays_and_the_run_goes_on(tmp_path, whole, monkeypatch):
    unlink = os.unlink

    def refuse(path, *, dir_fd=None):
        if dir_fd is not None:  # what removes a folder
            raise PermissionError(f"{path} may not be removed")
        unlink(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        run(tmp_path)
    assert_equals(tmp_path, whole)
    there = checkpoints_in(tmp_path / "checkpoints")
    assert [path.name[-1] for path in there] == ["2", "4", "6", "8"]
    assert not any(map(fault_of, there))


def test_lines_are_json(whole):
    assert [json.loads(line)["step"] for line in (whole / "metrics.jsonl").read_text().splitlines()] == [*range(1, 9)]
