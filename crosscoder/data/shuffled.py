"""The null in which layers know nothing of each other: every layer's tokens in an order of its own.

Each layer keeps its vectors, so its own statistics stay exactly as they were; only which vectors stand side by side as
one token changes. Permuting within a batch does that well enough where batches are drawn from shuffled text, as in
training: two tokens of a batch are then two independent draws, and a permutation of B tokens leaves a layer's vector
beside its own in a share 1 / B of the cases, on average. Where batches follow the text, as held-out ones do, partners
come from the same stretch of text, so batches must be much longer than documents; whatever the topic of a stretch
shows in several layers stays, which makes the null larger and X smaller.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from crosscoder.foundation.order import seeded_generator


class BatchSource(Protocol):
    """What gives batches by number, such as a `SiteView`."""

    n_layers: int
    d_model: int
    n_tokens: int
    scale_L: Tensor

    def batch(self, index: int, batch_size: int, seed: int) -> Tensor: ...


def shuffle_layer_tokens(x_BLD: Tensor, generator: torch.Generator) -> Tensor:
    """`x_BLD` with each layer's B vectors in a random order of its own; the generator must be on the CPU."""
    n_tokens, n_layers = x_BLD.shape[:2]
    order_BL = torch.stack([torch.randperm(n_tokens, generator=generator) for _ in range(n_layers)], dim=1)
    return x_BLD[order_BL.to(x_BLD.device), torch.arange(n_layers, device=x_BLD.device)]


class ShuffledLayers:
    """A source's batches with each layer's tokens permuted within the batch; the same interface, so that it trains.

    Every batch is a pure function of (`seed`, index, batch_size, the order's seed). A token of a layer meets others in
    each epoch, so that no pairing can be learnt by heart.
    """

    def __init__(self, source: BatchSource, seed: int) -> None:
        self._source, self._seed = source, seed
        self.n_layers, self.d_model, self.n_tokens = source.n_layers, source.d_model, source.n_tokens
        self.scale_L = source.scale_L

    def batch(self, index: int, batch_size: int, seed: int) -> Tensor:
        """Scaled global batch number `index` of the source, shuffled."""
        generator = seeded_generator("shuffled layers", self._seed, seed, index)
        return shuffle_layer_tokens(self._source.batch(index, batch_size, seed), generator)


def shuffle_layers(source: BatchSource, seed: int) -> ShuffledLayers:
    """The shuffled null of a source of training batches."""
    return ShuffledLayers(source, seed)


def shuffle_stream(batches: Iterable[Tensor], seed: int) -> Iterator[Tensor]:
    """Batches `x_BLD` with each layer's tokens permuted within the batch, a function of (`seed`, position) alone."""
    for index, x_BLD in enumerate(batches):
        yield shuffle_layer_tokens(x_BLD, seeded_generator("shuffled stream", seed, index))
