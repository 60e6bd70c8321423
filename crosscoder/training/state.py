"""All that a training run carries from one step to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from crosscoder.dictionary import Dictionary, SparseCode
from crosscoder.dictionary.codec import to_global
from crosscoder.training.optimizer import RowAdam


class FiringTracker:
    """Tokens seen since each feature was last active, `[G, F]`."""

    def __init__(self, n_groups: int, n_features: int, *, device: torch.device | str = "cpu") -> None:
        self.silent_GF = torch.zeros(n_groups, n_features, dtype=torch.int64, device=device)

    def update(self, code: SparseCode, n_tokens: int) -> None:
        """Count one batch of `n_tokens`; a stored value of zero is not activity, and none is below zero."""
        features, values = to_global(code, self.silent_GF.shape[0]), code.values.detach()
        total_F = values.new_zeros(self.silent_GF.numel()).index_add_(0, features, values)
        self.silent_GF.add_(n_tokens).masked_fill_((total_F > 0).view(self.silent_GF.shape), 0)

    def dead(self, after_tokens: int) -> Tensor:
        """True for features silent for at least `after_tokens`, `[G, F]`."""
        return self.silent_GF >= after_tokens


@dataclass
class TrainState:
    """A dictionary, its optimiser, the silence of its features, and how far the run is.

    The dictionary's state includes its inference threshold and input scale. The data cursor is `step`: batch number
    `step` is the next one. What a step draws at random it draws from a generator seeded by `step`, so there is none to
    keep.
    """

    dictionary: Dictionary
    optimizer: RowAdam
    firing: FiringTracker
    step: int = 0
    tokens: int = 0
    first_batch: str = ""

    @classmethod
    def start(cls, dictionary: Dictionary, *, learning_rate: float = 1e-3, precision: str = "fp32") -> Self:
        """The state before the first step; on a GPU in bf16 the optimiser keeps the encoder rounded for its product."""
        device = dictionary.encoder.device
        keep = device.type == "cuda" and precision == "bf16"
        optimizer = RowAdam(dictionary, lr=learning_rate, keep_working_copy=keep)
        return cls(
            dictionary, optimizer, FiringTracker(dictionary.n_groups, dictionary.config.n_features, device=device)
        )
