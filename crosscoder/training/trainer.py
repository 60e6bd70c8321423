"""One training loop for every dictionary.

`train` takes any iterable of `x_BLD`. Every step is a function of the state and its batch alone: order comes from the
batches, the one thing that is drawn (whom to resample where) comes from the seed and the step, and a run that was
killed continues from its newest verified checkpoint to the same bits, metrics included.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosscoder.dictionary import Dictionary
from crosscoder.foundation.config import to_mapping
from crosscoder.foundation.console import Progress
from crosscoder.training.checkpoint import Entry, RunLog
from crosscoder.training.state import TrainState
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
    config = config or TrainConfig()
    if isinstance(batches, Tensor):
        raise ValueError(f"batches is one tensor of shape {tuple(batches.shape)}; give an iterable of batches, as [x]")
    n_steps = len(batches) if config.steps is None and isinstance(batches, Sized) else config.steps
    was_training = dictionary.training
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
    state = TrainState.start(dictionary, learning_rate=config.learning_rate, precision=config.precision)
    run = RunLog(None if folder is None else Path(folder), settings)
    run.open(state, resume=resume)
    try:
        progress = Progress(label, n_steps, unit="step", quiet=quiet)
        _take_steps(state, batches, config, n_steps, run, progress, monitor, monitor_every)
        if state.step == 0 or (config.steps is not None and state.step < config.steps):
            raise ValueError(
                f"the batches ended after {state.step} of {config.steps or 'at least 1'} steps; "
                "give more data or fewer steps"
            )
    except BaseException:
        dictionary.train(was_training)
        raise
    dictionary.eval()
    run.finish(state)
    return TrainResult(dictionary, run.metrics, state.step, state.tokens)


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
    state: TrainState,
    batches: Batches,
    config: TrainConfig,
    n_steps: int | None,
    run: RunLog,
    progress: Progress,
    monitor: Callable[[Dictionary], Entry] | None,
    monitor_every: int,
) -> None:
    numbers: Callable[[], Entry] | None = None
    shown: dict[str, float] = {}
    with progress:
        progress.advance(state.step)
        for x in _batches_from(batches, state, n_steps):
            numbers = take_step(state, x.to(state.dictionary.encoder.device, non_blocking=True), config, n_steps)
            if state.step % config.log_every == 0 or state.step == n_steps:
                run.log(entry := numbers())
                numbers = None
                shown |= _to_show(entry, shown, state)
            progress.advance(1, **shown)
            if monitor is not None and monitor_every and state.step % monitor_every == 0 and state.step != n_steps:
                shown |= _monitor(state, monitor, run)
            if config.checkpoint_every and state.step % config.checkpoint_every == 0:
                run.checkpoint(state)
    if numbers is not None:
        run.log(numbers())
    if monitor is not None and state.step:
        _monitor(state, monitor, run)


def _to_show(entry: Entry, before: dict[str, float], state: TrainState) -> dict[str, float]:
    """Loss, smoothed explained variance, L0, and the share of features that have long been silent."""
    found = {name: float(entry[name] or 0.0) for name in ("loss", "l0")}
    found["dead"] = float(entry["silent_features"] or 0.0) / state.firing.silent_GF.numel()
    if (explained := entry["explained_variance"]) is not None:
        found["explained"] = explained + SMOOTHING * (before.get("explained", explained) - explained)
    return found


def _monitor(state: TrainState, monitor: Callable[[Dictionary], Entry], run: RunLog) -> dict[str, float]:
    state.dictionary.eval()
    found = monitor(state.dictionary)
    state.dictionary.train()
    run.log({"step": state.step, "tokens": state.tokens, **found})
    return {name: value for name, value in found.items() if value is not None}


def _batches_from(batches: Batches, state: TrainState, n_steps: int | None) -> Iterator[Tensor]:
    """The batches from `state.step` on, after checking that the run's first batch is the one it began with."""
    start = state.step
    every = (_only_tensor(x) for x in (batches if isinstance(batches, Iterable) else batches(0)))
    if start > 0:
        first = next(every, None)
        if first is None or batch_hash(first) != state.first_batch:
            raise ValueError(
                "the first batch differs from the one this run began with, so continuing would mix two runs; give the "
                "same batches in the same order, or start in a new folder"
            )
        if isinstance(batches, Iterable):
            every = islice(every, start - 1, None)
        else:
            every = (_only_tensor(x) for x in batches(start))
    for x in islice(every, None if n_steps is None else n_steps - start):
        if state.step == 0:
            state.first_batch = batch_hash(x)
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
