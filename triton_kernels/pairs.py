"""The pairs that an encoder keeps, with their scores: of a slab of rows, of a dictionary, of several dictionaries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from triton_kernels.reference import starts


class Pairs(NamedTuple):
    """Kept pairs as CSR."""

    z: Tensor
    score: Tensor  # z, times the scale where there is one
    features: Tensor  # int32, ascending within a row
    offsets: Tensor  # [R + 1], int64

    def only(self, kept: Tensor) -> Pairs:
        """Those at the positions `kept`, which ascend."""
        offsets = torch.searchsorted(kept, self.offsets)
        return Pairs(self.z[kept], self.score[kept], self.features[kept], offsets)


def above(z_RF: Tensor, scale_F: Tensor | None, bound_F: Tensor | float, least: float) -> Pairs:
    """The pairs with score > bound and z > least, by stock torch operators."""
    n_rows, n_features = z_RF.shape
    score_RF = z_RF if scale_F is None else z_RF * scale_F
    place = ((score_RF > bound_F) & (z_RF > least)).view(-1).nonzero().squeeze(1)
    offsets = torch.searchsorted(place, torch.arange(n_rows + 1, device=place.device) * n_features)
    columns = (place % max(1, n_features)).to(torch.int32)
    return Pairs(z_RF.view(-1)[place], score_RF.view(-1)[place], columns, offsets)


def stacked(slabs: list[Pairs], like: Tensor) -> Pairs:
    """The pairs of successive slabs of rows as one code; `like` gives dtype and device where there is no slab."""
    if not slabs:
        empty = like.new_empty(0)
        return Pairs(empty, empty, empty.to(torch.int32), empty.new_zeros(1, dtype=torch.int64))
    if len(slabs) == 1:
        return slabs[0]
    z, score, features = (torch.cat(column) for column in list(zip(*slabs, strict=True))[:3])
    return Pairs(z, score, features, starts(torch.cat([slab.offsets.diff() for slab in slabs])))


def joined_sets(parts: list[Pairs], n_inputs: int, n_features: int) -> Pairs:
    """The pairs of dictionaries as one code, set after set of `n_inputs` of them; see `joined`."""
    if len(parts) == n_inputs:
        return joined(parts, n_features)
    sets = [joined(parts[first : first + n_inputs], n_features) for first in range(0, len(parts), n_inputs)]
    shifted = [one._replace(features=one.features + s * n_inputs * n_features) for s, one in enumerate(sets)]
    return stacked(shifted, parts[0].z)


def joined(parts: list[Pairs], n_features: int) -> Pairs:
    """The pairs of G dictionaries as one code, in which row b of dictionary g is row b * G + g."""
    if len(parts) == 1:
        return parts[0]
    z, score = torch.cat([part.z for part in parts]), torch.cat([part.score for part in parts])
    features = torch.cat([part.features + group * n_features for group, part in enumerate(parts)])
    counts = torch.stack([part.offsets.diff() for part in parts], dim=1).flatten()
    begins = torch.stack([part.offsets[:-1] for part in parts], dim=1)
    begins = begins + starts(torch.stack([part.offsets[-1] for part in parts]))[:-1]
    offsets = starts(counts)
    shifts = (begins.flatten() - offsets[:-1]).repeat_interleave(counts, output_size=z.numel())
    order = torch.arange(z.numel(), device=z.device) + shifts
    return Pairs(z[order], score[order], features[order], offsets)
