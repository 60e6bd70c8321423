"""How long each feature has been silent."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder.dictionary import SparseCode
from crosscoder.dictionary.codec import to_global


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
