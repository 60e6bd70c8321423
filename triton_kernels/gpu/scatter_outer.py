"""`scatter_outer`, `out[f] = sum over pairs with feature f of value * x[row]`, and `backward_encoder` with it.

Feature-major (see `feature_major`): one program owns a column tile of one chunk and walks its pairs in order, several
at a time, its sum in registers. Chunks are the fast axis of the grid and column tiles the slow one, so that the slice
of x stays in L2: the floor is one read of x and one write of the output, `(R + F) * N` elements, against `P * N`
gathered. For `backward_encoder`, `d_encoder[f] = sum of d_z * (x[row] - center[g])` and `d_bias[f] = sum of d_z`, the
kernel takes the centre from each row on load and sums the values with the first column tile: the centred rows are never
materialised, and `sum(d_z * x) - d_bias * center` would cancel.
Deterministic: a chunk belongs to one program, and chunks of a feature are added in order. No atomics.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from triton_kernels.arguments import Code
from triton_kernels.gpu.feature_major import add_scratch, feature_major
from triton_kernels.gpu.tiles import accumulator, gather_tile, jit, tile_count
from triton_kernels.reference import sum_dtype


@jit
def scatter_outer_kernel(
    chunks, rows, values, x, center, out, scratch, sums, scratch_sums, n_features, features_each, n_own,
    CENTERED: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr, PAIRS: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    chunk = chunks + tl.program_id(0).to(tl.int64) * 4
    feature, begin, end, spare = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2), tl.load(chunk + 3)
    if feature < n_features:
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < N
        at = begin + tl.arange(0, PAIRS)
        row = tl.load(rows + at, at < end, other=0)
        value = tl.load(values + at, at < end, other=0).to(ACCUMULATE)
        total = tl.full([COLUMNS], 0, ACCUMULATE)
        summed = tl.full([PAIRS], 0, ACCUMULATE)
        if CENTERED:
            own = tl.load(center + (feature // features_each) * N + columns, inside, other=0).to(ACCUMULATE)
        for _ in range(begin, end, PAIRS):
            source = x + (row % n_own).to(tl.int64)[:, None] * N + columns[None, :]
            gathered = tl.load(source, (at < end)[:, None] & inside[None, :], other=0).to(ACCUMULATE)
            weight = value
            at += PAIRS
            row = tl.load(rows + at, at < end, other=0)
            value = tl.load(values + at, at < end, other=0).to(ACCUMULATE)
            if CENTERED:
                gathered -= own[None, :]
                summed += weight
            total += tl.sum(weight[:, None] * gathered, 0)
        if spare < 0:
            target = out + feature.to(tl.int64) * N + columns
            tl.store(target, total.to(out.dtype.element_ty), inside, eviction_policy="evict_first")
        else:
            tl.store(scratch + spare.to(tl.int64) * N + columns, total, inside)
        if CENTERED and tl.program_id(1) == 0:
            if spare < 0:
                tl.store(sums + feature, tl.sum(summed, 0).to(sums.dtype.element_ty))
            else:
                tl.store(scratch_sums + spare, tl.sum(summed, 0))


def scatter_rows(code: Code, x_RN: Tensor, center_GN: Tensor | None, n_features: int) -> tuple[Tensor, Tensor]:
    """`scatter_outer` of the rows less their centre `[F, N]`, and each feature's sum of values `[F]` if one is given.

    In the centre's dtype; x may be narrower. Sets of dictionaries, one after the other, may share the rows of x.
    """
    values_P, features_P, offsets = code
    x = x_RN.contiguous()
    center = x if center_GN is None else center_GN.contiguous()  # not read where there is none
    n_groups, width = 1 if center_GN is None else center.shape[0], x.shape[1]
    if features_P.numel() == 0 or width == 0:
        return center.new_zeros(n_features, width), center.new_zeros(n_features)
    transpose = feature_major(features_P, offsets, n_features)
    out_FN, sums_F = center.new_empty(n_features, width), center.new_empty(n_features)
    n_scratch, wide = transpose.scratch_features.numel(), sum_dtype(center.dtype)
    scratch, scratch_sums = (center.new_empty(n_scratch, columns, dtype=wide) for columns in (width, 1))
    tile = gather_tile(width, x.itemsize, (offsets.numel() - 1) // n_groups, most_row_bytes=1024)
    scatter_outer_kernel[(transpose.chunks.shape[0], tile_count(width, tile.columns))](
        transpose.chunks, transpose.rows_P, values_P[transpose.order_P], x, center,
        out_FN, scratch, sums_F, scratch_sums, n_features, n_features // n_groups, x.shape[0],
        center_GN is not None, width, tile.columns, tile.pairs, accumulator(center.dtype), num_warps=1,
    )  # fmt: skip
    add_scratch(out_FN, scratch, transpose)
    if center_GN is not None:
        add_scratch(sums_F.view(-1, 1), scratch_sums, transpose)
    return out_FN, sums_F


def scatter_outer(code: Code, x_RN: Tensor, n_features: int) -> Tensor:
    """See `reference.scatter_outer`; the output has x's dtype."""
    return scatter_rows(code, x_RN, None, n_features)[0]


def backward_encoder(code: Code, x_BGN: Tensor, center_GN: Tensor, n_features: int) -> tuple[Tensor, Tensor]:
    """`d_encoder` as `[G, F, N]` and `d_bias` as `[G, F]`, both in the centre's dtype; x may be narrower."""
    n_groups, width = center_GN.shape
    d_encoder_FN, d_bias_F = scatter_rows(code, x_BGN.reshape(-1, width), center_GN, n_groups * n_features)
    return d_encoder_FN.view(n_groups, n_features, width), d_bias_F.view(n_groups, n_features)
