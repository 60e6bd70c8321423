"""Activations harvested while they are used, and never stored."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from crosscoder.data.order import EpochOrder
from crosscoder.data.residuals import ResidualHarvester, combine_fingerprints, norms, scales_of_norms
from crosscoder.data.sources import WINDOW_TOKENS, Activations, SiteKind
from crosscoder.data.tokens import TokenBlocks
from crosscoder.foundation.config import require_count
from crosscoder.foundation.console import Progress, say
from crosscoder.foundation.failpoints import failpoint
from crosscoder.foundation.origin import Reads, TokenOrigin
from crosscoder.foundation.ranks import Ranks
from crosscoder.foundation.signals import safe_points

HARVEST_TOKENS = 4096
"""Tokens that a model is given at once."""
SCALE_TOKENS = 16_384
"""Tokens, spread evenly over the text, that scales are estimated on."""
SECONDS_UNTIL_SHOWN = 1.0
Key = tuple[int, int, int]  # seed, epoch, and the number of a refill or of a pool
Shares = dict[int, Tensor]  # of a refill, by the pool that takes them


class ActivationStream(Activations):
    """The activations of token blocks, harvested again whenever they are needed.

    Reading in order harvests each block once an epoch, a refill at a time (see `EpochOrder`), the next one by a thread
    while this one is used; starting anywhere harvests the window. Tokens are let go as they are used. A store of the
    same tokens holds the same activations up to the rounding of the model's matrix products.

    window_tokens: tokens that batches mix, in whole blocks; at most those and three refills are in memory.
    max_tokens: how many tokens to read at least, in whole blocks spread evenly over all; None reads all.
    ahead: whether the next refill is harvested beside the use of this one.
    quiet: whether nothing is said of how harvesting goes where others wait for it.
    job: ranks that read the same batches: each harvests other blocks of a refill, and all get all of it. It must be a
        group of its own (`Ranks.apart`), for the thread gathers while training does.
    """

    def __init__(
        self,
        harvester: ResidualHarvester,
        tokens: TokenBlocks,
        *,
        window_tokens: int = WINDOW_TOKENS,
        max_tokens: int | None = None,
        ahead: bool = True,
        quiet: bool = True,
        job: Ranks | None = None,
    ) -> None:
        self._job, self._quiet = job or Ranks(), quiet
        self._progress: Progress | None = None
        require_count(window_tokens=window_tokens, max_tokens=max_tokens)
        self.harvester, self.tokens, self.sites = harvester, tokens, harvester.sites
        self.context, self.keep_outliers = tokens.sequence_length, harvester.keep_outliers
        self._special_ids = () if self.keep_outliers or tokens.origin is None else tokens.origin.special_ids
        if tokens.origin is None and not self.keep_outliers:
            say("these tokens keep no record: special tokens among them are read as text; prepare them again to tell")
        kept = self.context - harvester.skip_positions
        if kept < 1:
            raise ValueError(f"skipping {harvester.skip_positions} of {self.context} tokens leaves nothing")
        n_blocks = len(tokens) if max_tokens is None else min(len(tokens), -(-max_tokens // kept))
        self.blocks = torch.linspace(0, len(tokens) - 1, n_blocks, dtype=torch.float64).round().long()
        self.order = EpochOrder(torch.cat([self.kept(part).sum(1) for part in self.parts()]), window_tokens)
        self.n_tokens = self.order.n_tokens
        if self.n_tokens == 0:
            raise ValueError(f"all {len(tokens)} blocks hold special tokens only; give text, or --keep-outliers")
        self._pool: tuple[Key, Tensor] | None = None
        self._waiting: dict[Key, Shares] = {}
        self._next: tuple[Key, Future[Shares]] | None = None
        self._thread = ThreadPoolExecutor(1) if ahead else None

    def parts(self, numbers: Tensor | None = None) -> tuple[Tensor, ...]:
        """Numbers of blocks (all of `blocks` by default), as many at once as the model is given."""
        chosen = self.blocks if numbers is None else numbers
        return chosen.split(max(1, HARVEST_TOKENS // self.context))

    def kept(self, numbers: Tensor) -> Tensor:
        """Which tokens of some blocks are read, bool `[b, S]`."""
        return self.harvester.kept(self.tokens[numbers], self._special_ids)

    def harvest(self, numbers: Tensor) -> Iterator[Tensor]:
        """`x_TLD` of the kept tokens of some blocks, a few thousand tokens at a time, in the model's dtype."""
        for part in safe_points(self.parts(numbers)):
            if bool((kept_BS := self.kept(part)).any()):
                yield self._told(self.harvester.harvest(self.tokens[part], kept_BS))

    def _told(self, x_TLD: Tensor) -> Tensor:
        if (progress := self._progress) is not None:  # read once: what is shown may end beside the thread
            progress.advance(len(x_TLD))
        return x_TLD

    @contextlib.contextmanager
    def _showing(self, label: str, n_tokens: int | None = None) -> Generator[None]:
        """Shows what is harvested meanwhile, here or by the thread, of `n_tokens` in all; nothing where those are 0."""
        try:
            with Progress(label, n_tokens, unit="token", quiet=self._quiet or n_tokens == 0) as self._progress:
                yield
        finally:
            self._progress = None

    @functools.cached_property
    def _sample(self) -> tuple[Tensor, Tensor, int]:
        """Norms of a sample of tokens at all sites, and of the differences of neighbouring sites; and the width."""
        n_blocks = min(len(self.tokens), max(1, SCALE_TOKENS // self.context))
        spread, found, d_model = torch.linspace(0, len(self.tokens) - 1, n_blocks).round().long(), [], 0
        with self._showing("scales of the layers", n_blocks * self.context):
            for x_TLD in self.harvest(spread):
                found.append((norms(x_TLD), norms(x_TLD.float().diff(dim=1))))
                d_model = x_TLD.shape[2]
        residual, write = (torch.cat(parts) for parts in zip(*found, strict=True))
        return residual, write, d_model

    @functools.cached_property
    def _like(self) -> Tensor:
        """No token's activations, for their shape, dtype and device."""
        fullest = self.blocks[self.order.count_B.argmax()][None]
        return next(self.harvest(fullest))[:0]

    @functools.cached_property
    def d_model(self) -> int:
        return self._like.shape[2]

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the model, the sites, the token policy, the tokens and their order."""
        order = f"{len(self.blocks)} blocks, {self.order}, without {self._special_ids}"
        return combine_fingerprints(self.harvester.fingerprint, self.tokens.fingerprint, order)

    @functools.cached_property
    def token_T(self) -> Tensor:
        found = []
        for part in self.parts():
            block_t, position_t = self.kept(part).nonzero().unbind(1)
            found.append(part[block_t] * self.context + position_t)
        return torch.cat(found)

    @property
    def document_T(self) -> Tensor:
        return torch.from_numpy(self.tokens.documents[self.sequences_T.numpy()]).long()

    def all_scales(self, kind: SiteKind) -> Tensor:
        """The scale of every harvested site, or of every difference of neighbours."""
        residual_TL, write_TL, d_model = self._sample
        return scales_of_norms(write_TL if kind == "write" else residual_TL, d_model)

    def site_scale(self, kind: SiteKind) -> Tensor:
        return self.all_scales(kind)[int(kind == "residual" and self.sites[0] == 0) :]

    @functools.cached_property
    def harvested(self) -> Reads | None:
        harvester, origin = self.harvester, self.tokens.origin
        return Reads(
            model=harvester.origin,
            tokens=origin or TokenOrigin(tokenizer=self.tokens.tokenizer_hash, context=self.context),
            site=harvester.reads,
            sites=self.sites,
            convention=harvester.probed.mlp if harvester.reads == "mlp" else "",
            skip_positions=harvester.skip_positions,
            keep_outliers=harvester.keep_outliers,
            dropped=self.dropped,
        )

    @property
    def dropped(self) -> dict[str, int]:
        """Tokens of the blocks that are not harvested, by reason."""
        first = len(self.blocks) * self.harvester.skip_positions
        return {"first_positions": first, "special_tokens": len(self.blocks) * self.context - first - self.n_tokens}

    def rows(self, start: int, stop: int) -> Tensor:
        first_B = self.order.first_B
        first, last = int(torch.searchsorted(first_B, start, right=True)) - 1, int(torch.searchsorted(first_B, stop))
        x_TLD = self._joined(self.blocks[first:last])
        return x_TLD[start - int(first_B[first]) :][: stop - start].float()

    def epoch_rows(self, start: int, stop: int, *, seed: int, epoch: int) -> Tensor:
        pieces = []
        for pool, first, last in self.order.pieces(start, stop, seed=seed, epoch=epoch):
            pieces.append(self._pooled((seed, epoch, pool))[first:last].float())
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def epoch_numbers(self, start: int, stop: int, *, seed: int, epoch: int) -> Tensor:
        pieces = self.order.pieces(start, stop, seed=seed, epoch=epoch)
        return torch.cat([self.order.stored(seed, epoch, pool)[first:last] for pool, first, last in pieces])

    def document_of(self, token: int) -> int:
        return int(self.tokens.documents[token // self.context])

    def _pooled(self, key: Key) -> Tensor:
        """The tokens of one pool, in its order, in the model's dtype."""
        if self._pool is None or self._pool[0] != key:
            self._pool = None  # the old one goes before another is made
            self._collect(key)
            pool, refills = key[2], [(*key[:2], refill) for refill in self.order.refills(key[2])]
            missing = [of for of in refills if pool not in self._waiting.get(of, {})]  # at the start the whole window
            n_tokens = sum(int(self.order.count_B[self.order.blocks(*of)].sum()) for of in missing)
            places, x_TLD = self.order.places(*key), None
            with self._showing("harvest of a window", n_tokens):
                for of, place_t in zip(refills, places, strict=True):
                    if of in missing:
                        self._waiting[of] = self._harvest_shares(of, pool)
                    share_TLD = self._waiting[of].pop(pool)
                    if x_TLD is None:
                        x_TLD = share_TLD.new_empty(sum(map(len, places)), *share_TLD.shape[1:])
                    x_TLD[place_t.to(x_TLD.device)] = share_TLD
            assert x_TLD is not None
            self._pool = key, x_TLD
            self._begin_next(key)
        return self._pool[1]

    def _collect(self, key: Key) -> None:
        """Take what the thread brought, and let go what `key` and the pools after it do not need."""
        if self._next is not None:
            (of, found), self._next = self._next, None
            if wait([found], SECONDS_UNTIL_SHOWN).not_done:
                with self._showing("waiting for the harvest"):
                    wait([found])
            self._waiting[of] = found.result()
        self._waiting = {of: shares for of, shares in self._waiting.items() if self._ahead(key, of) >= 0}

    def _ahead(self, key: Key, of: Key) -> int:
        """How many refills after the first of pool `key` one comes; -1 if no pool that comes soon needs it."""
        ahead = (of[1] - key[1]) * self.order.n_refills + of[2] - key[2]
        return ahead if of[0] == key[0] and ahead <= self.order.spread else -1

    def _begin_next(self, key: Key) -> None:
        if self._thread is None:
            return
        seed, epoch, pool = key
        more, number = divmod(pool + self.order.spread, self.order.n_refills)
        if (after := (seed, epoch + more, number)) not in self._waiting:
            self._next = after, self._thread.submit(self._harvest_beside, after, torch.get_num_threads())

    def _harvest_beside(self, key: Key, n_threads: int) -> Shares:
        torch.set_num_threads(n_threads)  # a new thread starts with one for every core
        return self._harvest_shares(key)

    def _harvest_shares(self, key: Key, first_pool: int = 0) -> Shares:
        """The tokens of a refill, for each pool from `first_pool` on that takes some."""
        failpoint("refill.begin")
        x_TLD = self._joined_of_all(self.blocks[self.order.blocks(*key)])
        failpoint("refill.end")
        shares = self.order.shares(*key)
        return {pool: x_TLD[place_t.to(x_TLD.device)] for pool, place_t in shares.items() if pool >= first_pool}

    def settle(self) -> None:
        """Wait for what is harvested ahead; before ranks part."""
        if self._next is not None:
            self._next[1].result()

    def _joined_of_all(self, numbers: Tensor) -> Tensor:
        """`_joined`, of blocks that the ranks share out among themselves."""
        if self._job.size == 1:
            return self._joined(numbers)
        pieces = numbers.tensor_split(self._job.size)
        counts = [int(self.kept(piece).sum()) for piece in pieces]
        own, like = pieces[self._job.rank], self._like
        x_TLD = like.new_empty(max(counts), *like.shape[1:])
        if counts[self._job.rank]:
            x_TLD[: counts[self._job.rank]] = self._joined(own)
        all_WX = self._job.gather(x_TLD.cpu().flatten(1).view(torch.uint8), "harvest")
        all_TX = torch.cat([one_TX[:count] for one_TX, count in zip(all_WX, counts, strict=True)])
        return all_TX.view(like.dtype).view(-1, *like.shape[1:]).to(like.device)

    def _joined(self, numbers: Tensor) -> Tensor:
        """All tokens of some blocks in one buffer; `harvest`'s parts are gone one by one."""
        parts = self.harvest(numbers)
        first = next(parts)
        n_tokens, filled = int(self.kept(numbers).sum()), len(first)
        if filled == n_tokens:
            return first
        joined = first.new_empty(n_tokens, *first.shape[1:])
        joined[:filled] = first
        for part in parts:
            joined[filled : filled + len(part)] = part
            filled += len(part)
        return joined
