"""`gather_dot`: the product of every pair's row with its table row, `out[p] = <x[row of p], table[feature of p]>`.

Row-major, with no sort: one program holds a column tile of one x row in registers and walks the row's pairs, several
at a time. Slices of the table stay in L2 as in `gather_sum`, so the floor is one read of x and of the table's used
rows, `(F + R) * N` elements. A program knows its own columns only, so partial dots `[tiles, P]` are written and a
second kernel adds them in tile order: at `P * tiles * 8` bytes less than 2 % of the rows gathered. One program for all
columns would need no partials, but then no slice of the table stays in L2. Deterministic: both sums have one order.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from triton_kernels.gpu.tiles import accumulator, gather_tile, jit, tile_count
from triton_kernels.reference import sum_dtype

PAIRS_TO_ADD = 256


@jit(do_not_specialize=["n_pairs"])
def gather_dot_kernel(
    x, features, offsets, table, partials, n_pairs,
    N: tl.constexpr, COLUMNS: tl.constexpr, PAIRS: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < N
    begin = tl.load(offsets + row)
    end = (tl.load(offsets + row + 1) - begin).to(tl.int32)
    features, partials = features + begin, partials + tile.to(tl.int64) * n_pairs + begin
    own = tl.load(x + row * N + columns, inside, other=0, eviction_policy="evict_first").to(ACCUMULATE)
    at = tl.arange(0, PAIRS)
    feature = tl.load(features + at, at < end, other=0)
    for _ in range(0, end, PAIRS):
        source = table + feature.to(tl.int64)[:, None] * N + columns[None, :]
        active, target = at < end, partials + at
        rows = tl.load(source, active[:, None] & inside[None, :], other=0).to(ACCUMULATE)
        at += PAIRS
        feature = tl.load(features + at, at < end, other=0)
        tl.store(target, tl.sum(own[None, :] * rows, 1), active)


@jit(do_not_specialize=["n_pairs"])
def add_tiles_kernel(partials, order, out, n_pairs, n_tiles, ORDERED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n_pairs
    source = partials + at
    total = tl.load(source, inside, other=0)
    for _ in range(1, n_tiles):
        source += n_pairs
        total += tl.load(source, inside, other=0)
    target = at
    if ORDERED:
        target = tl.load(order + at, inside, other=0)
    tl.store(out + target, total.to(out.dtype.element_ty), inside)


def add_tiles(partials_TP: Tensor, dtype: torch.dtype, order_P: Tensor | None = None) -> Tensor:
    """Sums of `partials_TP` over its first axis in order, as `dtype`; sum p goes to position `order_P[p]` if given."""
    n_tiles, n_pairs = partials_TP.shape
    out_P = torch.empty(n_pairs, dtype=dtype, device=partials_TP.device)
    order = out_P if order_P is None else order_P
    add_tiles_kernel[(tile_count(n_pairs, PAIRS_TO_ADD),)](
        partials_TP, order, out_P, n_pairs, n_tiles, order_P is not None, PAIRS_TO_ADD, num_warps=4
    )
    return out_P


def gather_dot(x_RN: Tensor, features_P: Tensor, offsets: Tensor, table_FN: Tensor) -> Tensor:
    """See `reference.gather_dot`; the output has x's dtype."""
    n_pairs, (n_features, width) = features_P.numel(), table_FN.shape
    if n_pairs == 0 or width == 0:
        return x_RN.new_zeros(n_pairs)
    tile = gather_tile(width, table_FN.itemsize, n_features)
    n_tiles = tile_count(width, tile.columns)
    partials = torch.empty(n_tiles, n_pairs, dtype=sum_dtype(x_RN.dtype), device=x_RN.device)
    gather_dot_kernel[(offsets.numel() - 1, n_tiles)](
        x_RN.contiguous(), features_P.contiguous(), offsets.contiguous(), table_FN.contiguous(), partials, n_pairs,
        width, tile.columns, tile.pairs, accumulator(x_RN.dtype), num_warps=1,
    )  # fmt: skip
    return add_tiles(partials, x_RN.dtype)
