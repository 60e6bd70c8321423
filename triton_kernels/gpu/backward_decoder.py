"""`backward_decoder`: gradients of the kept values and of the decoder from the error, in one pass over the pairs.

The weight is the same for every pair of a feature, so it multiplies the decoder row once before the dots and the sum
once after; it is repeated to `[G, N]`, so that a tile may straddle parts. Feature-major (see `feature_major`): one
program owns a column tile of one chunk, and reads each error row once for both results.

A program knows its own columns only, so partial dots `[tiles, P]` are added in tile order by `add_tiles`, which also
puts them where the pairs stand in the code: `P * tiles * 8` bytes, 1 % of the rows gathered. One program for all
columns of a chunk would need no partials, but only with column tiles as the slow axis does the slice of the error
(8 MB, instead of 302) stay in L2 while every feature comes by. The floor is then one read of the error and the decoder
and one write of the gradient, `(R + 2 * G * F) * N` elements. Deterministic: a chunk's sums belong to one program;
chunks and tiles are added in order. No atomics.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from triton_kernels.arguments import Code
from triton_kernels.gpu.feature_major import add_scratch, feature_major
from triton_kernels.gpu.gather_dot import add_tiles
from triton_kernels.gpu.tiles import Tile, accumulator, gather_tile, jit, tile_count
from triton_kernels.reference import sum_dtype


@jit(do_not_specialize=["n_pairs"])
def backward_decoder_kernel(
    chunks, rows, values, error, scales, decoder, d_decoder, scratch, partials, n_pairs, n_features, features_each,
    N: tl.constexpr, COLUMNS: tl.constexpr, PAIRS: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    chunk, tile = chunks + tl.program_id(0).to(tl.int64) * 4, tl.program_id(1)
    feature, begin, end, spare = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2), tl.load(chunk + 3)
    if feature < n_features:
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < N
        at = begin + tl.arange(0, PAIRS)
        row = tl.load(rows + at, at < end, other=0)
        value = tl.load(values + at, at < end, other=0).to(ACCUMULATE)
        place = feature.to(tl.int64) * N + columns
        scale = scales + (feature // features_each) * N + columns
        own = tl.load(decoder + place, inside, other=0, eviction_policy="evict_first").to(ACCUMULATE)
        own *= tl.load(scale, inside, other=0)
        total = tl.full([COLUMNS], 0, ACCUMULATE)
        for _ in range(begin, end, PAIRS):
            source = error + row.to(tl.int64)[:, None] * N + columns[None, :]
            active, target = at < end, partials + tile.to(tl.int64) * n_pairs + at
            gathered = tl.load(source, active[:, None] & inside[None, :], other=0).to(ACCUMULATE)
            weight = value
            at += PAIRS
            row = tl.load(rows + at, at < end, other=0)
            value = tl.load(values + at, at < end, other=0).to(ACCUMULATE)
            total += tl.sum(weight[:, None] * gathered, 0)
            tl.store(target, tl.sum(own[None, :] * gathered, 1), active)
        # Loaded again rather than kept: the loop needs the registers.
        total *= tl.load(scale, inside, other=0)
        if spare < 0:
            tl.store(d_decoder + place, total.to(d_decoder.dtype.element_ty), inside, eviction_policy="evict_first")
        else:
            tl.store(scratch + spare.to(tl.int64) * N + columns, total, inside)


def decoder_tile(width: int, itemsize: int, n_tokens: int) -> Tile:
    """The kernel's tile: four pairs at most, since each error element is in two products; eight take 168 registers."""
    return gather_tile(width, itemsize, n_tokens, most_row_bytes=1024, most_pairs=4)


def backward_decoder(code: Code, error_BGN: Tensor, weight_GL: Tensor, decoder_GFN: Tensor) -> tuple[Tensor, Tensor]:
    values_P, features_P, offsets = code
    (n_groups, features_each, width), n_pairs, dtype = decoder_GFN.shape, values_P.numel(), decoder_GFN.dtype
    if n_pairs == 0:
        return values_P.new_zeros(0), decoder_GFN.new_zeros(decoder_GFN.shape)
    n_features = n_groups * features_each
    transpose = feature_major(features_P, offsets, n_features)
    tile = decoder_tile(width, error_BGN.itemsize, error_BGN.shape[0])
    n_tiles = tile_count(width, tile.columns)
    wide, device = sum_dtype(dtype), values_P.device
    scale_GN = (2 * weight_GL.to(wide)).repeat_interleave(width // weight_GL.shape[1], dim=1)
    d_decoder_FN = torch.empty(n_features, width, dtype=dtype, device=device)
    scratch = torch.empty(transpose.scratch_features.numel(), width, dtype=wide, device=device)
    partials = torch.empty(n_tiles, n_pairs, dtype=wide, device=device)
    backward_decoder_kernel[(transpose.chunks.shape[0], n_tiles)](
        transpose.chunks, transpose.rows_P, values_P[transpose.order_P], error_BGN.contiguous(), scale_GN,
        decoder_GFN.contiguous(), d_decoder_FN, scratch, partials, n_pairs, n_features, features_each,
        width, tile.columns, tile.pairs, accumulator(dtype), num_warps=1,
    )  # fmt: skip
    add_scratch(d_decoder_FN, scratch, transpose)
    return add_tiles(partials, values_P.dtype, transpose.order_P), d_decoder_FN.view(decoder_GFN.shape)
