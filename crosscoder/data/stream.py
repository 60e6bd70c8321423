"""Activations harvested while they are used, and never stored."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from crosscoder.data.order import order_slice, seeded_generator
from crosscoder.data.residuals import (
    ResidualHarvester,
    estimate_scales,
    harvest_blocks,
    harvest_sample,
    kept_per_block,
    spread_blocks,
)
from crosscoder.data.sources import SiteKind, SiteSource, combine_fingerprints, select_sites
from crosscoder.data.tokens import TokenBlocks

BLOCKS_PER_REFILL = 256


class ActivationStream:
    """The activations of token blocks as `Activations`, harvested again whenever they are needed.

    An epoch visits the blocks in a shuffled order, `blocks_per_refill` at a time; the tokens of a refill are shuffled
    among themselves. `epoch_tokens` gives this order: a store of the same tokens, read in it, gives the same batches up
    to the rounding of the model's matrix products. Only the refill in use is kept: reading in order harvests each block
    once an epoch, and starting anywhere harvests one refill.

    max_tokens: how many tokens to read at least, in whole blocks spread evenly over all; None reads all.
    """

    def __init__(
        self,
        harvester: ResidualHarvester,
        tokens: TokenBlocks,
        *,
        blocks_per_refill: int = BLOCKS_PER_REFILL,
        max_tokens: int | None = None,
    ) -> None:
        for name, value in (("blocks_per_refill", blocks_per_refill), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self._harvester, self._tokens = harvester, tokens
        self._kept = kept_per_block(harvester, tokens)
        n_blocks = len(tokens) if max_tokens is None else min(len(tokens), -(-max_tokens // self._kept))
        self._blocks = spread_blocks(len(tokens), n_blocks)
        self._per_refill = min(blocks_per_refill, n_blocks)
        self._refill: tuple[tuple[int, int, int], Tensor] | None = None
        self.sites, self.n_tokens = harvester.sites, n_blocks * self._kept

    @functools.cached_property
    def _sample_TLD(self) -> Tensor:
        return harvest_sample(self._harvester, self._tokens)

    @property
    def d_model(self) -> int:
        return self._sample_TLD.shape[2]

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the model, the sites, the token policy, the tokens and their order."""
        order = f"{len(self._blocks)} blocks, {self._per_refill} a refill"
        return combine_fingerprints(self._harvester.fingerprint, self._tokens.fingerprint, order)

    @property
    def sequences_T(self) -> Tensor:
        return self._blocks.repeat_interleave(self._kept).int()

    @property
    def positions_T(self) -> Tensor:
        positions = torch.arange(self._harvester.skip_positions, self._tokens.sequence_length, dtype=torch.int32)
        return positions.repeat(len(self._blocks))

    def site_scale(self, kind: SiteKind) -> Tensor:
        return estimate_scales(select_sites(self._sample_TLD, self.sites, kind))

    def rows(self, start: int, stop: int) -> Tensor:
        first, last = start // self._kept, -(-stop // self._kept)
        x_TLD = self._harvest(torch.arange(first, last))
        return x_TLD[start - first * self._kept : stop - first * self._kept]

    def epoch_rows(self, start: int, stop: int, *, seed: int, epoch: int) -> Tensor:
        per_refill = self._per_refill * self._kept
        pieces = []
        while start < stop:
            refill, offset = divmod(start, per_refill)
            take = min(per_refill - offset, stop - start)
            pieces.append(self._refilled(seed, epoch, refill)[offset : offset + take])
            start += take
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def epoch_tokens(self, *, seed: int, epoch: int) -> Tensor:
        """The order of an epoch: for each of its tokens, its number in stored order; a pure function of both."""
        refills = []
        for refill in range(-(-len(self._blocks) // self._per_refill)):
            blocks, shuffle_T = self._refill_order(seed, epoch, refill)
            numbers_BS = blocks[:, None] * self._kept + torch.arange(self._kept)
            refills.append(numbers_BS.flatten()[shuffle_T])
        return torch.cat(refills)

    def _refill_order(self, seed: int, epoch: int, refill: int) -> tuple[Tensor, Tensor]:
        """Which blocks a refill harvests, and the order that their tokens are then read in."""
        start = refill * self._per_refill
        blocks = order_slice(len(self._blocks), start, start + self._per_refill, seed=seed, epoch=epoch)
        generator = seeded_generator("refill", seed, epoch, refill)
        return blocks, torch.randperm(len(blocks) * self._kept, generator=generator)

    def _refilled(self, seed: int, epoch: int, refill: int) -> Tensor:
        key = (seed, epoch, refill)
        if self._refill is None or self._refill[0] != key:
            self._refill = None  # the old one goes before the new one is made
            blocks, shuffle_T = self._refill_order(*key)
            x_TLD = self._harvest(blocks)
            self._refill = key, x_TLD[shuffle_T.to(x_TLD.device)]
        return self._refill[1]

    def _harvest(self, blocks: Tensor) -> Tensor:
        return torch.cat(list(harvest_blocks(self._harvester, self._tokens, self._blocks[blocks])))


def stream_source(
    model: nn.Module,
    tokens_folder: str | Path,
    *,
    kind: SiteKind = "residual",
    layers: tuple[int, ...] | None = None,
    reads: Literal["residual", "mlp"] = "residual",
    blocks_path: str | None = None,
    max_held_out_tokens: int | None = 50_000,
) -> SiteSource:
    """A model's activations on a folder of tokens (`train/` and `held_out/`), harvested as training goes.

    `layers`, `reads` and `blocks_path` are those of `ResidualHarvester`.
    """
    harvester = ResidualHarvester(model, layers=layers, reads=reads, blocks_path=blocks_path)
    train, held_out = (TokenBlocks.load(Path(tokens_folder) / split) for split in ("train", "held_out"))
    other = ActivationStream(harvester, held_out, max_tokens=max_held_out_tokens)
    return SiteSource(ActivationStream(harvester, train), other, kind)
