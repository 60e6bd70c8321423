"""Every pair of a slab above a bound, in (row, column) order.

The bound is a threshold a column (JumpReLU, inference of BatchTopK) or one integer key (candidates of BatchTopK).
Two passes of one kernel over the slab: count the pairs of each tile, exclusive prefix sum of the counts, then write
each pair to its slot. Groups of 32 columns whose maximum (from `group_max`) is not above the bound are masked out, and
a masked load moves no bytes: floor one read of the slab (the group maxima), plus 64 to 128 bytes a pass for each group
that holds a pair. One device sync a slab, to size the lists. Deterministic: a slot depends on the counts before it.
Scores in fp64 (for gradcheck) take `pairs.above`.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from triton_kernels.gpu import tiles
from triton_kernels.gpu.group_max import raw_key
from triton_kernels.pairs import Pairs


@tiles.jit
def kept_pairs_kernel(
    z_ptr, scale_ptr, lower_ptr, bound_ptr, maxima_ptr, counts_ptr, ends_ptr,
    columns_ptr, z_out_ptr, score_out_ptr, n_features, n_groups, n_tiles,
    SCALED: tl.constexpr, PER_COLUMN: tl.constexpr, WRITE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = (pid // n_tiles).to(tl.int64)
    group = (pid % n_tiles) * TILE + tl.arange(0, TILE)
    best = tl.load(maxima_ptr + row * n_groups + group, mask=group < n_groups, other=0)
    if maxima_ptr.dtype.element_ty == tl.int16:
        best = best.to(tl.int32) << 16  # exact where positive, and without a scale nothing else is kept
    # The bound of a group: of its lowest threshold, or of the batch.
    bound = tl.load(bound_ptr + group, mask=group < n_groups, other=0) if PER_COLUMN else tl.load(bound_ptr)
    column = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    live = ((best >= bound) & (group < n_groups))[:, None] & (column < n_features)
    z = tl.load(z_ptr + row * n_features + column, mask=live, other=0.0).to(tl.float32)
    score = z
    if SCALED:
        score = z * tl.load(scale_ptr + column, mask=live, other=0.0).to(tl.float32)
    if PER_COLUMN:
        keep = live & (score > tl.load(lower_ptr + column, mask=live, other=0.0)) & (z > 0)
    else:
        keep = live & (raw_key(score) >= bound)
    if WRITE:
        keep_flat = tl.reshape(keep.to(tl.int32), [TILE * 32])
        slot = tl.cumsum(keep_flat, axis=0) - 1
        keep_flat = keep_flat > 0
        first = tl.load(ends_ptr + pid) - tl.load(counts_ptr + pid)
        place = (pid % n_tiles) * (TILE * 32) + tl.arange(0, TILE * 32)
        tl.store(columns_ptr + first + slot, place, mask=keep_flat)
        kept = tl.load(z_ptr + row * n_features + place, mask=keep_flat, other=0.0)
        tl.store(z_out_ptr + first + slot, kept, mask=keep_flat)
        if SCALED:
            scale = tl.load(scale_ptr + place, mask=keep_flat, other=0.0).to(tl.float32)
            tl.store(score_out_ptr + first + slot, kept.to(tl.float32) * scale, mask=keep_flat)
    else:
        tl.store(counts_ptr + pid, tl.sum(tl.reshape(keep.to(tl.int32), [TILE * 32]), axis=0))


def kept_pairs(z_RF: Tensor, scale_F: Tensor | None, maxima: Tensor, *, lower_F: Tensor | None, bound: Tensor) -> Pairs:
    """Pairs of a slab with score > `lower_F` and z > 0, or without `lower_F`, with a key of at least `bound` > 0.

    `bound` is int32: one key a group of columns with `lower_F` (`group_bounds`), else one number.
    """
    n_rows, n_features = z_RF.shape
    n_groups, device = maxima.shape[1], z_RF.device
    tile = tiles.group_tile(n_groups)
    n_tiles = tiles.tile_count(n_groups, tile)
    counts = torch.empty(n_rows * n_tiles, dtype=torch.int32, device=device)

    def launch(columns, z, score, ends, write):
        kept_pairs_kernel[(n_rows * n_tiles,)](
            z_RF, z_RF if scale_F is None else scale_F, bound if lower_F is None else lower_F, bound, maxima,
            counts, ends, columns, z, score, n_features, n_groups, n_tiles,
            SCALED=scale_F is not None, PER_COLUMN=lower_F is not None, WRITE=write, TILE=tile,
            num_warps=8 if write else 4,  # writing needs the prefix sum of every place in registers
        )  # fmt: skip

    launch(counts, z_RF, counts, counts, False)
    ends = counts.cumsum(0)
    n_pairs = int(ends[-1])
    columns = torch.empty(n_pairs, dtype=torch.int32, device=device)
    z = torch.empty(n_pairs, dtype=z_RF.dtype, device=device)
    score = torch.empty(n_pairs if scale_F is not None else 0, dtype=torch.float32, device=device)
    if n_pairs:
        launch(columns, z, score, ends, True)
    offsets = torch.nn.functional.pad(ends.view(n_rows, n_tiles)[:, -1], (1, 0))
    return Pairs(z, z.float() if scale_F is None else score, columns, offsets)


def group_bounds(lower_F: Tensor) -> Tensor:
    """For each group of 32 columns, the key of its lowest threshold, int32 `[ceil(F / 32)]`."""
    n_features = lower_F.shape[0]
    padded = torch.nn.functional.pad(lower_F.float(), (0, -n_features % tiles.GROUP), value=float("inf"))
    bits = (padded.view(-1, tiles.GROUP).amin(1) + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
