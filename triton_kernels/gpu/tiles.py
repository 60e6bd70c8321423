"""Block sizes as functions of the shape: a committed table, since run-time tuning would change the order of sums.

Every gather kernel runs one warp a program. Then each lane owns whole columns, so a sum over pairs stays in its
registers, a dot product needs shuffles only, and no program waits at a barrier. A row of a tile is 256 to 1,024
bytes: at least 8 bytes a lane, 16 wherever the slice of the gathered table (its rows times the tile's bytes) still
fits the L2 cache. Programs run row-fast and slice-slow, so that a slice is fetched from memory once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# Half of an H200's 50 MiB of L2: its two partitions may each hold a copy, and outputs stream through it as well.
RESIDENT_BYTES = 24 * 2**20
LEAST_ROW_BYTES, MOST_ROW_BYTES = 256, 1024
TILE_BYTES = 4096  # eight 16-byte loads a lane in flight
MOST_PAIRS = 16


class Tile(NamedTuple):
    """One step of a gather kernel: `pairs` rows of `columns` columns."""

    columns: int
    pairs: int


def gather_tile(
    width: int, itemsize: int, gathered_rows: int, *, most_row_bytes: int = 512, most_pairs: int = 16
) -> Tile:
    """The tile of a kernel that gathers rows of `width` elements from a table of `gathered_rows` rows.

    `width` is the extent a tile may not leave: a row's, or one layer's part of it. 768 is cut into 256s, not 512s.
    """
    row_bytes = min(most_row_bytes, MOST_ROW_BYTES)
    while row_bytes > LEAST_ROW_BYTES and gathered_rows * row_bytes > RESIDENT_BYTES:
        row_bytes //= 2
    columns = min(row_bytes // itemsize, power_of_two(width))
    while columns * itemsize > LEAST_ROW_BYTES and tile_count(width, columns) * columns > 1.125 * width:
        columns //= 2
    return Tile(columns, min(most_pairs, MOST_PAIRS, TILE_BYTES // (columns * itemsize)))


def tile_count(extent: int, tile: int) -> int:
    """How many tiles cover an extent, the last one perhaps in part."""
    return -(-extent // tile)


def power_of_two(n: int) -> int:
    """The least power of two that is not below `n`."""
    return 1 << max(0, n - 1).bit_length()


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """`reference.sum_dtype` as Triton names it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


# A type checker knows neither launch options nor that numbers become constexpr: kernels here are untyped.
jit: Any = triton.jit

FLAT_TILE = 1024  # elements of one program of an elementwise pass: two 16-byte loads a thread and tensor
GROUP = 32  # neighbouring scores that share one maximum


def group_tile(n_groups: int) -> int:
    """Groups of scores that one program reads: 4,096 scores keep four 16-byte loads a thread in flight."""
    return min(128, max(2, power_of_two(n_groups)))


CHOICE_CHUNK = 2048  # candidates written at a time; all of them at once would spill


def choice_warps(size: int) -> int:
    """Warps for a choice among `size` keys held in registers: 16 keys a thread, 32 of the longest."""
    return min(16, max(1, size // 512))


def row_tile(width: int) -> tuple[int, int, int]:
    """Rows, columns and warps of one program of the row-wise optimiser.

    Short rows share a program of 1,024 elements, a row of up to 4,096 stays in registers, and a longer one is walked
    by few, wide programs so that the tiles in flight stay in the L1 cache between passes.
    """
    columns = power_of_two(width)
    if columns <= 1024:
        return 1024 // columns, columns, 4
    if columns <= 4096:
        return 1, columns, columns // 512
    return 1, 4096, 16
