"""Every pair of a slab above a bound, in (row, column) order, and the merge of such lists into one CSR code.

The bound is a threshold a column (JumpReLU, inference of BatchTopK) or one integer key (candidates of BatchTopK).
Two passes of one kernel over the slab: count the pairs of each tile, exclusive prefix sum of the counts, then write
each pair to its slot. Groups of 32 columns whose maximum (from `group_max`) is not above the bound are masked out, and
a masked load moves no bytes: floor one read of the slab (the group maxima), plus 64 to 128 bytes a pass for each group
that holds a pair. One device sync a slab, to size the lists. Deterministic: a slot depends on the counts before it.
Scores in fp64 (for gradcheck) take `torch.nonzero`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from triton_kernels.gpu import tiles
from triton_kernels.gpu.group_max import raw_key


class Pairs(NamedTuple):
    """Chosen pairs of one dictionary in (row, column) order."""

    rows_P: Tensor  # row of the batch, int32
    columns_P: Tensor  # feature within the dictionary, int32
    z_P: Tensor
    score_P: Tensor  # fp32 (fp64 for fp64): z, times the scale where there is one

    def take(self, places: Tensor) -> Pairs:
        return Pairs(*(column[places] for column in self))


@tiles.jit
def kept_pairs_kernel(
    z_ptr, scale_ptr, lower_ptr, bound_ptr, maxima_ptr, counts_ptr, ends_ptr,
    rows_ptr, columns_ptr, z_out_ptr, score_out_ptr,
    n_features, n_groups, n_tiles, first_row,
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
        tl.store(rows_ptr + first + slot, (row + first_row).to(tl.int32), mask=keep_flat)
        tl.store(columns_ptr + first + slot, place, mask=keep_flat)
        kept = tl.load(z_ptr + row * n_features + place, mask=keep_flat, other=0.0)
        tl.store(z_out_ptr + first + slot, kept, mask=keep_flat)
        if SCALED:
            scale = tl.load(scale_ptr + place, mask=keep_flat, other=0.0).to(tl.float32)
            tl.store(score_out_ptr + first + slot, kept.to(tl.float32) * scale, mask=keep_flat)
    else:
        tl.store(counts_ptr + pid, tl.sum(tl.reshape(keep.to(tl.int32), [TILE * 32]), axis=0))


def kept_pairs(
    z_RF: Tensor, scale_F: Tensor | None, maxima: Tensor, first_row: int,
    *, lower_F: Tensor | None, bound: Tensor,
) -> Pairs:  # fmt: skip
    """Pairs of a slab with score > `lower_F` and z > 0, or without `lower_F`, with a key of at least `bound` > 0.

    `bound` is int32: one key a group of columns with `lower_F` (`group_bounds`), else one number.
    """
    n_rows, n_features = z_RF.shape
    n_groups, device = maxima.shape[1], z_RF.device
    tile = tiles.group_tile(n_groups)
    n_tiles = tiles.tile_count(n_groups, tile)
    counts = torch.empty(n_rows * n_tiles, dtype=torch.int32, device=device)

    def launch(rows, columns, z, score, ends, write):
        kept_pairs_kernel[(n_rows * n_tiles,)](
            z_RF, z_RF if scale_F is None else scale_F, bound if lower_F is None else lower_F, bound, maxima,
            counts, ends, rows, columns, z, score, n_features, n_groups, n_tiles, first_row,
            SCALED=scale_F is not None, PER_COLUMN=lower_F is not None, WRITE=write, TILE=tile,
            num_warps=8 if write else 4,  # writing needs the prefix sum of every place in registers
        )  # fmt: skip

    launch(counts, counts, z_RF, counts, counts, False)
    ends = counts.cumsum(0)
    n_pairs = int(ends[-1])
    rows, columns = (torch.empty(n_pairs, dtype=torch.int32, device=device) for _ in range(2))
    z = torch.empty(n_pairs, dtype=z_RF.dtype, device=device)
    score = torch.empty(n_pairs if scale_F is not None else 0, dtype=torch.float32, device=device)
    if n_pairs:
        launch(rows, columns, z, score, ends, True)
    return Pairs(rows, columns, z, z.float() if scale_F is None else score)


def kept_pairs_fp64(z_RF: Tensor, scale_F: Tensor | None, first_row: int, lower_F: Tensor | None) -> Pairs:
    """`kept_pairs` in stock torch; without `lower_F`, every pair with a positive score."""
    score_RF = z_RF if scale_F is None else z_RF * scale_F
    keep = score_RF > 0 if lower_F is None else (score_RF > lower_F) & (z_RF > 0)
    rows, columns = keep.nonzero(as_tuple=True)
    return Pairs((rows + first_row).int(), columns.int(), z_RF[rows, columns], score_RF[rows, columns])


def group_bounds(lower_F: Tensor) -> Tensor:
    """For each group of 32 columns, the key of its lowest threshold, int32 `[ceil(F / 32)]`."""
    n_features = lower_F.shape[0]
    padded = torch.nn.functional.pad(lower_F.float(), (0, -n_features % tiles.GROUP), value=float("inf"))
    bits = (padded.view(-1, tiles.GROUP).amin(1) + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def collect(parts: list[Pairs], like: Tensor) -> Pairs:
    """The lists of one dictionary's slabs, one after the other."""
    if not parts:
        empty = torch.empty(0, dtype=torch.int32, device=like.device)
        return Pairs(empty, empty, like.new_empty(0), like.new_empty(0))
    return parts[0] if len(parts) == 1 else Pairs(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def join_dictionaries(lists: list[Pairs], n_rows: int, n_features: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, global features, offsets `[B * G + 1]` and scores of the code whose row b * G + g is row b of list g."""
    n_groups, device = len(lists), lists[0].rows_P.device
    edges = torch.arange(n_rows + 1, dtype=torch.int32, device=device)
    starts_GB = torch.stack([torch.searchsorted(pairs.rows_P, edges) for pairs in lists])
    offsets = torch.zeros(n_rows * n_groups + 1, dtype=torch.int64, device=device)
    torch.cumsum(starts_GB.diff(dim=1).t().reshape(-1), 0, out=offsets[1:])
    features = torch.cat([pairs.columns_P + group * n_features for group, pairs in enumerate(lists)])
    z, score = torch.cat([pairs.z_P for pairs in lists]), torch.cat([pairs.score_P for pairs in lists])
    if n_groups == 1:
        return z, features, offsets, score
    slots = []
    for group, pairs in enumerate(lists):
        rows = pairs.rows_P.long()
        within = torch.arange(rows.numel(), device=device) - starts_GB[group][rows]
        slots.append(offsets[rows * n_groups + group] + within)
    slot = torch.cat(slots)
    z, features, score = (torch.empty_like(t).index_copy_(0, slot, t) for t in (z, features, score))
    return z, features, offsets, score
