"""What loggers are told, by `train` and its kin, and what becomes of one that fails."""

import builtins
import dataclasses
import json
import sys

import pytest
import torch

from crosscoder import Crosscoder, LayerwiseSAE, TopK, TrainConfig, train, train_many, train_warm_chain
from crosscoder.training.loggers import close_logger, open_logger

CONFIG = TrainConfig(log_every=2)
BATCHES = [torch.randn(16, 2, 4, generator=torch.Generator().manual_seed(i)) for i in range(6)]


class Log:
    def __init__(self, fails_at=None):
        self.entries, self.steps, self.fails_at = [], [], fails_at

    def log(self, data, step=None):
        if len(self.entries) == self.fails_at:
            raise ConnectionError("no network")
        self.entries.append(data)
        self.steps.append(step)


def small(form=Crosscoder, **more):
    return form(n_layers=2, d_model=4, n_features=8, sparsity=TopK(k=2), **more)


def test_a_logger_is_told_what_the_metrics_hold(tmp_path):
    logger = Log()
    options = {"monitor": lambda _: {"held_out_l0": 2.0, "unknown": None}, "monitor_every": 4}
    result = train(small(), BATCHES, config=CONFIG, folder=tmp_path, logger=logger, quiet=True, **options)
    known = [{n: value for n, value in entry.items() if value is not None and n != "step"} for entry in result.metrics]
    assert logger.entries == known
    assert logger.steps == [2, 4, 4, 6, 6]
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == result.metrics


def test_one_without_steps_is_given_none():
    seen = []

    class Plain:
        def log(self, data):
            seen.append(data)

    train(small(), BATCHES, config=CONFIG, logger=Plain(), quiet=True)
    assert [entry["step"] for entry in seen] == [2, 4, 6]


def test_a_logger_that_fails_is_named_once_and_training_goes_on(capsys, tmp_path):
    logger = Log(fails_at=1)
    result = train(small(), BATCHES, config=CONFIG, folder=tmp_path, logger=logger, quiet=True)
    assert result.steps == 6
    assert len(result.metrics) == 3
    said = capsys.readouterr().err
    assert said.count("test_loggers.Log failed (ConnectionError: no network); training goes on without it") == 1
    assert len(logger.entries) == 1
    other = small()
    train(other, BATCHES, config=CONFIG, quiet=True)
    assert torch.equal(result.dictionary.encoder, other.encoder)


def test_several_dictionaries_and_layers_are_told_apart(capsys):
    logger = Log()
    train_many([small(), small(seed=1)], BATCHES, names=["a", "b"], config=CONFIG, logger=logger, quiet=True)
    assert {name.split("/")[0] for entry in logger.entries for name in entry} == {"a", "b"}
    assert logger.steps == [2, 2, 4, 4, 6, 6]
    chained = Log(fails_at=4)
    train_warm_chain(small(LayerwiseSAE), BATCHES, config=CONFIG, logger=chained, quiet=True)
    assert chained.steps == [2, 4, 6, 8]  # a logger's steps never go back
    assert "layer-1/loss" in chained.entries[-1]
    assert capsys.readouterr().err.count("failed") == 1


def test_what_is_no_logger_is_refused_before_any_step():
    with pytest.raises(ValueError, match=r"logger is a list without log\(dict\)"):
        train(small(), BATCHES, logger=[], quiet=True)


@pytest.mark.parametrize("kind", ["trackio", "wandb", "tensorboard"])
def test_a_package_that_is_missing_is_named(kind, monkeypatch, tmp_path):
    real = builtins.__import__

    def missing(name, *rest):
        if name.split(".")[0] in ("trackio", "wandb", "tensorboard"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    for name in [name for name in sys.modules if name.split(".")[0] == kind or name.startswith("torch.utils.tensorb")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(ImportError, match=rf"--log-to {kind} needs it: pip install 'crosscoder\[{kind}\]'"):
        open_logger(kind, tmp_path, project="x", settings={})


def test_tensorboard_writes_what_it_is_told(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = open_logger("tensorboard", tmp_path, project="x", settings={})
    result = train(small(), BATCHES, config=CONFIG, logger=logger, quiet=True)
    close_logger(logger)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in losses] == [2, 4, 6]
    assert [value for _, value in losses] == pytest.approx([entry["loss"] for entry in result.metrics])


def test_a_finished_run_tells_nothing_twice(tmp_path):
    config = dataclasses.replace(CONFIG, checkpoint_every=3)  # of six steps, so that one is written at the last
    options = {"monitor": lambda _: {"held_out_l0": 1.0}, "folder": tmp_path, "quiet": True}
    train(small(), BATCHES, config=config, **options)
    again = Log()
    train(small(), BATCHES, config=config, resume=True, logger=again, **options)
    assert again.entries == []
