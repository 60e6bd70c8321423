"""Lists of the columns whose scores in bf16 reach a bound, row by row, in C.

A score's key is its 16 bits as a whole number in the order of the scores, which a CPU compares many at a time. Columns
are looked at in chunks: chunk c of C holds the features c, C + c, 2 C + c, ..., so that each is a fair sample.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from triton_kernels.cpu import native, selection
from triton_kernels.reference import starts


class Candidates(NamedTuple):
    """Features of each row, ascending, as CSR."""

    features: Tensor  # int32
    offsets: Tensor  # [R + 1], int64

    def only(self, kept: Tensor) -> Candidates:
        """Those at the positions `kept`, which ascend."""
        return Candidates(self.features[kept], torch.searchsorted(kept, self.offsets))


Parts = tuple[Tensor, Tensor, Tensor]
"""Columns and keys of what is listed of a slab, and how many each row has."""


class Lists(NamedTuple):
    """The columns found in each of C chunks for each of R rows, with their keys."""

    columns: Tensor  # int32, ascending within a list
    keys: Tensor  # int16
    offsets: Tensor  # [C * R + 1]: the list of chunk c and row r begins at c * R + r
    n_rows: int

    @property
    def n_chunks(self) -> int:
        return (self.offsets.numel() - 1) // max(1, self.n_rows)


def _turned(bits: Tensor) -> Tensor:
    """Keys of bf16 bits, and bits of keys: the one undoes the other."""
    return bits ^ ((bits >> 15) & 0x7FFF)


def keys_of(score: Tensor) -> Tensor:
    """The keys of bf16 scores."""
    return _turned(score.view(torch.int16))


def scores_of(keys: Tensor) -> Tensor:
    """The scores with these keys, in fp32."""
    return _turned(keys).view(torch.bfloat16).float()


def keys_reaching(bound_R: Tensor) -> Tensor:
    """The smallest key whose score is not below each bound, or a smaller one."""
    low_R = bound_R.to(torch.bfloat16) + 0  # no -0, which has the key before that of 0
    is_above_R = (low_R.float() > bound_R) | (low_R == 0)
    return keys_of(low_R) - is_above_R.to(torch.int16)


def proven(score: Tensor, margin: Tensor, slack: float) -> Tensor:
    """What an exact score is at least, whose rounded one is `score`."""
    return score * torch.where(score >= 0, 1 - slack, 1 + slack) - margin


def within_reach(exact: Tensor, margin: Tensor, slack: float) -> Tensor:
    """The smallest rounded score whose exact one may be `exact`."""
    score = exact - margin
    return score / torch.where(score >= 0, 1 + slack, 1 - slack)


def sieved(score_RF: Tensor, k: int, margin_R: Tensor, slack: float, least_R: Tensor) -> Parts:
    """Columns and keys of the scores that may be among the k best of their row, and each row's count of them.

    least_R: what the k-th best exact score is known to be at least; raised to what these scores prove.
    """
    n_groups = min(score_RF.shape[1], max(256, selection.GROUPS_PER_KEPT * k))
    bounds_R = torch.empty(score_RF.shape[0], dtype=torch.int16)
    counts_R = torch.empty(score_RF.shape[0], dtype=torch.int64)
    sizes = (*score_RF.shape, n_groups, k, slack)
    native.call("sieve_rows", *sizes, score_RF.view(torch.int16), margin_R, least_R, bounds_R, counts_R)
    return _listed(score_RF, bounds_R, counts_R)


def not_below(score_RF: Tensor, bound_R: Tensor) -> Parts:
    """Columns and keys of the bf16 scores not below their row's bound, and each row's count of them."""
    bounds_R, counts_R = keys_reaching(bound_R), torch.empty(score_RF.shape[0], dtype=torch.int64)
    native.call("list_rows", *score_RF.shape, score_RF.view(torch.int16), bounds_R, None, counts_R, None, None)
    return _listed(score_RF, bounds_R, counts_R)


def _listed(score_RF: Tensor, bounds_R: Tensor, counts_R: Tensor) -> Parts:
    offsets = starts(counts_R)
    columns = torch.empty(int(offsets[-1]), dtype=torch.int32)
    keys = torch.empty_like(columns, dtype=torch.int16)
    native.call("list_rows", *score_RF.shape, score_RF.view(torch.int16), bounds_R, offsets, None, columns, keys)
    return columns, keys, counts_R


def kth_score(found: Lists, k: int) -> Tensor:
    """The k-th largest score of each row's lists together, in fp32; there must be k of them."""
    kth_R = found.keys.new_empty(found.n_rows)
    native.call("kth_of_lists", found.n_chunks, found.n_rows, k, found.offsets, found.keys, kth_R)
    return scores_of(kth_R)


def merged(found: Lists, bound_R: Tensor, n_features: int) -> Candidates:
    """The features in each row's lists whose scores are not below the row's bound."""
    columns, keys, offsets, n_rows = found
    bounds_R, counts_R = keys_reaching(bound_R), torch.empty(n_rows, dtype=torch.int64)
    given = (found.n_chunks, n_rows, n_features, offsets, columns, keys, bounds_R)
    native.call("merge_lists", *given, None, counts_R, None)
    row_starts = starts(counts_R)
    features = torch.empty(int(row_starts[-1]), dtype=torch.int32)
    native.call("merge_lists", *given, row_starts, None, features)
    return Candidates(features, row_starts)
