"""Activations as batches, harvested again when needed or read from a store, behind one interface.

Unusual here: a source has no cursor. `batch(index, batch_size, seed)` is a pure function, so the whole data
state of a run is the number of the next batch, and any batch can be asked for first. Every layer of a token
travels together.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from typing import Literal, Protocol

import torch
from torch import Tensor

from crosscoder.data.residuals import ResidualHarvester, block_writes, estimate_scales
from crosscoder.data.tokens import TokenBlocks
from crosscoder.foundation.order import epoch_spans, order_slice, seeded_generator

SiteKind = Literal["residual", "write"]
SCALE_SEQUENCES = 128
HARVEST_TOKENS = 4096


class ActivationSource(Protocol):
    """What a trainer and an evaluation need of activations."""

    n_tokens: int
    """Tokens in one epoch."""
    n_layers: int
    d_model: int
    scale_L: Tensor
    """Multiplied into every batch, so that the usual norm of each layer is sqrt(D)."""
    fingerprint: str
    sites: tuple[int, ...]

    def epoch_rows(self, start: int, stop: int, *, seed: int, epoch: int) -> Tensor:
        """Tokens `start` to `stop` of the shuffled epoch, float32 `[t, L, D]`, not scaled."""
        ...

    def batches(self, batch_size: int, *, seed: int, epoch: int = 0, start: int = 0) -> Iterator[Tensor]:
        """One epoch as scaled float32 `x_BLD` from its batch `start` on; the last may be smaller."""
        ...

    def batch(self, index: int, batch_size: int, seed: int) -> Tensor:
        """Scaled global batch number `index`, always full: epochs follow one another without a gap."""
        ...


def epoch_batches(source: ActivationSource, batch_size: int, *, seed: int, epoch: int, start: int) -> Iterator[Tensor]:
    """One epoch of `source`, every token once; what its `batches` yields."""
    if batch_size < 1 or start < 0:
        raise ValueError(f"expected batch_size >= 1 and start >= 0, got {batch_size} and {start}")
    for first in range(start * batch_size, source.n_tokens, batch_size):
        last = min(first + batch_size, source.n_tokens)
        x_BLD = source.epoch_rows(first, last, seed=seed, epoch=epoch)
        yield x_BLD * source.scale_L[:, None]


def global_batch(source: ActivationSource, index: int, batch_size: int, seed: int) -> Tensor:
    """Batch number `index` of the endless run of epochs; what a source's `batch` returns."""
    spans = epoch_spans(source.n_tokens, batch=batch_size, index=index)
    pieces = [source.epoch_rows(start, stop, seed=seed, epoch=epoch) for epoch, start, stop in spans]
    x_BLD = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return x_BLD * source.scale_L[:, None]


class ReplayableBuffer:
    """Activations of token blocks, harvested as they are needed and never stored.

    Refill r of an epoch covers sequences `[r * m, (r + 1) * m)` of the epoch's order (m =
    `sequences_per_refill`), its tokens shuffled by a generator of (seed, epoch, r).
    Only the refill in use is kept: reading in order harvests each sequence once an epoch, and starting
    anywhere harvests one refill.
    """

    def __init__(
        self,
        harvester: ResidualHarvester,
        tokens: TokenBlocks,
        *,
        sequences_per_refill: int = 256,
        scale_L: Tensor | None = None,
    ) -> None:
        if sequences_per_refill < 1:
            raise ValueError(f"sequences_per_refill is {sequences_per_refill}, expected at least 1")
        self._harvester, self._tokens = harvester, tokens
        self._per_refill = min(sequences_per_refill, len(tokens))
        self._refills: dict[tuple[int, int, int], Tensor] = {}
        self._kept = kept_per_sequence(harvester, tokens)
        sample_TLD = harvest_sample(harvester, tokens)
        self.sites = harvester.sites
        self.n_tokens = len(tokens) * self._kept
        self.n_layers, self.d_model = sample_TLD.shape[1:]
        self.scale_L = check_scale(estimate_scales(sample_TLD) if scale_L is None else scale_L, self.n_layers)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the model, the sites, the token policy and the tokens."""
        return combine_fingerprints(self._harvester.fingerprint, self._tokens.fingerprint)

    def epoch_rows(self, start: int, stop: int, *, seed: int, epoch: int) -> Tensor:
        per_refill = self._per_refill * self._kept
        pieces = []
        while start < stop:
            refill, offset = divmod(start, per_refill)
            take = min(per_refill - offset, stop - start)
            pieces.append(self._refill(seed, epoch, refill)[offset : offset + take])
            start += take
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def batches(self, batch_size: int, *, seed: int, epoch: int = 0, start: int = 0) -> Iterator[Tensor]:
        return epoch_batches(self, batch_size, seed=seed, epoch=epoch, start=start)

    def batch(self, index: int, batch_size: int, seed: int) -> Tensor:
        return global_batch(self, index, batch_size, seed)

    def view(self, kind: SiteKind) -> SiteView:
        """The outputs of the blocks, or what each block wrote, with scales of their own."""
        sample_TLD = select_sites(harvest_sample(self._harvester, self._tokens), self.sites, kind)
        return SiteView(self, kind, scale_L=estimate_scales(sample_TLD))

    def _refill(self, seed: int, epoch: int, refill: int) -> Tensor:
        key = (seed, epoch, refill)
        if key not in self._refills:
            order = order_slice(len(self._tokens), seed=seed, epoch=epoch)
            chosen = order[refill * self._per_refill : (refill + 1) * self._per_refill]
            pieces = list(harvest_sequences(self._harvester, self._tokens, chosen))
            x_TLD = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            shuffle = torch.randperm(len(x_TLD), generator=seeded_generator("refill", seed, epoch, refill))
            self._refills = {key: x_TLD[shuffle.to(x_TLD.device)]}
        return self._refills[key]


class SiteView:
    """A source's block outputs ("residual") or block writes ("write"), computed batch by batch."""

    def __init__(self, source: ActivationSource, kind: SiteKind, *, scale_L: Tensor) -> None:
        self._source, self.kind = source, kind
        self.sites = select_site_numbers(source.sites, kind)
        self.n_tokens, self.d_model, self.n_layers = source.n_tokens, source.d_model, len(self.sites)
        self.scale_L = check_scale(scale_L, self.n_layers)
        self.fingerprint = combine_fingerprints(source.fingerprint, kind)

    def epoch_rows(self, start: int, stop: int, *, seed: int, epoch: int) -> Tensor:
        x_TLD = self._source.epoch_rows(start, stop, seed=seed, epoch=epoch)
        return select_sites(x_TLD, self._source.sites, self.kind)

    def batches(self, batch_size: int, *, seed: int, epoch: int = 0, start: int = 0) -> Iterator[Tensor]:
        return epoch_batches(self, batch_size, seed=seed, epoch=epoch, start=start)

    def batch(self, index: int, batch_size: int, seed: int) -> Tensor:
        return global_batch(self, index, batch_size, seed)


def select_site_numbers(sites: tuple[int, ...], kind: SiteKind) -> tuple[int, ...]:
    """Which blocks a view of `sites` shows.

    Raises:
        ValueError: an unknown kind, nothing left, or writes asked of sites that are not neighbours.
    """
    if kind == "residual":
        chosen = tuple(site for site in sites if site > 0)
        if not chosen:
            raise ValueError(f"sites {list(sites)} hold no block output; harvest more layers")
        return chosen
    if kind != "write":
        raise ValueError(f"kind is {kind!r}, expected 'residual' or 'write'")
    if len(sites) < 2 or sites != tuple(range(sites[0], sites[-1] + 1)):
        raise ValueError(
            f"sites {list(sites)} are not two or more neighbours, so blocks' writes are not their "
            "differences; harvest every layer"
        )
    return sites[1:]


def select_sites(x_TLD: Tensor, sites: tuple[int, ...], kind: SiteKind) -> Tensor:
    """`x_TLD` without the embedding ("residual"), or the differences of neighbouring sites ("write")."""
    select_site_numbers(sites, kind)
    if kind == "write":
        return block_writes(x_TLD)
    return x_TLD[:, 1:] if sites[0] == 0 else x_TLD


def kept_per_sequence(harvester: ResidualHarvester, tokens: TokenBlocks) -> int:
    """How many tokens of each block are kept.

    Raises:
        ValueError: none, or the harvester drops padding, of which packed blocks have none.
    """
    if harvester.pad_token_id is not None:
        raise ValueError("packed blocks have no padding; make the harvester without pad_token_id")
    kept = tokens.sequence_length - harvester.skip_positions
    if kept < 1:
        raise ValueError(f"skipping {harvester.skip_positions} of {tokens.sequence_length} positions leaves nothing")
    return kept


def harvest_sequences(
    harvester: ResidualHarvester, tokens: TokenBlocks, chosen: Tensor, *, dtype: torch.dtype = torch.float32
) -> Iterator[Tensor]:
    """`x_TLD` of the chosen blocks in order, a few thousand tokens at a time."""
    for part in chosen.split(max(1, HARVEST_TOKENS // tokens.sequence_length)):
        yield harvester.harvest(tokens[part]).x_TLD.to(dtype)


def harvest_sample(harvester: ResidualHarvester, tokens: TokenBlocks) -> Tensor:
    """Residual streams of up to 128 blocks spread evenly over all, for estimating scales."""
    spread = torch.linspace(0, len(tokens) - 1, min(SCALE_SEQUENCES, len(tokens))).round().long()
    return torch.cat(list(harvest_sequences(harvester, tokens, spread)))


def combine_fingerprints(*parts: str) -> str:
    """sha256 of the parts, in order."""
    return hashlib.sha256("/".join(parts).encode()).hexdigest()


def check_scale(scale_L: Tensor, n_layers: int) -> Tensor:
    """`scale_L` as float32, after checking that it holds one positive finite number a layer."""
    scale_L = torch.as_tensor(scale_L, dtype=torch.float32)
    if scale_L.shape != (n_layers,) or not bool((scale_L.isfinite() & (scale_L > 0)).all()):
        raise ValueError(f"expected {n_layers} positive scales, got {scale_L.tolist()}")
    return scale_L
