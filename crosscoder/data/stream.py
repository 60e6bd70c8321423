"""Activations harvested while they are used, and never stored."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from crosscoder.data.order import order_slice, seeded_generator
from crosscoder.data.residuals import ResidualHarvester, estimate_scales, harvest_blocks
from crosscoder.data.sources import SiteKind, SiteSource, combine_fingerprints, select_sites
from crosscoder.data.tokens import TokenBlocks

BLOCKS_PER_REFILL = 256
SCALE_BLOCKS = 128


class ActivationStream:
    """The activations of token blocks as `Activations`, harvested again whenever they are needed.

    An epoch visits the blocks in a shuffled order, `blocks_per_refill` at a time; the tokens of a refill are shuffled
    among themselves. A store of the same tokens holds the same activations up to the rounding of the model's matrix
    products. Only the refill in use is kept: reading in order harvests each block once an epoch, and starting anywhere
    harvests one refill.

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
        self.harvester, self.tokens = harvester, tokens
        self.kept = tokens.sequence_length - harvester.skip_positions
        if self.kept < 1:
            raise ValueError(f"skipping {harvester.skip_positions} of {tokens.sequence_length} tokens leaves nothing")
        n_blocks = len(tokens) if max_tokens is None else min(len(tokens), -(-max_tokens // self.kept))
        self.blocks = torch.linspace(0, len(tokens) - 1, n_blocks, dtype=torch.float64).round().long()
        self._per_refill = min(blocks_per_refill, n_blocks)
        self._refill: tuple[tuple[int, int, int], Tensor] | None = None
        self.sites, self.n_tokens = harvester.sites, n_blocks * self.kept

    @functools.cached_property
    def sample_TLD(self) -> Tensor:
        """Activations of up to 128 blocks spread evenly over the text, for estimating scales."""
        spread = torch.linspace(0, len(self.tokens) - 1, min(SCALE_BLOCKS, len(self.tokens))).round().long()
        return torch.cat(list(harvest_blocks(self.harvester, self.tokens, spread)))

    @property
    def d_model(self) -> int:
        return self.sample_TLD.shape[2]

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the model, the sites, the token policy, the tokens and their order."""
        order = f"{len(self.blocks)} blocks, {self._per_refill} a refill"
        return combine_fingerprints(self.harvester.fingerprint, self.tokens.fingerprint, order)

    @property
    def sequences_T(self) -> Tensor:
        return self.blocks.repeat_interleave(self.kept).int()

    @property
    def positions_T(self) -> Tensor:
        positions = torch.arange(self.harvester.skip_positions, self.tokens.sequence_length, dtype=torch.int32)
        return positions.repeat(len(self.blocks))

    def site_scale(self, kind: SiteKind) -> Tensor:
        return estimate_scales(select_sites(self.sample_TLD, self.sites, kind))

    def rows(self, start: int, stop: int) -> Tensor:
        first, last = start // self.kept, -(-stop // self.kept)
        x_TLD = self._harvest(torch.arange(first, last))
        return x_TLD[start - first * self.kept : stop - first * self.kept]

    def epoch_rows(self, start: int, stop: int, *, seed: int, epoch: int) -> Tensor:
        per_refill = self._per_refill * self.kept
        pieces = []
        while start < stop:
            refill, offset = divmod(start, per_refill)
            take = min(per_refill - offset, stop - start)
            pieces.append(self._refilled(seed, epoch, refill)[offset : offset + take])
            start += take
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _refilled(self, seed: int, epoch: int, refill: int) -> Tensor:
        """The tokens of one refill in the order in which they are read."""
        key = (seed, epoch, refill)
        if self._refill is None or self._refill[0] != key:
            self._refill = None  # the old one goes before the new one is made
            start = refill * self._per_refill
            numbers = order_slice(len(self.blocks), start, start + self._per_refill, seed=seed, epoch=epoch)
            order_T = torch.randperm(len(numbers) * self.kept, generator=seeded_generator("refill", *key))
            x_TLD = self._harvest(numbers)
            self._refill = key, x_TLD[order_T.to(x_TLD.device)]
        return self._refill[1]

    def _harvest(self, numbers: Tensor) -> Tensor:
        return torch.cat(list(harvest_blocks(self.harvester, self.tokens, self.blocks[numbers])))


def stream_source(
    model: nn.Module,
    tokens_folder: str | Path,
    *,
    kind: SiteKind = "residual",
    layers: tuple[int, ...] | None = None,
    reads: Literal["residual", "mlp"] = "residual",
    blocks_path: str | None = None,
    mlp_path: str | None = None,
    max_held_out_tokens: int | None = 50_000,
) -> SiteSource:
    """A model's activations on a folder of tokens (`train/` and `held_out/`), harvested as training goes.

    `layers`, `reads`, `blocks_path` and `mlp_path` are those of `ResidualHarvester`.
    """
    harvester = ResidualHarvester(model, layers=layers, reads=reads, blocks_path=blocks_path, mlp_path=mlp_path)
    train, held_out = (TokenBlocks.load(Path(tokens_folder) / split) for split in ("train", "held_out"))
    other = ActivationStream(harvester, held_out, max_tokens=max_held_out_tokens)
    return SiteSource(ActivationStream(harvester, train), other, kind)
