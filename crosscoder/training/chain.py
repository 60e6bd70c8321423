"""A bank whose layers are trained one after the other, each from where the one before it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from crosscoder.dictionary import Dictionary
from crosscoder.training.step import TrainConfig
from crosscoder.training.trainer import Batches, TrainResult, train

Repeatable = Sequence[Tensor] | Callable[[int], Iterable[Tensor]]


def train_warm_chain(
    bank: Dictionary,
    batches: Repeatable,
    *,
    config: TrainConfig | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    device: torch.device | str | None = None,
    data_fingerprint: str | None = None,
    label: str = "training",
    quiet: bool = False,
) -> TrainResult:
    """Trains the SAEs of `bank` in place, layer l from the trained weights of layer l - 1, as `train` would.

    Layer 0 starts as the bank does. Every layer has all of `config.steps` on the same batches of `[..., L, D]`, a fresh
    optimiser and its own centre, so a chain costs what the bank costs. Features keep their number from layer to layer
    far more often than in SAEs from independent starts: the chain is the upper estimate of how many survive.

    batches: a list, or a function that gives the batches from a step number on; they are read once a layer.
    folder: each layer's run is in `layer-l`, the bank at the end in `dictionary`. With `resume` finished layers are
        read again, not trained again.

    Metrics are those of the layers one after the other, each with its `layer`; steps are summed, tokens are those of
    one layer.

    Raises:
        ValueError: `bank` is no bank of separate layers, `batches` could be read only once, or as `train`.
    """
    _check(bank, batches)
    metrics, steps, tokens, state = [], 0, 0, _layer_state(bank, 0)
    for layer in range(bank.config.n_layers):
        single = type(bank)(**{**bank.config.settings(), "n_layers": 1})
        single.load_state_dict({**state, "input_scale": bank.input_scale[layer : layer + 1]})
        result = train(
            single,
            _one_layer(batches, layer),
            config=config,
            folder=None if folder is None else Path(folder) / f"layer-{layer}",
            resume=resume,
            device=device,
            data_fingerprint=data_fingerprint,
            label=f"{label}, layer {layer}",
            quiet=quiet,
        )
        metrics += [{"layer": float(layer), **entry} for entry in result.metrics]
        steps, tokens = steps + result.steps, result.tokens
        state = _started_from(single)
        _write_layer(bank, layer, single)
    bank.to(next(single.parameters()).device).eval()
    if folder is not None:
        bank.save_pretrained(Path(folder) / "dictionary")
    return TrainResult(bank, metrics, steps, tokens)


def _check(bank: Dictionary, batches: Repeatable) -> None:
    n_groups, n_layers = bank.n_groups, bank.config.n_layers
    if n_groups != n_layers:
        raise ValueError(
            f"a {type(bank).__name__} of {n_layers} layers has {n_groups} dictionary; a chain needs a LayerwiseSAE "
            "with one for each layer"
        )
    if not (isinstance(batches, Sequence) or callable(batches)):
        raise ValueError(
            f"batches is a {type(batches).__name__}, and a chain reads its batches once a layer; give a list or a "
            "function"
        )


def _layer_state(bank: Dictionary, layer: int) -> dict[str, Tensor]:
    return {name: tensor[layer : layer + 1].clone() for name, tensor in bank.state_dict().items()}


def _started_from(single: Dictionary) -> dict[str, Tensor]:
    """What the next layer begins with: weights, but a centre and an inference threshold of its own."""
    state = _layer_state(single, 0)
    return {
        **state,
        "decoder_bias": torch.zeros_like(state["decoder_bias"]),
        "threshold": torch.full_like(state["threshold"], torch.nan),
    }


@torch.no_grad()
def _write_layer(bank: Dictionary, layer: int, single: Dictionary) -> None:
    for name, tensor in bank.state_dict().items():
        tensor[layer] = single.state_dict()[name][0].to(tensor)


def _one_layer(batches: Repeatable, layer: int) -> Batches:
    if isinstance(batches, Sequence):
        return [x[..., layer : layer + 1, :] for x in batches]
    return lambda start: (x[..., layer : layer + 1, :] for x in batches(start))
