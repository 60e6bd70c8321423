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

from triton_kernels.cpu import selection
from triton_kernels.cpu.affine import affine
from triton_kernels.reference import first_largest

SLAB_ELEMENTS = 2**22  # 8 MiB in bf16
RELATIVE = 2.0**-8 * 1.01  # rounding of a result to bf16
SUMMATION = 2.0**-23  # of a term of a sum in fp32, for both sums that are compared
SAFE_NORMS = (1e-12, 1e18)  # between them squares of a row and of its rounding neither vanish nor overflow
ROWS_AT_A_TIME = 512  # of the encoder: its rounded copy and both norms are made while the rows are in cache
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
    """Pairs in row-major order: `rows` and `features` are int64."""

    rows: Tensor
    features: Tensor


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
    low_FN = torch.empty_like(encoder_FN, dtype=torch.bfloat16)
    norms, errors = [], []
    for start in range(0, encoder_FN.shape[0], ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        rows = encoder_FN[part] if scale_F is None else encoder_FN[part] * scale_F[part, None]
        low_FN[part] = rows
        if certified:
            norms.append(torch.linalg.vector_norm(rows, dim=1).amax())
            errors.append(torch.linalg.vector_norm(rows - low_FN[part], dim=1).amax())
    bias_F = bias_F if scale_F is None else bias_F * scale_F
    low_F = bias_F.to(torch.bfloat16)
    if not certified:
        return Rounded(low_FN, low_F, certified=False)
    norm, error = torch.stack(norms).amax().item(), torch.stack(errors).amax().item()
    bias_error = (bias_F - low_F).abs().amax().item()
    if not (SAFE_NORMS[0] < norm < SAFE_NORMS[1] and math.isfinite(error) and math.isfinite(bias_error)):
        return None
    return Rounded(low_FN, low_F, True, norm, error, bias_error)


def _margins(x_RN: Tensor, encoder: Rounded) -> Iterator[tuple[int, Tensor, Tensor]]:
    """`(start, rows in bf16, margin)` of each slab of rows."""
    n_features, width = encoder.encoder_FN.shape
    step = max(1, SLAB_ELEMENTS // n_features)
    for start in range(0, x_RN.shape[0], step):
        x = x_RN[start : start + step]
        low = x.to(torch.bfloat16)
        margin_R = x.new_zeros(x.shape[0])
        if encoder.certified:
            low_norm_R, error_R = torch.linalg.vector_norm(low.float(), dim=1), torch.linalg.vector_norm(x - low, dim=1)
            sums = SUMMATION * width * (low_norm_R + error_R) * (encoder.norm + encoder.error)
            margin_R = error_R * encoder.norm + low_norm_R * encoder.error + encoder.bias_error + sums
            safe_R = (low_norm_R > SAFE_NORMS[0]) & (low_norm_R < SAFE_NORMS[1])
            margin_R = torch.where(safe_R, margin_R, torch.inf)
        yield start, low, margin_R


def _not_below(score_RF: Tensor, bound_R: Tensor) -> Tensor:
    """Flat positions, ascending, of the bf16 scores not below their row's bound, which must be positive.

    Positive bf16 numbers compare as their bits do, which the CPU does many at a time; eight answers make one word,
    and few words are not zero.
    """
    low_R = bound_R.to(torch.bfloat16)
    keys_R = low_R.view(torch.int16) - (low_R.float() > bound_R).to(torch.int16)
    kept = score_RF.view(torch.int16) >= keys_R[:, None]
    if kept.shape[1] % 8:
        return kept.view(-1).nonzero().squeeze(1)
    words = kept.view(-1).view(torch.int64)
    index = words.nonzero().squeeze(1)
    word, byte = words[index].view(torch.bool).view(-1, 8).nonzero(as_tuple=True)
    return index[word] * 8 + byte


def _reached_by(score_RF: Tensor, k: int) -> Tensor:
    """A value that at least k scores of each row reach, in fp32: the k-th largest of the maxima of groups.

    Negative scores may be compared in the wrong order; a value at or below 0 is therefore no answer.
    """
    keys_RF = score_RF.view(torch.int16)
    n_rows, n_features = keys_RF.shape
    n_groups = min(n_features, max(256, 8 * k))
    whole = n_features // n_groups * n_groups
    maxima = keys_RF[:, :whole].unflatten(1, (whole // n_groups, n_groups)).amax(1)
    if whole < n_features:
        maxima = torch.cat([maxima, keys_RF[:, whole:]], dim=1)
    best = maxima.view(torch.bfloat16).float().topk(k, dim=1, sorted=False)
    return best.values.amin(1) if n_rows else best.values.new_empty(0)


def top_k_candidates(x_RN: Tensor, encoder_FN: Tensor, bias_F: Tensor, encoder: Rounded, k: int) -> Candidates:
    """At least k features of each row, the k best scores among them; `encoder` is `rounded(encoder_FN, bias_F)`."""
    n_features = encoder_FN.shape[0]
    positions = []
    for start, low, margin_R in _margins(x_RN, encoder):
        score_RF = affine(low, encoder.encoder_FN, encoder.bias_F)
        reached_R = _reached_by(score_RF, k)
        bound_R = (reached_R * (1 - encoder.slack) - 2 * margin_R) / (1 + encoder.slack)
        hard = ~((bound_R > 0) & bound_R.isfinite())
        position = _not_below(score_RF, torch.where(hard, torch.inf, bound_R))
        if bool(hard.any()):
            position = position[~hard[position.div(n_features, rounding_mode="floor")]]  # a score may be inf itself
            rows = hard.nonzero().squeeze(1)
            columns = first_largest(affine(x_RN[start + rows], encoder_FN, bias_F), k)
            position = torch.cat([position, (rows[:, None] * n_features + columns).view(-1)]).sort().values
        positions.append(position + start * n_features)
    position = torch.cat(positions) if positions else torch.empty(0, dtype=torch.int64)
    rows = position.div(n_features, rounding_mode="floor")
    return Candidates(rows, position - rows * n_features)


def above_candidates(x_RN: Tensor, encoder: Rounded, threshold: float) -> Candidates | None:
    """Every feature whose score may exceed `threshold`; None where the threshold is too near 0 to certify."""
    n_features = encoder.encoder_FN.shape[0]
    positions = []
    for start, low, margin_R in _margins(x_RN, encoder):
        score_RF = affine(low, encoder.encoder_FN, encoder.bias_F)
        bound_R = (threshold - margin_R) / (1 + encoder.slack)
        if not bool((bound_R > 0).all()):
            return None
        positions.append(_not_below(score_RF, bound_R) + start * n_features)
    position = torch.cat(positions) if positions else torch.empty(0, dtype=torch.int64)
    rows = position.div(n_features, rounding_mode="floor")
    return Candidates(rows, position - rows * n_features)


def batch_candidates(x_RN: Tensor, encoder: Rounded, wanted: int) -> Candidates | None:
    """At least `wanted` pairs, the `wanted` largest positive scores of the batch among them; None where that is open.

    A sample of the first slab sets the bound that pairs must reach to be looked at. It was low enough if `wanted`
    rounded scores reach it.
    """
    n_features = encoder.encoder_FN.shape[0]
    slack = encoder.slack
    slabs = list(_margins(x_RN, encoder))
    widest = max(margin_R.amax().item() for _, _, margin_R in slabs)
    reached = 0.0
    positions, scores, margins = [], [], []
    for start, low, margin_R in slabs:
        score_RF = affine(low, encoder.encoder_FN, encoder.bias_F)
        if start == 0:
            reached = selection.sampled_bound(score_RF, wanted / (x_RN.shape[0] * n_features))
        bound_R = (reached * (1 - slack) - widest - margin_R) / (1 + slack)
        if not bool((bound_R > 0).all()):
            return None
        position = _not_below(score_RF, bound_R)
        positions.append(position + start * n_features)
        scores.append(score_RF.view(-1)[position].float())
        margins.append(margin_R)
    position, score, margin_R = torch.cat(positions), torch.cat(scores), torch.cat(margins)
    if int((score >= reached).sum()) < wanted:
        return None
    cut = score.topk(wanted, sorted=False).values.amin()
    rows = position.div(n_features, rounding_mode="floor")
    near = score >= (cut * (1 - slack) - widest - margin_R[rows]) / (1 + slack)
    return Candidates(rows[near], position[near] - rows[near] * n_features)
