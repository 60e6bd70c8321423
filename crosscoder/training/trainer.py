"""One training loop for every dictionary.

`train` takes any iterable of `x_BLD`. Every step is a function of the state and its batch alone: order comes from the
batches, the one thing that is drawn (whom to resample where) comes from the seed and the step, and a run that was
killed continues from its newest verified checkpoint to the same bits, metrics included.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosscoder.dictionary import Dictionary
from crosscoder.foundation import signals
from crosscoder.foundation.config import require_count, to_mapping
from crosscoder.foundation.console import Progress
from crosscoder.foundation.failpoints import failpoint
from crosscoder.training import together
from crosscoder.training.batches import Batches, batches_from
from crosscoder.training.checkpoint import Entry, RunLog, find_checkpoints
from crosscoder.training.company import side_by_side
from crosscoder.training.finite import require_finite
from crosscoder.training.frozen import frozen_parts, require_resampling
from crosscoder.training.given import checked_dictionaries, checked_names, unwrapped
from crosscoder.training.keeping import TornStepError, keep_stopped, one_writer
from crosscoder.training.loggers import Logger, SafeLogger
from crosscoder.training.state import State, TrainState
from crosscoder.training.step import TrainConfig, take_step

SHOWN = ("loss", "explained_variance", "l0", "held_out_explained_variance", "held_out_l0", "held_out_dead_share")
"""What is last logged that a result shows."""
SMOOTHING = 0.8  # weight of the past in the explained variance that is shown


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns: the dictionary (evaluation mode), its logged metrics, and how far it went."""

    dictionary: Dictionary
    metrics: list[Entry]
    steps: int
    tokens: int

    def __repr__(self) -> str:
        known = {name: value for entry in self.metrics for name, value in entry.items() if value is not None}
        last = ", ".join(f"{name} {known[name]:.4g}" for name in SHOWN if name in known)
        return f"TrainResult({self.steps:,} steps, {self.tokens:,} tokens; last: {last}; {self.dictionary})"


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
    logger: Logger | None = None,
    label: str = "training",
    quiet: bool = False,
    scratch_seconds: float | None = None,
) -> TrainResult:
    """Trains `dictionary` in place on `batches` of `[..., L, D]` and returns it with its metrics.

    batches: an iterable of tensors, or a function that gives the batches from a step number on. On resume an iterable
        is replayed and its used part skipped, so it must give the same batches again.
    folder: where `metrics.jsonl`, `run.json`, `curves.png`, checkpoints and the finished `dictionary/` go; None writes
        nothing.
    resume: continue from the folder's newest verified checkpoint, if there is one.
    monitor: what to measure of the dictionary (in evaluation mode) at the end, and every `monitor_every` steps, such as
        its explained variance on held-out batches; logged and shown.
    logger: anything with `log(dict)`, such as a run of trackio or wandb, is given every entry of the metrics (and
        `step=`, if it takes that). One that fails is named once, and training goes on.

    A dictionary that `torch.compile` has wrapped is trained as it is: a step's operators are compiled already.
    scratch_seconds: for a run whose result is kept elsewhere: `folder` gets no dictionary, and a checkpoint only where
        more than so many seconds of work would be lost.

    SIGINT (Ctrl-C, a notebook's stop button), SIGTERM and SIGHUP end the run after the step at hand: a checkpoint is
    written, where there is a folder, and `Stopped`, a KeyboardInterrupt, is raised; `resume` goes on from there.
    Handlers are set in the main thread alone, only where there were none, and taken back at the end. With another
    number of steps `resume` lengthens or shortens the run, by the rule of `lengthen`.

    Batches of a source (`Source.batches`) carry the scale and the record of their activations, which the dictionary
    takes over.

    Raises:
        ValueError: a batch of the wrong shape, no batches, fewer than `config.steps`, or a folder in use.
        MismatchError: the dictionary has a scale or record of its inputs already, and the batches have another.
        InUseError: another process trains in the folder.
        OSError: the folder could not take the run's checkpoints; before the first step.
        NonFiniteError: a batch, loss or gradient is not finite, and the parameters are as before that step; or a step
            took parameters there, which are not kept.
    """
    (result,) = _train(
        [unwrapped(dictionary)], [""], batches, [None if folder is None else Path(folder)], config or TrainConfig(),
        resume=resume, device=device, data_fingerprint=data_fingerprint, monitor=monitor, monitor_every=monitor_every,
        logger=logger, label=label, quiet=quiet, scratch_seconds=scratch_seconds,
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
    logger: Logger | None = None,
    label: str = "training",
    quiet: bool = False,
    scratch_seconds: float | None = None,
) -> list[TrainResult]:
    """Trains dictionaries that read the same batches, each as `train` would by itself, and returns their results.

    `TopK`, `BatchTopK` and `JumpReLU` dictionaries (these with a penalty on L0) in float32, without `prefixes`, that
    differ in seed, in k, in the thresholds that they start from and the L0 aimed at, or (crosscoders over all layers
    that select by bare scores, of fewer than 4,096 features) in size by up to a factor of 2 take their steps together:
    one encoding, one decoding, one update for all (`StackState`). All else in their configs must agree, and what of
    them is frozen. Others take turns on each batch. Choices, products and sums are those of a dictionary alone, so
    weights are equal to the bit on a CPU but for codes that are nearly dense in one of them (half of a row's features
    or more are stored), where they agree to rounding.

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
    dictionaries = checked_dictionaries(dictionaries)
    names = [str(place) for place in range(len(dictionaries))] if names is None else checked_names(names)
    if len(set(names)) < len(names) or len(names) != len(dictionaries):
        raise ValueError(f"names are {names} for {len(dictionaries)} dictionaries; give each a name of its own")
    folders = [None if folder is None else Path(folder) / name for name in names]
    return _train(
        dictionaries, names, batches, folders, config or TrainConfig(), resume=resume, device=device,
        data_fingerprint=data_fingerprint, monitor=monitor, monitor_every=monitor_every, logger=logger, label=label,
        quiet=quiet, scratch_seconds=scratch_seconds,
    )  # fmt: skip


@signals.watching()
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
    logger: Logger | None,
    label: str,
    quiet: bool,
    scratch_seconds: float | None,
) -> list[TrainResult]:
    if isinstance(batches, Tensor):
        raise ValueError(f"batches is one tensor of shape {tuple(batches.shape)}; give an iterable of batches, as [x]")
    require_count(0, monitor_every=monitor_every)
    n_steps = len(batches) if config.steps is None and isinstance(batches, Sized) else config.steps
    job = together.require_one_job(dictionaries, is_scratch=(is_scratch := scratch_seconds is not None))
    were_training = [dictionary.training for dictionary in dictionaries]
    stacked, states, runs = list[State](), list[TrainState](), list[RunLog]()
    with together.stopping_together(job), one_writer(folders if job.is_first and not is_scratch else []):
        try:
            with frozen_parts(dictionaries, config.frozen):
                _take_inputs(dictionaries, batches)
                for dictionary, name, folder in zip(dictionaries, names, folders, strict=True):
                    dictionary.to(device).train()
                    states.append(_first_state(dictionary, config, name))
                    settings = _settings(dictionary, config, data_fingerprint, n_steps)
                    told = None if logger is None else SafeLogger(logger, prefix=f"{name}/" if name else "")
                    runs.append(RunLog(folder, settings, told, is_scratch=is_scratch, shard=dictionary.shard))
                found = together.found_by_first(job, folders, lambda: find_checkpoints(runs, resume=resume))
                every = batches_from(batches, states, found, n_steps)
                for run, state, checkpoint in zip(runs, states, found, strict=True):
                    run.begin(state, checkpoint)
                    require_finite(state)
                    state.dictionary.frozen = config.frozen
                failpoint("train.begin")
                stacked = side_by_side(states)
                progress = Progress(label, n_steps, unit="step", quiet=quiet or job.rank > 0, initial=states[0].step)
                watch = _Watch(monitor, monitor_every, scratch_seconds)
                try:
                    _take_steps(stacked, states, every, config, n_steps, runs, progress, watch)
                except KeyboardInterrupt as stop:
                    raise keep_stopped(runs, states, stop, n_steps) from stop
                _require_steps(states[0].step, config.steps)
        except BaseException:
            for dictionary, was_training in zip(dictionaries, were_training, strict=True):
                dictionary.train(was_training)
            raise
        finally:
            for state in stacked:
                state.release()
            for dictionary in dictionaries:
                dictionary.zero_grad(set_to_none=True)
        return [_finished(state, run) for state, run in zip(states, runs, strict=True)]


def _require_steps(taken: int, asked: int | None) -> None:
    if taken == 0 or (asked is not None and taken < asked):
        raise ValueError(
            f"the batches ended after {taken} of {asked or 'at least 1'} steps; give more data or fewer steps"
        )


def _finished(state: TrainState, run: RunLog) -> TrainResult:
    together.require_same_replicas([state])
    state.dictionary.eval()
    run.finish(state)
    return TrainResult(state.dictionary, run.metrics, state.step, state.tokens)


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


@dataclass(frozen=True)
class _Watch:
    """What is done beside the steps."""

    monitor: Callable[[Dictionary], Entry] | None
    monitor_every: int
    scratch_seconds: float | None

    def is_monitored(self, step: int, n_steps: int | None) -> bool:
        """Whether the monitor is asked after a step that is not the last."""
        return self.monitor is not None and self.monitor_every > 0 and step % self.monitor_every == 0 < step != n_steps


def _take_steps(
    stacked: list[State],
    states: list[TrainState],
    batches: Iterator[Tensor],
    config: TrainConfig,
    n_steps: int | None,
    runs: list[RunLog],
    progress: Progress,
    watch: _Watch,
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

    def keep() -> None:
        nonlocal kept_at
        kept_at = time.monotonic()
        together.require_same_replicas(states)
        for state, run in zip(states, runs, strict=True):
            run.checkpoint(state)

    def is_lost() -> bool:
        """Whether a scratch run has much to lose."""
        return watch.scratch_seconds is not None and time.monotonic() - kept_at > watch.scratch_seconds

    shown, kept_at = dict[str, float](), time.monotonic()
    with progress:
        step = states[0].step
        if watch.is_monitored(step, n_steps):  # where the run was stopped before it was
            shown |= _monitor(states, watch.monitor, runs)
        for x in progress.from_first(batches):
            x = x.to(device, non_blocking=True)
            together.require_same_batch(states[0].dictionary.shard, x)
            try:
                numbers[:] = [take_step(state, x, config, n_steps) for state in stacked]
            except KeyboardInterrupt as stop:
                raise TornStepError from stop
            step += 1
            if step % config.log_every == 0 or step == n_steps:
                shown |= _to_show(log(), shown, states)
            progress.advance(1, tokens=math.prod(x.shape[:-2]), **shown)
            if watch.is_monitored(step, n_steps):
                shown |= _monitor(states, watch.monitor, runs)
            if (config.checkpoint_every and step % config.checkpoint_every == 0) or is_lost():
                keep()
            failpoint("train.step")
            signals.safe_point(together=True)
    if numbers:
        log()
    _monitor(states, watch.monitor if step else None, runs)
    if is_lost():
        keep()


def _to_show(entries: list[Entry], before: dict[str, float], states: list[TrainState]) -> dict[str, float]:
    """Loss, smoothed explained variance, L0, and the share of features that have long been silent; means over all."""
    found = {name: statistics.fmean(float(one[name] or 0.0) for one in entries) for name in ("loss", "l0")}
    whole = (state.dictionary.tensor_shapes(state.dictionary.config)["encoder_bias"] for state in states)
    n_features = sum(math.prod(shape) for shape in whole)
    found["silent"] = sum(float(one["silent_features"] or 0.0) for one in entries) / n_features
    if explained := [one["explained_variance"] for one in entries if one["explained_variance"] is not None]:
        mean = statistics.fmean(explained)
        found["explained"] = mean + SMOOTHING * (before.get("explained", mean) - mean)
    return found


def _monitor(
    states: list[TrainState], monitor: Callable[[Dictionary], Entry] | None, runs: list[RunLog]
) -> dict[str, float]:
    """What to show of what the monitor found, the mean over all dictionaries; what is logged of a step stays."""
    every = []
    if monitor is None:
        return {}
    for state, run in zip(states, runs, strict=True):
        if any(entry["step"] == state.step and "loss" not in entry for entry in run.metrics[-1:]):
            continue  # a run that had been finished
        state.dictionary.eval()
        try:
            found = together.measured_by_first(state.dictionary, monitor)
        finally:
            state.dictionary.train()
        every.append(found)
        run.log({"step": state.step, "tokens": state.tokens, **found})
    known = {name: [value for one in every if (value := one.get(name)) is not None] for one in every for name in one}
    return {name: statistics.fmean(values) for name, values in known.items() if values}
