"""A source of planted tokens, drawn anew for every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from crosscoder.data.sources import EVALUATION_BATCH, Marked, Source


class PlantedSource(Source):
    """Tokens of a planted world, drawn when they are asked for.

    draw: `(n, stream, index) -> x_BLD`, scaled: batch number `index` of `n` tokens of a stream of random numbers, a
        pure function. Training batches are of the stream of their seed.
    held_out_stream: the stream of the held-out tokens; never train with it as seed.
    held_out_tokens: how many there are; the last batch may be smaller than the others.
    distinct_tokens: training reads as many tokens over and over; None: they never repeat.
    """

    def __init__(
        self,
        draw: Callable[[int, int | str, int], Tensor],
        *,
        scale_L: Tensor,
        d_model: int,
        held_out_stream: int | str,
        held_out_tokens: int,
        distinct_tokens: int | None = None,
    ) -> None:
        self._draw, self._stream, self._distinct = draw, held_out_stream, distinct_tokens
        self.n_layers, self.d_model, self.scale_L = len(scale_L), d_model, scale_L
        self.held_out_tokens = held_out_tokens

    def batch(self, index: int, size: int, seed: int) -> Tensor:
        if self._distinct is not None:
            index %= max(1, self._distinct // size)
        return self._draw(size, seed, index)

    def marked(self) -> Iterator[Marked]:
        for index, start in enumerate(range(0, self.held_out_tokens, EVALUATION_BATCH)):
            x_BLD = self._draw(min(EVALUATION_BATCH, self.held_out_tokens - start), self._stream, index)
            yield Marked.plain(x_BLD, torch.arange(start, start + len(x_BLD)))
