"""Squared norms of gradient rows, without their part along given unit rows: what clipping by the norm needs.

Floor: one read of the gradient and of the unit rows. Deterministic: one program owns a row, and sums it in tile order.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from triton_kernels.gpu import tiles
from triton_kernels.reference import sum_dtype


@tiles.jit
def row_squares_kernel(
    g_ptr, unit_ptr, squares_ptr, n_rows, width,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    place = row[:, None] * width + column[None, :]
    squares = tl.full([ROWS, COLUMNS], 0.0, SUM)
    along = tl.full([ROWS, COLUMNS], 0.0, SUM)
    for start in range(0, width, COLUMNS):
        mask = (row < n_rows)[:, None] & (start + column < width)[None, :]
        g = tl.load(g_ptr + place + start, mask=mask, other=0.0).to(SUM)
        squares += g * g
        if UNIT:
            along += g * tl.load(unit_ptr + place + start, mask=mask, other=0.0).to(SUM)
    total = tl.sum(squares, axis=1)
    if UNIT:
        part = tl.sum(along, axis=1)
        total = tl.maximum(total - part * part, 0.0)
    tl.store(squares_ptr + row, total.to(squares_ptr.dtype.element_ty), mask=row < n_rows)


def row_squares(gradient_RN: Tensor, unit_RN: Tensor | None, *, untouched: bool = False) -> Tensor:
    """See `reference.row_squares`: `<g, g> - <g, u>^2`, at least 0, from one read of gradient and unit rows."""
    n_rows, width = gradient_RN.shape
    squares = gradient_RN.new_zeros(n_rows, dtype=sum_dtype(gradient_RN.dtype))
    if not gradient_RN.numel():
        return squares
    rows, columns, warps = tiles.row_tile(width)
    gradient = gradient_RN.contiguous()
    row_squares_kernel[(tiles.tile_count(n_rows, rows),)](
        gradient, gradient if unit_RN is None else unit_RN.contiguous(), squares, n_rows, width,
        UNIT=unit_RN is not None, ROWS=rows, COLUMNS=columns, SUM=tiles.accumulator(gradient.dtype), num_warps=warps,
    )  # fmt: skip
    return squares
