"""Seeds and orders as pure functions: what is drawn depends on numbers and names alone, never on what came before.

No sampler has state: the order of any epoch and any batch follows from (seed, epoch) or (seed, index), so that a run
resumes anywhere without replaying what came before.
"""

from __future__ import annotations

import functools
import hashlib

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
