"""Stopped runs: what they keep, what they go on as, and that a state holds all that a step changes."""

import json
import os
import random
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crosscoder import BatchTopK, JumpReLU, LayerwiseSAE, ReLU, TopK
from crosscoder.foundation import failpoints, signals
from crosscoder.foundation.lock import InUseError, locked
from crosscoder.training import TrainConfig, train, train_many
from crosscoder.training.checkpoint import checkpoints_in, load_checkpoint, save_checkpoint
from crosscoder.training.keeping import lengthened
from crosscoder.training.state import TrainState
from crosscoder.training.step import take_step
from tests.training.test_trainer import batches, make

CONFIG = TrainConfig(steps=20, learning_rate=3e-3, warmup_steps=3, log_every=1, dead_after_tokens=64)
DERIVED = {
    ".dictionary.training": "the mode, which the trainer sets",
    ".optimizer.param_groups": "the rate, set at every step from the step's number",
}
"""What a step changes and no checkpoint keeps, and why."""


def leaves(value, path=""):
    """Every tensor, number and string that hangs on an object, by where."""
    if isinstance(value, Tensor):
        yield path, value.detach().clone()
        if value.grad is not None:
            yield f"{path}.grad", value.grad.clone()
    elif isinstance(value, nn.Module):
        own = {k: v for k, v in vars(value).items() if not k.startswith("_") or k in ("_parameters", "_buffers")}
        yield from leaves(own, path)
    elif isinstance(value, torch.optim.Optimizer):
        names = {id(parameter): name for name, parameter in value._dictionary.named_parameters()}
        state = {names[id(parameter)]: moments for parameter, moments in value.state.items()}
        rates = [{k: v for k, v in group.items() if k != "params"} for group in value.param_groups]
        own = {k: v for k, v in vars(value).items() if k not in ("state", "_dictionary", "param_groups")}
        yield from leaves({**own, "state": state, "param_groups": rates}, path)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    elif isinstance(value, int | float | str | bool | None):
        yield path, value
    elif hasattr(value, "__dict__") and type(value).__module__.startswith("crosscoder"):
        yield from leaves(vars(value), path)


def same(a, b):
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a == b
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)  # thresholds begin as NaN


def forgotten(tmp_path, *, frozen="none", **settings):
    """What steps changed and a checkpoint did not bring back."""

    def state():
        return TrainState.start(make(**settings).train(), frozen=frozen)

    run, start = state(), dict(leaves(state()))
    for x in (next(batches(i)) for i in range(4)):
        take_step(run, x, CONFIG, 20)
    run.first_batch, run.rise_from = "hash", 2
    run.clear_gradients()  # as at the end of a run
    save_checkpoint(run, tmp_path, settings={})
    loaded = state()
    load_checkpoint(checkpoints_in(tmp_path)[0], loaded)
    after, found = dict(leaves(run)), dict(leaves(loaded))
    changed = [path for path in after if path not in start or not same(start[path], after[path])]
    assert any(".state." in path for path in changed)
    lost = [path for path in changed if path not in found or not same(found[path], after[path])]
    return [path for path in lost if not path.startswith(tuple(DERIVED))]


RULES = {type(one).__name__: one for one in (TopK(k=3), BatchTopK(k=3), JumpReLU(), ReLU())}


@pytest.mark.parametrize("sparsity", RULES.values(), ids=RULES)
@pytest.mark.parametrize("frozen", ["none", "soft_decoder"])
def test_a_checkpoint_brings_back_all_that_steps_change(sparsity, frozen, tmp_path):
    assert forgotten(tmp_path, sparsity=sparsity, frozen=frozen) == []


def test_something_that_is_left_out_is_found(tmp_path, monkeypatch):
    """The test above fails for an attribute that nobody thought of."""
    from crosscoder.training.state import FiringTracker

    update = FiringTracker.update

    def counted(self, *given):
        self.ever = getattr(self, "ever", 0) + 1
        update(self, *given)

    monkeypatch.setattr(FiringTracker, "update", counted)
    assert forgotten(tmp_path) == [".firing.ever"]


def test_no_generator_of_the_process_is_drawn_from():
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    train(make(sparsity=BatchTopK(k=3)), batches, config=replace(CONFIG, resample_every=5), quiet=True)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    assert states[2] == random.getstate()


def stopping(after, how=lambda: os.kill(os.getpid(), signal.SIGTERM)):
    """Batches among which, once, a signal comes."""

    def give(start):
        for index, x in enumerate(batches(start), start):
            if index == after:
                how()
            yield x

    return give


def everything(folder):
    newest = checkpoints_in(folder / "checkpoints")[-1]
    files = [*sorted(newest.iterdir()), folder / "metrics.jsonl", folder / "dictionary" / "model.safetensors"]
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.parametrize("cls", [None, LayerwiseSAE])
def test_a_signal_ends_a_run_after_its_step_and_it_goes_on_to_the_same_bits(cls, tmp_path):
    def new():
        return make(sparsity=BatchTopK(k=3)) if cls is None else make(cls, BatchTopK(k=3))

    monitored = {"monitor": lambda one: {"bias": one.decoder_bias.sum().item()}, "monitor_every": 4, "quiet": True}
    train(new(), batches, config=CONFIG, folder=tmp_path / "whole", **monitored)
    dictionary = new()
    with pytest.raises(signals.Stopped, match=r"SIGTERM after 8 of 20 steps; kept in .*step-000000008$"):
        train(dictionary, stopping(7), config=CONFIG, folder=tmp_path / "cut", **monitored)
    assert dictionary.training  # as it was given
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not (tmp_path / "cut" / ".lock").exists()
    train(new(), batches, config=CONFIG, folder=tmp_path / "cut", resume=True, **monitored)
    assert everything(tmp_path / "whole") == everything(tmp_path / "cut")


def test_a_monitor_that_is_stopped_is_asked_again(tmp_path):
    def monitor(dictionary):
        if stop:
            os.kill(os.getpid(), signal.SIGINT)
            signals.safe_point()
        return {"bias": dictionary.decoder_bias.sum().item()}

    given = {"config": CONFIG, "folder": tmp_path, "monitor": monitor, "monitor_every": 5, "quiet": True}
    stop = True
    with pytest.raises(signals.Stopped, match="after 5 of 20"):
        train(make(), batches, **given)
    stop = False
    train(make(), batches, **given, resume=True)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "bias" in line] == [5, 10, 15, 20]


def raise_interrupt():
    raise KeyboardInterrupt


def test_an_interrupt_of_the_caller_keeps_the_run_too(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="interrupted after 7 of 20 steps; kept in"):
        train(make(), stopping(7, raise_interrupt), config=CONFIG, folder=tmp_path, quiet=True)
    assert [path.name for path in checkpoints_in(tmp_path / "checkpoints")] == ["step-000000007"]
    with pytest.raises(KeyboardInterrupt, match="after 7 of 20 steps; nothing is kept"):
        train(make(), stopping(7, raise_interrupt), config=CONFIG, quiet=True)


def test_a_step_that_was_torn_is_not_kept(tmp_path, monkeypatch):
    from crosscoder.training import trainer

    def torn(state, *given):
        if state.step == 3:
            with torch.no_grad():
                state.dictionary.encoder.add_(1)
            raise KeyboardInterrupt
        return take_step(state, *given)

    monkeypatch.setattr(trainer, "take_step", torn)
    config = replace(CONFIG, checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt, match=r"in the middle of step 3, which is lost; kept in .*step-000000002"):
        train(make(), batches, config=config, folder=tmp_path, quiet=True)


def test_dictionaries_that_are_trained_together_stop_and_go_on_together(tmp_path):
    def new():
        return [make(seed=0), make(seed=1), make(sparsity=BatchTopK(k=3))]

    whole = train_many(new(), batches, config=CONFIG, quiet=True)
    with pytest.raises(signals.Stopped):
        train_many(new(), stopping(5), config=CONFIG, folder=tmp_path, quiet=True, scratch_seconds=1e9)
    assert len(list(tmp_path.glob("*/checkpoints/step-000000006"))) == 3
    resumed = train_many(new(), batches, config=CONFIG, folder=tmp_path, resume=True, quiet=True, scratch_seconds=1e9)
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(one.dictionary.encoder, other.dictionary.encoder)
        assert one.metrics == other.metrics


def test_a_scratch_run_writes_nothing_that_is_not_worth_it(tmp_path):
    train(make(), batches, config=CONFIG, folder=tmp_path / "short", quiet=True, scratch_seconds=1e9)
    assert not (tmp_path / "short").exists()
    train(make(), batches, config=CONFIG, folder=tmp_path / "long", quiet=True, scratch_seconds=0.0)
    assert [path.name for path in checkpoints_in(tmp_path / "long" / "checkpoints")][-1] == "step-000000020"
    assert not (tmp_path / "long" / "dictionary").exists()


def test_a_run_that_is_lengthened_before_its_rate_fell_is_the_longer_one(tmp_path):
    longer = replace(CONFIG, steps=40)
    train(make(), batches, config=longer, folder=tmp_path / "whole", quiet=True)
    with pytest.raises(signals.Stopped):
        train(make(), stopping(9), config=CONFIG, folder=tmp_path / "cut", quiet=True)
    train(make(), batches, config=longer, folder=tmp_path / "cut", resume=True, quiet=True)
    assert everything(tmp_path / "whole") == everything(tmp_path / "cut")


def test_a_finished_run_takes_more_steps_and_its_rate_rises_again(tmp_path, capsys):
    train(make(), batches, config=CONFIG, folder=tmp_path, quiet=True)
    longer = replace(CONFIG, steps=40)
    with pytest.raises(signals.Stopped):
        train(make(), stopping(30), config=longer, folder=tmp_path, resume=True, quiet=True)
    assert "20 steps become 40, of which 20 are done; the learning rate rises again over 3" in capsys.readouterr().err
    result = train(make(), batches, config=longer, folder=tmp_path, resume=True, quiet=True)
    rates = [entry["learning_rate"] / 3e-3 for entry in result.metrics]
    assert result.steps == len(rates) == 40
    assert rates[19] < 0.2
    assert rates[20:24] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[39] < 0.1
    assert sorted(rates[28:], reverse=True) == rates[28:]


def test_what_a_budget_derives_from_its_steps_stays_as_the_run_began(tmp_path):
    train(make(), batches, config=CONFIG, folder=tmp_path, quiet=True)
    asked = replace(CONFIG, steps=40, warmup_steps=8, log_every=2)
    assert lengthened(tmp_path, asked) == replace(CONFIG, steps=40)
    assert lengthened(tmp_path / "new", asked) == asked


def test_a_folder_in_use_or_without_room_is_refused_before_the_first_step(tmp_path):
    def never(start):
        raise AssertionError

    with locked(tmp_path), pytest.raises(InUseError, match="in use by process"):
        train(make(), never, config=CONFIG, folder=tmp_path, quiet=True)
    failpoints.arm("json.rename=full")
    try:
        with pytest.raises(OSError, match="no room for the rest"):
            train(make(), batches, config=CONFIG, folder=tmp_path / "a", quiet=True)
    finally:
        failpoints.arm("")


def test_a_disk_that_fills_up_leaves_the_checkpoints_that_there_are(tmp_path):
    config = replace(CONFIG, checkpoint_every=5)
    failpoints.arm("save.manifest@3=full")
    try:
        with pytest.raises(OSError, match="no room for the rest"):
            train(make(), batches, config=config, folder=tmp_path, quiet=True)
    finally:
        failpoints.arm("")
    assert [path.name for path in checkpoints_in(tmp_path / "checkpoints")] == ["step-000000005", "step-000000010"]
    assert not list(tmp_path.rglob(".tmp-*"))
    train(make(), batches, config=config, folder=tmp_path, resume=True, quiet=True)
    train(make(), batches, config=config, folder=tmp_path / "whole", quiet=True)
    assert everything(tmp_path / "whole") == everything(tmp_path)
