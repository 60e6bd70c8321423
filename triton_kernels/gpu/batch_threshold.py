"""The exact cut of BatchTopK: the B * k largest positive scores of a batch that is never whole in memory.

Slab by slab, the B * k-th largest of all group maxima seen so far bounds the cut from below: the maxima are scores, and
a subset's B * k-th largest is not above the whole's. `RunningBound` keeps that number as a histogram of the upper 16
bits of the keys (the lower edge of its bin, so one bf16 step loose), and only pairs at or above it are written down.
With n slabs of equal size about B * k * (1 + 1/2 + ... + 1/n) survive. `largest_pairs` then finds the cut among the
survivors by the same histogram, first of the upper, then of the lower 16 bits, and gives equal scores to the lowest
(row, column).

Counts are added by integer atomics, so no order matters. A positive score's key is its fp32 bits. `COPIES` histograms
share the atomics, because the keys of like scores are neighbours in memory.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from triton_kernels.gpu import tiles
from triton_kernels.pairs import Pairs

HIGH_BINS, LOW_BINS = 2**15, 2**16
COPIES = 32


@tiles.jit
def digit_histogram_kernel(
    key_ptr, bound_ptr, counts_ptr, n_keys,
    LOW: tl.constexpr, BINS: tl.constexpr, COPIES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Counts keys of at least `bound` by their upper digit; LOW: keys with the upper digit `bound`, by the lower."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    key = tl.load(key_ptr + place, mask=place < n_keys, other=-1).to(tl.int32)
    if key_ptr.dtype.element_ty == tl.int16:
        key = key << 16  # exact for a positive score, and a negative one stays negative
    bound = tl.load(bound_ptr)
    if LOW:
        counted, digit = (key >> 16) == bound, key & 0xFFFF
    else:
        counted, digit = key >= bound, key >> 16
    counted = counted & (key > 0)
    copy = (tl.program_id(0) % COPIES) * BINS
    tl.atomic_add(counts_ptr + copy + digit, 1, mask=counted, sem="relaxed")


def _count(keys: Tensor, bound: Tensor, counts: Tensor, low: bool) -> None:
    n_keys = keys.numel()
    tile = tiles.histogram_tile(n_keys)
    digit_histogram_kernel[(tiles.tile_count(n_keys, tile),)](
        keys, bound, counts, n_keys, LOW=low, BINS=counts.shape[1], COPIES=counts.shape[0], TILE=tile, num_warps=4
    )


def _digit_of(counts: Tensor, wanted: int | Tensor) -> tuple[Tensor, Tensor]:
    """The digit in which the `wanted`-th largest key lies (-1: there are fewer), and how many keys lie above it."""
    total = counts.sum(0, dtype=torch.int64)
    at_least = total.flip(0).cumsum(0).flip(0)
    digit = (at_least >= wanted).sum() - 1
    here = digit.clamp(min=0)
    return digit, at_least[here] - total[here]


class RunningBound:
    """A lower bound of the `wanted`-th largest score, as an int32 key, from the group maxima of the slabs so far."""

    def __init__(self, wanted: int, device: torch.device) -> None:
        self.wanted = wanted
        self.bound = torch.ones(1, dtype=torch.int32, device=device)  # the least positive score
        self._counts = torch.zeros(COPIES, HIGH_BINS, dtype=torch.int32, device=device)

    def add(self, maxima: Tensor) -> Tensor:
        """The bound after the slab with these group maxima."""
        # Maxima under the bound cannot raise it: every bin above it is complete without them.
        _count(maxima, self.bound, self._counts, low=False)
        digit, _ = _digit_of(self._counts, self.wanted)
        self.bound = torch.maximum(self.bound, digit.to(torch.int32) << 16)
        return self.bound


def largest_pairs(pairs: Pairs, wanted: int) -> tuple[Pairs, Tensor]:
    """The `wanted` pairs of largest (positive) score, in their order, and the least score among them.

    Equal scores go to the first pair. The least score is 0 where there is no pair. fp64 takes a stable `torch.sort`.
    """
    score = pairs.score
    if score.numel() <= wanted:
        return pairs, score.amin() if score.numel() else score.new_zeros(())
    if wanted == 0:
        return pairs.only(torch.arange(0, device=score.device)), score.new_zeros(())
    if score.dtype == torch.float64:
        places = torch.sort(score, descending=True, stable=True).indices[:wanted]
        return pairs.only(places.sort().values), score[places[-1]]
    keys = score.contiguous().view(torch.int32)
    counts = torch.zeros(COPIES, HIGH_BINS, dtype=torch.int32, device=score.device)
    _count(keys, torch.ones(1, dtype=torch.int32, device=score.device), counts, low=False)
    high, above = _digit_of(counts, wanted)
    counts = torch.zeros(COPIES, LOW_BINS, dtype=torch.int32, device=score.device)
    _count(keys, high.to(torch.int32), counts, low=True)
    low, above_low = _digit_of(counts, wanted - above)
    cut = ((high << 16) | low).to(torch.int32)
    equal = keys == cut
    keep = (keys > cut) | (equal & (equal.cumsum(0) <= wanted - above - above_low))
    # The place of the i-th kept pair is the first with i kept up to it; unlike nonzero this needs no sync.
    order = torch.arange(1, wanted + 1, device=score.device)
    return pairs.only(torch.searchsorted(keep.cumsum(0), order)), cut.view(torch.float32)
