"""A slab of scores by one kernel that also writes the largest key of each group of its columns.

The usual way is the library's GEMM and then `group_max`, which reads the slab again. This product finds the keys while
scores are in registers. What it saves is one read of the slab, R * F * 2 bytes, beside a product of 2 * R * F * N
operations: less the wider the rows, so it is for banks, and only where Triton's GEMM is that much near the library's.
`WIDEST` is the switch; `scripts/bench_epilogue.py` measures where it belongs. Floor: that of the GEMM, and one write of
the slab. Deterministic: a program owns its tile and sums in a fixed order.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from triton_kernels.gpu import tiles
from triton_kernels.gpu.group_max import GROUP, empty_maxima, raw_key

WIDEST: int = 0
"""The widest rows whose scores this kernel makes; 0 (never) until it has won on a GPU."""

ROWS, COLUMNS, DEPTH = 128, 128, 64


@tiles.jit
def score_slab_kernel(
    x_ptr, encoder_ptr, bias_ptr, scale_ptr, z_ptr, maxima_ptr, n_rows, n_features, width, n_groups, n_row_tiles,
    SCALED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # Rows run fast: a slab's x stays in the L2 cache, and the encoder is fetched once.
    row = (tl.program_id(0) % n_row_tiles) * ROWS + tl.arange(0, ROWS)
    first = (tl.program_id(0) // n_row_tiles) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    x_row, encoder_row = row.to(tl.int64)[:, None] * width, column.to(tl.int64)[:, None] * width
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for start in range(0, width, DEPTH):
        depth = start + tl.arange(0, DEPTH)[None, :]
        x = tl.load(x_ptr + x_row + depth, mask=(row < n_rows)[:, None] & (depth < width), other=0.0)
        encoder = tl.load(
            encoder_ptr + encoder_row + depth, mask=(column < n_features)[:, None] & (depth < width), other=0.0
        )
        total = tl.dot(x, tl.trans(encoder), total)
    inside = column < n_features
    total += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    z = total.to(z_ptr.dtype.element_ty)  # keys are of the rounded scores, as `group_max` would read them
    place = row.to(tl.int64)[:, None] * n_features + column[None, :]
    tl.store(z_ptr + place, z, mask=(row < n_rows)[:, None] & inside[None, :])
    z = tl.where(inside[None, :], z, float("-inf")).to(z_ptr.dtype.element_ty)
    if SCALED:
        key = raw_key(z.to(tl.float32) * tl.load(scale_ptr + column, mask=inside, other=1.0).to(tl.float32)[None, :])
    else:
        key = raw_key(z)
    best = tl.max(tl.reshape(key, [ROWS, COLUMNS // 32, 32]), axis=2)
    best = tl.where(best == -1, 0, best)  # -0 has the key -1
    group = first // 32 + tl.arange(0, COLUMNS // 32)
    place = row.to(tl.int64)[:, None] * n_groups + group[None, :]
    kept = (row < n_rows)[:, None] & (group < n_groups)[None, :]
    tl.store(maxima_ptr + place, best.to(maxima_ptr.dtype.element_ty), mask=kept)


def pays(width: int, product: torch.dtype) -> bool:
    """Whether scores of rows of this width are made here; tensor cores take 16-bit numbers."""
    return width <= WIDEST and product.itemsize == 2


def score_slab(x_RN: Tensor, encoder_FN: Tensor, bias_F: Tensor, scale_F: Tensor | None, z_RF: Tensor) -> Tensor:
    """Fill `z_RF` with <x, encoder row> + bias and return what `group_max` returns of it.

    x, encoder and z are of one 16-bit dtype; sums are in fp32, rounded once.
    """
    n_rows, n_features = z_RF.shape
    maxima = empty_maxima(z_RF, scale_F)
    n_row_tiles = tiles.cdiv(n_rows, ROWS)
    score_slab_kernel[(n_row_tiles * tiles.cdiv(n_features, COLUMNS),)](
        x_RN.contiguous(), encoder_FN.contiguous(), bias_F, bias_F if scale_F is None else scale_F, z_RF, maxima,
        n_rows, n_features, x_RN.shape[1], tiles.cdiv(n_features, GROUP), n_row_tiles,
        SCALED=scale_F is not None, ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH, num_warps=8, num_stages=3,
    )  # fmt: skip
    return maxima
