"""A bank's SAEs trained one after the other, each from the weights of the layer before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosscoder.dictionary import Dictionary
from crosscoder.dictionary.division import save_whole
from crosscoder.foundation import signals
from crosscoder.training.checkpoint import Entry
from crosscoder.training.given import unwrapped
from crosscoder.training.keeping import one_writer
from crosscoder.training.loggers import Logger, SafeLogger
from crosscoder.training.step import TrainConfig
from crosscoder.training.trainer import Batches, TrainResult, train

Repeatable = Sequence[Tensor] | Callable[[int], Iterable[Tensor]]


@signals.watching()
def train_warm_chain(
    bank: Dictionary,
    batches: Repeatable,
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
    """Trains the SAEs of `bank` in place, layer l from the trained weights of layer l - 1, as `train` would.

    Layer 0 starts as the bank does. Every layer takes all steps on the same batches of `[..., L, D]`, with a fresh
    optimiser and its own centre, so a chain costs what the bank costs. Features keep their number from layer to layer
    far more often than in SAEs from independent starts: the chain is the upper estimate of how many survive.

    batches: a list, or a function that gives the batches from a step number on; they are read once a layer.
    folder: each layer's run is in `layer-l`, the bank at the end in `dictionary`. With `resume` finished layers are
        read again, not trained again; with another number of steps each goes on from where it was.
    monitor: is given the SAE of one layer. logger: its names begin with the layer's.

    The other arguments are those of `train`.

    Metrics are those of the layers one after the other, each with its `layer`; steps are summed, tokens are those of
    one layer.

    Raises:
        ValueError: `bank` is no bank of separate layers, `batches` could be read only once, weights are frozen, or as
            `train`.
    """
    bank = unwrapped(bank)
    n_groups, n_layers = bank.n_groups, bank.config.n_layers
    if bank.shard is not None and bank.shard.along == "layers":
        raise ValueError("a chain trains one layer after the other: ranks divide the features of its bank, not layers")
    if n_groups != n_layers:
        raise ValueError(
            f"a {type(bank).__name__} of {n_layers} layers has {n_groups} dictionary; a chain needs a LayerwiseSAE "
            "with one for each layer"
        )
    if not (isinstance(batches, Sequence) or callable(batches)):
        kind = type(batches).__name__
        raise ValueError(f"batches is a {kind}, and a chain reads its batches once a layer; give a list or a function")
    if config is not None and config.frozen != "none":
        raise ValueError(
            f"frozen is {config.frozen!r}, and a chain starts each layer from the trained weights of the one before, "
            "which are not random; train a bank whose layers start by themselves"
        )
    if (scale_L := getattr(batches, "scale_L", None)) is not None:
        bank.set_input(scale_L, getattr(batches, "reads", None))
    told = None if logger is None else SafeLogger(logger)
    options: dict[str, Any] = {
        "config": config, "resume": resume, "device": device, "data_fingerprint": data_fingerprint, "quiet": quiet,
        "monitor": monitor, "monitor_every": monitor_every, "scratch_seconds": scratch_seconds,
    }  # fmt: skip
    writes = scratch_seconds is None and (bank.shard is None or bank.shard.ranks.job.is_first)
    with one_writer([Path(folder)] if folder is not None and writes else []):
        return _train_layers(bank, batches, None if folder is None else Path(folder), label, told, options)


def _train_layers(
    bank: Dictionary,
    batches: Repeatable,
    folder: Path | None,
    label: str,
    told: SafeLogger | None,
    options: dict[str, Any],
) -> TrainResult:
    metrics, steps, tokens, state = [], 0, 0, _layer_state(bank, 0)
    for layer in range(bank.config.n_layers):
        single = type(bank)(shard=bank.shard, **replace(bank.config, n_layers=1).settings())
        single.load_state_dict({**state, "input_scale": bank.input_scale[layer : layer + 1]})
        result = train(
            single,
            _one_layer(batches, layer),
            folder=None if folder is None else folder / f"layer-{layer}",
            label=f"{label}, layer {layer}",
            logger=None if told is None else SafeLogger(told, prefix=f"layer-{layer}/", first_step=steps),
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
    if folder is not None and options.get("scratch_seconds") is None:
        save_whole(bank, folder / "dictionary")
    return TrainResult(bank, metrics, steps, tokens)


def _layer_state(bank: Dictionary, layer: int) -> dict[str, Tensor]:
    return {name: tensor[layer : layer + 1].clone() for name, tensor in bank.state_dict().items()}


def _one_layer(batches: Repeatable, layer: int) -> Batches:
    if isinstance(batches, Sequence):
        return [x[..., layer : layer + 1, :] for x in batches]
    return lambda start: (x[..., layer : layer + 1, :] for x in batches(start))
