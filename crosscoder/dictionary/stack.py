"""Dictionaries side by side in one memory, so that one operator call serves all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from crosscoder.dictionary.codec import Grouped
from crosscoder.dictionary.dictionary import Dictionary
from crosscoder.dictionary.sparsity import BatchTopK, JumpReLU, TargetL0Penalty, TopK
from crosscoder.dictionary.structure import Acausal
from crosscoder.dictionary.weights import OF_FEATURES, Weights, masked

SHARED = ("encoder", "decoder", "encoder_bias", "decoder_bias", "log_threshold", "threshold")
"""The tensors that lie together, of those that a dictionary has."""
NEVER_ACTIVE = -(2.0**100)
"""Bias of a feature that does not exist; a number of every format, so that rounding it costs no bound its hold."""
NEVER_ABOVE = 60.0
"""Log-threshold of a feature that does not exist: far above every score, and finite, so that 0 times it is 0."""
PADDING = {"encoder_bias": NEVER_ACTIVE, "log_threshold": NEVER_ABOVE}
LEAST_FILLED, MOST_PADDED = 0.5, 4095
"""A crosscoder is padded with features that do not exist up to twice its size, and to fewer than so many that
encoders choose another way of finding candidates by the size (`triton_kernels.cpu.prefilter`)."""


class Stack(Weights):
    """The weights of S dictionaries that read the same inputs, `[S * G, F, ...]`, of which each one's are views.

    Dictionaries of one kind (`kind`) may differ in seed, in k, in the thresholds that they start from and the L0 that a
    penalty aims at, and, where a `Crosscoder` has all layers and selects by bare scores, in size: smaller ones are
    padded with features whose bias is so low that they are never active. `release` gives every dictionary memory of its
    own again.
    """

    def __init__(self, members: Sequence[Dictionary]) -> None:
        super().__init__()
        largest = max(members, key=lambda one: one.config.n_features)
        self.members, self.config, self.log_threshold = list(members), largest.config, None
        self.shared = [name for name in SHARED if getattr(largest, name) is not None]
        self.read_mask, self.write_mask = largest.read_mask, largest.write_mask
        for name in self.shared:
            tensors = [getattr(one, name).detach() for one in members]
            tensor = self.joined(name, tensors, fill=PADDING.get(name, 0.0))
            if name == "threshold":
                self.register_buffer(name, tensor)
            else:
                setattr(self, name, nn.Parameter(tensor, requires_grad=getattr(largest, name).requires_grad))
            for member, view in zip(self.members, self.views(name, tensor), strict=True):
                getattr(member, name).data = view

    def grouped(self) -> Grouped:
        encoder, decoder = masked(self.encoder, self.read_mask), masked(self.decoder, self.write_mask)
        return Grouped(
            encoder.flatten(2), decoder.flatten(2), self.encoder_bias, self.decoder_bias.flatten(1), self.log_threshold
        )

    def joined(self, name: str, tensors: Sequence[Tensor], *, fill: float) -> Tensor:
        """What each dictionary has of a named weight's shape, as one tensor `[S * G, ...]`, padded with `fill`."""
        pairs = zip(self.members, tensors, strict=True)
        own = [tensor.reshape(m.n_groups, *tensor.shape[_n_axes(m, name) :]) for m, tensor in pairs]
        if name in OF_FEATURES:
            own = [_padded(one, self.config.n_features, fill) for one in own]
        return torch.cat(own)

    def views(self, name: str, tensor: Tensor) -> list[Tensor]:
        """Each dictionary's part of a tensor of a named weight's shape, in the shape that the dictionary gives it."""
        parts = tensor.chunk(len(self.members))
        if name in OF_FEATURES:
            parts = [part[:, : m.config.n_features] for part, m in zip(parts, self.members, strict=True)]
        return [part.view(getattr(m, name).shape) for part, m in zip(parts, self.members, strict=True)]

    def release(self) -> None:
        """Give every dictionary its weights in memory of its own."""
        for member in self.members:
            for name in self.shared:
                tensor = getattr(member, name)
                tensor.data, tensor.grad = tensor.data.clone(), None


def kind(dictionary: Dictionary) -> str:
    """What dictionaries must have in common to stand in one stack; sizes are compared apart (`fits`)."""
    config, weight = dictionary.config, dictionary.encoder
    settings = config.settings() | {"seed": 0, "initial": "independent"}
    match config.sparsity:
        case TopK() | BatchTopK() as rule:
            settings["sparsity"] = replace(rule, k=1)
        case JumpReLU(penalty=TargetL0Penalty() as penalty) as rule:
            settings["sparsity"] = replace(rule, threshold=1, penalty=replace(penalty, target=1))
    is_plain = isinstance(config.structure, Acausal) and config.selection_weight == "none" and not config.shared
    if dictionary.n_groups == 1 and is_plain:  # a score times a norm of 0 would be 0, and no padding any more
        settings["n_features"] = 1
    trained = [name for name, parameter in dictionary.named_parameters() if parameter.requires_grad]
    return f"{type(dictionary).__name__} {settings} {weight.dtype} {weight.device} {trained}"


def fits(dictionary: Dictionary, largest: Dictionary) -> bool:
    """Whether a dictionary can stand in a stack with a larger one, without more padding than weights."""
    size, most = dictionary.config.n_features, largest.config.n_features
    return kind(dictionary) == kind(largest) and (size == most or LEAST_FILLED * most <= size < most <= MOST_PADDED)


def _n_axes(dictionary: Dictionary, name: str) -> int:
    """How many leading axes of a dictionary's weight count its groups."""
    return len(type(dictionary).layout(dictionary.config).groups) if name != "threshold" else 1


def _padded(tensor: Tensor, n_features: int, fill: float) -> Tensor:
    padding = tensor.new_full((len(tensor), n_features - tensor.shape[1], *tensor.shape[2:]), fill)
    return torch.cat([tensor, padding], dim=1)
