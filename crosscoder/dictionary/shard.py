"""A dictionary that is divided over ranks, each of which holds, decodes and trains its own part.

By features: what is whole on every rank is the batch, `decoder_bias`, the inference threshold, the reconstruction. What
crosses over: the scores at which the choice is cut (`choice`), the sum of the partial reconstructions, and sums of a
few numbers. By layers, which a bank alone has apart: nothing but those sums.

In a mesh (`Ranks.mesh`) several groups of ranks do so, each for its share of a batch's tokens; between them cross over
the gradients, the choice over the batch, which features were active, and sums of a few numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from crosscoder.dictionary.choice import keep_batch_top_k, keep_top_k
from crosscoder.foundation.ranks import Ranks

PIECE = 2**22
"""Numbers that are drawn, or sent to rank 0, at once."""
RECONSTRUCTION = "reconstruction"
CENTER = "center"
GRADIENTS = "gradients"
FIRING = "firing"
Along = Literal["features", "layers"]


@dataclass(frozen=True, eq=False)
class Shard:
    """Features `start` to `stop` of each dictionary side by side: rows of encoder, decoder, biases and thresholds.

    stops: where the shards of all ranks end, in their order; they lie one after the other and make up all features.
    ranks: who holds them; alone by default, never all processes that there are. In a mesh they are one of its groups.
    along: `layers` where the numbers are those of a bank's layers instead, and a rank holds all features of its own.
    """

    stops: tuple[int, ...]
    ranks: Ranks
    along: Along = "features"

    @classmethod
    def of(cls, n: int, ranks: Ranks | None = None, along: Along = "features") -> Shard:
        """This rank's part of n features or layers, divided evenly; the first ranks hold one more where that must be.

        Raises:
            ValueError: there are more ranks than that.
        """
        ranks = ranks or Ranks()
        if n < ranks.size:
            raise ValueError(f"{n} {along} are divided over {ranks.size} ranks; start fewer processes")
        sizes = [n // ranks.size + (one < n % ranks.size) for one in range(ranks.size)]
        return cls(tuple(sum(sizes[: one + 1]) for one in range(ranks.size)), ranks, along)

    def __deepcopy__(self, _: dict[int, Any]) -> Shard:
        return self  # a group of processes is no value

    @property
    def start(self) -> int:
        """The first feature or layer that this rank holds."""
        return self.bounds(self.ranks.rank)[0]

    @property
    def stop(self) -> int:
        """The first one after those that this rank holds."""
        return self.stops[self.ranks.rank]

    @property
    def n_own(self) -> int:
        """How many this rank holds."""
        return self.stop - self.start

    @property
    def n_whole(self) -> int:
        """How many all ranks hold."""
        return self.stops[-1]

    @property
    def called(self) -> str:
        """What this rank holds, for people."""
        return f"{self.along} {self.start} to {self.stop} of {self.n_whole}"

    @property
    def mesh(self) -> dict[str, int]:
        """Over how many ranks what is divided, as `run.json` says it."""
        n_data = self.ranks.data.size
        return {self.along: self.ranks.size} | ({"data": n_data} if n_data > 1 else {})

    def bounds(self, rank: int) -> tuple[int, int]:
        """The first feature or layer of a rank, and the first after its own."""
        return (self.stops[rank - 1] if rank else 0), self.stops[rank]

    @property
    def widest(self) -> int:
        """The most that a rank holds."""
        return max(stop - start for start, stop in map(self.bounds, range(self.ranks.size)))

    def require(self, n_features: int, groups: tuple[int, ...]) -> None:
        """Refuse a dictionary of another size, or one whose layers do not lie side by side (`groups`); a ValueError."""
        there = n_features if self.along == "features" else math.prod(groups or (0,))
        if self.n_whole != there:
            kind = "features" if self.along == "features" else "layers that have weights of their own"
            raise ValueError(f"shards make up {self.n_whole} {self.along}; the dictionary has {there} {kind}")

    def axis(self, n_groups_axes: int) -> int:
        """The axis along which a tensor is divided that has so many axes of dictionaries before that of features."""
        return n_groups_axes if self.along == "features" else 0

    def drawn(self, shape: list[int], axis: int, generator: torch.Generator) -> Tensor:
        """This rank's part of `torch.randn(shape, generator=generator)`, to the bit, drawn a piece at a time.

        It is divided along `axis`, 0 or 1. Pieces are whole runs of 16, which is how many torch draws at once.
        """
        n_groups, row = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        total, n_own = math.prod(shape), self.n_own * row
        own, begin = torch.empty(n_groups, n_own), 0
        while begin < total:
            end = total if total - begin < PIECE + 16 else begin + PIECE
            piece = torch.randn(end - begin, generator=generator)
            for group in range(n_groups):
                first = (group * shape[axis] + self.start) * row
                a, b = max(begin, first), min(end, first + n_own)
                if a < b:
                    own[group, a - first : b - first] = piece[a - begin : b - begin]
            begin = end
        return own.view(self.own_shape(shape, axis))

    def own_shape(self, shape: Sequence[int], axis: int) -> tuple[int, ...]:
        """The shape of this rank's part."""
        return (*shape[:axis], self.n_own, *shape[axis + 1 :])

    def part(self, whole: Tensor, axis: int) -> Tensor:
        """This rank's part of a whole tensor, in memory of its own."""
        return whole.narrow(axis, self.start, self.n_own).clone()

    def blocks(self, part: Tensor, axis: int) -> Iterator[Tensor]:
        """The numbers of the whole tensor on rank 0, in their order, some at a time; nothing elsewhere.

        All ranks use it up, at the same place among those of other tensors. The next ones take the memory of the last.
        """
        if not self.ranks.data.is_first:
            return  # others hold the same
        width = math.prod(part.shape[axis + 1 :])
        taken = part.new_empty(min(PIECE, self.widest * width) if self.ranks.is_first else 0)
        for own in part.reshape(math.prod(part.shape[:axis]), self.n_own * width):
            for rank, (start, stop) in enumerate(map(self.bounds, range(self.ranks.size))):
                n_there = (stop - start) * width
                for begin in range(0, n_there, PIECE):
                    end = min(begin + PIECE, n_there)
                    if not self.ranks.is_first:
                        if rank == self.ranks.rank:
                            self.ranks.give(own[begin:end])
                    elif rank == 0:
                        yield own[begin:end]
                    else:
                        yield self.ranks.take(taken[: end - begin], rank)

    def keep_top_k(self, score_RC: Tensor, k: int) -> Tensor:
        """See `choice.keep_top_k`; candidates are the best min(k, features) of each rank."""
        if self.ranks.size == 1:
            return torch.ones_like(score_RC, dtype=torch.bool)
        return keep_top_k(score_RC, k, min(k, self.widest), self.ranks)

    def keep_batch_top_k(self, score_P: Tensor, offsets: Tensor, n_groups: int, wanted: int) -> tuple[Tensor, Tensor]:
        """See `choice.keep_batch_top_k`; candidates are the best of a row `most_of_row` on average."""
        return keep_batch_top_k(score_P, offsets, n_groups, wanted, self.ranks)

    def most_of_row(self, k: int) -> int:
        """How many a row could have on average here, where it has k over the tokens of all ranks."""
        data = self.ranks.data
        return k if data.size == 1 else -(-k * data.n_tokens // max(1, data.n_own))

    def add_reconstruction(self, part: Tensor) -> Tensor:
        """The reconstruction of all ranks' features from that of its own, in place."""
        return self.ranks.add(part, RECONSTRUCTION)

    def add_center(self, part: Tensor) -> Tensor:
        """The gradient to the centre by way of all ranks' encoders, in place."""
        return self.ranks.add(part, CENTER)

    def total(self, part: Tensor, what: str = "numbers") -> Tensor:
        """The sum of what each rank has of it; every rank then goes on alike, so that its gradient is its part's."""
        return part if self.ranks.size == 1 else _Total.apply(part, self.ranks, what)

    def over_tokens(self, part: Tensor, what: str = "numbers") -> Tensor:
        """`total` over the ranks that hold the same for other tokens, in float64."""
        data = self.ranks.data
        return part if data.size == 1 else _Total.apply(part.double(), data, what).to(part.dtype)

    def add_once(self, part: Tensor, what: str) -> Tensor:
        """The sum over the parts, in place, of what ranks that hold the same have alike; the same bits on all ranks."""
        if self.ranks.size == 1:
            return part
        return self.ranks.job.add(part if self.ranks.data.is_first else part.zero_(), what)

    def of_all(self, whole: Tensor) -> Tensor:
        """A tensor that every rank holds whole; each rank's use of it gives a part of its gradient."""
        return whole if self.ranks.size == 1 else _OfAll.apply(whole, self.ranks)


class _Total(torch.autograd.Function):
    """Forward a sum over ranks, backward nothing."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks, what: str) -> Tensor:
        return ranks.add(part.clone(), what)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient[0], None, None


class _OfAll(torch.autograd.Function):
    """Forward nothing, backward a sum over ranks."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.ranks.add(gradient[0].clone(), CENTER), None
