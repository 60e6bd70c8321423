"""The encoders: dense scores in slabs, or candidates from a bf16 product, and the exact choice among them.

Only one slab of scores exists at a time: `[B, F]` is never whole in memory. G dictionaries of F features run one after
the other, so a kept feature's index is `g * F + f` and a row is `b * G + g`.

Which product makes the scores is the caller's `product`. Where it is the encoder's own dtype the choice is that of
exact scores, whether or not candidates help to find it (see `prefilter`). Where it is another, scores rounded to bf16
choose the candidates, and their exact scores decide among them and are the values.
The CPU rounds the encoder anew at each call and leaves a given `working` copy unread.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from triton_kernels.arguments import Encoding
from triton_kernels.cpu import native, prefilter, rounded, selection, sparse
from triton_kernels.cpu.lists import Candidates
from triton_kernels.cpu.problem import Problem, affine, problems
from triton_kernels.pairs import Pairs, joined_sets, stacked

SLAB_ELEMENTS = 2**21  # 8 MiB in fp32: stays in the last-level cache between the product and the selection


def _finder(problem: Problem, k: int) -> ModuleType | None:
    """The module that finds candidates for about k features a row, certified or not; None: score all in full."""
    if not problem.x_RN.shape[0]:
        return None
    if native.serves(problem.x_RN, problem.encoder_FN, problem.bias_F, problem.scale_F):
        return prefilter if problem.is_rounded or prefilter.pays(problem.encoder_FN, k) else None
    return rounded if problem.is_rounded else None


def _scored_again(problem: Problem, found: Candidates) -> Pairs:
    """Candidates with z and score in the encoder's own dtype."""
    features, offsets = found
    z = sparse.gather_dot(problem.x_RN, features, offsets, problem.encoder_FN)
    z += problem.bias_F.index_select(0, features)
    score = z if problem.scale_F is None else z * problem.scale_F.index_select(0, features)
    return Pairs(z, score, features, offsets)


def encode_top_k(encoding: Encoding, k_G: Sequence[int]) -> tuple[Tensor, Tensor]:
    """z and features of `reference.encode_top_k`, k of each dictionary."""
    n_inputs, n_features = encoding.x_BGN.shape[1], encoding.encoder_GFN.shape[1]
    parts = [_top_k(problem, k) for problem, k in zip(problems(encoding), k_G, strict=True)]
    z = [z_RK for z_RK, _ in parts]
    features = [columns_RK + g * n_features for g, (_, columns_RK) in enumerate(parts)]
    sets = [slice(first, first + n_inputs) for first in range(0, len(parts), n_inputs)]
    z_P, features_P = (torch.cat([torch.cat(one[own], dim=1).view(-1) for own in sets]) for one in (z, features))
    return z_P, features_P.to(torch.int32)


def _top_k(problem: Problem, k: int) -> tuple[Tensor, Tensor]:
    """z and columns of the k best of each row, `[R, k]`."""
    finder = _finder(problem, k)
    if finder is None:
        return _top_k_of_slabs(problem, k)
    try:
        found = finder.top_k(problem, k)
    except prefilter.UnsafeError as error:
        if error.safe_R is None:
            return _top_k_of_slabs(problem, k)
        return _top_k_by_safety(problem, k, error.safe_R)
    pairs = _scored_again(problem, found)
    kept = selection.list_top_k(pairs.score, pairs.offsets, k)
    return pairs.z[kept], pairs.features[kept].long()


def _top_k_by_safety(problem: Problem, k: int, safe_R: Tensor) -> tuple[Tensor, Tensor]:
    """Rows without a certificate are scored as a whole, the others by candidates."""
    n_rows = safe_R.numel()
    z_RK, columns_RK = problem.x_RN.new_empty(n_rows, k), torch.empty(n_rows, k, dtype=torch.int64)
    for rows_R, choose in ((safe_R, _top_k), (~safe_R, _top_k_of_slabs)):
        if bool(rows_R.any()):
            z_RK[rows_R], columns_RK[rows_R] = choose(problem._replace(x_RN=problem.x_RN[rows_R]), k)
    return z_RK, columns_RK


def _top_k_of_slabs(problem: Problem, k: int) -> tuple[Tensor, Tensor]:
    z_parts, column_parts = [problem.x_RN.new_empty(0, k)], [torch.empty(0, k, dtype=torch.int64)]
    for z_RF in problem.slabs(SLAB_ELEMENTS):
        columns_RK = selection.row_top_k(z_RF if problem.scale_F is None else z_RF * problem.scale_F, k)
        z_parts.append(z_RF.gather(1, columns_RK))
        column_parts.append(columns_RK)
    return torch.cat(z_parts), torch.cat(column_parts)


def encode_batch_top_k(encoding: Encoding, k_G: Sequence[int]) -> tuple[Pairs, Tensor]:
    """Pairs and cut of `reference.encode_batch_top_k`: a sampled bound lets some through, and is given up if high."""
    n_rows, n_features = encoding.x_BGN.shape[0], encoding.encoder_GFN.shape[1]
    if _is_one_slab(encoding, min(k_G)):
        return _batch_top_k_in_c(encoding, k_G)
    parts = [_batch_top_k(problem, n_rows * k) for problem, k in zip(problems(encoding), k_G, strict=True)]
    cuts = [part.score.amin() if part.score.numel() else part.score.new_zeros(()) for part in parts]
    return joined_sets(parts, encoding.x_BGN.shape[1], n_features), torch.stack(cuts)


def _is_one_slab(encoding: Encoding, k: int) -> bool:
    """Whether C chooses from all scores of a dictionary at once: they fit a slab, unscaled and not rounded.

    k: the least of any; candidates pay for small k first, and each dictionary is to go its way as it would alone.
    """
    tensors = (encoding.x_BGN, encoding.center_GN, encoding.encoder_GFN, encoding.bias_GF)
    n_scores = encoding.x_BGN.shape[0] * encoding.encoder_GFN.shape[1]
    fits = 0 < n_scores <= SLAB_ELEMENTS and encoding.scale_GF is None and not encoding.is_rounded
    return fits and native.serves(*tensors) and not prefilter.pays(encoding.encoder_GFN[0], k)


def _batch_top_k_in_c(encoding: Encoding, k_G: Sequence[int]) -> tuple[Pairs, Tensor]:
    """Pairs and cut of dictionaries whose scores fit a slab: one call chooses, one puts all codes together."""
    (n_rows, n_inputs, _), (n_groups, n_features, _) = encoding.x_BGN.shape, encoding.encoder_GFN.shape
    most = [min(n_rows * k, n_rows * n_features) for k in k_G]
    begins = [0, *itertools.accumulate(most)]
    new = encoding.encoder_GFN.new_empty
    z_P, columns_P = new(begins[-1]), new(begins[-1], dtype=torch.int32)
    counts_GB, cut_G = new(n_groups, n_rows, dtype=torch.int64), new(n_groups)
    for g, problem in enumerate(problems(encoding)):
        z_RF, own = affine(problem.x_RN, problem.encoder_FN, problem.bias_F), slice(begins[g], begins[g + 1])
        chosen = (counts_GB[g], z_P[own], columns_P[own], cut_G[g])
        native.call("batch_top_k", n_rows, n_features, most[g], z_RF, *chosen)
    n_pairs = int(counts_GB.sum())
    offsets = new(n_rows * n_groups + 1, dtype=torch.int64)
    out_P, features_P = new(n_pairs), new(n_pairs, dtype=torch.int32)
    given = (counts_GB, torch.tensor(begins), z_P, columns_P)
    native.call("join_codes", n_rows, n_groups, n_inputs, n_features, *given, offsets, out_P, features_P)
    return Pairs(out_P, out_P, features_P, offsets), cut_G


def _batch_top_k(problem: Problem, wanted: int) -> Pairs:
    """The `wanted` largest positive scores of one dictionary."""
    finder = _finder(problem, wanted // max(1, problem.x_RN.shape[0])) if wanted else None
    pairs = None
    if finder is not None:
        with contextlib.suppress(prefilter.UnsafeError):
            pairs = _scored_again(problem, finder.batch(problem, wanted))
    if pairs is None:
        pairs = _survivors(problem, wanted)
    return pairs.only(selection.keep_largest(pairs.score, wanted))


def _survivors(problem: Problem, wanted: int) -> Pairs:
    """At least the `wanted` largest positive scores of one dictionary, or all positive ones."""
    kept_fraction = wanted / max(1, problem.x_RN.shape[0] * problem.encoder_FN.shape[0])
    bound, slabs = 0.0, []
    for z_RF in problem.slabs(SLAB_ELEMENTS):
        bound = bound if slabs else selection.sampled_bound(z_RF, problem.scale_F, kept_fraction)
        slabs.append(selection.above(z_RF, problem.scale_F, torch.full_like(problem.bias_F, bound), -torch.inf))
    found = stacked(slabs, problem.x_RN)
    if bound == 0.0 or found.z.numel() >= wanted:
        return found
    return _above(problem, torch.zeros_like(problem.bias_F), -torch.inf)


def _above(problem: Problem, bound_F: Tensor, least: float) -> Pairs:
    """Every pair with score > bound and z > least, from slabs of all scores."""
    slabs = [selection.above(z, problem.scale_F, bound_F, least) for z in problem.slabs(SLAB_ELEMENTS)]
    return stacked(slabs, problem.x_RN)


def encode_threshold(encoding: Encoding, threshold_GF: Tensor, window: float) -> Pairs:
    """Pairs of `reference.encode_threshold`."""
    lower_GF = threshold_GF - window / 2
    parts = [_near(problem, lower_F) for problem, lower_F in zip(problems(encoding), lower_GF, strict=True)]
    return joined_sets(parts, encoding.x_BGN.shape[1], encoding.encoder_GFN.shape[1])


def _near(problem: Problem, lower_F: Tensor) -> Pairs:
    """The pairs of one dictionary with score > lower and z > 0."""
    finder = _finder(problem, 1) if lower_F.numel() else None
    if finder is not None:
        with contextlib.suppress(prefilter.UnsafeError):
            pairs = _scored_again(problem, finder.above(problem, lower_F.amin().item()))
            is_near = (pairs.score > lower_F.index_select(0, pairs.features)) & (pairs.z > 0)
            return pairs.only(is_near.nonzero().squeeze(1))
    return _above(problem, lower_F, 0.0)
