"""Dense scores in row chunks, and the exact choice of the few that are kept.

Only one slab of scores, at most `SLAB_ELEMENTS` numbers, exists at a time: `[B, F]` is never whole in memory. Scores
are `z = <x - center, encoder row> + bias`, times an optional per-feature scale; the value of a kept pair is relu(z)
without the scale. Centring is in the dtype of x, the product in that of the encoder.

G dictionaries of F features run side by side, so a kept feature's index is `g * F + f` and a row
is `b * G + g`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from triton_kernels.reference import first_largest

SLAB_ELEMENTS = 2**21  # 8 MiB in fp32: stays in the last-level cache between the product and the selection
GROUP = 32
TWO_STAGE_COLUMNS = 4096  # from here on finding the best groups first is faster
PREFILTER_MARGIN = 1.5  # how many times more scores than needed the sampled bound lets through
PREFILTER_SAMPLES = 2**15


class Scores(NamedTuple):
    """One slab: rows `start : start + z.shape[0]` of dictionary `group`."""

    group: int
    start: int
    z: Tensor  # [rows, F]
    score: Tensor  # z, or z times the scale


def affine(x_RN: Tensor, weight_FN: Tensor, bias_F: Tensor) -> Tensor:
    """`x @ weight.T + bias`, as `[R, F]`, in the dtype of `x`.

    On the CPU in fp32 this goes to oneDNN, which is true fp32 and was 1.2-1.4 times faster than the default product
    on the machines measured; the global precision flags are neither read nor changed.
    """
    if x_RN.device.type == "cpu" and x_RN.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x_RN.contiguous(), weight_FN, bias_F, "none", [], "")
    return torch.addmm(bias_F, x_RN, weight_FN.t())


def score_slabs(
    x_BGN: Tensor, center_GN: Tensor, encoder_GFN: Tensor, bias_GF: Tensor, scale_GF: Tensor | None
) -> Iterator[Scores]:
    """Every score once, one dictionary after the other, in slabs of rows."""
    n_rows, n_groups, _ = x_BGN.shape
    n_features = encoder_GFN.shape[1]
    step = max(1, min(n_rows, SLAB_ELEMENTS // n_features))
    for group in range(n_groups):
        for start in range(0, n_rows, step):
            x_RN = (x_BGN[start : start + step, group] - center_GN[group]).to(encoder_GFN.dtype)
            z = affine(x_RN, encoder_GFN[group], bias_GF[group])
            score = z if scale_GF is None else z * scale_GF[group]
            yield Scores(group, start, z, score)


def row_top_k(score_RF: Tensor, k: int) -> Tensor:
    """Columns of the k largest scores of each row, equal scores by lowest column, ascending, `[R, k]` int64."""
    n_columns = score_RF.shape[1]
    if k >= n_columns:
        return torch.arange(n_columns, device=score_RF.device).expand(score_RF.shape[0], -1)
    if n_columns >= TWO_STAGE_COLUMNS and n_columns % GROUP == 0 and 4 * (k + 1) * GROUP <= n_columns:
        columns, tied = _top_k_of_groups(score_RF, k)
    else:
        best = score_RF.topk(k + 1, dim=1)
        columns, tied = best.indices[:, :k], best.values[:, k - 1] == best.values[:, k]
    columns = columns.sort(dim=1).values
    # torch.topk leaves the choice among equal scores open; only a tie across the cut can change the set.
    rows = tied.nonzero().squeeze(1)
    if rows.numel():
        columns[rows] = first_largest(score_RF[rows], k)
    return columns


def _top_k_of_groups(score_RF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Columns of the k largest by way of the k groups with the largest maxima, and rows where a tie may decide.

    A score outside those groups has k scores in them at least as large, so without ties the result is exact.
    """
    n_rows, n_groups = score_RF.shape[0], score_RF.shape[1] // GROUP
    maxima = score_RF.view(n_rows, n_groups, GROUP).amax(-1).topk(k + 1, dim=1)
    groups = maxima.indices[:, :k]
    flat = (groups + n_groups * torch.arange(n_rows, device=groups.device)[:, None]).reshape(-1)
    candidates = score_RF.view(-1, GROUP).index_select(0, flat).view(n_rows, k * GROUP)
    best = candidates.topk(k + 1, dim=1)
    inside = best.indices[:, :k]
    columns = groups.gather(1, inside // GROUP) * GROUP + inside % GROUP
    smallest = best.values[:, k - 1]
    return columns, (smallest == best.values[:, k]) | (smallest <= maxima.values[:, k])


def select_top_k(
    x_BGN: Tensor,
    center_GN: Tensor,
    encoder_GFN: Tensor,
    bias_GF: Tensor,
    scale_GF: Tensor | None,
    k: int,
) -> tuple[Tensor, Tensor]:
    """Values `[B * G * k]` and global features of the k best scores of each row and dictionary."""
    n_rows, n_groups, _ = x_BGN.shape
    n_features = encoder_GFN.shape[1]
    values = encoder_GFN.new_empty(n_rows, n_groups, k)
    features = torch.empty(n_rows, n_groups, k, dtype=torch.int32, device=x_BGN.device)
    for slab in score_slabs(x_BGN, center_GN, encoder_GFN, bias_GF, scale_GF):
        columns = row_top_k(slab.score, k)
        rows = slice(slab.start, slab.start + columns.shape[0])
        values[rows, slab.group] = slab.z.gather(1, columns).relu_()
        features[rows, slab.group] = (columns + slab.group * n_features).to(torch.int32)
    return values.reshape(-1), features.reshape(-1)


class _Survivors:
    """The scores of one dictionary above a bound, in (row, feature) order, slab by slab."""

    def __init__(self, bound: float) -> None:
        self.bound = bound
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, slab: Scores) -> None:
        flat = slab.score.reshape(-1)
        position = (flat > self.bound).nonzero().squeeze(1)
        score = flat[position]
        z = score if slab.z is slab.score else slab.z.reshape(-1)[position]
        self._parts.append((position + slab.start * slab.score.shape[1], score, z))

    def gather(self) -> tuple[Tensor, Tensor, Tensor]:
        position, score, z = (torch.cat(column) for column in zip(*self._parts, strict=True))
        return position, score, z


def _sampled_bound(score: Tensor, kept_fraction: float) -> float:
    """A guess that lets a little more than `kept_fraction` of the scores through; never below zero."""
    stride = max(1, score.numel() // PREFILTER_SAMPLES) | 1
    sample = score.reshape(-1)[::stride]
    keep = int(PREFILTER_MARGIN * kept_fraction * sample.numel()) + 16
    if keep >= sample.numel():
        return 0.0
    return max(0.0, sample.topk(keep).values[-1].item())


def _keep_largest(score_P: Tensor, count: int) -> Tensor:
    """Positions, ascending, of the `count` largest; equal scores go to the lowest position."""
    if score_P.numel() <= count:
        return torch.arange(score_P.numel(), device=score_P.device)
    cut = score_P.topk(count, sorted=False).values.amin()
    above = score_P > cut
    equal = (score_P == cut).nonzero().squeeze(1)[: count - int(above.sum())]
    above[equal] = True
    return above.nonzero().squeeze(1)


def select_batch_top_k(
    x_BGN: Tensor,
    center_GN: Tensor,
    encoder_GFN: Tensor,
    bias_GF: Tensor,
    scale_GF: Tensor | None,
    k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, global features, offsets `[B * G + 1]` and cut `[G]` of the B * k largest positive scores a dictionary.

    Exact: a sampled bound lets candidates through, the cut is taken among them, and if the bound proves too high the
    slabs are scored again without it. Equal scores go to the lowest (row, feature). Fewer than B * k pairs come back
    only where fewer scores are positive.
    """
    n_rows, n_groups, _ = x_BGN.shape
    n_features = encoder_GFN.shape[1]
    wanted = n_rows * k
    parts, cuts = [], []
    for group in range(n_groups):
        one = slice(group, group + 1)
        arguments = (
            x_BGN[:, one],
            center_GN[one],
            encoder_GFN[one],
            bias_GF[one],
            None if scale_GF is None else scale_GF[one],
        )
        survivors = None
        for slab in score_slabs(*arguments):
            if survivors is None:
                survivors = _Survivors(_sampled_bound(slab.score, k / n_features))
            survivors.add(slab)
        if survivors is None:
            empty = encoder_GFN.new_empty(0)
            parts.append((empty, empty.long(), empty.long()))
            cuts.append(encoder_GFN.new_zeros(()))
            continue
        position, score, z = survivors.gather()
        if survivors.bound > 0 and position.numel() < wanted:
            everything = _Survivors(0.0)
            for slab in score_slabs(*arguments):
                everything.add(slab)
            position, score, z = everything.gather()
        kept = _keep_largest(score, wanted)
        position, score, z = position[kept], score[kept], z[kept]
        row = position.div(n_features, rounding_mode="floor")
        parts.append((z, row * n_groups + group, position - row * n_features + group * n_features))
        cuts.append(score.amin() if score.numel() else score.new_zeros(()))
    return (*_join_groups(parts, n_rows * n_groups), torch.stack(cuts))


def select_threshold(
    x_BGN: Tensor,
    center_GN: Tensor,
    encoder_GFN: Tensor,
    bias_GF: Tensor,
    scale_GF: Tensor | None,
    threshold_G: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, global features and offsets of every positive score above its dictionary's threshold."""
    n_rows, n_groups, _ = x_BGN.shape
    n_features = encoder_GFN.shape[1]
    parts = []
    for slab in score_slabs(x_BGN, center_GN, encoder_GFN, bias_GF, scale_GF):
        kept = (slab.score > threshold_G[slab.group]) & (slab.z > 0)
        row, column = kept.nonzero(as_tuple=True)
        parts.append(
            (
                slab.z[row, column],
                (row + slab.start) * n_groups + slab.group,
                column + slab.group * n_features,
            )
        )
    if not parts:
        empty = encoder_GFN.new_empty(0)
        parts.append((empty, empty.long(), empty.long()))
    return _join_groups(parts, n_rows * n_groups)


def _join_groups(parts: list[tuple[Tensor, Tensor, Tensor]], n_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Parts (each in row-major order) merged into one CSR code."""
    values, rows, features = (torch.cat(column) for column in zip(*parts, strict=True))
    if len(parts) > 1:
        order = torch.sort(rows, stable=True).indices
        values, rows, features = values[order], rows[order], features[order]
    offsets = torch.zeros(n_rows + 1, dtype=torch.int64, device=values.device)
    offsets[1:] = torch.bincount(rows, minlength=n_rows).cumsum(0)
    return values, features.to(torch.int32), offsets
