"""AdamW over the rows of a parameter in one pass over its four tensors.

Fused: the scale that clips a gradient, the removal of its part along a unit row, the update, renormalising and the copy
rounded to the working dtype. Floor: 28 bytes an element in fp32 (30 with a bf16 copy). Without unit rows the tensors
are walked flat. A unit row longer than 4,096 is walked three times (dot product, update, division) in tiles that should
still be in the L1 or L2 cache. Deterministic: one program owns a row, and sums it in tile order.

Also squared norms of gradient rows, without their part along given unit rows: what clipping by the norm needs. Floor:
one read of the gradient and of the unit rows.
"""

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch import Tensor

from triton_kernels.arguments import AdamRows, AdamSettings
from triton_kernels.gpu import tiles
from triton_kernels.reference import sum_dtype


@tiles.jit
def load_moments(p_ptr, m_ptr, v_ptr, place, mask):
    p = tl.load(p_ptr + place, mask=mask, other=0.0)
    m = tl.load(m_ptr + place, mask=mask, other=0.0)
    v = tl.load(v_ptr + place, mask=mask, other=0.0)
    return p, m, v


@tiles.jit
def adam_update(p, g, m, v, keep, blend_first, decay_second, blend_second, rate, root, eps):
    m += (g - m) * blend_first
    v = v * decay_second + (g * g) * blend_second
    return p * keep - rate * m / (tl.sqrt(v) / root + eps), m, v


@tiles.jit
def store_working(working_ptr, place, p, mask):
    """Store p in the working dtype; bf16 comes as int16 and is rounded here: Triton's interpreter would truncate."""
    if working_ptr.dtype.element_ty == tl.int16:
        bits = p.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # A NaN's low bits could carry into the exponent and make it infinite or zero.
        tl.store(working_ptr + place, tl.where(p == p, rounded, 0x7FC0).to(tl.int16), mask=mask)
    else:
        tl.store(working_ptr + place, p.to(working_ptr.dtype.element_ty), mask=mask)


@tiles.jit
def adam_flat_kernel(
    p_ptr, g_ptr, m_ptr, v_ptr, scale_ptr, working_ptr,
    keep, blend_first, decay_second, blend_second, rate, root, eps, group_elements, n_tiles,
    SCALED: tl.constexpr, WORKING: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    group = (tl.program_id(0) // n_tiles).to(tl.int64)
    within = (tl.program_id(0) % n_tiles).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = within < group_elements
    place = group * group_elements + within
    g = tl.load(g_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        g *= tl.load(scale_ptr + group).to(tl.float32)
    p, m, v = load_moments(p_ptr, m_ptr, v_ptr, place, mask)
    p, m, v = adam_update(p, g, m, v, keep, blend_first, decay_second, blend_second, rate, root, eps)
    tl.store(p_ptr + place, p, mask=mask)
    tl.store(m_ptr + place, m, mask=mask)
    tl.store(v_ptr + place, v, mask=mask)
    if WORKING:
        store_working(working_ptr, place, p, mask)


@tiles.jit
def adam_rows_kernel(
    p_ptr, g_ptr, m_ptr, v_ptr, scale_ptr, working_ptr,
    keep, blend_first, decay_second, blend_second, rate, root, eps, n_rows, width, group_rows,
    SCALED: tl.constexpr, WORKING: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS unit rows of at most COLUMNS, in registers."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    place = row[:, None] * width + column[None, :]
    mask = (row < n_rows)[:, None] & (column < width)[None, :]
    g = tl.load(g_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        g *= tl.load(scale_ptr + row // group_rows, mask=row < n_rows, other=0.0).to(tl.float32)[:, None]
    p, m, v = load_moments(p_ptr, m_ptr, v_ptr, place, mask)
    g -= tl.sum(g * p, axis=1)[:, None] * p
    p, m, v = adam_update(p, g, m, v, keep, blend_first, decay_second, blend_second, rate, root, eps)
    tl.store(m_ptr + place, m, mask=mask)
    tl.store(v_ptr + place, v, mask=mask)
    p /= tl.maximum(tl.sqrt(tl.sum(p * p, axis=1)), 1e-12)[:, None]
    tl.store(p_ptr + place, p, mask=mask)
    if WORKING:
        store_working(working_ptr, place, p, mask)


@tiles.jit
def adam_long_rows_kernel(
    p_ptr, g_ptr, m_ptr, v_ptr, scale_ptr, working_ptr,
    keep, blend_first, decay_second, blend_second, rate, root, eps, width, group_rows,
    SCALED: tl.constexpr, WORKING: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One unit row of any length a program, in tiles of COLUMNS."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr + row // group_rows).to(tl.float32) if SCALED else 1.0
    along = tl.full([COLUMNS], 0.0, tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        g = tl.load(g_ptr + row * width + column, mask=column < width, other=0.0).to(tl.float32) * scale
        along += g * tl.load(p_ptr + row * width + column, mask=column < width, other=0.0)
    part = tl.sum(along, axis=0)
    squares = tl.full([COLUMNS], 0.0, tl.float32)
    for start in range(0, width, COLUMNS):
        place = row * width + start + tl.arange(0, COLUMNS)
        mask = place < (row + 1) * width
        g = tl.load(g_ptr + place, mask=mask, other=0.0).to(tl.float32) * scale
        p, m, v = load_moments(p_ptr, m_ptr, v_ptr, place, mask)
        g -= part * p
        p, m, v = adam_update(p, g, m, v, keep, blend_first, decay_second, blend_second, rate, root, eps)
        squares += p * p
        tl.store(m_ptr + place, m, mask=mask)
        tl.store(v_ptr + place, v, mask=mask)
        tl.store(p_ptr + place, p, mask=mask)
    # What other threads stored above is visible: the sum that gives the norm ends at a barrier.
    norm = tl.maximum(tl.sqrt(tl.sum(squares, axis=0)), 1e-12)
    for start in range(0, width, COLUMNS):
        place = row * width + start + tl.arange(0, COLUMNS)
        mask = place < (row + 1) * width
        p = tl.load(p_ptr + place, mask=mask, other=0.0) / norm
        tl.store(p_ptr + place, p, mask=mask)
        if WORKING:
            store_working(working_ptr, place, p, mask)


def adam_rows(rows: AdamRows, settings: AdamSettings) -> None:
    """See `reference.adam_rows`. Parameter and moments are contiguous fp32, changed in place."""
    parameter_RN, gradient_RN, first_RN, second_RN, working_RN = rows
    step, rate, betas, eps, weight_decay, scale_G, unit = settings
    if any(one.dtype != torch.float32 or not one.is_contiguous() for one in (parameter_RN, first_RN, second_RN)):
        raise ValueError(f"adam_rows works in place on contiguous float32 tensors, got {parameter_RN.dtype}")
    n_rows, width = parameter_RN.shape
    if not parameter_RN.numel():
        return
    n_scales = 1 if scale_G is None else scale_G.numel()
    scale, working = (parameter_RN if one is None else one for one in (scale_G, working_RN))
    if working.dtype == torch.bfloat16:
        working = working.view(torch.int16)
    pointers = (parameter_RN, gradient_RN.contiguous(), first_RN, second_RN, scale.contiguous(), working)
    blends = (1 - rate * weight_decay, 1 - betas[0], betas[1], 1 - betas[1])
    numbers = (*blends, rate / (1 - betas[0] ** step), math.sqrt(1 - betas[1] ** step), eps)
    flags = {"SCALED": scale_G is not None, "WORKING": working_RN is not None}
    n_together, columns, warps = tiles.row_tile(width)
    if not unit:
        elements = parameter_RN.numel() // n_scales
        n_tiles = tiles.tile_count(elements, tiles.FLAT_TILE)
        adam_flat_kernel[(n_scales * n_tiles,)](
            *pointers, *numbers, elements, n_tiles, **flags, TILE=tiles.FLAT_TILE, num_warps=4
        )
    elif columns < width:
        adam_long_rows_kernel[(n_rows,)](
            *pointers, *numbers, width, n_rows // n_scales, **flags, COLUMNS=columns, num_warps=warps
        )
    else:
        adam_rows_kernel[(tiles.tile_count(n_rows, n_together),)](
            *pointers, *numbers, n_rows, width, n_rows // n_scales,
            **flags, ROWS=n_together, COLUMNS=columns, num_warps=warps,
        )  # fmt: skip


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
