"""The exact choice of the few largest scores; equal scores go to the lowest index."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels import pairs
from triton_kernels.cpu import native
from triton_kernels.pairs import Pairs
from triton_kernels.reference import first_largest, row_of_pair, starts

GROUPS_PER_KEPT = 8  # columns are looked at again where they reach the k-th largest of so many groups' maxima
PREFILTER_MARGIN = 1.5  # how many times more scores than needed the sampled bound lets through
PREFILTER_SAMPLES = 2**15  # at most, and a sixteenth of the scores, but 4,096 where there are so many


def row_top_k(score_RF: Tensor, k: int) -> Tensor:
    """Columns of the k largest scores of each row, equal scores by lowest column, ascending, `[R, k]` int64."""
    n_columns = score_RF.shape[1]
    if k >= n_columns:
        return torch.arange(n_columns, device=score_RF.device).expand(score_RF.shape[0], -1)
    if native.serves(score_RF):
        n_groups = GROUPS_PER_KEPT * k if 2 * GROUPS_PER_KEPT * k <= n_columns else 0  # 0: all columns are looked at
        columns = torch.empty(score_RF.shape[0], k, dtype=torch.int64)
        native.call("top_k_of_rows", *score_RF.shape, n_groups, k, score_RF, columns)
        return columns
    best = score_RF.topk(k + 1, dim=1)
    columns = best.indices[:, :k].sort(dim=1).values
    # torch.topk leaves the choice among equal scores open; only a tie across the cut can change the set.
    rows = (best.values[:, k - 1] == best.values[:, k]).nonzero().squeeze(1)
    if rows.numel():
        columns[rows] = first_largest(score_RF[rows], k)
    return columns


def list_top_k(score_P: Tensor, offsets: Tensor, k: int) -> Tensor:
    """Positions of the k largest scores of each row of a CSR code, as `row_top_k` chooses them, `[R, k]` int64."""
    if native.serves(score_P):
        kept = torch.empty(offsets.numel() - 1, k, dtype=torch.int64)
        native.call("top_k_of_lists", *kept.shape, offsets, score_P, kept)
        return kept
    counts = offsets.diff()
    rows = row_of_pair(offsets, score_P.numel())
    place = torch.arange(score_P.numel()) - offsets[rows]
    width = int(counts.amax()) if counts.numel() else k
    padded = score_P.new_full((counts.numel(), width), -torch.inf)
    padded.view(-1)[rows * width + place] = score_P
    return offsets[:-1, None] + row_top_k(padded, k)


def above(z_RF: Tensor, scale_F: Tensor | None, bound_F: Tensor, least: float) -> Pairs:
    """The pairs with score > bound and z > least."""
    if native.serves(z_RF, scale_F, bound_F):
        counts_R = torch.empty(z_RF.shape[0], dtype=torch.int64)
        given = (*z_RF.shape, z_RF, scale_F, bound_F, least)
        native.call("list_above", *given, None, counts_R, None, None, None)
        offsets = starts(counts_R)
        z, score = z_RF.new_empty(2, int(offsets[-1]))
        columns = torch.empty(z.shape, dtype=torch.int32)
        native.call("list_above", *given, offsets, counts_R, z, score, columns)
        return Pairs(z, score, columns, offsets)
    return pairs.above(z_RF, scale_F, bound_F, least)


def sampled_bound(z_RF: Tensor, scale_F: Tensor | None, kept_fraction: float) -> float:
    """A guess that lets a little more than `kept_fraction` of the scores through; never below zero."""
    wanted = min(PREFILTER_SAMPLES, max(4096, z_RF.numel() // 16))
    stride = max(1, z_RF.numel() // wanted) | 1
    sample = z_RF.reshape(-1)[::stride].float()
    if scale_F is not None:
        sample = sample * scale_F[torch.arange(0, z_RF.numel(), stride) % scale_F.numel()]
    keep = int(PREFILTER_MARGIN * kept_fraction * sample.numel()) + 16
    if keep >= sample.numel():
        return 0.0
    return max(0.0, sample[keep_largest(sample, keep)].amin().item())


def keep_largest(score_P: Tensor, count: int) -> Tensor:
    """Positions, ascending, of the `count` largest; equal scores go to the lowest position."""
    if score_P.numel() <= count:
        return torch.arange(score_P.numel(), device=score_P.device)
    if native.serves(score_P):
        return list_top_k(score_P, torch.tensor([0, score_P.numel()]), count)[0]
    cut = score_P.topk(count, sorted=False).values.amin()
    kept = score_P > cut
    equal = (score_P == cut).nonzero().squeeze(1)[: count - int(kept.sum())]
    kept[equal] = True
    return kept.nonzero().squeeze(1)
