"""The k best scores of each row, exactly, in one read of the scores.

Elements are ordered by (score descending, column ascending). Let S be the k groups of 32 neighbouring columns whose
best elements come first: every element outside S has k elements before it, so the k best are inside S.

1. `group_max` reads the row once and writes one integer key a group (1/32 of the elements);
2. `choose_groups_kernel` picks S out of the keys;
3. `choose_features_kernel` gathers S and picks the k best of its k * 32 columns, written in ascending order.

Both choices bisect on the bits of the key and resolve equal keys by a prefix sum, which is the lowest-column rule. The
scale is applied on load in 1 and 3, so a scaled copy of the scores is never written. Floor: one read of the slab.
Deterministic: integer compares and prefix sums only. Scores in fp64, k = F, and more than `MOST_KEPT` a row of long
rows take a stable `torch.sort`: right, not fast.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from triton_kernels.gpu import tiles
from triton_kernels.gpu.group_max import GROUP, group_max, key_bits, load_key
from triton_kernels.reference import first_largest

MOST_KEPT = 512
MOST_COUNTED = 2**15
MOST_DIRECT = 16384  # columns that one program can choose among


@tiles.jit
def mend_key(key, valid, BITS: tl.constexpr):
    """The key with -0 on +0, and the lowest number where it is not valid; such places come after all valid ones."""
    return tl.where(valid, tl.where(key == -1, 0, key), -(2 ** (BITS - 1)))


@tiles.jit
def best_cut(key, k, BITS: tl.constexpr):
    """For a vector of mended keys: the k-th largest, and how many keys equal to it are among the k largest."""
    cut = tl.where(tl.sum((key >= 0).to(tl.int32), axis=0) >= k, 0, -(2 ** (BITS - 1)))
    bit = tl.full([], 2 ** (BITS - 2), tl.int32)
    for _ in range(BITS - 1):
        enough = tl.sum((key >= cut + bit).to(tl.int32), axis=0) >= k
        cut = tl.where(enough, cut + bit, cut)
        bit = bit >> 1
    return cut, k - tl.sum((key > cut).to(tl.int32), axis=0)


@tiles.jit
def take_in_order(key, cut, left, before):
    """Mask of the keys kept (equal keys by lowest place), their ranks by place, and `before` for the next chunk.

    `before` packs two counts over the chunks so far, of at most 2^15 each: keys above the cut, and equal to it.
    """
    one = (key > cut).to(tl.int32) + ((key == cut).to(tl.int32) << 16)
    counts = before + tl.cumsum(one, axis=0)
    equals = counts >> 16
    take = (key > cut) | ((key == cut) & (equals <= left))
    return take, (counts & 0xFFFF) + tl.minimum(equals, left) - 1, before + tl.sum(one, axis=0)


@tiles.jit
def choose_groups_kernel(
    maxima_ptr, groups_ptr, n_groups, k, SIZE: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, SIZE)
    valid = group < n_groups
    key = tl.load(maxima_ptr + row * n_groups + group, mask=valid, other=0).to(tl.int32)
    cut, left = best_cut(mend_key(key, valid, BITS), k, BITS)
    before = 0
    for start in range(0, SIZE, CHUNK):
        place = start + tl.arange(0, CHUNK)
        inside = place < n_groups
        part = tl.load(maxima_ptr + row * n_groups + place, mask=inside, other=0).to(tl.int32)
        take, rank, before = take_in_order(mend_key(part, inside, BITS), cut, left, before)
        tl.store(groups_ptr + row * k + rank, place, mask=take)


@tiles.jit
def choose_features_kernel(
    z_ptr, scale_ptr, groups_ptr, chosen_z_ptr, features_ptr,
    n_features, k, first_feature, z_stride, features_stride,
    SCALED: tl.constexpr, GATHER: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * n_features
    if GATHER:
        slot = tl.arange(0, SIZE // 32)
        group = tl.load(groups_ptr + row * k + slot, mask=slot < k, other=0)
        column = group[:, None] * 32 + tl.arange(0, 32)[None, :]
        valid = (slot < k)[:, None] & (column < n_features)
        key = mend_key(load_key(z_ptr, scale_ptr, column, valid, SCALED), valid, BITS)
        cut, left = best_cut(tl.reshape(key, [SIZE]), k, BITS)
    else:
        column = tl.arange(0, SIZE)
        valid = column < n_features
        cut, left = best_cut(mend_key(load_key(z_ptr, scale_ptr, column, valid, SCALED), valid, BITS), k, BITS)
    before = 0
    for start in range(0, SIZE, CHUNK):
        place = start + tl.arange(0, CHUNK)
        inside = place < n_features
        if GATHER:  # the groups ascend, so order of places is order of columns
            chosen = tl.load(groups_ptr + row * k + place // 32, mask=place // 32 < k, other=0)
            inside = (place // 32 < k) & (chosen * 32 + place % 32 < n_features)
            place = chosen * 32 + place % 32
        part = mend_key(load_key(z_ptr, scale_ptr, place, inside, SCALED), inside, BITS)
        take, rank, before = take_in_order(part, cut, left, before)
        z = tl.load(z_ptr + place, mask=take, other=0.0)
        tl.store(chosen_z_ptr + row * z_stride + rank, z.to(chosen_z_ptr.dtype.element_ty), mask=take)
        tl.store(features_ptr + row * features_stride + rank, place + first_feature, mask=take)


def select_top_k(
    z_RF: Tensor, scale_F: Tensor | None, k: int, first_feature: int, z_RK: Tensor, features_RK: Tensor
) -> None:
    """Fill `z_RK` with z and `features_RK` with `first_feature` + column of the k best scores of each row.

    The two results may be strided over their rows. The scale changes the choice, not z.
    """
    n_rows, n_features = z_RF.shape
    n_groups = tiles.tile_count(n_features, GROUP)
    gather = k <= MOST_KEPT and (2 * k <= n_groups or n_features > MOST_DIRECT)
    countable = n_groups <= MOST_COUNTED  # equal keys are counted in 15 bits
    if z_RF.dtype == torch.float64 or k >= n_features or not ((gather and countable) or n_features <= MOST_DIRECT):
        wide = torch.promote_types(z_RF.dtype, torch.float32)
        columns = first_largest(z_RF if scale_F is None else z_RF.to(wide) * scale_F, k)
        z_RK.copy_(z_RF.gather(1, columns))
        features_RK.copy_(columns + first_feature)
        return
    if not n_rows:
        return
    bits = key_bits(z_RF, scale_F)
    groups = features_RK  # not read unless gather
    if gather:
        groups = torch.empty(n_rows, k, dtype=torch.int32, device=z_RF.device)
        size = tiles.power_of_two(n_groups)
        choose_groups_kernel[(n_rows,)](
            group_max(z_RF, scale_F), groups, n_groups, k,
            SIZE=size, CHUNK=min(size, tiles.CHOICE_CHUNK), BITS=bits, num_warps=tiles.choice_warps(size),
        )  # fmt: skip
    size = tiles.power_of_two(k) * GROUP if gather else max(16, tiles.power_of_two(n_features))
    choose_features_kernel[(n_rows,)](
        z_RF, z_RF if scale_F is None else scale_F, groups, z_RK, features_RK,
        n_features, k, first_feature, z_RK.stride(0), features_RK.stride(0),
        SCALED=scale_F is not None, GATHER=gather, SIZE=size, CHUNK=min(size, tiles.CHOICE_CHUNK), BITS=bits,
        num_warps=tiles.choice_warps(size),
    )  # fmt: skip
