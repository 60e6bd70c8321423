"""Integer keys of scores, and the largest key of each group of 32 neighbouring columns.

A key is the bits of the score as a signed integer, with the order of negatives reversed and -0 moved onto +0; bf16
scores without a scale have 16-bit keys, all others are compared in fp32. A positive NaN, which is what the hardware
makes, comes before everything, so that it surfaces in a value. The optional scale is applied on load. Floor: one read
of the slab. Deterministic: integer maxima.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from triton_kernels.gpu import tiles

GROUP = tiles.GROUP


@tiles.jit
def raw_key(score):
    """int32 with the order of the scores, except that -0 has the key -1."""
    if score.dtype == tl.bfloat16:
        bits = score.to(tl.int16, bitcast=True).to(tl.int32)
        return bits ^ ((bits >> 31) & 0x7FFF)
    else:
        bits = score.to(tl.float32).to(tl.int32, bitcast=True)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@tiles.jit
def load_key(z_ptr, scale_ptr, column, mask, SCALED: tl.constexpr):
    """Key of z, or of z times the scale; -0 has the key -1."""
    z = tl.load(z_ptr + column, mask=mask, other=float("-inf"))
    if SCALED:
        z = z.to(tl.float32) * tl.load(scale_ptr + column, mask=mask, other=1.0).to(tl.float32)
    return raw_key(z)


@tiles.jit
def group_max_kernel(
    z_ptr, scale_ptr, maxima_ptr, n_features, n_groups, n_tiles, SCALED: tl.constexpr, TILE: tl.constexpr
):
    row = (tl.program_id(0) // n_tiles).to(tl.int64)
    group = (tl.program_id(0) % n_tiles) * TILE + tl.arange(0, TILE)
    column = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    key = load_key(z_ptr + row * n_features, scale_ptr, column, column < n_features, SCALED)
    # -0 may be mended after the maximum because moving it onto +0 keeps the order.
    best = tl.max(key, axis=1)
    best = tl.where(best == -1, 0, best)
    tl.store(maxima_ptr + row * n_groups + group, best.to(maxima_ptr.dtype.element_ty), mask=group < n_groups)


def key_bits(z_RF: Tensor, scale_F: Tensor | None) -> int:
    """Width of the keys of these scores."""
    return 16 if z_RF.dtype == torch.bfloat16 and scale_F is None else 32


def group_max(z_RF: Tensor, scale_F: Tensor | None) -> Tensor:
    """Key of the best score of each group of 32 columns, `[R, ceil(F / 32)]`, int16 or int32 by `key_bits`."""
    dtype = torch.int16 if key_bits(z_RF, scale_F) == 16 else torch.int32
    maxima = torch.empty(z_RF.shape[0], tiles.tile_count(z_RF.shape[1], GROUP), dtype=dtype, device=z_RF.device)
    if maxima.numel():
        n_rows, n_groups = maxima.shape
        tile = tiles.group_tile(n_groups)
        n_tiles = tiles.tile_count(n_groups, tile)
        group_max_kernel[(n_rows * n_tiles,)](
            z_RF, z_RF if scale_F is None else scale_F, maxima, z_RF.shape[1], n_groups, n_tiles,
            SCALED=scale_F is not None, TILE=tile, num_warps=4,
        )  # fmt: skip
    return maxima
