"""Candidates for an exact selection, from a product in bf16 and in C: half the time of one in fp32 with bf16 units.

With x~ and w~ the rounded vectors, Cauchy and Schwarz bound what rounding can do to a score `z = <x, w> + b`:

    |z~ - z| <= |x - x~| |w| + |x~| |w - w~| + |b - b~| + the sums' own rounding,

where the norms of the residuals are measured, not guessed. A feature whose rounded score is further below the k-th
best than both margins together cannot be among the k best, whatever the data, so scoring the others again in fp32
gives the selection of an fp32 product: `certified`. Without the margin the rounded scores alone decide who is a
candidate and fp32 decides among candidates: that is the setting `bf16` (`rounded` does it without C).

The encoder is rounded a chunk of features at a time, and only one slab of scores exists at a time. What a chunk's
scores prove about the k-th best goes on to the next one, and to a last sieve over all chunks' candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from triton_kernels.cpu import lists, native, selection
from triton_kernels.cpu.lists import Candidates, Lists, Parts
from triton_kernels.cpu.problem import Problem, affine
from triton_kernels.reference import row_of_pair, starts

SLAB_ELEMENTS = 2**22  # of scores: 8 MiB in bf16
CHUNK_ELEMENTS = 2**22  # of the encoder
MIN_CHUNK, CHUNK_PER_KEPT = 1024, 16  # features of a chunk, at least, and for each that is kept
RELATIVE = 2.0**-8 * 1.01  # rounding of a result to bf16
SUMMATION = 2.0**-23  # of a term of a sum in fp32, for both sums that are compared
SAFE_NORMS = (1e-12, 1e18)  # between them squares of a row and of its rounding neither vanish nor overflow
MIN_FEATURES, MIN_WIDTH, FEATURES_PER_ACTIVE = 4096, 128, 64
MOST_CANDIDATES = 1 / 6
"""Of a row's features: a candidate scored again costs as much as six scores of a product (4,096 features of 9,216)."""
MOST_AT_FIRST = 1 / 4
"""Of the first chunk's features, whose k-th best is below that of all: so many there are too many in the end (normal
scores)."""


class Rows(NamedTuple):
    """Rows of x in bf16, with the norms of the rows and of what rounding took from them."""

    low_RN: Tensor
    norm_R: Tensor
    error_R: Tensor


class Slab(NamedTuple):
    """Rounded scores of some rows for one chunk of features, and how far rounding can have moved each row's."""

    rows: slice
    score_RF: Tensor
    margin_R: Tensor


class UnsafeError(ArithmeticError):
    """Candidates are not to be had: numbers whose squares leave the range of fp32, or more than are worth the name."""

    def __init__(self, safe_R: Tensor | None = None) -> None:
        """safe_R: the rows that have a certificate by themselves; None where all are to be scored as a whole."""
        super().__init__()
        self.safe_R = safe_R


def pays(encoder_FN: Tensor, k: int) -> bool:
    """Whether candidates in bf16 beat a plain fp32 product: the CPU multiplies bf16, and few features are kept."""
    n_features, width = encoder_FN.shape
    is_fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    fits = n_features >= max(MIN_FEATURES, FEATURES_PER_ACTIVE * k) and width >= MIN_WIDTH
    return is_fast and fits and encoder_FN.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _rounded(table_RN: Tensor, scale_R: Tensor | None) -> Rows:
    """Rows of a table, times their scale; they may lie apart, but each must be contiguous."""
    low_RN = torch.empty(table_RN.shape, dtype=torch.bfloat16)
    squares_R, errors_R = table_RN.new_empty(2, table_RN.shape[0])
    stride = table_RN.stride(0)
    rows = table_RN.as_strided((max(0, (table_RN.shape[0] - 1) * stride) + table_RN.shape[1],), (1,))
    native.call("round_rows", *table_RN.shape, stride, rows, scale_R, low_RN, squares_R, errors_R)
    return Rows(low_RN, squares_R.sqrt_(), errors_R.sqrt_())


def _safe_rows(problem: Problem) -> Rows:
    """The rows in bf16."""
    x = _rounded(problem.x_RN, None)
    safe_R = (x.norm_R > SAFE_NORMS[0]) & (x.norm_R < SAFE_NORMS[1])
    if not bool(safe_R.all()):
        raise UnsafeError(safe_R)
    return x


def _slack(problem: Problem) -> float:
    """Relative rounding of a result that a certificate must allow for; 0 where rounded scores are to choose."""
    return 0.0 if problem.is_rounded else RELATIVE


def _n_chunks(problem: Problem, k: int) -> int:
    """In how many chunks of features the candidates of k are looked for."""
    n_features, width = problem.encoder_FN.shape
    return max(1, min(-(-n_features * width // CHUNK_ELEMENTS), n_features // max(MIN_CHUNK, CHUNK_PER_KEPT * k)))


def _scan(
    x: Rows, problem: Problem, n_chunks: int, listed: Callable[[Slab], Parts], *, most_at_first: float
) -> tuple[Lists, Tensor]:
    """What `listed` finds in slab by slab of rows, of chunk by chunk of features, and the largest margin of each row.

    A slab's memory is the next one's. most_at_first: share of the first chunk above which it is given up.
    """
    parts: list[Parts] = []
    most_R = torch.zeros_like(x.norm_R)
    low_norm_R = x.norm_R + x.error_R  # at least that of the rounded row
    for chunk in range(n_chunks):
        scale_F = None if problem.scale_F is None else problem.scale_F[chunk::n_chunks]
        weight = _rounded(problem.encoder_FN[chunk::n_chunks], scale_F)
        bias_F = problem.bias_F[chunk::n_chunks]
        bias_F = bias_F if scale_F is None else bias_F * scale_F
        low_F = bias_F.to(torch.bfloat16)
        norm, error = weight.norm_R.amax().item(), weight.error_R.amax().item()
        bias_error = (bias_F - low_F).abs().amax().item()
        if not (SAFE_NORMS[0] < norm < SAFE_NORMS[1] and math.isfinite(error) and math.isfinite(bias_error)):
            raise UnsafeError
        margin_R = torch.zeros_like(x.norm_R)
        if not problem.is_rounded:
            sums = SUMMATION * x.low_RN.shape[1] * (norm + error)
            margin_R = x.error_R * norm + low_norm_R * (error + sums) + bias_error
        most_R = torch.maximum(most_R, margin_R)
        step = max(1, SLAB_ELEMENTS // low_F.numel())
        for start in range(0, x.low_RN.shape[0], step):
            part = slice(start, start + step)
            parts.append(listed(Slab(part, affine(x.low_RN[part], weight.low_RN, low_F), margin_R[part])))
        if chunk == 0:
            _require_few(problem, sum(len(columns) for columns, *_ in parts), low_F.numel(), most_at_first)
    columns, keys, counts = (torch.cat(part) for part in zip(*parts, strict=True))
    return Lists(columns, keys, starts(counts), x.norm_R.numel()), most_R


def _require_few(problem: Problem, n_listed: int, n_features: int, most: float) -> None:
    """Give up where margins are so wide, as for noise in thousands of dimensions, that scoring all costs less."""
    if not problem.is_rounded and n_listed > most * problem.x_RN.shape[0] * n_features:
        raise UnsafeError


def _merged(problem: Problem, found: Lists, bound_R: Tensor) -> Candidates:
    n_features = problem.bias_F.numel()
    candidates = lists.merged(found, bound_R, n_features)
    _require_few(problem, candidates.features.numel(), n_features, MOST_CANDIDATES)
    return candidates


def top_k(problem: Problem, k: int) -> Candidates:
    """At least k features of each row, the k best scores among them."""
    x, slack = _safe_rows(problem), _slack(problem)
    least_R = torch.full_like(x.norm_R, -torch.inf)  # what the k-th best exact score is at least

    def listed(slab: Slab) -> Parts:
        return lists.sieved(slab.score_RF, k, slab.margin_R, slack, least_R[slab.rows])

    found, margin_R = _scan(x, problem, _n_chunks(problem, k), listed, most_at_first=MOST_AT_FIRST)
    least_R = torch.maximum(least_R, lists.proven(lists.kth_score(found, k), margin_R, slack))
    return _merged(problem, found, lists.within_reach(least_R, margin_R, slack))


def above(problem: Problem, threshold: float) -> Candidates:
    """Every feature whose score may exceed `threshold`."""
    x, slack = _safe_rows(problem), _slack(problem)
    exact = x.norm_R.new_tensor(threshold)

    def listed(slab: Slab) -> Parts:
        return lists.not_below(slab.score_RF, _positive(lists.within_reach(exact, slab.margin_R, slack)))

    found, _ = _scan(x, problem, _n_chunks(problem, 1), listed, most_at_first=MOST_CANDIDATES)
    return _merged(problem, found, torch.full_like(x.norm_R, -torch.inf))


def batch(problem: Problem, wanted: int) -> Candidates:
    """At least `wanted` pairs, the `wanted` largest positive scores of the batch among them.

    A sample of the first slab guesses what they reach. The guess was not too high if so many are proven to reach it.
    """
    x, slack = _safe_rows(problem), _slack(problem)
    n_rows, n_features = x.norm_R.numel(), problem.bias_F.numel()
    guesses: list[Tensor] = []

    def listed(slab: Slab) -> Parts:
        if not guesses:
            sampled = selection.sampled_bound(slab.score_RF, None, wanted / (n_rows * n_features))
            guesses.append(lists.proven(x.norm_R.new_tensor(sampled), slab.margin_R.amax(), slack))
        return lists.not_below(slab.score_RF, _positive(lists.within_reach(guesses[0], slab.margin_R, slack)))

    n_chunks = _n_chunks(problem, -(-wanted // n_rows))
    found, margin_R = _scan(x, problem, n_chunks, listed, most_at_first=MOST_AT_FIRST)
    rows = row_of_pair(found.offsets, found.keys.numel()) % n_rows
    proven_P = lists.proven(lists.scores_of(found.keys), margin_R[rows], slack)
    if int((proven_P >= guesses[0]).sum()) < wanted:
        raise UnsafeError
    least = proven_P[selection.keep_largest(proven_P, wanted)].amin()
    return _merged(problem, found, lists.within_reach(least, margin_R, slack))


def _positive(bound_R: Tensor) -> Tensor:
    """The bounds, if all are above 0: at or below it they would let most features of a row through."""
    if not bool((bound_R > 0).all()):
        raise UnsafeError
    return bound_R
