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
from triton_kernels.reference import starts

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


class Pairs(NamedTuple):
    """Pairs of one dictionary as CSR."""

    z: Tensor
    score: Tensor
    features: Tensor  # int32, ascending within a row
    offsets: Tensor  # [R + 1], int64

    def only(self, kept: Tensor) -> Pairs:
        """Those at the positions `kept`, which ascend."""
        offsets = torch.searchsorted(kept, self.offsets)
        return Pairs(self.z[kept], self.score[kept], self.features[kept], offsets)


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


def _slabs(problem: Problem) -> Iterator[tuple[int, Tensor]]:
    """The first row and z of each slab of rows."""
    step = max(1, SLAB_ELEMENTS // problem.encoder_FN.shape[0])
    for start in range(0, problem.x_RN.shape[0], step):
        yield start, affine(problem.x_RN[start : start + step], problem.encoder_FN, problem.bias_F)


def _scored_again(problem: Problem, found: Candidates) -> Pairs:
    """Candidates with z and score in the encoder's own dtype."""
    features, offsets = found
    z = sparse.gather_dot(problem.x_RN, features, offsets, problem.encoder_FN)
    z += problem.bias_F.index_select(0, features)
    score = z if problem.scale_F is None else z * problem.scale_F.index_select(0, features)
    return Pairs(z, score, features, offsets)


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
    for start, z in _slabs(problem):
        rows = slice(start, start + z.shape[0])
        columns[rows] = selection.row_top_k(z if problem.scale_F is None else z * problem.scale_F, k)
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
    pairs = _scored_again(problem, found)
    kept = selection.list_top_k(pairs.score, found.offsets, k)
    return pairs.z[kept], found.features[kept].long()


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
    parts, cuts = [], []
    for problem in _problems(x_BGN, center_GN, encoder_GFN, bias_GF, scale_GF, product):
        pairs = _batch_top_k(problem, x_BGN.shape[0] * k)
        parts.append(pairs)
        cuts.append(pairs.score.amin() if pairs.score.numel() else pairs.score.new_zeros(()))
    values, _, features, offsets = _joined(parts, encoder_GFN.shape[1])
    return values, features, offsets, torch.stack(cuts)


def _batch_top_k(problem: Problem, wanted: int) -> Pairs:
    """The `wanted` largest positive scores of one dictionary."""
    found = None
    if wanted and problem.takes_candidates(wanted // problem.x_RN.shape[0]):
        with contextlib.suppress(prefilter.UnsafeError):
            found = prefilter.batch_candidates(_safe_rows(problem), problem.for_candidates(), wanted)
    pairs = _survivors(problem, wanted) if found is None else _scored_again(problem, found)
    return pairs.only(selection.keep_largest(pairs.score, wanted))


def _safe_rows(problem: Problem) -> prefilter.Rows:
    """The rows in bf16.

    Raises:
        UnsafeError: not every row can have a certificate.
    """
    x = prefilter.rounded(problem.x_RN)
    if not bool(prefilter.is_safe(x).all()):
        raise prefilter.UnsafeError
    return x


def _survivors(problem: Problem, wanted: int) -> Pairs:
    """At least the `wanted` largest positive scores of one dictionary, or all positive ones."""
    kept_fraction = wanted / max(1, problem.x_RN.shape[0] * problem.encoder_FN.shape[0])
    bound, slabs = 0.0, []
    for start, z in _slabs(problem):
        bound = bound if start else selection.sampled_bound(z, problem.scale_F, kept_fraction)
        slabs.append(_listed(problem, z, torch.full_like(problem.bias_F, bound)))
    found = _stacked(problem, slabs)
    if bound == 0.0 or found.z.numel() >= wanted:
        return found
    zero_F = torch.zeros_like(problem.bias_F)
    return _stacked(problem, [_listed(problem, z, zero_F) for _, z in _slabs(problem)])


def _listed(problem: Problem, z_RF: Tensor, bound_F: Tensor, least: float = -torch.inf) -> Pairs:
    return Pairs(*selection.above(z_RF, problem.scale_F, bound_F, least))


def _stacked(problem: Problem, slabs: list[Pairs]) -> Pairs:
    """The pairs of successive slabs of rows as one code."""
    if not slabs:
        empty = problem.x_RN.new_empty(0)
        return Pairs(empty, empty, empty.to(torch.int32), torch.zeros(1, dtype=torch.int64))
    z, score, features = (torch.cat(column) for column in list(zip(*slabs, strict=True))[:3])
    counts_R = torch.cat([slab.offsets.diff() for slab in slabs])
    return Pairs(z, score, features, starts(counts_R))


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
    parts = []
    for group, problem in enumerate(_problems(x_BGN, center_GN, encoder_GFN, bias_GF, scale_GF, product)):
        threshold_F = threshold_GF[group]
        pairs = _near(problem, threshold_F - window / 2)
        value = torch.where(pairs.score > threshold_F.index_select(0, pairs.features), pairs.z, 0)
        parts.append(pairs._replace(score=value))
    z, value, features, offsets = _joined(parts, encoder_GFN.shape[1])
    return value, features, offsets, z


def _near(problem: Problem, lower_F: Tensor) -> Pairs:
    """The pairs of one dictionary with score > lower and z > 0."""
    found = None
    if lower_F.numel() and problem.takes_candidates(1):
        with contextlib.suppress(prefilter.UnsafeError):
            found = prefilter.above_candidates(_safe_rows(problem), problem.for_candidates(), lower_F.amin().item())
    if found is None:
        return _stacked(problem, [_listed(problem, z, lower_F, 0.0) for _, z in _slabs(problem)])
    pairs = _scored_again(problem, found)
    is_near = (pairs.score > lower_F.index_select(0, pairs.features)) & (pairs.z > 0)
    return pairs.only(is_near.nonzero().squeeze(1))


def _joined(parts: list[Pairs], n_features: int) -> Pairs:
    """The pairs of G dictionaries as one code, in which row b of dictionary g is row b * G + g."""
    if len(parts) == 1:
        return parts[0]
    z, score = torch.cat([part.z for part in parts]), torch.cat([part.score for part in parts])
    features = torch.cat([part.features + group * n_features for group, part in enumerate(parts)])
    counts = torch.stack([part.offsets.diff() for part in parts], dim=1).flatten()
    sizes = torch.tensor([part.z.numel() for part in parts])
    begins = torch.stack([part.offsets[:-1] for part in parts], dim=1) + starts(sizes)[:-1]
    offsets = starts(counts)
    order = torch.arange(z.numel()) + (begins.flatten() - offsets[:-1]).repeat_interleave(counts)
    return Pairs(z[order], score[order], features[order], offsets)


def _require_finite(tensor: Tensor) -> None:
    """Refuses NaN and infinity, which a comparison would turn into "not active" without a word.

    Raises:
        ValueError: some number is not finite.
    """
    if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
        row = int((~torch.isfinite(tensor)).nonzero()[0, 0])
        raise ValueError(f"row {row} is not finite, in x or in the encoder; drop such rows")
