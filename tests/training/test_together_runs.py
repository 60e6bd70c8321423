"""Ranks that divide a dictionary keep the files of one, and stop, fail and go on as one."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from crosscoder.dictionary import load_dictionary
from crosscoder.dictionary.division import divided, shard_for
from crosscoder.foundation.artifact import read_json
from crosscoder.foundation.failpoints import _Armed
from crosscoder.foundation.ranks import Ranks
from crosscoder.foundation.signals import Stopped
from crosscoder.training import train
from tests.divided import CONFIG, DATA, STEPS, assert_close, new
from tests.ranks import on_ranks


def run(
    ranks, folder, stop_at=STEPS, *, resume=True, act=None, case="bank BatchTopK", along="features", config=CONFIG,
    n_data=1,
):  # fmt: skip
    def batches(start):
        for index in range(start, STEPS):
            if act is not None and index == stop_at:
                act(ranks)
            elif index == stop_at:
                raise InterruptedError
            yield DATA[index]

    dictionary = new(case)
    if ranks.size > 1:
        dictionary = divided(dictionary, shard_for(type(dictionary), dictionary.config, ranks.mesh(n_data), along))
    monitor = {"monitor": lambda whole: {"ev": whole(DATA[0]).recon.sum().item()}, "monitor_every": 4}
    return train(dictionary, batches, config=config, folder=folder, resume=resume, quiet=True, **monitor).metrics


def until(ranks, folder, stop_at, along="features", config=CONFIG, n_data=1):
    try:
        return run(ranks, folder, stop_at, along=along, config=config, n_data=n_data)
    except InterruptedError:
        return None


def test_a_run_goes_on_with_other_ranks_that_divide_it_otherwise(tmp_path):
    config = replace(CONFIG, frozen="soft_decoder")
    until(Ranks(), tmp_path / "a", 2, config=config)
    for stop_at, size, n_data, along in ((3, 4, 2, "features"), (4, 3, 1, "layers"), (6, 4, 2, "layers")):
        on_ranks(size, until, tmp_path / "a", stop_at, along, config, n_data)
        mesh = {along: size // n_data, **({"data": n_data} if n_data > 1 else {})}
        assert read_json(tmp_path / "a/run.json")["mesh"] == mesh
    on_ranks(2, until, tmp_path / "a", 7, "features", config)
    assert read_json(tmp_path / "a/run.json")["mesh"] == {"features": 2}
    metrics = run(Ranks(), tmp_path / "a", config=config)
    whole = run(Ranks(), tmp_path / "b", config=config)
    assert_close(metrics, whole)
    newest = f"checkpoints/step-{STEPS:09d}"
    for file in (f"{newest}/optimizer.safetensors", f"{newest}/model.safetensors", "dictionary/model.safetensors"):
        a, b = (load_file(tmp_path / run_name / file) for run_name in ("a", "b"))
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            assert torch.allclose(a[name].double(), b[name].double(), atol=1e-6, rtol=1e-4), (file, name)


def begun_and_gone_on(ranks, folder, along, n_data):
    until(ranks, folder / "a", 5, along, n_data=n_data)
    whole = {"along": along, "n_data": n_data}
    return run(ranks, folder / "a", **whole), run(ranks, folder / "b", **whole)


@pytest.mark.parametrize(("along", "n_data"), [("features", 1), ("layers", 1), ("features", 2), ("layers", 2)])
def test_ranks_go_on_to_the_same_bits_and_leave_the_files_of_one(tmp_path, along, n_data):
    (stopped, whole), *_ = on_ranks(2 * n_data, begun_and_gone_on, tmp_path, along, n_data)
    assert stopped == whole
    run(Ranks(), tmp_path / "c")
    files = [
        sorted(str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*") if path.is_file())
        for name in "abc"
    ]
    assert files[0] == files[1] == files[2]
    same = ("dictionary/model.safetensors", "metrics.jsonl", f"checkpoints/step-{STEPS:09d}/optimizer.safetensors")
    for name in same:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        if along == "layers" and n_data == 1 and name != "metrics.jsonl":  # no sum of theirs is another
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    assert load_dictionary(tmp_path / "a/dictionary")(DATA[0]).recon.shape == DATA[0].shape


def one_is_told_to_stop(ranks, folder, n_data):
    def act(of):
        if of.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        run(ranks, folder, 3, act=act, n_data=n_data)
    except Stopped as stop:
        return str(stop), run(ranks, folder, n_data=n_data), run(ranks, folder.parent / "whole", n_data=n_data)
    return "not stopped"


@pytest.mark.parametrize("n_data", [1, 3])
def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_saves_once(tmp_path, n_data):
    found = on_ranks(3, one_is_told_to_stop, tmp_path / "run", n_data)
    for rank, (said, metrics, whole) in enumerate(found):
        assert "after 4 of 8 steps; kept in" in said
        assert ("SIGTERM" if rank == 1 else "a signal to rank 1") in said
        assert metrics == whole


def killed(ranks, folder):
    run(ranks, folder, 5, act=lambda of: os.kill(os.getpid(), signal.SIGKILL) if of.rank == 1 else None)


def killed_in_a_mesh(ranks, folder):
    act = lambda of: os.kill(os.getpid(), signal.SIGKILL) if of.rank == 3 else None
    run(ranks, folder, 5, act=act, n_data=2)


def raising(ranks, folder):
    def act(of):
        if of.rank == 2:
            raise ArithmeticError("of rank 2")

    run(ranks, folder, 5, act=act)


def killed_while_it_saves(ranks, folder):
    if ranks.is_first:
        _Armed.name, _Armed.left, _Armed.action = "save.manifest", 2, "kill"
    run(ranks, folder, along="layers")


@pytest.mark.parametrize(
    ("fault", "others"),
    [(killed, [0, 2]), (killed_in_a_mesh, [0, 1, 2]), (raising, [0, 1]), (killed_while_it_saves, [1, 2])],
)
def test_a_rank_that_ends_takes_the_others_with_it_and_what_was_kept_is_whole(fault, others, tmp_path):
    errors = on_ranks(4 if fault is killed_in_a_mesh else 3, fault, tmp_path, fails=True)
    assert [rank for rank, text in errors.items() if "LostRankError" in text] == others
    assert ("ArithmeticError: of rank 2" in errors.get(2, "")) == (fault is raising)
    metrics = run(Ranks(), tmp_path)
    assert [entry["step"] for entry in metrics if "loss" in entry] == list(range(1, STEPS + 1))
