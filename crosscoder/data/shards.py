"""Activations kept on disk: hashed safetensors shards in one committed folder, read through a memory map."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from safetensors import safe_open
from torch import Tensor

from crosscoder.data.order import EpochOrder, order_slice
from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.sources import (
    WINDOW_TOKENS,
    Activations,
    SiteKind,
    SiteSource,
    are_neighbours,
    combine_fingerprints,
)
from crosscoder.data.stream import ActivationStream
from crosscoder.data.tokens import TokenBlocks
from crosscoder.foundation.artifact import (
    DamagedArtifactError,
    read_json,
    resumed_directory,
    verify_directory,
    write_json,
)
from crosscoder.foundation.config import config, from_mapping, to_mapping
from crosscoder.foundation.console import Progress, human_bytes, say
from crosscoder.foundation.origin import Reads

SCHEMA = "crosscoder.activations/1"
INDEX = "index.json"
StoredDtype = Literal["float32", "bfloat16"]
_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ORIGINS = ("document_T", "sequence_T", "position_T")
_SLACK_BYTES = 2**20
SHARD_BYTES = 2**28
UNFINISHED = ".part"


@config
class Shard:
    """One file of the store."""

    file: Annotated[str, Field(pattern=r"^[\w-]+\.safetensors$")]
    tokens: PositiveInt


@config
class StoreIndex:
    """What a store holds and where it came from."""

    shards: Annotated[tuple[Shard, ...], Field(min_length=1)]
    sites: tuple[int, ...]
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
        n_writes = len(self.sites) - 1 if are_neighbours(self.sites) and self.write_scale else 0
        if (len(self.scale), len(self.write_scale)) != (len(self.sites), n_writes):
            raise ValueError(
                f"{len(self.scale)} scales and {len(self.write_scale)} of writes, expected {len(self.sites)} and "
                f"{n_writes} for sites {list(self.sites)}; harvest again"
            )


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
    """Harvest `tokens` into `folder`, which appears whole or not at all; one that was stopped goes on.

    dtype: bfloat16 where the model is, else float32, unless told otherwise.
    tokens_per_shard: by default as many as fill 256 MiB. In memory is one shard, and one call of the model.
    max_tokens: how many tokens to store at least, in whole blocks evenly spread over the text; less text gives a
        smaller store, never a repeated one.
    metadata: kept for the reader; takes no part in the fingerprint.

    Raises:
        OSError: the disk has less room than the store needs; the sum is shown, and nothing is written.
        ValueError: an activation is not finite; names the site, block and position.
    """
    from safetensors.torch import save_file

    stream = ActivationStream(harvester, tokens, max_tokens=max_tokens, ahead=False)
    dtype = dtype or ("bfloat16" if harvester.origin.dtype == "bfloat16" else "float32")
    if tokens_per_shard is not None and tokens_per_shard < 1:
        raise ValueError(f"tokens_per_shard is {tokens_per_shard}, expected at least 1")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {sorted(_DTYPES)}")
    token_bytes = len(stream.sites) * stream.d_model * _DTYPES[dtype].itemsize
    blocks_of_shard = _blocks_of_shard(stream, tokens_per_shard or max(1, SHARD_BYTES // token_bytes))
    _require_room(Path(folder), stream, _DTYPES[dtype])
    fingerprint = combine_fingerprints(stream.fingerprint, dtype, str(stream.n_tokens))
    shards: list[Shard] = []
    with resumed_directory(folder, schema=SCHEMA, key=f"{fingerprint} {blocks_of_shard}") as temporary:
        with Progress("harvest", stream.n_tokens, unit="token", quiet=quiet) as progress:
            for number, blocks in enumerate(stream.blocks.split(blocks_of_shard)):
                path = temporary / f"shard-{number:05d}.safetensors"
                if not path.is_file():
                    tensors = _harvest_shard(stream, number * blocks_of_shard, blocks, _DTYPES[dtype], progress)
                    save_file(tensors, path.with_suffix(UNFINISHED))
                    path.with_suffix(UNFINISHED).rename(path)
                    shards.append(Shard(file=path.name, tokens=len(tensors["x_TLD"])))
                else:
                    with safe_open(path, framework="pt") as stored:
                        shards.append(Shard(file=path.name, tokens=stored.get_slice("x_TLD").get_shape()[0]))
                    progress.advance(shards[-1].tokens)
        index = StoreIndex(
            shards=tuple(shards),
            sites=stream.sites,
            d_model=stream.d_model,
            dtype=dtype,
            scale=tuple(stream.all_scales("residual").tolist()),
            write_scale=_write_scales(stream),
            dropped=stream.dropped,
            fingerprint=fingerprint,
            metadata=dict(metadata or {}),
            harvested=stream.harvested,
        )
        write_json(temporary / INDEX, to_mapping(index))
    return ActivationShards.load(folder, verify=False)


class ActivationShards(Activations):
    """A store of activations, read through a memory map in the order of a stream of the same tokens."""

    def __init__(
        self, index: StoreIndex, shards: list[dict[str, Tensor]], *, window_tokens: int = WINDOW_TOKENS
    ) -> None:
        self.index, self.sites = index, index.sites
        self._shards, self.harvested = shards, index.harvested
        self._ends = torch.tensor([shard.tokens for shard in index.shards]).cumsum(0)
        self.n_tokens = int(self._ends[-1])
        sequence_T, position_T = (torch.cat([one[name] for one in shards]).long() for name in _ORIGINS[1:])
        self.context = int(position_T.max()) + 1 if self.harvested is None else self.harvested.tokens.context
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
        verify_directory(folder, schema=SCHEMA, hashes=verify)
        index = from_mapping(StoreIndex, read_json(folder / INDEX), where=str(folder / INDEX))
        shards = [_open_shard(folder, shard, index) for shard in index.shards]
        return cls(index, shards, window_tokens=window_tokens)

    @property
    def d_model(self) -> int:
        return self.index.d_model

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
        if self.harvested is None:
            return self.gather(order_slice(self.n_tokens, start, stop, seed=seed, epoch=epoch))
        numbers = []
        for pool, first, last in self._order.pieces(start, stop, seed=seed, epoch=epoch):
            numbers.append(self._pool(seed, epoch, pool)[first:last])
        return self.gather(torch.cat(numbers))

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
    needed = n_tokens * (n_sites * d_model * dtype.itemsize + 4 * len(_ORIGINS)) + _SLACK_BYTES
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OSError(
            f"the store needs {human_bytes(needed)} ({n_tokens:,} tokens x {n_sites} layers x {d_model} "
            f"wide x {dtype.itemsize} bytes) and {existing} has {human_bytes(free)} free; lower max_tokens, "
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


def _blocks_of_shard(stream: ActivationStream, n_tokens: int) -> int:
    """Blocks that hold about so many tokens: whole calls of the model, so that a resumed harvest makes the same."""
    blocks, call = max(1, n_tokens // stream.context), len(stream.parts()[0])
    return blocks if blocks < call else blocks // call * call


def _harvest_shard(
    stream: ActivationStream, first: int, blocks: Tensor, dtype: torch.dtype, progress: Progress
) -> dict[str, Tensor]:
    """The tensors of the shard whose blocks start at number `first` of the stream's."""
    count_b = stream.order.count_B[first : first + len(blocks)]
    start = int(stream.order.first_B[first])
    token_T = stream.token_T[start : start + int(count_b.sum())]
    sequence_T, position_T = token_T // stream.context, token_T % stream.context
    x_TLD, filled = torch.empty(len(token_T), len(stream.sites), stream.d_model, dtype=dtype), 0
    for part_TLD in stream.harvest(blocks):
        _require_finite(part_TLD, stream, token_T[filled:])
        x_TLD[filled : filled + len(part_TLD)] = part_TLD
        filled += len(part_TLD)
        progress.advance(len(part_TLD))
    document_T = torch.from_numpy(stream.tokens.documents[blocks.numpy()]).repeat_interleave(count_b)
    numbers = zip(_ORIGINS, (document_T, sequence_T, position_T), strict=True)
    return {"x_TLD": x_TLD, **{name: number_T.int() for name, number_T in numbers}}


def _require_finite(x_TLD: Tensor, stream: ActivationStream, token_T: Tensor) -> None:
    bad = (~x_TLD.isfinite()).any(-1).T.nonzero()  # lowest site first: attention spreads what is not finite
    if len(bad):
        slot, token = bad[0].tolist()
        block, position = divmod(int(token_T[token]), stream.context)
        raise ValueError(
            f"the activation at site {stream.sites[slot]}, block {block}, position {position} is not finite; check the "
            "model's weights, or load it in float32"
        )


def _open_shard(folder: Path, shard: Shard, index: StoreIndex) -> dict[str, Tensor]:
    from safetensors import SafetensorError

    path = folder / shard.file
    try:
        with safe_open(path, framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in ("x_TLD", *_ORIGINS)}
    except (SafetensorError, OSError) as error:
        raise DamagedArtifactError(f"{path} cannot be read ({error}); harvest again") from error
    expected = (shard.tokens, len(index.sites), index.d_model)
    x_TLD = tensors["x_TLD"]
    if tuple(x_TLD.shape) != expected or x_TLD.dtype != _DTYPES[index.dtype]:
        raise DamagedArtifactError(
            f"{path} holds {x_TLD.dtype} {list(x_TLD.shape)}, {INDEX} says {index.dtype} "
            f"{list(expected)}; harvest again"
        )
    return tensors
