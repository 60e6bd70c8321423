"""Activations kept on disk: hashed safetensors shards in one committed folder, read through a memory map."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from safetensors import safe_open
from torch import Tensor

from crosscoder.data.order import EpochOrder, order_slice
from crosscoder.data.residuals import ResidualHarvester, combine_fingerprints
from crosscoder.data.shard_files import ORIGINS, blocks_of_shard, write_shard
from crosscoder.data.sources import (
    WINDOW_TOKENS,
    Activations,
    SiteKind,
    SiteSource,
    are_neighbours,
)
from crosscoder.data.stream import ActivationStream
from crosscoder.data.tokens import TokenBlocks
from crosscoder.foundation.artifact import (
    MANIFEST,
    DamagedArtifactError,
    read_json,
    resumed_directory,
    verify_directory,
    write_json,
)
from crosscoder.foundation.config import config, from_mapping, require_count, to_mapping
from crosscoder.foundation.console import Progress, human_bytes, say
from crosscoder.foundation.damage import reading
from crosscoder.foundation.lock import locked
from crosscoder.foundation.origin import Reads
from crosscoder.foundation.signals import Stopped, watching

SCHEMA = "crosscoder.activations/1"
INDEX = "index.json"
StoredDtype = Literal["float32", "bfloat16"]
_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SLACK_BYTES = 2**20
SHARD_BYTES = 2**28


@config
class Shard:
    file: Annotated[str, Field(pattern=r"^[\w-]+\.safetensors$")]
    tokens: PositiveInt


@config
class StoreIndex:
    """What a store holds and where it came from."""

    shards: Annotated[tuple[Shard, ...], Field(min_length=1)]
    sites: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    d_model: PositiveInt
    dtype: StoredDtype
    scale: tuple[PositiveFloat, ...]
    write_scale: tuple[PositiveFloat, ...]
    """Scales of the blocks' writes; empty where the sites are not neighbours, or a block writes nothing."""
    dropped: Any
    """Tokens left out, by reason."""
    fingerprint: str
    metadata: Any
    harvested: Reads | None = None
    """What was harvested; a store of version 0.2 keeps no record, and is read in the order of that version."""

    def __post_init__(self) -> None:
        if len({shard.file for shard in self.shards}) < len(self.shards):
            raise ValueError("a shard is named twice; harvest again")
        n_writes = len(self.sites) - 1 if are_neighbours(self.sites) and self.write_scale else 0
        if (len(self.scale), len(self.write_scale)) != (len(self.sites), n_writes):
            raise ValueError(
                f"{len(self.scale)} scales and {len(self.write_scale)} of writes, expected {len(self.sites)} and "
                f"{n_writes} for sites {list(self.sites)}; harvest again"
            )


@watching()
def write_shards(
    harvester: ResidualHarvester,
    tokens: TokenBlocks,
    folder: str | Path,
    *,
    dtype: StoredDtype | None = None,
    tokens_per_shard: int | None = None,
    max_tokens: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    quiet: bool = True,
) -> ActivationShards:
    """Harvest `tokens` into `folder`, which appears whole or not at all; one that was stopped goes on, and where the
    same is there already nothing is done.

    dtype: bfloat16 where the model is, else float32, unless told otherwise.
    tokens_per_shard: by default as many as fill 256 MiB. In memory is one shard, and one call of the model.
    max_tokens: how many tokens to store at least, in whole blocks evenly spread over the text; less text gives a
        smaller store, never a repeated one.
    metadata: kept for the reader, beside the tokens' fingerprint; takes no part in the store's.

    Raises:
        OSError: the disk has less room than the store needs; the sum is shown, and nothing is written.
        InUseError: another process harvests into `folder`.
        Stopped: a signal came; what there is of the store is kept for the next harvest of the same.
        ValueError: an activation is not finite; names the site, block and position.
    """
    require_count(tokens_per_shard=tokens_per_shard)
    stream = ActivationStream(harvester, tokens, max_tokens=max_tokens, ahead=False)
    dtype = dtype or ("bfloat16" if harvester.origin.dtype == "bfloat16" else "float32")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {sorted(_DTYPES)}")
    token_bytes = len(stream.sites) * stream.d_model * _DTYPES[dtype].itemsize
    per_shard = blocks_of_shard(stream, tokens_per_shard or max(1, SHARD_BYTES // token_bytes))
    fingerprint, folder = combine_fingerprints(stream.fingerprint, dtype, str(stream.n_tokens)), Path(folder)
    n_shards = -(-len(stream.blocks) // per_shard)
    about = {"dtype": dtype, "fingerprint": fingerprint, "metadata": {"tokens": tokens.fingerprint, **(metadata or {})}}
    if (done := _finished(folder, n_shards, about)) is not None:
        return done
    with (
        locked(folder.parent, name=f".lock-{folder.name[:80]}"),
        resumed_directory(folder, schema=SCHEMA, key=f"{fingerprint} {per_shard}") as temporary,
        Progress("harvest", stream.n_tokens, unit="token", quiet=quiet) as progress,
    ):
        _require_room(temporary, stream, _DTYPES[dtype])
        try:
            shards = []
            for number, blocks in enumerate(stream.blocks.split(per_shard)):
                path = temporary / f"shard-{number:05d}.safetensors"
                tokens_there = write_shard(stream, number * per_shard, blocks, _DTYPES[dtype], progress, path)
                shards.append(Shard(file=path.name, tokens=tokens_there))
        except Stopped as stop:
            raise Stopped(f"{stop}; what was harvested is kept in {temporary}") from stop
        index = StoreIndex(
            **about,
            shards=tuple(shards),
            sites=stream.sites,
            d_model=stream.d_model,
            scale=tuple(stream.all_scales("residual").tolist()),
            write_scale=_write_scales(stream),
            dropped=stream.dropped,
            harvested=stream.harvested,
        )
        write_json(temporary / INDEX, to_mapping(index))
    if max_tokens is not None and stream.n_tokens < max_tokens:
        say(
            f"note: {stream.n_tokens:,} of the {max_tokens:,} tokens that were asked for: the text has no more; "
            "prepare more of it"
        )
    return ActivationShards.load(folder, verify=False)


def _finished(folder: Path, n_shards: int, about: dict[str, Any]) -> ActivationShards | None:
    """The store in `folder` if it is whole and what is to be written."""
    if not (folder / INDEX).is_file():
        return None
    with contextlib.suppress(ValueError, OSError):  # damaged, or of another version: it is written again
        store = ActivationShards.load(folder)
        if len(store.index.shards) == n_shards and about == {name: getattr(store.index, name) for name in about}:
            say(f"{folder} holds these activations already")
            return store
    return None


class ActivationShards(Activations):
    """A store of activations, read through a memory map in the order of a stream of the same tokens."""

    def __init__(
        self, index: StoreIndex, shards: list[dict[str, Tensor]], *, window_tokens: int = WINDOW_TOKENS
    ) -> None:
        self.index, self.sites = index, index.sites
        self._shards, self.harvested = shards, index.harvested
        self._ends = torch.tensor([shard.tokens for shard in index.shards]).cumsum(0)
        self.n_tokens = int(self._ends[-1])
        sequence_T, position_T = (torch.cat([one[name] for one in shards]).long() for name in ORIGINS[1:])
        self.context = int(position_T.max()) + 1 if self.harvested is None else self.harvested.tokens.context
        if int(sequence_T.min()) < 0 or not 0 <= int(position_T.min()) <= int(position_T.max()) < self.context:
            raise ValueError(f"tokens stand at positions outside blocks of {self.context}; harvest again")
        self.keep_outliers = self.harvested is not None and self.harvested.keep_outliers
        self.token_T = sequence_T * self.context + position_T
        self._order = EpochOrder(sequence_T.unique_consecutive(return_counts=True)[1], window_tokens)
        self._pool = functools.lru_cache(maxsize=2)(self._order.stored)
        self.fingerprint = index.fingerprint
        if self.harvested is not None:
            self.fingerprint = combine_fingerprints(index.fingerprint, str(self._order))

    @classmethod
    def load(cls, folder: str | Path, *, verify: bool = True, window_tokens: int = WINDOW_TOKENS) -> ActivationShards:
        """The store in `folder`. `verify=False` checks names and sizes but not the hashes.

        Raises:
            FileNotFoundError: no finished store is there.
            DamagedArtifactError: a file is missing, truncated or altered; names it.
        """
        folder = Path(folder)
        files = verify_directory(folder, schema=SCHEMA, required=(INDEX,), hashes=verify)
        with reading(folder / INDEX, mend="harvest again"):
            index = from_mapping(StoreIndex, read_json(folder / INDEX), where=str(folder / INDEX))
            if {INDEX, *(shard.file for shard in index.shards)} != files:
                raise ValueError(f"its shards are not the files that {MANIFEST} lists")
        with reading(folder, mend="harvest again"):
            shards = [_open_shard(folder, shard, index) for shard in index.shards]
            return cls(index, shards, window_tokens=window_tokens)

    @property
    def d_model(self) -> int:
        return self.index.d_model

    @property
    def document_T(self) -> Tensor:
        return torch.cat([shard["document_T"] for shard in self._shards]).long()

    def rows(self, start: int, stop: int) -> Tensor:
        if not 0 <= start <= stop <= self.n_tokens:
            raise ValueError(f"rows {start} to {stop} of a store of {self.n_tokens} tokens")
        return self.gather(torch.arange(start, stop))

    def gather(self, tokens_T: Tensor) -> Tensor:
        """The tokens of these stored numbers, float32 `[t, L, D]`, not scaled."""
        if len(self._shards) == 1:
            return self._shards[0]["x_TLD"].index_select(0, tokens_T).float()
        x_TLD = torch.empty(len(tokens_T), len(self.sites), self.d_model)
        shard_T = torch.bucketize(tokens_T, self._ends, right=True)
        for number in shard_T.unique().tolist():
            here_t, end = (shard_T == number).nonzero().squeeze(1), self._ends[number]
            within_t = tokens_T[here_t] - (end - self.index.shards[number].tokens)
            x_TLD.index_copy_(0, here_t, self._shards[number]["x_TLD"].index_select(0, within_t).float())
        return x_TLD

    def epoch_rows(self, start: int, stop: int, *, seed: int, epoch: int) -> Tensor:
        return self.gather(self.epoch_numbers(start, stop, seed=seed, epoch=epoch))

    def epoch_numbers(self, start: int, stop: int, *, seed: int, epoch: int) -> Tensor:
        if self.harvested is None:
            return order_slice(self.n_tokens, start, stop, seed=seed, epoch=epoch)
        pieces = self._order.pieces(start, stop, seed=seed, epoch=epoch)
        return torch.cat([self._pool(seed, epoch, pool)[first:last] for pool, first, last in pieces])

    def document_of(self, token: int) -> int:
        stored = int((self.token_T == token).nonzero()[0])
        return int(torch.cat([one["document_T"] for one in self._shards])[stored])

    def site_scale(self, kind: SiteKind) -> Tensor:
        if kind == "write" and not self.index.write_scale:
            raise ValueError(f"some block of sites {list(self.sites)} writes nothing, so writes have no scale")
        if kind == "write":
            return torch.tensor(self.index.write_scale)
        return torch.tensor(self.index.scale)[int(self.sites[0] == 0) :]


def stored_source(train: str | Path, held_out: str | Path | None, kind: SiteKind, *, verify: bool = True) -> SiteSource:
    """The stores in two folders as a source, verified as `ActivationShards.load` does."""
    other = None if held_out is None else ActivationShards.load(held_out, verify=verify)
    return SiteSource(ActivationShards.load(train, verify=verify), other, kind)


def _require_room(folder: Path, stream: ActivationStream, dtype: torch.dtype) -> None:
    n_tokens, n_sites, d_model = stream.n_tokens, len(stream.sites), stream.d_model
    needed = n_tokens * (n_sites * d_model * dtype.itemsize + 4 * len(ORIGINS)) + _SLACK_BYTES
    there = sum(path.stat().st_size for path in folder.iterdir())
    free = shutil.disk_usage(folder).free
    if needed - there > free:
        raise OSError(
            f"the store needs {human_bytes(needed)} ({n_tokens:,} tokens x {n_sites} layers x {d_model} wide x "
            f"{dtype.itemsize} bytes) and {folder.parent} has {human_bytes(free)} free; lower max_tokens, "
            "choose fewer layers, use dtype bfloat16, or harvest as you train"
        )


def _write_scales(stream: ActivationStream) -> tuple[float, ...]:
    if not are_neighbours(stream.sites):
        return ()
    try:
        return tuple(stream.all_scales("write").tolist())
    except ValueError as error:
        say(f"what blocks write will not be readable from this store: {error}")
        return ()


def _open_shard(folder: Path, shard: Shard, index: StoreIndex) -> dict[str, Tensor]:
    from safetensors import SafetensorError

    path = folder / shard.file
    try:
        with safe_open(path, framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in ("x_TLD", *ORIGINS)}
    except (SafetensorError, OSError) as error:
        raise DamagedArtifactError(f"{path} cannot be read ({error}); harvest again") from error
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "x_TLD": ((shard.tokens, len(index.sites), index.d_model), _DTYPES[index.dtype])
    }
    expected |= dict.fromkeys(ORIGINS, ((shard.tokens,), torch.int32))
    for name, tensor in tensors.items():
        if (tuple(tensor.shape), tensor.dtype) != expected[name]:
            shape, dtype = expected[name]
            raise DamagedArtifactError(
                f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, {INDEX} says {dtype} {list(shape)}; "
                "harvest again"
            )
    return tensors
