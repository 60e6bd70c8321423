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

SPREAD = 12
"""Pools that the tokens of a refill are dealt over."""


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

    Blocks come in a shuffled order, so many at a time (a refill). The tokens of a refill are dealt out at random over
    the next `spread` pools, and the tokens of a pool are shuffled among themselves, so that batches mix the tokens of a
    window of about `window_tokens`, which moves on by a refill a pool. Whoever stores all tokens and whoever harvests a
    refill when it is needed read the same tokens in the same order. Pool p takes from refills p to p + spread - 1, so
    the first pool, which takes all of refill 0, half of refill 1 and so on, is as well mixed as the others.

    count_B: how many tokens each block holds.
    """

    def __init__(self, count_B: Tensor, window_tokens: int) -> None:
        self.count_B = count_B.long()
        self.first_B = self.count_B.cumsum(0) - self.count_B
        self.n_tokens = int(self.count_B.sum())
        blocks = max(1, min(len(count_B), window_tokens // max(1, int(self.count_B.max()))))
        self.blocks_per_refill = -(-blocks // SPREAD)
        self.n_refills = -(-len(count_B) // self.blocks_per_refill)
        self.spread = min(-(-blocks // self.blocks_per_refill), self.n_refills)
        self._dealt = functools.lru_cache(maxsize=2 * SPREAD)(self._deal)
        self._ends = functools.lru_cache(maxsize=2)(self._count_ends)

    def __str__(self) -> str:
        return f"{self.blocks_per_refill} blocks a refill, spread over {self.spread}"

    def blocks(self, seed: int, epoch: int, refill: int) -> Tensor:
        """A refill's blocks, in the order in which they are harvested."""
        start = refill * self.blocks_per_refill
        return order_slice(len(self.count_B), start, start + self.blocks_per_refill, seed=seed, epoch=epoch)

    def shares(self, seed: int, epoch: int, refill: int) -> dict[int, Tensor]:
        """For each pool that takes from a refill, the places there of the tokens that it takes; not to be changed."""
        return self._dealt(seed, epoch, refill)

    def _deal(self, seed: int, epoch: int, refill: int) -> dict[int, Tensor]:
        n_tokens = int(self.count_B[self.blocks(seed, epoch, refill)].sum())
        order_T = torch.randperm(n_tokens, generator=seeded_generator("refill", seed, epoch, refill))
        pools = range(max(0, refill - self.spread + 1), refill + 1)
        return dict(zip(pools, order_T.tensor_split(len(pools)), strict=True))

    def refills(self, pool: int) -> range:
        """The refills that a pool takes from."""
        return range(pool, min(pool + self.spread, self.n_refills))

    def places(self, seed: int, epoch: int, pool: int) -> tuple[Tensor, ...]:
        """Where the tokens of each share of a pool stand in the pool's order."""
        sizes = [len(self.shares(seed, epoch, refill)[pool]) for refill in self.refills(pool)]
        return torch.randperm(sum(sizes), generator=seeded_generator("pool", seed, epoch, pool)).split(sizes)

    def stored(self, seed: int, epoch: int, pool: int) -> Tensor:
        """The stored numbers of a pool's tokens, in the pool's order."""
        places = self.places(seed, epoch, pool)
        number_T = torch.empty(sum(map(len, places)), dtype=torch.int64)
        for refill, place_t in zip(self.refills(pool), places, strict=True):
            blocks_b = self.blocks(seed, epoch, refill)
            number_T[place_t] = self._numbers(blocks_b)[self.shares(seed, epoch, refill)[pool]]
        return number_T

    def _numbers(self, blocks_b: Tensor) -> Tensor:
        count_b, first_b = self.count_B[blocks_b], self.first_B[blocks_b]
        within_T = torch.arange(int(count_b.sum())) - (count_b.cumsum(0) - count_b).repeat_interleave(count_b)
        return first_b.repeat_interleave(count_b) + within_T

    def pieces(self, start: int, stop: int, *, seed: int, epoch: int) -> Iterator[tuple[int, int, int]]:
        """Where tokens `start` to `stop` of the epoch lie: `(pool, start, stop)` within each pool's own order."""
        ends_P = self._ends(seed, epoch)
        while start < stop:
            pool = int(torch.searchsorted(ends_P, start, right=True))
            end = min(stop, int(ends_P[pool]))
            first = int(ends_P[pool - 1]) if pool else 0
            yield pool, start - first, end - first
            start = end

    def _count_ends(self, seed: int, epoch: int) -> Tensor:
        """How many tokens come before the end of each pool."""
        order_B = order_slice(len(self.count_B), seed=seed, epoch=epoch)
        size_P = torch.zeros(self.n_refills, dtype=torch.int64)
        for refill, part in enumerate(self.count_B[order_B].split(self.blocks_per_refill)):
            first = max(0, refill - self.spread + 1)
            n_tokens, n_pools = int(part.sum()), refill + 1 - first
            size_P[first : refill + 1] += n_tokens // n_pools
            size_P[first : first + n_tokens % n_pools] += 1  # as `Tensor.tensor_split` divides
        return size_P.cumsum(0)
