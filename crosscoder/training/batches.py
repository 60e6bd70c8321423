"""The batches of a run, from where it goes on, and that they are the ones that it began with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from crosscoder.training.checkpoint import read_cursor, step_of
from crosscoder.training.state import TrainState

Batches = Iterable[Tensor] | Callable[[int], Iterable[Tensor]]


def batches_from(
    batches: Batches, states: list[TrainState], found: list[Path | None], n_steps: int | None
) -> Iterator[Tensor]:
    """The batches from the checkpoints' step on, after checking that the first is the one that the runs began with."""
    start = step_of(found[0])
    every = (_only_tensor(x) for x in (batches if isinstance(batches, Iterable) else batches(0)))
    if start > 0:
        first = next(every, None)
        if first is None or any(batch_hash(first) != read_cursor(path)["first_batch"] for path in found):
            raise ValueError(
                "the first batch differs from the one this run began with, so continuing would mix two runs; give the "
                "same batches in the same order, or start in a new folder"
            )
        if isinstance(batches, Iterable):
            every = islice(every, start - 1, None)
        else:
            every = (_only_tensor(x) for x in batches(start))
    return _remembering_first(islice(every, None if n_steps is None else n_steps - start), states)


def _remembering_first(batches: Iterator[Tensor], states: list[TrainState]) -> Iterator[Tensor]:
    for x in batches:
        if states[0].step == 0:
            first_batch = batch_hash(x)
            for state in states:
                state.first_batch = first_batch
        yield x


def _only_tensor(batch: Any) -> Tensor:
    """The batch itself; a data loader wraps it in a list or tuple of one."""
    if isinstance(batch, list | tuple) and len(batch) == 1:
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise ValueError(f"a batch is a {type(batch).__name__}; expected a tensor [..., n_layers, d_model]")
    return batch


def batch_hash(batch: Tensor) -> str:
    """sha256 of a batch's shape and numbers."""
    content = batch.detach().float().cpu().contiguous()
    digest = hashlib.sha256(repr(tuple(batch.shape)).encode())
    digest.update(content.numpy().data)
    return digest.hexdigest()
