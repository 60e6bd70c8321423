"""The weights of dictionaries side by side: how they lie, and what a training step asks of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from crosscoder.dictionary.codec import Grouped
from crosscoder.dictionary.config import DictionaryConfig
from crosscoder.dictionary.shard import Shard
from crosscoder.dictionary.sparsity import BatchTopK
from crosscoder.foundation.ranks import ALONE, DataRanks, Ranks


class Layout(NamedTuple):
    """How weights `[*groups, F, *row]` lie: `groups` is `()` or `(G,)`, `row` `(L, D)` or `(D,)`.

    `rows_of_token` is `()` where a token is one row of the code, `(L,)` where each of its layers is.
    """

    groups: tuple[int, ...]
    row: tuple[int, ...]
    rows_of_token: tuple[int, ...]


class Weights(nn.Module, ABC):
    """The weights of G dictionaries side by side, and what a training step asks of them."""

    layer_axis: ClassVar[int]
    """The axis of the weights along which layers lie."""
    config: DictionaryConfig
    encoder: nn.Parameter
    decoder: nn.Parameter
    encoder_bias: nn.Parameter
    decoder_bias: nn.Parameter
    log_threshold: nn.Parameter | None
    read_mask: Tensor | None
    write_mask: Tensor | None
    threshold: Tensor
    shard: Shard | None = None
    """Which features or layers these are the weights of, where ranks hold a part each; None where they are of all."""

    @abstractmethod
    def grouped(self) -> Grouped:
        """The parameters as G dictionaries of width N, with 0 outside the masks."""

    @property
    def n_groups(self) -> int:
        """G, the dictionaries side by side that have weights of their own here."""
        return self.threshold.numel()

    @property
    def n_held(self) -> int:
        """The features of each dictionary whose weights are here: all, or this rank's."""
        return self.encoder_bias.shape[-1]

    @property
    def others(self) -> Shard | None:
        """The shard, where other ranks hold features of the same dictionaries or have other tokens; of a bank's layers
        one of all their features. None where this rank has all of both."""
        if self.shard is None or ((data := self.data).size == 1 and (self.shard.ranks.size == 1 or self.by_layer)):
            return None
        by_layers = self.shard.along == "layers"
        return Shard((self.n_held,), Ranks(data=data, job=data)) if by_layers else self.shard

    @property
    def data(self) -> DataRanks:
        """The ranks that hold the same weights and work on other tokens; this one alone without a mesh."""
        return ALONE if self.shard is None else self.shard.ranks.data

    @property
    def by_layer(self) -> Shard | None:
        """The shard, where other ranks hold other layers of a bank; None elsewhere."""
        is_whole = self.shard is None or self.shard.ranks.size == 1 or self.shard.along == "features"
        return None if is_whole else self.shard

    @property
    def n_groups_of_all(self) -> int:
        """The dictionaries side by side on all ranks, over which means are taken."""
        return self.n_groups if self.by_layer is None else self.by_layer.n_whole

    def of_all(self, part: Tensor) -> Tensor:
        """The sum of a number over the ranks that divide the dictionary; itself where it is whole."""
        return part if self.shard is None else self.shard.total(part)

    def of_tokens(self, part: Tensor) -> Tensor:
        """The sum in float64 of a number over the ranks that have other tokens of a batch; itself elsewhere."""
        return part if self.shard is None else self.shard.over_tokens(part)

    def of_layers(self, part: Tensor) -> Tensor:
        """The sum in float64 of a number over ranks that hold whole layers of a bank; itself elsewhere."""
        return part if self.by_layer is None else self.by_layer.total(part.double())

    def on_any(self, found: Tensor) -> bool:
        """Whether a truth value holds on any of the ranks that divide the dictionary."""
        return bool(found if self.shard is None else self.shard.ranks.largest(found.to(torch.uint8), "numbers"))

    def require_whole(self) -> None:
        """Refuse a use of all features where only some are here; a ValueError."""
        if self.shard is not None:
            raise ValueError(
                f"{self.shard.called} are here, the others on other ranks; take the whole dictionary (`gathered`, or "
                "the finished one from its folder)"
            )

    @torch.no_grad()
    def follow(self, cut_G: Tensor) -> None:
        """Move the inference threshold towards a training step's cut: the first counts whole, later 1 - momentum."""
        assert isinstance(self.config.sparsity, BatchTopK)
        cut_G = cut_G.to(self.threshold.dtype)
        mean_G = torch.lerp(cut_G, self.threshold, self.config.sparsity.momentum)
        self.threshold.copy_(torch.where(self.threshold.isnan(), cut_G, mean_G))


def masked(weight: Tensor, mask: Tensor | None) -> Tensor:
    """The weight with 0 where the mask is, itself where there is none."""
    return weight if mask is None else weight * mask


def unit_rows(rows: Tensor, *, n_axes: int, mask: Tensor | None) -> Tensor:
    """The rows, masked, with norm 1 over their last `n_axes` axes together, as a tensor of its own."""
    rows = masked(rows, mask)
    return rows / rows.norm(dim=tuple(range(-n_axes, 0)), keepdim=True)


OF_FEATURES = ("encoder", "decoder", "encoder_bias", "log_threshold")
"""The tensors that hold a row for each feature."""
