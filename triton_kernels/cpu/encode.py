"""The encoders: dense scores in slabs, or candidates from a bf16 product, and the exact choice among them.

`z = <x - center, encoder row> + bias`; a score is z times an optional scale; the value of a kept pair is relu(z)
without the scale. Only one slab of scores exists at a time: `[B, F]` is never whole in memory. Centring is in the
dtype of x. G dictionaries of F features run one after the other, so a kept feature's index is `g * F + f` and a row
is `b * G + g`.

Which product makes the scores is the caller's `product`. Where it is the encoder's own dtype the choice is that of
exact scores, whether or not candidates help to find it (see `prefilter`). Where it is bf16 on a wider encoder, scores
rounded to bf16 choose the candidates, and their exact scores decide among them and are the values.
The CPU rounds the encoder anew at each call and leaves a given `working` copy unread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from triton_kernels.cpu import prefilter, selection, sparse
from triton_kernels.cpu.affine import affine
from triton_kernels.cpu.lists import Candidates

SLAB_ELEMENTS = 2**21  # 8 MiB in fp32: stays in the last-level cache between the product and the selection


class Problem(NamedTuple):
    """One dictionary and its centred rows."""

    x_RN: Tensor
    encoder_FN: Tensor
    bias_F: Tensor
    scale_F: Tensor | None
    product: torch.dtype

    @property
    def is_rounded(self) -> bool:
        """Whether the choice is made on scores rounded to a narrower dtype."""
        return self.product != self.encoder_FN.dtype

    def takes_candidates(self, k: int) -> bool:
        """Whether candidates come first, certified or not."""
        return self.x_RN.shape[0] > 0 and (self.is_rounded or prefilter.pays(self.encoder_FN, k))

    def for_candidates(self) -> prefilter.Encoder:
        """What candidates are looked for with."""
        return prefilter.Encoder(self.encoder_FN, self.bias_F, self.scale_F, certified=not self.is_rounded)

    def scaled(self, z: Tensor, features: Tensor) -> Tensor:
        """Scores of pairs from their z."""
        return z if self.scale_F is None else z * self.scale_F.index_select(0, features)


class Pairs(NamedTuple):
    """Chosen pairs of one dictionary in row-major order."""

    z: Tensor
    rows: Tensor
    features: Tensor


def _problems(
    x_BGN: Tensor,
    center_GN: Tensor,
    encoder_GFN: Tensor,
    bias_GF: Tensor,
    scale_GF: Tensor | None,
    product: torch.dtype,
) -> Iterator[Problem]:
    for group in range(x_BGN.shape[1]):
        x_RN = (x_BGN[:, group] - center_GN[group]).to(encoder_GFN.dtype)
        _require_finite(x_RN)
        scale_F = None if scale_GF is None else scale_GF[group]
        yield Problem(x_RN, encoder_GFN[group], bias_GF[group], scale_F, product)


def _slabs(problem: Problem) -> Iterator[tuple[int, Tensor, Tensor]]:
    """`(start, z, score)` of each slab of rows."""
    step = max(1, SLAB_ELEMENTS // problem.encoder_FN.shape[0])
    for start in range(0, problem.x_RN.shape[0], step):
        z = affine(problem.x_RN[start : start + step], problem.encoder_FN, problem.bias_F)
        yield start, z, z if problem.scale_F is None else z * problem.scale_F


def _scored_again(problem: Problem, found: Candidates) -> tuple[Tensor, Tensor]:
    """z and score of candidates, in the encoder's own dtype."""
    features, offsets = found
    z = sparse.gather_dot(problem.x_RN, features, offsets, problem.encoder_FN)
    z += problem.bias_F.index_select(0, features)
    return z, problem.scaled(z, features)


def encode_top_k(
    x_BGN: Tensor,
    center_GN: Tensor,
    encoder_GFN: Tensor,
    bias_GF: Tensor,
    scale_GF: Tensor | None,
    k: int,
    product: torch.dtype,
    working_GFN: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `reference.encode_top_k`."""
    n_rows, n_groups, _ = x_BGN.shape
    n_features = encoder_GFN.shape[1]
    values = encoder_GFN.new_empty(n_rows, n_groups, k)
    features = torch.empty(n_rows, n_groups, k, dtype=torch.int32)
    for group, problem in enumerate(_problems(x_BGN, center_GN, encoder_GFN, bias_GF, scale_GF, product)):
        choose = _top_k_of_candidates if problem.takes_candidates(k) else _top_k_of_slabs
        z, columns = choose(problem, k)
        values[:, group] = z.relu_()
        features[:, group] = columns + group * n_features
    return values.view(-1), features.view(-1)


def _top_k_of_slabs(problem: Problem, k: int) -> tuple[Tensor, Tensor]:
    n_rows = problem.x_RN.shape[0]
    values, columns = problem.x_RN.new_empty(n_rows, k), torch.empty(n_rows, k, dtype=torch.int64)
    for start, z, score in _slabs(problem):
        rows = slice(start, start + z.shape[0])
        columns[rows] = selection.row_top_k(score, k)
        values[rows] = z.gather(1, columns[rows])
    return values, columns


def _top_k_of_candidates(problem: Problem, k: int) -> tuple[Tensor, Tensor]:
    x = prefilter.rounded(problem.x_RN)
    safe_R = prefilter.is_safe(x)
    if not bool(safe_R.all()):  # rows without a certificate are scored as a whole
        values, columns = problem.x_RN.new_empty(safe_R.numel(), k), torch.empty(safe_R.numel(), k, dtype=torch.int64)
        for chosen_R, choose in ((safe_R, _top_k_of_candidates), (~safe_R, _top_k_of_slabs)):
            if bool(chosen_R.any()):
                part = problem._replace(x_RN=problem.x_RN[chosen_R])
                values[chosen_R], columns[chosen_R] = choose(part, k)
        return values, columns
    try:
        found = prefilter.top_k_candidates(x, problem.for_candidates(), k)
    except prefilter.UnsafeError:
        return _top_k_of_slabs(problem, k)
    z, score = _scored_again(problem, found)
    kept = selection.list_top_k(score, found.offsets, k)
    return z[kept], found.features[kept].long()


def encode_batch_top_k(
    x_BGN: Tensor,
    center_GN: Tensor,
    encoder_GFN: Tensor,
    bias_GF: Tensor,
    scale_GF: Tensor | None,
    k: int,
    product: torch.dtype,
    working_GFN: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.encode_batch_top_k`.

    Exact: a sampled bound lets candidates through, the cut is taken among them, and if the bound proves too high the
    slabs are scored again without it.
    """
    n_rows = x_BGN.shape[0]
    parts, cuts = [], []
    for problem in _problems(x_BGN, center_GN, encoder_GFN, bias_GF, scale_GF, product):
        pairs, cut = _batch_top_k(problem, n_rows * k)
        parts.append(pairs)
        cuts.append(cut)
    values, features, offsets = _joined(parts, n_rows, encoder_GFN.shape[1])
    return values, features, offsets, torch.stack(cuts)


def _batch_top_k(problem: Problem, wanted: int) -> tuple[Pairs, Tensor]:
    """The `wanted` largest positive scores of one dictionary, and the smallest of them (0 where there is none)."""
    found = None
    if wanted and problem.takes_candidates(wanted // problem.x_RN.shape[0]):
        with contextlib.suppress(prefilter.UnsafeError):
            found = prefilter.batch_candidates(_safe_rows(problem), problem.for_candidates(), wanted)
    if found is not None:
        rows, features = found.rows(), found.features
        z, score = _scored_again(problem, found)
        kept = selection.keep_largest(score, wanted)
    else:
        position, score, z = _survivors(problem, wanted)
        kept = selection.keep_largest(score, wanted)
        rows = position.div(problem.encoder_FN.shape[0], rounding_mode="floor")
        features = position - rows * problem.encoder_FN.shape[0]
    score = score[kept]
    cut = score.amin() if score.numel() else score.new_zeros(())
    return Pairs(z[kept], rows[kept], features[kept]), cut


def _safe_rows(problem: Problem) -> prefilter.Rows:
    """The rows in bf16.

    Raises:
        UnsafeError: not every row can have a certificate.
    """
    x = prefilter.rounded(problem.x_RN)
    if not bool(prefilter.is_safe(x).all()):
        raise prefilter.UnsafeError
    return x


def _survivors(problem: Problem, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """Flat position, score and z of at least the `wanted` largest positive scores, or of all positive ones."""
    n_features = problem.encoder_FN.shape[0]
    bound: float | None = None
    while True:
        parts = []
        for start, z, score in _slabs(problem):
            if bound is None:
                bound = selection.sampled_bound(score, wanted / (problem.x_RN.shape[0] * n_features))
            position = (score.view(-1) > bound).nonzero().squeeze(1)
            parts.append((position + start * n_features, score.view(-1)[position], z.view(-1)[position]))
        if not parts:
            empty = problem.x_RN.new_empty(0)
            return empty.long(), empty, empty
        position, score, z = (torch.cat(column) for column in zip(*parts, strict=True))
        if bound == 0.0 or position.numel() >= wanted:
            return position, score, z
        bound = 0.0


def encode_threshold(
    x_BGN: Tensor,
    center_GN: Tensor,
    encoder_GFN: Tensor,
    bias_GF: Tensor,
    scale_GF: Tensor | None,
    threshold_GF: Tensor,
    window: float,
    product: torch.dtype,
    working_GFN: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.encode_threshold`."""
    parts, values = [], []
    for group, problem in enumerate(_problems(x_BGN, center_GN, encoder_GFN, bias_GF, scale_GF, product)):
        threshold_F = threshold_GF[group]
        pairs, score = _above(problem, threshold_F, window)
        parts.append(pairs)
        values.append(torch.where(score > threshold_F[pairs.features], pairs.z, 0))
    z, features, offsets, order = _join(parts, x_BGN.shape[0], encoder_GFN.shape[1])
    value = torch.cat(values) if values else z
    value = value if order is None else value[order]
    return value, features, offsets, z


def _above(problem: Problem, threshold_F: Tensor, window: float) -> tuple[Pairs, Tensor]:
    """The pairs of one dictionary above `threshold - window / 2` with z > 0, and their scores."""
    lower_F = threshold_F - window / 2
    n_features = problem.encoder_FN.shape[0]
    found = None
    if n_features and problem.takes_candidates(1):
        with contextlib.suppress(prefilter.UnsafeError):
            found = prefilter.above_candidates(_safe_rows(problem), problem.for_candidates(), lower_F.amin().item())
    if found is not None:
        rows, features = found.rows(), found.features
        z, score = _scored_again(problem, found)
        kept = (score > lower_F[features]) & (z > 0)
        return Pairs(z[kept], rows[kept], features[kept]), score[kept]
    parts = []
    for start, z, score in _slabs(problem):
        row, column = ((score > lower_F) & (z > 0)).nonzero(as_tuple=True)
        parts.append((z[row, column], row + start, column, score[row, column]))
    if not parts:
        empty = problem.x_RN.new_empty(0)
        return Pairs(empty, empty.long(), empty.long()), empty
    z, rows, columns, score = (torch.cat(column) for column in zip(*parts, strict=True))
    return Pairs(z, rows, columns), score


def _offsets(rows: Tensor, n_rows: int) -> Tensor:
    offsets = torch.zeros(n_rows + 1, dtype=torch.int64)
    offsets[1:] = torch.bincount(rows, minlength=n_rows).cumsum(0)
    return offsets


def _join(parts: list[Pairs], n_tokens: int, n_features: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The pairs of all dictionaries as one CSR code of z, and the order that merged them (None: as they were)."""
    n_groups = len(parts)
    z = torch.cat([part.z for part in parts])
    rows = torch.cat([part.rows * n_groups + group for group, part in enumerate(parts)])
    features = torch.cat([part.features + group * n_features for group, part in enumerate(parts)])
    order = None
    if n_groups > 1:
        rows, order = torch.sort(rows, stable=True)
        z, features = z[order], features[order]
    return z, features.to(torch.int32), _offsets(rows, n_tokens * n_groups), order


def _joined(parts: list[Pairs], n_tokens: int, n_features: int) -> tuple[Tensor, Tensor, Tensor]:
    return _join(parts, n_tokens, n_features)[:3]


def _require_finite(tensor: Tensor) -> None:
    """Refuses NaN and infinity, which a comparison would turn into "not active" without a word.

    Raises:
        ValueError: some number is not finite.
    """
    if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
        row = int((~torch.isfinite(tensor)).nonzero()[0, 0])
        raise ValueError(f"row {row} is not finite, in x or in the encoder; drop such rows")
