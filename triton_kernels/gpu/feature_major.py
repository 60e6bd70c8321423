"""The transpose of a code, cut into chunks: what the kernels that own one output row a feature walk.

One stable sort orders the pairs by feature, ties in row order. A feature's pairs are cut into chunks of at most
`CHUNK`, so that a feature active in every row is not one serial loop; a feature with no pair has one empty chunk,
which writes its zero row. Chunk 0 of a feature writes the output row, and every further one a row of scratch: at
most `P // CHUNK` rows of N in the accumulator's dtype, 4 bytes * P * N / 128 in float32. `add_scratch` then adds a
feature's scratch rows to its output row in chunk order. The number of chunks is bounded by `F + P // CHUNK` without
asking the device; chunks past the last one carry feature F and their programs return at once.
Deterministic: the sort is stable, and all that follows depends on counts only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from triton_kernels.cache import TransposeCache
from triton_kernels.gpu.tiles import accumulator, gather_tile, jit, tile_count

CHUNK = 128


class ChunkedTranspose(NamedTuple):
    """A code's pairs by feature, and the chunks they are cut into."""

    order_P: Tensor  # position of each sorted pair in the row-major code, int64
    rows_P: Tensor  # the row of each sorted pair, int32
    starts: Tensor  # [F + 1], where each feature's pairs begin, int32
    chunks: Tensor  # [F + P // CHUNK, 4], int32: feature, first pair, end, scratch row (-1: the output row)
    scratch_features: Tensor  # [P // CHUNK], int32: the feature that each scratch row belongs to, F if none
    first_scratch: Tensor  # [F + 1], int32: where each feature's scratch rows begin


@TransposeCache
def feature_major(features_P: Tensor, offsets: Tensor, n_features: int) -> ChunkedTranspose:
    """The code's pairs in feature-major order; the last transpose is cached."""
    n_spare, device = features_P.numel() // CHUNK, features_P.device
    sorted_P, order_P = torch.sort(features_P, stable=True)
    rows_P = torch.searchsorted(offsets[1:].contiguous(), order_P, right=True, out_int32=True)
    every_feature = torch.arange(n_features + 1, dtype=features_P.dtype, device=device)
    starts = torch.searchsorted(sorted_P, every_feature, out_int32=True)
    spare_F = (starts.diff() - 1).clamp_(min=0) // CHUNK
    first_scratch = torch.zeros(n_features + 1, dtype=torch.int32, device=device)
    torch.cumsum(spare_F, 0, dtype=torch.int32, out=first_scratch[1:])
    ends = first_scratch[1:]
    chunk = torch.arange(n_features + n_spare, dtype=torch.int32, device=device)
    feature = torch.searchsorted(ends + every_feature[1:], chunk, right=True, out_int32=True)
    nth = chunk - (first_scratch + every_feature)[feature]
    begin = starts[feature] + nth * CHUNK
    end = torch.minimum(begin + CHUNK, starts[(feature + 1).clamp_(max=n_features)])
    scratch = torch.where(nth > 0, first_scratch[feature] + nth - 1, -1)
    chunks = torch.stack([feature, begin, end, scratch], 1)
    scratch_features = torch.searchsorted(ends, chunk[:n_spare], right=True, out_int32=True)
    return ChunkedTranspose(order_P, rows_P, starts, chunks, scratch_features, first_scratch)


@jit
def add_scratch_kernel(
    out, scratch, scratch_features, first_scratch, n_features,
    N: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0)
    feature = tl.load(scratch_features + own)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < N
    if feature < n_features:
        begin, end = tl.load(first_scratch + feature), tl.load(first_scratch + feature + 1)
        if own == begin:
            target = out + feature.to(tl.int64) * N + columns
            total = tl.load(target, inside, other=0).to(ACCUMULATE)
            for first in range(begin, end, ROWS):
                row = first + tl.arange(0, ROWS)
                source = scratch + row.to(tl.int64)[:, None] * N + columns[None, :]
                total += tl.sum(tl.load(source, (row < end)[:, None] & inside[None, :], other=0), 0)
            tl.store(target, total.to(out.dtype.element_ty), inside)


def add_scratch(out_FN: Tensor, scratch_SN: Tensor, transpose: ChunkedTranspose) -> None:
    """Add to every feature's output row its further chunks' partial rows, in chunk order, in place."""
    (n_scratch, width), n_features = scratch_SN.shape, out_FN.shape[0]
    if n_scratch == 0:
        return
    tile = gather_tile(width, scratch_SN.itemsize, 1)
    add_scratch_kernel[(n_scratch, tile_count(width, tile.columns))](
        out_FN, scratch_SN, transpose.scratch_features, transpose.first_scratch, n_features,
        width, tile.columns, tile.pairs, accumulator(scratch_SN.dtype), num_warps=1,
    )  # fmt: skip
