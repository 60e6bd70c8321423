"""The tensors of a training state by name, whole or this rank's part: what a checkpoint holds is always whole."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder.dictionary import Dictionary
from crosscoder.foundation.tensors import WHOLE, Pieces, Streamed
from crosscoder.training.state import TrainState


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    """What a checkpoint holds beside the dictionary, by name: this rank's part."""
    tensors = {"firing.silent": state.firing.silent_GF}
    if state.start_RN is not None:
        tensors["frozen.start"] = state.start_RN
    for name, parameter in state.dictionary.named_parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"adam.{key}.{name}"] = value.detach()
    return tensors


def _axis(name: str, dictionary: Dictionary) -> int | None:
    """The axis along which ranks divide a tensor of a checkpoint; None where each of them holds it whole."""
    if name in ("firing.silent", "frozen.start"):
        return None if dictionary.shard is None else dictionary.shard.axis(1)
    moment, _, of = name.removeprefix("adam.").rpartition(".")
    return None if moment == "step" else dictionary.axis_of(of)


def whole_tensors_of(state: TrainState) -> dict[str, Tensor | Streamed]:
    """`tensors_of` of all ranks together, as one process would have it; see `division.whole_tensors`."""
    dictionary, whole = state.dictionary, dict[str, Tensor | Streamed]()
    for name, tensor in tensors_of(state).items():
        axis, whole[name] = _axis(name, dictionary), tensor
        if dictionary.shard is not None and axis is not None:
            rows = tensor.view(dictionary.n_groups, dictionary.n_held, -1) if name == "frozen.start" else tensor
            shape = tuple(whole_like(name, tensor, dictionary).shape)
            whole[name] = Streamed(shape, tensor.dtype, dictionary.shard.blocks(rows, axis))
    return whole


def own_pieces(name: str, dictionary: Dictionary) -> Pieces:
    """Which pieces of a whole tensor this rank holds, one after the other."""
    shard, axis = dictionary.shard, _axis(name, dictionary)
    if shard is None or axis is None:
        return WHOLE
    if name != "frozen.start":
        return [(slice(None),) * axis + (slice(shard.start, shard.stop),)]
    per_group = dictionary.config.n_features
    if shard.along == "layers":
        return [(slice(shard.start * per_group, shard.stop * per_group),)]
    begins = range(0, dictionary.n_groups * per_group, per_group)
    return [(slice(begin + shard.start, begin + shard.stop),) for begin in begins]


def whole_like(name: str, part: Tensor, dictionary: Dictionary) -> Tensor:
    """A tensor of the shape and dtype of all ranks' parts together, without numbers."""
    shape, axis = list(part.shape), _axis(name, dictionary)
    if dictionary.shard is not None and axis is not None:
        place = 0 if name == "frozen.start" else axis
        shape[place] = shape[place] // dictionary.shard.n_own * dictionary.shard.n_whole
    return torch.empty(shape, dtype=part.dtype, device="meta")
