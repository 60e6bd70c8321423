"""Candidates for an exact selection, from a product in bf16: half the time of one in fp32 where the CPU has bf16 units.

With x~ and w~ the rounded vectors, Cauchy and Schwarz bound what rounding can do to a score `z = <x, w> + b`:

    |z~ - z| <= |x - x~| |w| + |x~| |w - w~| + |b - b~| + the sums' own rounding,

where the norms of the residuals are measured, not guessed. A feature whose rounded score is further below the k-th
best than twice that margin cannot be among the k best, whatever the data, so scoring the others again in fp32 gives
the selection of an fp32 product: `certified`. Without the margin the rounded scores alone decide who is a candidate
and fp32 decides among candidates: that is the setting `bf16`.

On random data a certified choice of 32 among 8,192 scores about 70 candidates a row again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from triton_kernels.cpu import native, selection
from triton_kernels.cpu.affine import affine
from triton_kernels.reference import first_largest, row_of_pair

SLAB_ELEMENTS = 2**22  # 8 MiB in bf16
RELATIVE = 2.0**-8 * 1.01  # rounding of a result to bf16
SUMMATION = 2.0**-23  # of a term of a sum in fp32, for both sums that are compared
SAFE_NORMS = (1e-12, 1e18)  # between them squares of a row and of its rounding neither vanish nor overflow
ROWS_AT_A_TIME = 512  # of a table that is rounded: copy and both norms are made while the rows are in cache
MIN_FEATURES, MIN_WIDTH, FEATURES_PER_ACTIVE = 4096, 128, 64


class Rounded(NamedTuple):
    """An encoder in bf16 and the largest norms over its rows."""

    encoder_FN: Tensor
    bias_F: Tensor
    certified: bool
    norm: float = 0.0
    error: float = 0.0
    bias_error: float = 0.0

    @property
    def slack(self) -> float:
        """Relative rounding of a result that a certificate must allow for."""
        return RELATIVE if self.certified else 0.0


class Candidates(NamedTuple):
    """Features of each row, ascending, as CSR."""

    features: Tensor  # int32
    offsets: Tensor  # [R + 1], int64

    def rows(self) -> Tensor:
        """The row of each candidate."""
        return row_of_pair(self.offsets, self.features.numel())


def pays(encoder_FN: Tensor, k: int) -> bool:
    """Whether candidates in bf16 beat a plain fp32 product: the CPU multiplies bf16, and few features are kept."""
    n_features, width = encoder_FN.shape
    is_fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    fits = n_features >= max(MIN_FEATURES, FEATURES_PER_ACTIVE * k) and width >= MIN_WIDTH
    return is_fast and fits and encoder_FN.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def rounded(encoder_FN: Tensor, bias_F: Tensor, scale_F: Tensor | None, *, certified: bool) -> Rounded | None:
    """The encoder in bf16, rows times `scale_F` where given, with what a certificate needs.

    None where none can be given: norms that are not finite, or whose squares leave the range of fp32.
    """
    low_FN, norm_F, error_F = _rounded_rows(encoder_FN, scale_F)
    bias_F = bias_F if scale_F is None else bias_F * scale_F
    low_F = bias_F.to(torch.bfloat16)
    if not certified:
        return Rounded(low_FN, low_F, certified=False)
    norm, error = norm_F.amax().item(), error_F.amax().item()
    bias_error = (bias_F - low_F).abs().amax().item()
    if not (SAFE_NORMS[0] < norm < SAFE_NORMS[1] and math.isfinite(error) and math.isfinite(bias_error)):
        return None
    return Rounded(low_FN, low_F, True, norm, error, bias_error)


def _rounded_rows(table_RN: Tensor, scale_R: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rows times their scale in bf16, and the norms of the rows and of what rounding took from them."""
    if native.serves(table_RN, scale_R):
        return native.round_rows(table_RN, scale_R)
    low_RN = torch.empty(table_RN.shape, dtype=torch.bfloat16)
    norm_R, error_R = table_RN.new_empty(2, table_RN.shape[0])
    for start in range(0, table_RN.shape[0], ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        rows = table_RN[part] if scale_R is None else table_RN[part] * scale_R[part, None]
        low_RN[part] = rows
        norm_R[part] = torch.linalg.vector_norm(rows, dim=1)
        error_R[part] = torch.linalg.vector_norm(rows - low_RN[part], dim=1)
    return low_RN, norm_R, error_R


def _rounded_x(x_RN: Tensor, encoder: Rounded) -> tuple[Tensor, Tensor]:
    """Rows in bf16 and how far rounding can move their scores, `[R]`: infinite where that cannot be said."""
    low_RN, norm_R, error_R = _rounded_rows(x_RN, None)
    if not encoder.certified:
        return low_RN, norm_R.zero_()
    low_norm_R = norm_R + error_R  # at least that of the rounded row
    margin_R = error_R * encoder.norm + low_norm_R * encoder.error + encoder.bias_error
    margin_R += SUMMATION * x_RN.shape[1] * low_norm_R * (encoder.norm + encoder.error)
    is_safe_R = (norm_R > SAFE_NORMS[0]) & (norm_R < SAFE_NORMS[1])
    return low_RN, torch.where(is_safe_R, margin_R, torch.inf)


def _slabs(low_RN: Tensor, encoder: Rounded) -> Iterator[tuple[slice, Tensor]]:
    """The rounded scores of each slab of rows."""
    step = max(1, SLAB_ELEMENTS // encoder.encoder_FN.shape[0])
    for start in range(0, low_RN.shape[0], step):
        part = slice(start, start + step)
        yield part, affine(low_RN[part], encoder.encoder_FN, encoder.bias_F)


def _not_below(score_RF: Tensor, bound_R: Tensor) -> tuple[Tensor, Tensor]:
    """Columns, ascending, of the bf16 scores not below their row's bound, which must be positive; and their counts.

    Positive bf16 numbers compare as their bits do, which the CPU does many at a time.
    """
    low_R = bound_R.to(torch.bfloat16)
    bound_R = low_R.view(torch.int16) - (low_R.float() > bound_R).to(torch.int16)
    keys_RF = score_RF.view(torch.int16)
    if native.serves():
        return native.not_below(keys_RF, bound_R)
    rows, columns = (keys_RF >= bound_R[:, None]).nonzero(as_tuple=True)
    return columns.to(torch.int32), torch.bincount(rows, minlength=keys_RF.shape[0])


def _reached_by(score_RF: Tensor, k: int) -> Tensor:
    """A value that at least k scores of each row reach, in fp32: the k-th largest of the maxima of groups.

    Negative scores may be compared in the wrong order; a value at or below 0 is therefore no answer.
    """
    keys_RF = score_RF.view(torch.int16)
    n_features = keys_RF.shape[1]
    n_groups = min(n_features, max(256, selection.GROUPS_PER_KEPT * k))
    if native.serves():
        return native.reached_keys(keys_RF, n_groups, k).view(torch.bfloat16).float()
    whole = n_features // n_groups * n_groups
    maxima = keys_RF[:, :whole].unflatten(1, (whole // n_groups, n_groups)).amax(1)
    if whole < n_features:
        maxima = torch.cat([maxima, keys_RF[:, whole:]], dim=1)
    best = maxima.view(torch.bfloat16).float().topk(k, dim=1, sorted=False)
    return best.values.amin(1) if keys_RF.shape[0] else best.values.new_empty(0)


def top_k_candidates(x_RN: Tensor, encoder_FN: Tensor, bias_F: Tensor, encoder: Rounded, k: int) -> Candidates:
    """At least k features of each row, the k best scores among them; `encoder` is `rounded(encoder_FN, bias_F)`."""
    low_RN, margin_R = _rounded_x(x_RN, encoder)
    features, counts = [], []
    for part, score_RF in _slabs(low_RN, encoder):
        bound_R = (_reached_by(score_RF, k) * (1 - encoder.slack) - 2 * margin_R[part]) / (1 + encoder.slack)
        hard = ~((bound_R > 0) & bound_R.isfinite())
        columns, counts_R = _not_below(score_RF, torch.where(hard, torch.inf, bound_R))
        if bool(hard.any()):  # those rows are scored again as a whole
            best = first_largest(affine(x_RN[part][hard], encoder_FN, bias_F), k).to(torch.int32)
            lists = list(columns.split(counts_R.tolist()))
            for row, chosen in zip(hard.nonzero().flatten().tolist(), best, strict=True):
                lists[row] = chosen
            columns, counts_R = torch.cat(lists), counts_R.masked_fill(hard, k)
        features.append(columns)
        counts.append(counts_R)
    return _joined(features, counts)


def above_candidates(x_RN: Tensor, encoder: Rounded, threshold: float) -> Candidates | None:
    """Every feature whose score may exceed `threshold`; None where the threshold is too near 0 to certify."""
    low_RN, margin_R = _rounded_x(x_RN, encoder)
    bound_R = (threshold - margin_R) / (1 + encoder.slack)
    if not bool((bound_R > 0).all()):
        return None
    found = [_not_below(score_RF, bound_R[part]) for part, score_RF in _slabs(low_RN, encoder)]
    return _joined([columns for columns, _ in found], [counts_R for _, counts_R in found])


def batch_candidates(x_RN: Tensor, encoder: Rounded, wanted: int) -> Candidates | None:
    """At least `wanted` pairs, the `wanted` largest positive scores of the batch among them; None where that is open.

    A sample of the first slab sets the bound that pairs must reach to be looked at. It was low enough if `wanted`
    rounded scores reach it.
    """
    low_RN, margin_R = _rounded_x(x_RN, encoder)
    below_R = margin_R + margin_R.amax()
    reached, bound_R = 0.0, margin_R
    features, counts, scores = [], [], []
    for part, score_RF in _slabs(low_RN, encoder):
        if part.start == 0:
            reached = selection.sampled_bound(score_RF, wanted / (x_RN.shape[0] * score_RF.shape[1]))
            bound_R = (reached * (1 - encoder.slack) - below_R) / (1 + encoder.slack)
            if not bool((bound_R > 0).all()):
                return None
        columns, counts_R = _not_below(score_RF, bound_R[part])
        rows = torch.arange(score_RF.shape[0]).repeat_interleave(counts_R, output_size=columns.numel())
        features.append(columns)
        counts.append(counts_R)
        scores.append(score_RF[rows, columns.long()].float())
    found, score = _joined(features, counts), torch.cat(scores)
    if int((score >= reached).sum()) < wanted:
        return None
    cut = score.topk(wanted, sorted=False).values.amin()
    rows = found.rows()
    near = score >= (cut * (1 - encoder.slack) - below_R[rows]) / (1 + encoder.slack)
    counts_R = torch.bincount(rows[near], minlength=x_RN.shape[0])
    return _joined([found.features[near]], [counts_R])


def _joined(features: list[Tensor], counts: list[Tensor]) -> Candidates:
    """Candidates of successive rows."""
    if not features:
        return Candidates(torch.empty(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int64))
    return Candidates(torch.cat(features), torch.nn.functional.pad(torch.cat(counts).cumsum(0), (1, 0)))
