"""The tensors of a training state by name, whole or this rank's part: what a checkpoint holds is always whole."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder.dictionary import Dictionary
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


def whole_tensors_of(state: TrainState) -> dict[str, Tensor]:
    """`tensors_of` of all ranks together, on the CPU of rank 0, as one process would have it."""
    dictionary, whole = state.dictionary, {}
    for name, tensor in tensors_of(state).items():
        axis = _axis(name, dictionary)
        if dictionary.shard is not None and axis is not None:
            rows = tensor.view(dictionary.n_groups, dictionary.n_held, -1) if name == "frozen.start" else tensor
            found = dictionary.shard.whole(rows, axis)
            tensor = found.flatten(0, 1) if name == "frozen.start" and found is not None else found
        if tensor is not None:
            whole[name] = tensor.cpu().contiguous()
    return whole


def part_of(name: str, whole: Tensor, dictionary: Dictionary) -> Tensor:
    """What this rank holds of a whole tensor."""
    axis = _axis(name, dictionary)
    if dictionary.shard is None or axis is None:
        return whole
    if name == "frozen.start":
        n_features = dictionary.config.n_features
        return dictionary.shard.part(whole.view(-1, n_features, whole.shape[1]), axis).flatten(0, 1)
    return dictionary.shard.part(whole, axis)


def whole_like(name: str, part: Tensor, dictionary: Dictionary) -> Tensor:
    """A tensor of the shape and dtype of all ranks' parts together, without numbers."""
    shape, axis = list(part.shape), _axis(name, dictionary)
    if dictionary.shard is not None and axis is not None:
        place = 0 if name == "frozen.start" else axis
        shape[place] = shape[place] // dictionary.shard.n_own * dictionary.shard.n_whole
    return torch.empty(shape, dtype=part.dtype, device="meta")
