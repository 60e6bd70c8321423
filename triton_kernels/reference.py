"""The definition of each sparse primitive in plain torch: any dtype, any device, no cleverness.

A sparse code is CSR: `values_P`, `features_P` and `offsets` of length R + 1, so that row r owns the pairs
`offsets[r] : offsets[r + 1]`. Tables are row-major, one row a feature. These forms materialise `[P, N]` and are the
truth that every faster form is tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_of_pair(offsets: Tensor, n_pairs: int) -> Tensor:
    """The row that owns each pair, as int64 `[P]`."""
    rows = torch.arange(offsets.numel() - 1, device=offsets.device)
    return rows.repeat_interleave(offsets.diff().long(), output_size=n_pairs)


def gather_sum(values_P: Tensor, features_P: Tensor, offsets: Tensor, table_FN: Tensor) -> Tensor:
    """`out[r] = sum over pairs p of row r of values[p] * table[features[p]]`, as `[R, N]`."""
    rows = row_of_pair(offsets, values_P.numel())
    out_RN = table_FN.new_zeros(offsets.numel() - 1, table_FN.shape[1])
    return out_RN.index_add(0, rows, values_P[:, None] * table_FN[features_P.long()])


def gather_dot(x_RN: Tensor, features_P: Tensor, offsets: Tensor, table_FN: Tensor) -> Tensor:
    """`out[p] = <x[row of p], table[features[p]]>`, as `[P]`."""
    rows = row_of_pair(offsets, features_P.numel())
    return (x_RN[rows] * table_FN[features_P.long()]).sum(1)


def scatter_outer(values_P: Tensor, features_P: Tensor, offsets: Tensor, x_RN: Tensor, n_features: int) -> Tensor:
    """`out[f] = sum over pairs p with features[p] = f of values[p] * x[row of p]`, as `[F, N]`."""
    rows = row_of_pair(offsets, values_P.numel())
    out_FN = x_RN.new_zeros(n_features, x_RN.shape[1])
    return out_FN.index_add(0, features_P.long(), values_P[:, None] * x_RN[rows])


def first_largest(scores_RF: Tensor, k: int) -> Tensor:
    """Columns of the k largest scores of each row, equal scores by lowest column, ascending, as int64 `[R, k]`."""
    order = torch.sort(scores_RF, dim=1, descending=True, stable=True).indices
    return order[:, :k].sort(dim=1).values
