"""What dictionaries speak in: the sparse code of a batch, and their parameters as dictionaries side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SparseCode:
    """The active features of a batch, as CSR.

    Row r owns pairs `offsets[r] : offsets[r + 1]`; within a row features ascend. For a crosscoder a row is a token
    and `batch_shape` is the input's leading shape; for a bank a row is a (token, layer), `batch_shape` ends in L, and
    `features` count from 0 within each layer. Values are >= 0; codes of TopK, and of JumpReLU in training, may hold
    zeros, which are not active.
    """

    values: Tensor  # [P]
    features: Tensor  # [P], int32, 0 <= feature < n_features
    offsets: Tensor  # [R + 1], int64
    n_features: int
    batch_shape: tuple[int, ...]
    global_features: Tensor | None = None
    """Features counted over all layers of a bank, `layer * F + feature`, where the encoder had them at hand."""

    @property
    def n_pairs(self) -> int:
        """P, the stored pairs."""
        return self.values.numel()

    @property
    def n_rows(self) -> int:
        """R, the product of `batch_shape`."""
        return self.offsets.numel() - 1

    def rows(self) -> Tensor:
        """The row of each pair, as int64 `[P]`."""
        rows = torch.arange(self.n_rows, device=self.offsets.device)
        return rows.repeat_interleave(self.offsets.diff(), output_size=self.n_pairs)

    def l0(self) -> Tensor:
        """Active features of each row, as int64 in `batch_shape`."""
        counts = torch.zeros(self.n_rows, dtype=torch.int64, device=self.offsets.device)
        counts.index_add_(0, self.rows(), (self.values > 0).long())
        return counts.view(self.batch_shape)

    def prefix(self, size: int) -> SparseCode:
        """The code of the first `size` features alone, in a bank of each layer's; the same rows and `n_features`."""
        kept_P = self.features < size
        ends = torch.nn.functional.pad(kept_P.cumsum(0), (1, 0))
        return replace(
            self,
            values=self.values[kept_P],
            features=self.features[kept_P],
            offsets=ends[self.offsets],
            global_features=None if self.global_features is None else self.global_features[kept_P],
        )

    def to_dense(self) -> Tensor:
        """The code with its zeros, `[*batch_shape, F]`; differentiable in `values`. Costs R * F numbers."""
        flat = self.values.new_zeros(self.n_rows * self.n_features)
        position = self.rows() * self.n_features + self.features
        return flat.index_put((position,), self.values).view(*self.batch_shape, self.n_features)


class DictionaryOutput(NamedTuple):
    """What a forward pass gives: the reconstruction `[..., L, D]` and the code it was made from."""

    recon: Tensor
    code: SparseCode


class Grouped(NamedTuple):
    """A dictionary's parameters as G independent dictionaries side by side, each reading N numbers.

    A crosscoder is G = 1, N = L * D; a bank is G = L, N = D; an SAE that all layers share is G = 1, N = D, and has L
    rows a token. The centre is a view: writing to it writes to the dictionary; weights are views too where no structure
    masks them.
    """

    encoder_GFN: Tensor
    decoder_GFN: Tensor
    encoder_bias_GF: Tensor
    center_GN: Tensor
    log_threshold_GF: Tensor | None = None
    """Of a JumpReLU dictionary."""
    working_GFN: Tensor | None = None
    """The encoder rounded for its product, where an optimiser keeps one beside it."""

    def split(self, x_BLD: Tensor) -> Tensor:
        """What each of the G dictionaries reads of `x_BLD`: `[B, G, N]`, or for a shared SAE `[B * L, 1, D]`."""
        return x_BLD.reshape(-1, *self.center_GN.shape)
