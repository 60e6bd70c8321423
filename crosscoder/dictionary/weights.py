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
    """Which features these are the weights of, where ranks hold a part each; None where they are of all."""

    @abstractmethod
    def grouped(self) -> Grouped:
        """The parameters as G dictionaries of width N, with 0 outside the masks."""

    @property
    def n_groups(self) -> int:
        """G, the dictionaries side by side that have weights of their own."""
        return self.threshold.numel()

    @property
    def n_held(self) -> int:
        """The features of each dictionary whose weights are here: all, or this rank's."""
        return self.encoder_bias.shape[-1]

    @property
    def others(self) -> Shard | None:
        """The shard, where other ranks hold features; None where what is here can be taken for the whole."""
        return None if self.shard is None or self.shard.ranks.size == 1 else self.shard

    def of_all(self, part: Tensor) -> Tensor:
        """The sum of a number over the ranks that divide the features; itself where they are all here."""
        return part if self.shard is None else self.shard.total(part)

    def require_whole(self) -> None:
        """Refuse a use of all features where only some are here; a ValueError."""
        if self.shard is not None:
            raise ValueError(
                f"features {self.shard.start} to {self.shard.stop} of {self.config.n_features} are here, the others on "
                "other ranks; take the whole dictionary (`gathered`, or the finished one from its folder)"
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


def whole_tensors(weights: Weights) -> dict[str, Tensor]:
    """Every tensor by name, on the CPU; where ranks divide the features all call it, and rank 0 alone gets them."""
    axis, whole = weights.encoder_bias.dim() - 1, dict[str, Tensor]()
    for name, tensor in weights.state_dict().items():
        own = tensor.detach()
        found = weights.shard.whole(own, axis) if weights.shard is not None and name in OF_FEATURES else own
        if found is not None:
            whole[name] = found.cpu().contiguous()
    return whole
