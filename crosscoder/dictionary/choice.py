"""The exact choice of the few largest scores where each rank holds some of the features, or some of the tokens.

The order is total, and the same on every number of ranks: by score, -0 and +0 being equal, then by lowest (row,
feature). Ranks hold features in the order of their numbers and a rank's candidates ascend, so that the order among
equal scores is row, rank, place; no feature's number travels. In a mesh the rows of one group of ranks come before
those of the next. A rank's candidates hold all of its own that can be among the wanted ones. Nothing is differentiated.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crosscoder.foundation.ranks import Ranks
from triton_kernels.reference import row_of_pair, starts

BINS = 256
ROUNDS = 4  # of one byte of a score each
SELECTION = "selection"


class _Cut(NamedTuple):
    """Of each choice: the key at which it cuts, how many pairs of that key it takes, and how many there are."""

    key_S: Tensor
    taken_S: Tensor
    there_S: Tensor


def ordered_bits(score: Tensor) -> Tensor:
    """Whole numbers from 0 to 2^32 that are in the order of the float32 scores, int64; -0 is +0."""
    bits = (score + 0.0).view(torch.int32).long()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + 2**31


def _score_of(key: Tensor) -> Tensor:
    bits = key - 2**31
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int32).view(torch.float32)


def keep_top_k(score_RC: Tensor, k: int, width: int, ranks: Ranks) -> Tensor:
    """Which of this rank's candidates are among the k largest of their row over all ranks, bool `[R, C]`.

    width: the most candidates of a row that a rank has. All of them are gathered where that is less than the counts of
    a radix selection.
    """
    n_rows, n_own = score_RC.shape
    if width * ranks.size <= ROUNDS * BINS:
        padded_RC = torch.nn.functional.pad(score_RC, (0, width - n_own), value=-torch.inf)
        all_WRC = ranks.gather(padded_RC, SELECTION)
        best_RK = all_WRC.transpose(0, 1).flatten(1).topk(k, dim=1).values
        cut_R = best_RK[:, -1] if n_rows else score_RC.new_empty(0)
        taken_R = k - (all_WRC > cut_R[:, None]).sum((0, 2))
        before_R = (all_WRC[: ranks.rank] == cut_R[:, None]).sum((0, 2))
        is_tie_RC = score_RC == cut_R[:, None]
        place_RC = is_tie_RC.cumsum(1) - 1 + before_R[:, None]
        return (score_RC > cut_R[:, None]) | (is_tie_RC & (place_RC < taken_R[:, None]))
    row_P = torch.arange(n_rows, device=score_RC.device).repeat_interleave(n_own)
    key_P = ordered_bits(score_RC.reshape(-1))
    cut = _radix_cut(key_P, row_P, row_P.new_full((n_rows,), k), ranks)
    return _taken(key_P, row_P, row_P, n_rows, cut, ranks).view(n_rows, n_own)


def keep_batch_top_k(
    score_P: Tensor, offsets: Tensor, n_groups: int, wanted: int, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Which of this rank's candidates are among the `wanted` largest of their dictionary over all ranks, and the
    smallest score that was taken of each, `[G]`, 0 where none was.

    Candidates are a code whose row b * G + g is of dictionary g. wanted: for this rank's tokens, summed over all.
    """
    row_P = row_of_pair(offsets, score_P.numel())
    key_P, group_P = ordered_bits(score_P), row_P % n_groups
    wanted_G = ranks.data.add(row_P.new_full((n_groups,), wanted), SELECTION)
    cut = _radix_cut(key_P, group_P, wanted_G, ranks.job)
    kept_P = _taken(key_P, group_P, row_P, offsets.numel() - 1, cut, ranks, data=ranks.data)
    return kept_P, torch.where(cut.taken_S > 0, _score_of(cut.key_S), 0)


def _radix_cut(key_P: Tensor, segment_P: Tensor, wanted_S: Tensor, ranks: Ranks) -> _Cut:
    """Where the `wanted` largest keys of each segment end, by counts of one byte after the other."""
    n_segments = len(wanted_S)
    left_S, key_S, there_S = wanted_S, torch.zeros_like(wanted_S), torch.zeros_like(wanted_S)
    for shift in range(8 * (ROUNDS - 1), -1, -8):
        digit_P = (key_P >> shift) & (BINS - 1)
        count_SX = torch.bincount(segment_P * BINS + digit_P, minlength=n_segments * BINS).view(n_segments, BINS)
        ranks.add(count_SX, SELECTION)
        at_least_SX = count_SX.flip(1).cumsum(1).flip(1)
        left_S = torch.minimum(left_S, at_least_SX[:, 0])
        chosen_S1 = (at_least_SX >= left_S[:, None]).sum(1, keepdim=True) - 1
        there_S = count_SX.gather(1, chosen_S1)[:, 0]
        left_S = left_S - (at_least_SX.gather(1, chosen_S1)[:, 0] - there_S)
        key_S = key_S * BINS + chosen_S1[:, 0]
        is_alive_P = digit_P == chosen_S1[segment_P, 0]
        key_P, segment_P = key_P[is_alive_P], segment_P[is_alive_P]
    return _Cut(key_S, left_S, there_S)


def _taken(
    key_P: Tensor, segment_P: Tensor, row_P: Tensor, n_rows: int, cut: _Cut, ranks: Ranks, data: Ranks | None = None
) -> Tensor:
    """True above the cut, and at it for as many as are taken, lowest (row, rank, place) first.

    data: the ranks that have other rows of the same segments; those of lower ranks come first.
    """
    cut_P = cut.key_S[segment_P]
    is_tie_P = key_P == cut_P
    if bool((cut.taken_S == cut.there_S).all()):  # known to every rank alike
        return key_P >= cut_P
    n_segments = len(cut.key_S)
    count_R = torch.bincount(row_P[is_tie_P], minlength=n_rows)
    # A segment's rows are every n_segments-th one.
    count_WR = ranks.gather(count_R, SELECTION)
    count_SBW = count_WR.view(ranks.size, n_rows // n_segments, n_segments).permute(2, 1, 0)
    flat_SX = count_SBW.reshape(n_segments, -1)
    before_SBW = (flat_SX.cumsum(1) - flat_SX).view(count_SBW.shape)
    left_S = cut.taken_S
    if data is not None and data.size > 1:
        left_S = left_S - data.gather(flat_SX.sum(1), SELECTION)[: data.rank].sum(0)
    allowed_R = (left_S[:, None] - before_SBW[:, :, ranks.rank]).T.reshape(-1)
    place_P = is_tie_P.cumsum(0) - 1 - starts(count_R)[row_P]
    return (key_P > cut_P) | (is_tie_P & (place_P < allowed_R[row_P]))
