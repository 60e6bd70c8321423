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

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from triton_kernels.arguments import Encoding
from triton_kernels.gpu.batch_threshold import RunningBound, largest_pairs
from triton_kernels.gpu.gather_dot import gather_dot
from triton_kernels.gpu.group_max import group_max
from triton_kernels.gpu.select_threshold import group_bounds, kept_pairs
from triton_kernels.gpu.select_topk import select_top_k
from triton_kernels.pairs import Pairs, above, joined_sets, stacked

SLAB_BYTES = 256 * 2**20


def _slabs(encoding: Encoding, working_FN: Tensor, group: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """First row, centred rows and scores of one dictionary's slabs of rows; the next slab overwrites the scores."""
    (n_rows, n_inputs, _), n_features, dtype = encoding.x_BGN.shape, working_FN.shape[0], encoding.product
    step = max(1, min(n_rows, SLAB_BYTES // (n_features * dtype.itemsize)))
    slab = torch.empty(step if n_rows else 0, n_features, dtype=dtype, device=working_FN.device)
    bias_F = encoding.bias_GF[group].to(dtype)
    for start in range(0, n_rows, step):
        centred_RN = encoding.x_BGN[start : start + step, group % n_inputs] - encoding.center_GN[group]
        z_RF = slab[: centred_RN.shape[0]]
        torch.addmm(bias_F, centred_RN.to(dtype), working_FN.t(), out=z_RF)
        yield start, centred_RN, z_RF


def _rescored(encoding: Encoding, centred_RN: Tensor, features_P: Tensor, offsets: Tensor) -> Tensor:
    """z of the given pairs in the encoder's own dtype."""
    table_FN = encoding.encoder_GFN.reshape(-1, encoding.encoder_GFN.shape[2])
    z_P = gather_dot(centred_RN.to(table_FN.dtype).contiguous(), features_P, offsets, table_FN)
    return z_P + encoding.bias_GF.reshape(-1)[features_P.long()]


def _dictionaries(encoding: Encoding) -> Iterator[tuple[Tensor | None, Iterator[tuple[int, Tensor, Tensor]]]]:
    """The scale and the slabs of one dictionary after the other."""
    working_GFN = encoding.encoder_GFN.to(encoding.product) if encoding.working_GFN is None else encoding.working_GFN
    for group, working_FN in enumerate(working_GFN):
        scale_F = None if encoding.scale_GF is None else encoding.scale_GF[group].contiguous()
        yield scale_F, _slabs(encoding, working_FN, group)


def encode_top_k(encoding: Encoding, k_G: Sequence[int]) -> tuple[Tensor, Tensor]:
    """z and features of `reference.encode_top_k`, k of each dictionary."""
    (n_rows, n_inputs, _), device = encoding.x_BGN.shape, encoding.x_BGN.device
    n_features, dtype = encoding.encoder_GFN.shape[1], encoding.encoder_GFN.dtype
    z_P = torch.empty(n_rows * sum(k_G), dtype=dtype, device=device)
    features_P = torch.empty_like(z_P, dtype=torch.int32)
    for group, (scale_F, slabs) in enumerate(_dictionaries(encoding)):
        k, first = k_G[group], group // n_inputs * n_inputs
        before, width = sum(k_G[first:group]), sum(k_G[first : first + n_inputs])  # columns of a row of the set
        own_set = slice(n_rows * sum(k_G[:first]), n_rows * sum(k_G[: first + n_inputs]))
        for start, centred_RN, z_RF in slabs:
            rows, own = slice(start, start + z_RF.shape[0]), slice(before, before + k)
            z_RK, features_RK = (one[own_set].view(n_rows, width)[rows, own] for one in (z_P, features_P))
            chosen_RK = torch.empty(z_RK.shape, dtype=encoding.product, device=device) if encoding.is_rounded else z_RK
            select_top_k(z_RF, scale_F, k, group * n_features, chosen_RK, features_RK)
            if encoding.is_rounded:
                offsets = torch.arange(0, z_RK.numel() + 1, k, device=device)
                z_RK.copy_(_rescored(encoding, centred_RN, features_RK.reshape(-1), offsets).view(-1, k))
    return z_P, features_P


def _kept(z_RF: Tensor, scale_F: Tensor | None, lower_F: Tensor | None, bound: Tensor | RunningBound) -> Pairs:
    """The pairs of a slab above `lower_F`, whose groups have `bound`, or those above the running bound of the batch."""
    if z_RF.dtype == torch.float64:
        return above(z_RF, scale_F, 0.0, -torch.inf) if lower_F is None else above(z_RF, scale_F, lower_F, 0.0)
    maxima = group_max(z_RF, scale_F)
    bound = bound.add(maxima) if isinstance(bound, RunningBound) else bound
    return kept_pairs(z_RF, scale_F, maxima, lower_F=lower_F, bound=bound)


def _code_of(encoding: Encoding, parts: list[Pairs]) -> Pairs:
    """The pairs of all dictionaries, with z in the encoder's dtype."""
    pairs = joined_sets(parts, encoding.x_BGN.shape[1], encoding.encoder_GFN.shape[1])
    if not encoding.is_rounded:
        return pairs
    center_SGN = encoding.center_GN.view(-1, *encoding.x_BGN.shape[1:])
    centred_RN = (encoding.x_BGN - center_SGN[:, None]).flatten(0, 2)
    return pairs._replace(z=_rescored(encoding, centred_RN, pairs.features, pairs.offsets))


def encode_batch_top_k(encoding: Encoding, k_G: Sequence[int]) -> tuple[Pairs, Tensor]:
    """Pairs and cut of `reference.encode_batch_top_k`; the cut is one of the scores that chose."""
    parts, cuts = [], []
    for k, (scale_F, slabs) in zip(k_G, _dictionaries(encoding), strict=True):
        wanted = encoding.x_BGN.shape[0] * k
        running = RunningBound(wanted, encoding.x_BGN.device)
        kept = [_kept(z_RF, scale_F, None, running) for _, _, z_RF in slabs]
        best, cut = largest_pairs(stacked(kept, encoding.encoder_GFN), wanted)
        parts.append(best)
        cuts.append(cut.to(encoding.encoder_GFN.dtype))
    return _code_of(encoding, parts), torch.stack(cuts)


def encode_threshold(encoding: Encoding, threshold_GF: Tensor, window: float) -> Pairs:
    """Pairs of `reference.encode_threshold`."""
    wide = torch.promote_types(encoding.product, torch.float32)
    lower_GF, parts = threshold_GF.to(wide).sub(window / 2).contiguous(), []
    for lower_F, (scale_F, slabs) in zip(lower_GF, _dictionaries(encoding), strict=True):
        bounds = group_bounds(lower_F)
        kept = [_kept(z_RF, scale_F, lower_F, bounds) for _, _, z_RF in slabs]
        parts.append(stacked(kept, encoding.encoder_GFN))
    return _code_of(encoding, parts)
