"""`gather_sum`: every row's weighted sum of table rows, `out[r] = sum over its pairs of value * table[feature]`.

One program owns a column tile of one output row and walks the row's pairs in order, several at a time, its sum in
registers; the indices of the next step are fetched while the rows of this one are on their way. Rows are the fast
axis of the grid and column tiles the slow one, so that the slice of the table in use stays in L2: the floor is one
read of the table's used rows and one write of the output, `(F + R) * N` elements, against `P * N` gathered.
Deterministic: a sum belongs to one program and its order is that of the pairs.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from triton_kernels.arguments import Code
from triton_kernels.gpu.tiles import accumulator, gather_tile, jit, tile_count


@jit
def weighted_rows(
    values, features, offsets, row, table, columns, inside,
    N: tl.constexpr, PAIRS: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Sum over the pairs of `row` of `values * table[features, columns]`."""
    begin = tl.load(offsets + row)
    end = (tl.load(offsets + row + 1) - begin).to(tl.int32)
    values, features = values + begin, features + begin
    at = tl.arange(0, PAIRS)
    feature = tl.load(features + at, at < end, other=0)
    value = tl.load(values + at, at < end, other=0).to(ACCUMULATE)
    total = tl.full(columns.shape, 0, ACCUMULATE)
    for _ in range(0, end, PAIRS):
        source = table + feature.to(tl.int64)[:, None] * N + columns[None, :]
        rows = tl.load(source, (at < end)[:, None] & inside[None, :], other=0).to(ACCUMULATE)
        weight = value
        at += PAIRS
        feature = tl.load(features + at, at < end, other=0)
        value = tl.load(values + at, at < end, other=0).to(ACCUMULATE)
        total += tl.sum(weight[:, None] * rows, 0)
    return total


@jit
def gather_sum_kernel(
    values, features, offsets, table, out,
    N: tl.constexpr, COLUMNS: tl.constexpr, PAIRS: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < N
    total = weighted_rows(values, features, offsets, row, table, columns, inside, N, PAIRS, ACCUMULATE)
    tl.store(out + row * N + columns, total.to(out.dtype.element_ty), inside, eviction_policy="evict_first")


def gather_sum(code: Code, table_FN: Tensor) -> Tensor:
    """See `reference.gather_sum`; the output has the table's dtype."""
    values_P, features_P, offsets = code
    n_rows, (n_features, width) = offsets.numel() - 1, table_FN.shape
    if features_P.numel() == 0 or width == 0:
        return table_FN.new_zeros(n_rows, width)
    out_RN = torch.empty(n_rows, width, dtype=table_FN.dtype, device=table_FN.device)
    tile = gather_tile(width, table_FN.itemsize, n_features)
    gather_sum_kernel[(n_rows, tile_count(width, tile.columns))](
        values_P.contiguous(), features_P.contiguous(), offsets.contiguous(), table_FN.contiguous(), out_RN,
        width, tile.columns, tile.pairs, accumulator(table_FN.dtype), num_warps=1,
    )  # fmt: skip
    return out_RN
