"""Ranks that divide a dictionary, in one training run: what they must agree on, and what rank 0 does for all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from crosscoder.dictionary import Dictionary
from crosscoder.dictionary.division import gathered
from crosscoder.dictionary.shard import PIECE, Shard
from crosscoder.foundation import signals
from crosscoder.foundation.ranks import DesyncError, Ranks
from crosscoder.training.checkpoint import step_of
from crosscoder.training.history import Entry
from crosscoder.training.parts import tensors_of
from crosscoder.training.state import TrainState


def require_one_job(dictionaries: Sequence[Dictionary], *, is_scratch: bool) -> Ranks:
    """The ranks that divide the dictionaries; this process alone where they are whole.

    Raises:
        ValueError: not all are divided over the same ranks, or a setting that ranks cannot keep together.
    """
    shards = [one.shard for one in dictionaries if one.shard is not None]
    if not shards:
        return Ranks()
    if len(shards) < len(dictionaries) or len({(one.ranks.group, one.ranks.job.group) for one in shards}) > 1:
        raise ValueError(
            f"{len(shards)} of {len(dictionaries)} dictionaries are divided; divide all over the same ranks"
        )
    if is_scratch:
        raise ValueError("scratch_seconds cannot be had of a dictionary that ranks divide; train it on one device")
    if wrong := [str(one.encoder.dtype) for one in dictionaries if one.encoder.dtype != torch.float32]:
        raise ValueError(f"ranks divide a dictionary in float32, this one is {wrong[0]}")
    return shards[0].ranks.job


def stopping_together(job: Ranks) -> contextlib.AbstractContextManager[None]:
    """While it lasts, ranks stop at the same step, the one after that in which any of them was asked to."""
    if job.size == 1:
        return contextlib.nullcontext()

    def agree(reason: str) -> str:
        first = -int(job.largest(torch.tensor([-job.rank if reason else -job.size]), "stop"))
        return "" if first == job.size else reason or f"a signal to rank {first}"

    return signals.agreeing(agree)


def require_same_batch(shard: Shard | None, x: Tensor) -> None:
    """Refuse to go on with batches that differ between ranks.

    Raises:
        DesyncError: they do, on every rank.
    """
    if shard is None or shard.ranks.job.size == 1:
        return
    total = x.detach().double().sum()
    bounds = torch.stack([total, -total, total.new_tensor(len(x)), -total.new_tensor(len(x))]).nan_to_num()
    high, low, most, least = shard.ranks.job.largest(bounds, "batch check").tolist()
    if high != -low or most != -least:
        raise DesyncError(
            f"ranks were given different batches (sums {-low:.17g} to {high:.17g}, {-least:.0f} to {most:.0f} tokens); "
            "every rank must read the same data in the same order, on the same kind of machine"
        )


def require_same_replicas(states: Sequence[TrainState]) -> None:
    """Refuse to keep weights and moments that differ between the ranks of a mesh which hold the same features.

    Raises:
        DesyncError: they do, on every such rank.
    """
    for state in states:
        if (data := state.dictionary.data).size > 1:
            tensors = [*state.dictionary.state_dict().values(), *tensors_of(state).values()]
            sums = [_sum_of_bits(one).to(tensors[0].device) for one in tensors]
            bounds = torch.stack([*sums, *(-one for one in sums)])
            high, low = data.largest(bounds, "replica check").chunk(2)
            if not torch.equal(high, -low):
                raise DesyncError(
                    f"step {state.step}{state.called}: ranks that hold the same weights, moments and counts of silence "
                    "have come to differ; every rank must run the same code on the same kind of machine"
                )


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """The exact sum of its bits as whole numbers; torch would hold all of them in 64 bits, so it is given pieces."""
    pieces = tensor.contiguous().view(-1).view(torch.int32).split(PIECE)
    return torch.stack([piece.sum() for piece in pieces]).sum()


def found_by_first(
    job: Ranks, folders: Sequence[Path | None], find: Callable[[], list[Path | None]]
) -> list[Path | None]:
    """The checkpoints that rank 0 finds; the others read them from the same folders, which they must see."""
    if job.size == 1:
        return find()
    steps = job.from_first(lambda: [step_of(path) for path in find()])
    pairs = list(zip(folders, steps, strict=True))
    found = [folder / "checkpoints" / f"step-{step:09d}" if folder and step else None for folder, step in pairs]
    if missing := [path for path in found if path is not None and not path.is_dir()]:
        raise FileNotFoundError(f"rank {job.rank} does not see {missing[0]}; all ranks need a folder that they share")
    return found


def measured_by_first(dictionary: Dictionary, monitor: Callable[[Dictionary], Entry]) -> Entry:
    """What the monitor says of the whole dictionary: rank 0 gathers and measures it, and tells the others."""

    def measured(whole: Dictionary) -> Entry:
        found = monitor(whole)
        if not isinstance(found, Mapping):
            raise ValueError(f"monitor returned a {type(found).__name__}; expected numbers by name, as {{'ev': 0.8}}")
        return dict(found)

    if dictionary.shard is None:
        return measured(dictionary)
    whole, device = gathered(dictionary), dictionary.encoder.device
    return dictionary.shard.ranks.job.from_first(lambda: measured(whole.to(device)) if whole is not None else {})
