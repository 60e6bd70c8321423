"""The three encoders: scores in slabs of rows, the choice, and the values of the chosen pairs.

Scores z = <x - center, encoder row> + bias come from one GEMM a slab, in `product` precision with fp32 accumulation,
into a slab of at most `SLAB_BYTES` that every chunk of rows reuses: the `[B, F]` scores never exist. Centring is in
the wider of the dtypes of x and center. Where `product` is not the encoder's dtype (bf16 scores of an fp32 encoder),
the z of the chosen pairs are computed again in the encoder's dtype, so that only the choice is in low precision; that
holds x - center in the encoder's dtype for a chunk (top_k) or for the batch (the other two).

Floor: the GEMM's 2 * B * F * N operations; the choice adds one write and one read of the slab. Deterministic: the
choices are (see `select_topk`, `select_threshold`, `batch_threshold`), the GEMM is the library's for a fixed shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from triton_kernels.gpu.batch_threshold import RunningBound, largest_pairs
from triton_kernels.gpu.gather_dot import gather_dot
from triton_kernels.gpu.group_max import group_max
from triton_kernels.gpu.select_threshold import (
    Pairs,
    collect,
    group_bounds,
    join_dictionaries,
    kept_pairs,
    kept_pairs_fp64,
)
from triton_kernels.gpu.select_topk import select_top_k

SLAB_BYTES = 256 * 2**20


class Slab(NamedTuple):
    """Scores of rows `start : start + z.shape[0]`, and those rows of x, centred. The next slab overwrites `z`."""

    start: int
    centred_RN: Tensor
    z_RF: Tensor


class Encoder(NamedTuple):
    """Encoder of G dictionaries, as the operators receive it."""

    center_GN: Tensor
    encoder_GFN: Tensor
    bias_GF: Tensor
    product: torch.dtype
    working_GFN: Tensor

    @property
    def rescores(self) -> bool:
        """Whether the chosen pairs are computed again in the encoder's own dtype."""
        return self.product != self.encoder_GFN.dtype

    def slabs(self, x_BGN: Tensor, group: int) -> Iterator[Slab]:
        """The scores of one dictionary, in slabs of rows."""
        n_rows, n_features = x_BGN.shape[0], self.encoder_GFN.shape[1]
        step = max(1, min(n_rows, SLAB_BYTES // (n_features * self.product.itemsize)))
        slab = torch.empty(step if n_rows else 0, n_features, dtype=self.product, device=x_BGN.device)
        bias_F = self.bias_GF[group].to(self.product)
        for start in range(0, n_rows, step):
            centred = x_BGN[start : start + step, group] - self.center_GN[group]
            z = slab[: centred.shape[0]]
            torch.addmm(bias_F, centred.to(self.product), self.working_GFN[group].t(), out=z)
            yield Slab(start, centred, z)

    def rescore(self, centred_RN: Tensor, features_P: Tensor, offsets: Tensor) -> Tensor:
        """z of the given pairs in the encoder's dtype."""
        table_FN = self.encoder_GFN.reshape(-1, self.encoder_GFN.shape[2])
        z_P = gather_dot(centred_RN.to(table_FN.dtype).contiguous(), features_P, offsets, table_FN)
        return z_P + self.bias_GF.reshape(-1)[features_P.long()]


def _encoder(center_GN, encoder_GFN, bias_GF, product: torch.dtype, working_GFN: Tensor | None) -> Encoder:
    working = encoder_GFN.to(product) if working_GFN is None else working_GFN
    return Encoder(center_GN, encoder_GFN, bias_GF, product, working)


def _scale_of(scale_GF: Tensor | None, group: int) -> Tensor | None:
    return None if scale_GF is None else scale_GF[group].contiguous()


def encode_top_k(
    x_BGN: Tensor, center_GN: Tensor, encoder_GFN: Tensor, bias_GF: Tensor, scale_GF: Tensor | None,
    k: int, product: torch.dtype, working_GFN: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Values and global features, `[B * G * k]` each, of the k best scores of each row and dictionary."""
    n_rows, n_groups, _ = x_BGN.shape
    n_features, device = encoder_GFN.shape[1], x_BGN.device
    encoder = _encoder(center_GN, encoder_GFN, bias_GF, product, working_GFN)
    values = torch.empty(n_rows, n_groups, k, dtype=encoder_GFN.dtype, device=device)
    features = torch.empty(n_rows, n_groups, k, dtype=torch.int32, device=device)
    for group in range(n_groups):
        scale_F = _scale_of(scale_GF, group)
        for start, centred, z in encoder.slabs(x_BGN, group):
            rows = slice(start, start + z.shape[0])
            value, feature = values[rows, group], features[rows, group]
            chosen_z = torch.empty(value.shape, dtype=product, device=device) if encoder.rescores else value
            select_top_k(z, scale_F, k, group * n_features, chosen_z, feature)
            if encoder.rescores:
                offsets = torch.arange(0, value.numel() + 1, k, device=device)
                value.copy_(encoder.rescore(centred, feature.reshape(-1), offsets).relu_().view(-1, k))
    return values.view(-1), features.view(-1)


def _code_of(x_BGN: Tensor, encoder: Encoder, lists: list[Pairs]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z in the encoder's dtype, global features, offsets and scores of the chosen pairs."""
    z, features, offsets, score = join_dictionaries(lists, x_BGN.shape[0], encoder.encoder_GFN.shape[1])
    if encoder.rescores:
        centred = (x_BGN - encoder.center_GN).reshape(-1, x_BGN.shape[2])
        z = encoder.rescore(centred, features, offsets)
    return z, features, offsets, score


def encode_batch_top_k(
    x_BGN: Tensor, center_GN: Tensor, encoder_GFN: Tensor, bias_GF: Tensor, scale_GF: Tensor | None,
    k: int, product: torch.dtype, working_GFN: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Values, global features, offsets `[B * G + 1]` and cut `[G]` of the B * k largest positive scores a dictionary.

    Equal scores go to the lowest (row, feature). There are fewer pairs only where fewer scores are positive. The cut
    is the smallest kept score, 0 without any.
    """
    n_rows, n_groups, _ = x_BGN.shape
    encoder = _encoder(center_GN, encoder_GFN, bias_GF, product, working_GFN)
    lists, cuts = [], []
    for group in range(n_groups):
        scale_F, running, parts = _scale_of(scale_GF, group), RunningBound(n_rows * k, x_BGN.device), []
        for start, _, z in encoder.slabs(x_BGN, group):
            if product == torch.float64:
                parts.append(kept_pairs_fp64(z, scale_F, start, None))
            else:
                maxima = group_max(z, scale_F)
                parts.append(kept_pairs(z, scale_F, maxima, start, lower_F=None, bound=running.add(maxima)))
        best, cut = largest_pairs(collect(parts, encoder_GFN), n_rows * k)
        lists.append(best)
        cuts.append(cut.to(encoder_GFN.dtype))
    z, features, offsets, _ = _code_of(x_BGN, encoder, lists)
    return z.relu(), features, offsets, torch.stack(cuts)


def encode_threshold(
    x_BGN: Tensor, center_GN: Tensor, encoder_GFN: Tensor, bias_GF: Tensor, scale_GF: Tensor | None,
    threshold_GF: Tensor, window: float, product: torch.dtype, working_GFN: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Values, global features, offsets and z of the pairs with score > threshold - window / 2 and z > 0.

    The value is relu(z) where the score is above the threshold itself, else 0.
    """
    n_groups = x_BGN.shape[1]
    encoder = _encoder(center_GN, encoder_GFN, bias_GF, product, working_GFN)
    lists = []
    for group in range(n_groups):
        scale_F, parts = _scale_of(scale_GF, group), []
        lower_F = (threshold_GF[group].to(torch.promote_types(product, torch.float32)) - window / 2).contiguous()
        bounds = group_bounds(lower_F)
        for start, _, z in encoder.slabs(x_BGN, group):
            if product == torch.float64:
                parts.append(kept_pairs_fp64(z, scale_F, start, lower_F))
            else:
                maxima = group_max(z, scale_F)
                parts.append(kept_pairs(z, scale_F, maxima, start, lower_F=lower_F, bound=bounds))
        lists.append(collect(parts, encoder_GFN))
    z, features, offsets, score = _code_of(x_BGN, encoder, lists)
    above = score > threshold_GF.reshape(-1)[features.long()].to(score.dtype)
    return torch.where(above, z.relu(), 0), features, offsets, z
