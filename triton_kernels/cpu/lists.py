"""Lists of the columns whose scores in bf16 reach a bound, row by row: in C, else in stock torch operators.

A score's key is its 16 bits as a whole number in the order of the scores, which a CPU compares many at a time. Columns
are looked at in chunks: chunk c of C holds the features c, C + c, 2 C + c, ..., so that each is a fair sample.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from triton_kernels.cpu import native, selection
from triton_kernels.reference import row_of_pair, starts


class Candidates(NamedTuple):
    """Features of each row, ascending, as CSR."""

    features: Tensor  # int32
    offsets: Tensor  # [R + 1], int64

    def rows(self) -> Tensor:
        """The row of each candidate."""
        return row_of_pair(self.offsets, self.features.numel())


class Lists(NamedTuple):
    """The columns found in each of C chunks for each of R rows, with their keys."""

    columns: Tensor  # int32, ascending within a list
    keys: Tensor  # int16
    offsets: Tensor  # [C * R + 1]: the list of chunk c and row r begins at c * R + r
    n_rows: int

    @property
    def n_chunks(self) -> int:
        """C."""
        return (self.offsets.numel() - 1) // max(1, self.n_rows)


def _turned(bits: Tensor) -> Tensor:
    """Keys of bf16 bits, and bits of keys: the one undoes the other."""
    return bits ^ ((bits >> 15) & 0x7FFF)


def scores_of(keys: Tensor) -> Tensor:
    """The scores with these keys, in fp32."""
    return _turned(keys).view(torch.bfloat16).float()


def keys_reaching(bound_R: Tensor) -> Tensor:
    """The smallest key whose score is not below each bound, or a smaller one."""
    low_R = bound_R.to(torch.bfloat16) + 0  # no -0, which has the key before that of 0
    is_above_R = (low_R.float() > bound_R) | (low_R == 0)
    return _turned(low_R.view(torch.int16)) - is_above_R.to(torch.int16)


def proven(score: Tensor, margin: Tensor, slack: float) -> Tensor:
    """What an exact score is at least, whose rounded one is `score`."""
    return score * torch.where(score >= 0, 1 - slack, 1 + slack) - margin


def within_reach(exact: Tensor, margin: Tensor, slack: float) -> Tensor:
    """The smallest rounded score whose exact one may be `exact`."""
    score = exact - margin
    return score / torch.where(score >= 0, 1 + slack, 1 - slack)


def sieved(score_RF: Tensor, k: int, margin_R: Tensor, slack: float, least_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns and keys of the scores that may be among the k best of their row, and each row's count of them.

    least_R: what the k-th best exact score is known to be at least; raised to what these scores prove.
    """
    n_groups = min(score_RF.shape[1], max(256, selection.GROUPS_PER_KEPT * k))
    if native.serves(margin_R, least_R):
        return native.sieved(score_RF.view(torch.int16), n_groups, k, slack, margin_R, least_R)
    least_R.copy_(torch.maximum(least_R, proven(_reached_by(score_RF, n_groups, k), margin_R, slack)))
    return not_below(score_RF, within_reach(least_R, margin_R, slack))


def _reached_by(score_RF: Tensor, n_groups: int, k: int) -> Tensor:
    """A score that at least k of each row's reach, in fp32: the k-th largest of the maxima of groups."""
    keys_RF = _turned(score_RF.view(torch.int16))
    whole = keys_RF.shape[1] // n_groups * n_groups
    maxima = keys_RF[:, :whole].unflatten(1, (whole // n_groups, n_groups)).amax(1)
    maxima = torch.cat([maxima, keys_RF[:, whole:]], dim=1)
    return scores_of(maxima.topk(k, dim=1).values[:, k - 1])


def not_below(score_RF: Tensor, bound_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns and keys of the bf16 scores not below their row's bound, and each row's count of them."""
    bits_RF, bounds_R = score_RF.view(torch.int16), keys_reaching(bound_R)
    if native.serves():
        return native.not_below(bits_RF, bounds_R)
    keys_RF = _turned(bits_RF)
    rows, columns = (keys_RF >= bounds_R[:, None]).nonzero(as_tuple=True)
    return columns.to(torch.int32), keys_RF[rows, columns], torch.bincount(rows, minlength=keys_RF.shape[0])


def kth_score(found: Lists, k: int) -> Tensor:
    """The k-th largest score of each row's lists together, in fp32; there must be k of them."""
    if native.serves():
        return scores_of(native.kth_of_lists(found.offsets, found.keys, found.n_rows, found.n_chunks, k))
    rows = row_of_pair(found.offsets, found.keys.numel()) % found.n_rows
    order = torch.sort(rows, stable=True).indices
    score, offsets = scores_of(found.keys[order]), _offsets(rows, found.n_rows)
    return score[selection.list_top_k(score, offsets, k)].amin(1)


def merged(found: Lists, bound_R: Tensor, n_features: int) -> Candidates:
    """The features in each row's lists whose scores are not below the row's bound."""
    bounds_R = keys_reaching(bound_R)
    if native.serves():
        lists = (found.offsets, found.columns, found.keys, found.n_rows, found.n_chunks)
        return Candidates(*native.merged_lists(*lists, bounds_R, n_features))
    run = row_of_pair(found.offsets, found.keys.numel())
    rows = run % found.n_rows
    place = rows * n_features + found.columns.long() * found.n_chunks + run // found.n_rows
    place = place[found.keys >= bounds_R[rows]].sort().values
    rows = place.div(n_features, rounding_mode="floor")
    return Candidates((place - rows * n_features).to(torch.int32), _offsets(rows, found.n_rows))


def _offsets(rows: Tensor, n_rows: int) -> Tensor:
    return starts(torch.bincount(rows, minlength=n_rows))
