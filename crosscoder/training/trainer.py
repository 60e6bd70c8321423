"""One training loop for every dictionary.

`train` takes any iterable of `x_BLD`. Every step is a function of the state and its batch alone: order comes from the
batches, the one thing that is drawn (whom to resample where) comes from the seed and the step, and a run that was
killed continues from its newest verified checkpoint to the same bits, metrics included.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosscoder.dictionary import Dictionary
from crosscoder.foundation.config import to_mapping
from crosscoder.foundation.console import Progress
from crosscoder.training.checkpoint import Entry, RunFolder
from crosscoder.training.state import TrainState
from crosscoder.training.step import NonFiniteError, TrainConfig, take_step

__all__ = ["NonFiniteError", "TrainConfig", "TrainResult", "train"]

Batches = Iterable[Tensor] | Callable[[int], Iterable[Tensor]]


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns: the dictionary (evaluation mode), its logged metrics, and how far it went."""

    dictionary: Dictionary
    metrics: list[Entry]
    steps: int
    tokens: int


def train(
    dictionary: Dictionary,
    batches: Batches,
    *,
    config: TrainConfig | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    device: torch.device | str | None = None,
    data_fingerprint: str | None = None,
    label: str = "training",
    quiet: bool = False,
) -> TrainResult:
    """Trains `dictionary` in place on `batches` of `[..., L, D]` and returns it with its metrics.

    batches: an iterable of tensors, or a function that gives the batches from a step number on. On resume an iterable
        is replayed and its used part skipped, so it must give the same batches again.
    folder: where `metrics.jsonl`, `run.json`, checkpoints and the finished `dictionary/` go; None writes nothing.
    resume: continue from the folder's newest verified checkpoint, if there is one.

    Raises:
        ValueError: a batch of the wrong shape, no batches, fewer than `config.steps`, or a folder in use.
        NonFiniteError: a batch, loss or gradient is not finite; the parameters are as before that step.
    """
    config = config or TrainConfig()
    if isinstance(batches, Tensor):
        raise ValueError(f"batches is one tensor of shape {tuple(batches.shape)}; give an iterable of batches, as [x]")
    n_steps = config.steps if config.steps is not None else _length(batches)
    was_training = dictionary.training
    dictionary.to(device).train()
    settings = {
        "class": type(dictionary).__name__,
        "dictionary": to_mapping(dictionary.config),
        "training": to_mapping(config),
        "data": data_fingerprint,
        "steps": n_steps,
    }
    state = TrainState.start(dictionary, learning_rate=config.learning_rate, precision=config.precision)
    run = RunFolder(Path(folder), settings) if folder is not None else None
    metrics = run.open(state, resume=resume) if run else []
    try:
        _take_steps(state, batches, config, n_steps, metrics, run, Progress(label, n_steps, unit="step", quiet=quiet))
        if state.step == 0 or (config.steps is not None and state.step < config.steps):
            raise ValueError(
                f"the batches ended after {state.step} of {config.steps or 'at least 1'} steps; "
                "give more data or fewer steps"
            )
    except BaseException:
        dictionary.train(was_training)
        raise
    dictionary.eval()
    if run:
        run.finish(state)
    return TrainResult(dictionary, metrics, state.step, state.tokens)


def _take_steps(
    state: TrainState,
    batches: Batches,
    config: TrainConfig,
    n_steps: int | None,
    metrics: list[Entry],
    run: RunFolder | None,
    progress: Progress,
) -> None:
    device = state.firing.silent_GF.device
    log: Callable[[], Entry] | None = None

    def keep(entry: Entry) -> None:
        metrics.append(entry)
        if run:
            run.log(entry)

    with progress:
        progress.advance(state.step)
        for x in _batches_from(batches, state, n_steps):
            log = take_step(state, x.to(device, non_blocking=True), config, n_steps)
            if state.step % config.log_every == 0 or state.step == n_steps:
                keep(log())
            progress.advance(1)
            if run and config.checkpoint_every and state.step % config.checkpoint_every == 0:
                run.checkpoint(state)
    if log is not None and (not metrics or metrics[-1]["step"] != state.step):
        keep(log())


def _length(batches: Batches) -> int | None:
    return len(batches) if hasattr(batches, "__len__") else None  # ty: ignore[invalid-argument-type]


def _batches_from(batches: Batches, state: TrainState, n_steps: int | None) -> Iterator[Tensor]:
    """The batches from `state.step` on, after checking that the run's first batch is the one it began with."""
    start = state.step
    if isinstance(batches, Iterable):
        every = iter(batches)
        if start > 0:
            _check_first(state, _only_tensor(next(every, None)))
            every = islice(every, start - 1, None)
    else:
        if start > 0:
            _check_first(state, _only_tensor(next(iter(batches(0)), None)))
        every = iter(batches(start))
    for x in islice(every, None if n_steps is None else n_steps - start):
        batch = _only_tensor(x)
        if state.step == 0:
            state.first_batch = batch_hash(batch)
        yield batch


def _only_tensor(batch: Any) -> Tensor:
    """The batch itself; a data loader wraps it in a list or tuple of one."""
    if isinstance(batch, list | tuple) and len(batch) == 1:
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise ValueError(f"a batch is a {type(batch).__name__}; expected a tensor [..., n_layers, d_model]")
    return batch


def _check_first(state: TrainState, batch: Tensor) -> None:
    if batch_hash(batch) != state.first_batch:
        raise ValueError(
            "the first batch differs from the one this run began with, so continuing would mix two runs; give the "
            "same batches in the same order, or start in a new folder"
        )


def batch_hash(batch: Tensor) -> str:
    """sha256 of a batch's shape and numbers."""
    content = batch.detach().float().cpu().contiguous()
    digest = hashlib.sha256(repr(tuple(batch.shape)).encode())
    digest.update(content.numpy().data)
    return digest.hexdigest()
