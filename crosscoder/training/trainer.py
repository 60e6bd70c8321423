"""One training loop for every dictionary.

`train` takes any iterable of `x_BLD`. Every step is a function of the state and its batch alone: order comes from the
batches, the one thing that is drawn (whom to resample where) comes from the seed and the step, and a run that was
killed continues from its newest verified checkpoint to the same bits, metrics included.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
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
from crosscoder.training.checkpoint import Entry, RunLog, open_together
from crosscoder.training.gradients import is_direct
from crosscoder.training.state import StackState, State, TrainState
from crosscoder.training.step import TrainConfig, take_step

Batches = Iterable[Tensor] | Callable[[int], Iterable[Tensor]]
SMOOTHING = 0.8
"""Weight of the past in the explained variance that is shown."""
Repeatable = Sequence[Tensor] | Callable[[int], Iterable[Tensor]]


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
        [dictionary], batches, [None if folder is None else Path(folder)], config or TrainConfig(), resume=resume,
        device=device, data_fingerprint=data_fingerprint, monitor=monitor, monitor_every=monitor_every, label=label,
        quiet=quiet,
    )  # fmt: skip
    return result


def train_many(
    dictionaries: Sequence[Dictionary],
    batches: Batches,
    *,
    config: TrainConfig | None = None,
    folder: str | Path | None = None,
    names: Sequence[str] | None = None,
    resume: bool = False,
    device: torch.device | str | None = None,
    data_fingerprint: str | None = None,
    monitor: Callable[[Dictionary], Entry] | None = None,
    monitor_every: int = 0,
    label: str = "training",
    quiet: bool = False,
) -> list[TrainResult]:
    """Trains dictionaries that read the same batches, each as `train` would by itself, and returns their results.

    Those that differ in seed, in k, or (crosscoders over all layers) in size by up to a factor of 2 take their steps
    together where their rule is `TopK` or `BatchTopK` without `prefixes`: one encoding, one decoding, one update for
    all (`StackState`). Others take turns on each batch. Choices, products and sums are those of a dictionary alone, so
    weights are equal to the bit on a CPU but for codes that are nearly dense in one of them (F <= 2 k), where they
    agree to rounding.

    folder: each dictionary's run goes to `folder/name` and is what `train` writes; with `resume` all continue from the
        newest step that all have a verified checkpoint of.
    names: of the dictionaries; `0`, `1`, ... by default.

    The other arguments are those of `train`.

    Raises:
        ValueError: as `train`; no dictionary, one twice, or names that are not one for each.
        NonFiniteError: as `train`, for the first dictionary that is not finite; none took that step.
    """
    names = [str(place) for place in range(len(dictionaries))] if names is None else list(names)
    if not dictionaries or len({id(one) for one in dictionaries}) < len(dictionaries):
        raise ValueError(f"{len(dictionaries)} dictionaries, some given twice or none at all; give each one once")
    if len(set(names)) != len(dictionaries) or not all(names) or any(Path(name).name != name for name in names):
        raise ValueError(f"names are {names} for {len(dictionaries)} dictionaries; give each a file name of its own")
    folders = [None if folder is None else Path(folder) / name for name in names]
    return _train(
        list(dictionaries), batches, folders, config or TrainConfig(), resume=resume, device=device,
        data_fingerprint=data_fingerprint, monitor=monitor, monitor_every=monitor_every, label=label, quiet=quiet,
    )  # fmt: skip


def _train(
    dictionaries: list[Dictionary],
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
    states, runs = [], []
    for dictionary, folder in zip(dictionaries, folders, strict=True):
        if (scale_L := getattr(batches, "scale_L", None)) is not None:
            dictionary.set_input(scale_L, getattr(batches, "reads", None))
        dictionary.to(device).train()
        settings = {
            "class": type(dictionary).__name__,
            "dictionary": to_mapping(dictionary.config),
            "training": to_mapping(config),
            "data": data_fingerprint,
            "steps": n_steps,
        }
        states.append(TrainState.start(dictionary, learning_rate=config.learning_rate, precision=config.precision))
        runs.append(RunLog(folder, settings))
    open_together(runs, states, resume=resume)
    stacked = side_by_side(states)
    try:
        progress = Progress(label, n_steps, unit="step", quiet=quiet)
        _take_steps(stacked, states, batches, config, n_steps, runs, progress, monitor, monitor_every)
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
    for state, run in zip(states, runs, strict=True):
        state.dictionary.eval()
        run.finish(state)
    pairs = zip(states, runs, strict=True)
    return [TrainResult(state.dictionary, run.metrics, state.step, state.tokens) for state, run in pairs]


def side_by_side(states: Sequence[TrainState]) -> list[State]:
    """The states in as few as can take their steps: those that fit one another in one, largest first."""
    alone = [state for state in states if not is_direct(state.dictionary)]
    left = [state for state in states if is_direct(state.dictionary)]
    left.sort(key=lambda state: -state.dictionary.config.n_features)
    stacks: list[list[TrainState]] = []
    for state in left:
        own = (stack for stack in stacks if fits(state.dictionary, stack[0].dictionary))
        if (stack := next(own, None)) is not None:
            stack.append(state)
        else:
            stacks.append([state])
    return [*alone, *(StackState(stack) if len(stack) > 1 else stack[0] for stack in stacks)]


def train_warm_chain(
    bank: Dictionary, batches: Repeatable, *, folder: str | Path | None = None, label: str = "training", **options: Any
) -> TrainResult:
    """Trains the SAEs of `bank` in place, layer l from the trained weights of layer l - 1, as `train` would.

    Layer 0 starts as the bank does. Every layer has all of `config.steps` on the same batches of `[..., L, D]`, a fresh
    optimiser and its own centre, so a chain costs what the bank costs. Features keep their number from layer to layer
    far more often than in SAEs from independent starts: the chain is the upper estimate of how many survive.

    batches: a list, or a function that gives the batches from a step number on; they are read once a layer.
    folder: each layer's run is in `layer-l`, the bank at the end in `dictionary`. With `resume` finished layers are
        read again, not trained again.
    options: the other keyword arguments of `train`.

    Metrics are those of the layers one after the other, each with its `layer`; steps are summed, tokens are those of
    one layer.

    Raises:
        ValueError: `bank` is no bank of separate layers, `batches` could be read only once, or as `train`.
    """
    n_groups, n_layers = bank.n_groups, bank.config.n_layers
    if n_groups != n_layers:
        raise ValueError(
            f"a {type(bank).__name__} of {n_layers} layers has {n_groups} dictionary; a chain needs a LayerwiseSAE "
            "with one for each layer"
        )
    if not (isinstance(batches, Sequence) or callable(batches)):
        kind = type(batches).__name__
        raise ValueError(f"batches is a {kind}, and a chain reads its batches once a layer; give a list or a function")
    if (scale_L := getattr(batches, "scale_L", None)) is not None:
        bank.set_input(scale_L, getattr(batches, "reads", None))
    metrics, steps, tokens, state = [], 0, 0, _layer_state(bank, 0)
    for layer in range(n_layers):
        single = type(bank)(**{**bank.config.settings(), "n_layers": 1})
        single.load_state_dict({**state, "input_scale": bank.input_scale[layer : layer + 1]})
        result = train(
            single,
            _one_layer(batches, layer),
            folder=None if folder is None else Path(folder) / f"layer-{layer}",
            label=f"{label}, layer {layer}",
            **options,
        )
        metrics += [{"layer": float(layer), **entry} for entry in result.metrics]
        steps, tokens = steps + result.steps, result.tokens
        with torch.no_grad():
            for name, tensor in bank.state_dict().items():
                tensor[layer] = single.state_dict()[name][0].to(tensor)
        state = _layer_state(single, 0)
        state["decoder_bias"].zero_()  # a centre and an inference threshold are each layer's own
        state["threshold"].fill_(torch.nan)
    bank.to(next(single.parameters()).device).eval()
    if folder is not None:
        bank.save_pretrained(Path(folder) / "dictionary")
    return TrainResult(bank, metrics, steps, tokens)


def _layer_state(bank: Dictionary, layer: int) -> dict[str, Tensor]:
    return {name: tensor[layer : layer + 1].clone() for name, tensor in bank.state_dict().items()}


def _one_layer(batches: Repeatable, layer: int) -> Batches:
    if isinstance(batches, Sequence):
        return [x[..., layer : layer + 1, :] for x in batches]
    return lambda start: (x[..., layer : layer + 1, :] for x in batches(start))


def _take_steps(
    stacked: list[State],
    states: list[TrainState],
    batches: Batches,
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
        for x in _batches_from(batches, states, n_steps):
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
    """What to show of what the monitor found, the mean over all dictionaries."""
    every = []
    for state, run in zip(states, runs, strict=True):
        state.dictionary.eval()
        every.append(monitor(state.dictionary))
        state.dictionary.train()
        run.log({"step": state.step, "tokens": state.tokens, **every[-1]})
    known = {name: [value for one in every if (value := one.get(name)) is not None] for name in every[0]}
    return {name: statistics.fmean(values) for name, values in known.items() if values}


def _batches_from(batches: Batches, states: list[TrainState], n_steps: int | None) -> Iterator[Tensor]:
    """The batches from the states' step on, after checking that the run's first batch is the one it began with."""
    start = states[0].step
    every = (_only_tensor(x) for x in (batches if isinstance(batches, Iterable) else batches(0)))
    if start > 0:
        first = next(every, None)
        if first is None or any(batch_hash(first) != state.first_batch for state in states):
            raise ValueError(
                "the first batch differs from the one this run began with, so continuing would mix two runs; give the "
                "same batches in the same order, or start in a new folder"
            )
        if isinstance(batches, Iterable):
            every = islice(every, start - 1, None)
        else:
            every = (_only_tensor(x) for x in batches(start))
    for x in islice(every, None if n_steps is None else n_steps - start):
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
