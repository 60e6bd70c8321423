"""Seeds and orders as pure functions: what is drawn depends on numbers and names alone, never on what came before.

No sampler has state: the order of any epoch and any batch follows from (seed, epoch) or (seed, index), so that a run
resumes anywhere without replaying what came before.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor


def seeded_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator that depends on `parts` only, so that streams for different purposes never meet."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@functools.lru_cache(maxsize=3)
def _order(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=seeded_generator("order", seed, epoch, n))


def order_slice(n: int, start: int = 0, stop: int | None = None, *, seed: int, epoch: int) -> Tensor:
    """Entries `start:stop` of a permutation of `range(n)`: int64, a pure function of (n, seed, epoch)."""
    return _order(n, seed, epoch)[start:stop].clone()


def epoch_spans(n: int, *, batch: int, index: int) -> list[tuple[int, int, int]]:
    """Where global batch number `index` lies in epochs of `n` items: `(epoch, start, stop)` pieces, in order.

    Epochs follow one another without a gap, so a batch may end one epoch and begin the next.
    """
    if n < 1 or batch < 1 or index < 0:
        raise ValueError(f"expected n >= 1, batch >= 1 and index >= 0, got n={n}, batch={batch}, index={index}")
    spans, position, end = [], index * batch, (index + 1) * batch
    while position < end:
        epoch, start = divmod(position, n)
        take = min(n - start, end - position)
        spans.append((epoch, start, start + take))
        position += take
    return spans


def batch_indices(n: int, *, batch: int, seed: int, index: int) -> Tensor:
    """Which of `n` items make up global batch number `index`, as int64 `[batch]`.

    A pure function of its arguments. Every epoch is a new permutation, and no item is left out of an epoch.
    """
    spans = epoch_spans(n, batch=batch, index=index)
    return torch.cat([_order(n, seed, epoch)[start:stop] for epoch, start, stop in spans])


class EpochOrder:
    """The order in which an epoch visits the tokens of blocks, a pure function of (seed, epoch).

    Blocks come in a shuffled order, so many at a time as hold about `tokens_per_refill` tokens (a refill); the tokens
    of a refill are shuffled among themselves. Whoever stores all tokens and whoever harvests a refill when it is needed
    read the same tokens in the same order.

    count_B: how many tokens each block holds.
    """

    def __init__(self, count_B: Tensor, tokens_per_refill: int) -> None:
        self.count_B = count_B.long()
        self.first_B = self.count_B.cumsum(0) - self.count_B
        self.n_tokens = int(self.count_B.sum())
        self.blocks_per_refill = max(1, tokens_per_refill // max(1, int(self.count_B.max())))
        self.refill = functools.lru_cache(maxsize=4)(self._refill)
        self._ends = functools.lru_cache(maxsize=2)(self._count_ends)

    def _refill(self, seed: int, epoch: int, refill: int) -> tuple[Tensor, Tensor]:
        """A refill's blocks in the order in which they are harvested, and the order of their tokens, as places there.

        Neither is to be changed: both are kept.
        """
        start = refill * self.blocks_per_refill
        blocks_b = order_slice(len(self.count_B), start, start + self.blocks_per_refill, seed=seed, epoch=epoch)
        n_tokens = int(self.count_B[blocks_b].sum())
        return blocks_b, torch.randperm(n_tokens, generator=seeded_generator("refill", seed, epoch, refill))

    @property
    def n_refills(self) -> int:
        """Refills in an epoch."""
        return -(-len(self.count_B) // self.blocks_per_refill)

    def stored(self, blocks_b: Tensor) -> Tensor:
        """The stored numbers of all tokens of some blocks."""
        count_b, first_b = self.count_B[blocks_b], self.first_B[blocks_b]
        within_T = torch.arange(int(count_b.sum())) - (count_b.cumsum(0) - count_b).repeat_interleave(count_b)
        return first_b.repeat_interleave(count_b) + within_T

    def pieces(self, start: int, stop: int, *, seed: int, epoch: int) -> Iterator[tuple[int, int, int]]:
        """Where tokens `start` to `stop` of the epoch lie: `(refill, start, stop)` within each refill's own order."""
        ends_R = self._ends(seed, epoch)
        while start < stop:
            refill = int(torch.searchsorted(ends_R, start, right=True))
            end = min(stop, int(ends_R[refill]))
            first = int(ends_R[refill - 1]) if refill else 0
            yield refill, start - first, end - first
            start = end

    def _count_ends(self, seed: int, epoch: int) -> Tensor:
        """How many tokens come before the end of each refill."""
        order_B = order_slice(len(self.count_B), seed=seed, epoch=epoch)
        return torch.stack([part.sum() for part in self.count_B[order_B].split(self.blocks_per_refill)]).cumsum(0)
