"""One training loop for every dictionary.

`train` takes any iterable of `x_BLD`. Every step is a function of the state and its batch alone: order comes from the
batches, the one thing that is drawn (whom to resample where) comes from the seed and the step, and a run that was
killed continues from its newest verified checkpoint to the same bits, metrics included.
"""

from __future__ import annotations

import hashlib
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosscoder.dictionary import Dictionary
from crosscoder.dictionary.stack import fits
from crosscoder.foundation.config import to_mapping
from crosscoder.foundation.console import Progress
from crosscoder.training.checkpoint import Entry, RunLog, find_checkpoints, read_cursor, step_of
from crosscoder.training.frozen import frozen_parts, require_resampling
from crosscoder.training.gradients import is_direct
from crosscoder.training.state import StackState, State, TrainState
from crosscoder.training.step import TrainConfig, require_finite, take_step

Batches = Iterable[Tensor] | Callable[[int], Iterable[Tensor]]
SMOOTHING = 0.8  # weight of the past in the explained variance that is shown
MAX_NAME = 200  # bytes of a dictionary's name: file systems take 255, some for what is written beside it


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
    monitor: Callable[[Dictionary], Entry] | None = None,
    monitor_every: int = 0,
    label: str = "training",
    quiet: bool = False,
) -> TrainResult:
    """Trains `dictionary` in place on `batches` of `[..., L, D]` and returns it with its metrics.

    batches: an iterable of tensors, or a function that gives the batches from a step number on. On resume an iterable
        is replayed and its used part skipped, so it must give the same batches again.
    folder: where `metrics.jsonl`, `run.json`, checkpoints and the finished `dictionary/` go; None writes nothing.
    resume: continue from the folder's newest verified checkpoint, if there is one.
    monitor: what to measure of the dictionary (in evaluation mode) at the end, and every `monitor_every` steps, such as
        its explained variance on held-out batches; logged and shown.

    Batches of a source (`Source.batches`) carry the scale and the record of their activations, which the dictionary
    takes over.

    Raises:
        ValueError: a batch of the wrong shape, no batches, fewer than `config.steps`, or a folder in use.
        MismatchError: the dictionary has a scale or record of its inputs already, and the batches have another.
        NonFiniteError: a batch, loss or gradient is not finite; the parameters are as before that step.
    """
    (result,) = _train(
        [dictionary], [""], batches, [None if folder is None else Path(folder)], config or TrainConfig(), resume=resume,
        device=device, data_fingerprint=data_fingerprint, monitor=monitor, monitor_every=monitor_every, label=label,
        quiet=quiet,
    )  # fmt: skip
    return result


def train_many(
    dictionaries: Iterable[Dictionary],
    batches: Batches,
    *,
    config: TrainConfig | None = None,
    folder: str | Path | None = None,
    names: Iterable[str] | None = None,
    resume: bool = False,
    device: torch.device | str | None = None,
    data_fingerprint: str | None = None,
    monitor: Callable[[Dictionary], Entry] | None = None,
    monitor_every: int = 0,
    label: str = "training",
    quiet: bool = False,
) -> list[TrainResult]:
    """Trains dictionaries that read the same batches, each as `train` would by itself, and returns their results.

    `TopK` and `BatchTopK` dictionaries in float32, without `prefixes`, that differ in seed, in k, or (crosscoders over
    all layers that select by bare scores) in size by up to a factor of 2 take their steps together: one encoding, one
    decoding, one update for all (`StackState`). All else in their configs must agree, and what of them is frozen.
    Others take turns on each batch. Choices, products and sums are those of a dictionary alone, so weights are equal to
    the bit on a CPU but for codes that are nearly dense in one of them (F <= 2 k), where they agree to rounding.

    folder: each dictionary's run goes to `folder/name` and is what `train` writes. With `resume` all continue from the
        newest step that all have a verified checkpoint of; a dictionary that is new to a folder has none, and is
        refused beside those that have gone further than their first.
    names: of the dictionaries, for folders and errors; `0`, `1`, ... by default.

    The other arguments are those of `train`.

    Raises:
        ValueError: as `train`; no dictionary, one twice, or names that are not one for each.
        NonFiniteError: as `train`, naming the dictionary; those it takes its steps with did not take that step, others
            may have.
    """
    dictionaries = _checked_dictionaries(dictionaries)
    names = [str(place) for place in range(len(dictionaries))] if names is None else _checked_names(names)
    if len(set(names)) < len(names) or len(names) != len(dictionaries):
        raise ValueError(f"names are {names} for {len(dictionaries)} dictionaries; give each a name of its own")
    folders = [None if folder is None else Path(folder) / name for name in names]
    return _train(
        dictionaries, names, batches, folders, config or TrainConfig(), resume=resume, device=device,
        data_fingerprint=data_fingerprint, monitor=monitor, monitor_every=monitor_every, label=label, quiet=quiet,
    )  # fmt: skip


def _checked_dictionaries(dictionaries: Iterable[Dictionary]) -> list[Dictionary]:
    given = [dictionaries] if isinstance(dictionaries, Dictionary) else list(dictionaries)
    if wrong := [type(one).__name__ for one in given if not isinstance(one, Dictionary)]:
        raise ValueError(f"among the dictionaries is a {wrong[0]}; give a list of Crosscoder or LayerwiseSAE")
    if not given or len({id(one) for one in given}) < len(given):
        raise ValueError(f"{len(given)} dictionaries, some given twice or none at all; give each one once")
    return given


def _checked_names(names: Iterable[str]) -> list[str]:
    """The names, each of which can be a folder's."""
    found = list(names)
    for name in found:
        is_plain = isinstance(name, str) and Path(name).name == name and name not in ("", "..") and "\0" not in name
        if not is_plain or len(os.fsencode(name)) > MAX_NAME:
            raise ValueError(f"{name!r:.80} is no name for a dictionary; give a string that can be a folder's name")
    return found


@torch.inference_mode(False)
@torch.enable_grad()
def _train(
    dictionaries: list[Dictionary],
    names: list[str],
    batches: Batches,
    folders: list[Path | None],
    config: TrainConfig,
    *,
    resume: bool,
    device: torch.device | str | None,
    data_fingerprint: str | None,
    monitor: Callable[[Dictionary], Entry] | None,
    monitor_every: int,
    label: str,
    quiet: bool,
) -> list[TrainResult]:
    if isinstance(batches, Tensor):
        raise ValueError(f"batches is one tensor of shape {tuple(batches.shape)}; give an iterable of batches, as [x]")
    n_steps = len(batches) if config.steps is None and isinstance(batches, Sized) else config.steps
    were_training = [dictionary.training for dictionary in dictionaries]
    stacked: list[State] = []
    try:
        with frozen_parts(dictionaries, config.frozen):
            _take_inputs(dictionaries, batches)
            states, runs = [], []
            for dictionary, name, folder in zip(dictionaries, names, folders, strict=True):
                dictionary.to(device).train()
                states.append(_first_state(dictionary, config, name))
                runs.append(RunLog(folder, _settings(dictionary, config, data_fingerprint, n_steps)))
            found = find_checkpoints(runs, resume=resume)
            every = _batches_from(batches, states, found, n_steps)
            for run, state, checkpoint in zip(runs, states, found, strict=True):
                run.begin(state, checkpoint)
                require_finite(state)
                state.dictionary.frozen = config.frozen
            stacked = side_by_side(states)
            progress = Progress(label, n_steps, unit="step", quiet=quiet)
            _take_steps(stacked, states, every, config, n_steps, runs, progress, monitor, monitor_every)
            if states[0].step == 0 or (config.steps is not None and states[0].step < config.steps):
                raise ValueError(
                    f"the batches ended after {states[0].step} of {config.steps or 'at least 1'} steps; "
                    "give more data or fewer steps"
                )
    except BaseException:
        for dictionary, was_training in zip(dictionaries, were_training, strict=True):
            dictionary.train(was_training)
        raise
    finally:
        for state in stacked:
            state.release()
        for dictionary in dictionaries:
            dictionary.zero_grad(set_to_none=True)
    for state, run in zip(states, runs, strict=True):
        state.dictionary.eval()
        run.finish(state)
    pairs = zip(states, runs, strict=True)
    return [TrainResult(state.dictionary, run.metrics, state.step, state.tokens) for state, run in pairs]


def _first_state(dictionary: Dictionary, config: TrainConfig, name: str) -> TrainState:
    if config.resample_every:
        require_resampling(dictionary)
    rate, precision, frozen = config.learning_rate, config.precision, config.frozen
    return TrainState.start(dictionary, rate, precision=precision, frozen=frozen, name=name)


def _settings(
    dictionary: Dictionary, config: TrainConfig, data_fingerprint: str | None, n_steps: int | None
) -> dict[str, Any]:
    """What must not change from one part of a run to the next."""
    return {
        "class": type(dictionary).__name__,
        "dictionary": to_mapping(dictionary.config),
        "training": to_mapping(config),
        "data": data_fingerprint,
        "steps": n_steps,
    }


def _take_inputs(dictionaries: list[Dictionary], batches: Batches) -> None:
    """Take over what the batches say of themselves, into all dictionaries or none."""
    if (scale_L := getattr(batches, "scale_L", None)) is not None:
        reads = getattr(batches, "reads", None)
        for dictionary in dictionaries:
            dictionary.require_input(scale_L, reads)
        for dictionary in dictionaries:
            dictionary.set_input(scale_L, reads)


def side_by_side(states: Sequence[TrainState]) -> list[State]:
    """The states in as few as can take their steps: those that fit one another in one, largest first."""

    def may_stack(state: TrainState) -> bool:
        return is_direct(state.dictionary) and state.dictionary.encoder.dtype == torch.float32

    alone = [state for state in states if not may_stack(state)]
    left = [state for state in states if may_stack(state)]
    left.sort(key=lambda state: -state.dictionary.config.n_features)
    stacks: list[list[TrainState]] = []
    for state in left:
        own = (stack for stack in stacks if fits(state.dictionary, stack[0].dictionary))
        if (stack := next(own, None)) is not None:
            stack.append(state)
        else:
            stacks.append([state])
    return [*alone, *(StackState(stack) if len(stack) > 1 else stack[0] for stack in stacks)]


def _take_steps(
    stacked: list[State],
    states: list[TrainState],
    batches: Iterator[Tensor],
    config: TrainConfig,
    n_steps: int | None,
    runs: list[RunLog],
    progress: Progress,
    monitor: Callable[[Dictionary], Entry] | None,
    monitor_every: int,
) -> None:
    device, run_of = states[0].dictionary.encoder.device, {id(state): run for state, run in zip(states, runs)}
    numbers: list[Callable[[], list[Entry]]] = []

    def log() -> list[Entry]:
        """Logs every dictionary's last step, and returns what was logged."""
        entries = [entry for one in numbers for entry in one()]
        members = [state for one in stacked for state in one.members]
        for state, entry in zip(members, entries, strict=True):
            run_of[id(state)].log(entry)
        numbers.clear()
        return entries

    shown: dict[str, float] = {}
    with progress:
        step = states[0].step
        progress.advance(step)
        for x in batches:
            x = x.to(device, non_blocking=True)
            numbers[:] = [take_step(state, x, config, n_steps) for state in stacked]
            step += 1
            if step % config.log_every == 0 or step == n_steps:
                shown |= _to_show(log(), shown, states)
            progress.advance(1, **shown)
            if monitor is not None and monitor_every and step % monitor_every == 0 and step != n_steps:
                shown |= _monitor(states, monitor, runs)
            if config.checkpoint_every and step % config.checkpoint_every == 0:
                for state, run in zip(states, runs, strict=True):
                    run.checkpoint(state)
    if numbers:
        log()
    if monitor is not None and step:
        _monitor(states, monitor, runs)


def _to_show(entries: list[Entry], before: dict[str, float], states: list[TrainState]) -> dict[str, float]:
    """Loss, smoothed explained variance, L0, and the share of features that have long been silent; means over all."""
    found = {name: statistics.fmean(float(one[name] or 0.0) for one in entries) for name in ("loss", "l0")}
    n_features = sum(state.firing.silent_GF.numel() for state in states)
    found["dead"] = sum(float(one["silent_features"] or 0.0) for one in entries) / n_features
    if explained := [one["explained_variance"] for one in entries if one["explained_variance"] is not None]:
        mean = statistics.fmean(explained)
        found["explained"] = mean + SMOOTHING * (before.get("explained", mean) - mean)
    return found


def _monitor(states: list[TrainState], monitor: Callable[[Dictionary], Entry], runs: list[RunLog]) -> dict[str, float]:
    """What to show of what the monitor found, the mean over all dictionaries; what is logged of a step stays."""
    every = []
    for state, run in zip(states, runs, strict=True):
        if any(entry["step"] == state.step and "loss" not in entry for entry in run.metrics[-1:]):
            continue  # a run that had been finished
        state.dictionary.eval()
        found = monitor(state.dictionary)
        state.dictionary.train()
        if not isinstance(found, Mapping):
            raise ValueError(f"monitor returned a {type(found).__name__}; expected numbers by name, as {{'ev': 0.8}}")
        every.append(found)
        run.log({"step": state.step, "tokens": state.tokens, **found})
    known = {name: [value for one in every if (value := one.get(name)) is not None] for one in every for name in one}
    return {name: statistics.fmean(values) for name, values in known.items() if values}


def _batches_from(
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
