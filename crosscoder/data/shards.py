"""Activations kept on disk: hashed safetensors shards in one committed folder, read through a memory map."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from crosscoder.data.order import order_slice
from crosscoder.data.residuals import ResidualHarvester, estimate_scales, harvest_blocks
from crosscoder.data.sources import SiteKind, SiteSource, are_neighbours, combine_fingerprints
from crosscoder.data.stream import ActivationStream
from crosscoder.data.tokens import TokenBlocks
from crosscoder.foundation.artifact import (
    DamagedArtifactError,
    committed_directory,
    read_json,
    verify_directory,
    write_json,
)
from crosscoder.foundation.config import config, from_mapping, to_mapping
from crosscoder.foundation.console import Progress, human_bytes

SCHEMA = "crosscoder.activations/1"
INDEX = "index.json"
StoredDtype = Literal["float32", "bfloat16"]
_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ORIGINS = ("document_T", "sequence_T", "position_T")
_SLACK_BYTES = 2**20


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
    """Scales of the blocks' writes; empty where the sites are not neighbours."""
    dropped: Any
    """Tokens left out, by reason."""
    fingerprint: str
    metadata: Any

    def __post_init__(self) -> None:
        n_writes = len(self.sites) - 1 if are_neighbours(self.sites) else 0
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
    dtype: StoredDtype = "float32",
    tokens_per_shard: int = 2**18,
    max_tokens: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    quiet: bool = True,
) -> ActivationShards:
    """Harvest `tokens` into `folder`, which appears whole or not at all.

    max_tokens: from blocks evenly spread over the text; less text gives a smaller store, never a repeated one.
    metadata: kept for the reader; takes no part in the fingerprint.

    Raises:
        OSError: the disk has less room than the store needs; the sum is shown, and nothing is written.
        ValueError: an activation is not finite; names the site, block and position.
    """
    from safetensors.torch import save_file

    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {sorted(_DTYPES)}")
    stream = ActivationStream(harvester, tokens, max_tokens=max_tokens)
    n_tokens = stream.n_tokens if max_tokens is None else min(stream.n_tokens, max_tokens)
    _require_room(Path(folder), n_tokens, len(stream.sites), stream.d_model, _DTYPES[dtype])
    shards: list[Shard] = []
    with committed_directory(folder, schema=SCHEMA) as temporary:
        with Progress("harvest", n_tokens, unit="token", quiet=quiet) as progress:
            for tensors in _harvest_shards(stream, n_tokens, tokens_per_shard, _DTYPES[dtype]):
                shard = Shard(file=f"shard-{len(shards):05d}.safetensors", tokens=len(tensors["x_TLD"]))
                save_file(tensors, temporary / shard.file)
                shards.append(shard)
                progress.advance(shard.tokens)
        index = StoreIndex(
            shards=tuple(shards),
            sites=stream.sites,
            d_model=stream.d_model,
            dtype=dtype,
            scale=tuple(estimate_scales(stream.sample_TLD).tolist()),
            write_scale=tuple(stream.site_scale("write").tolist()) if are_neighbours(stream.sites) else (),
            dropped={
                "first_positions": len(stream.blocks) * harvester.skip_positions,
                "beyond_max_tokens": stream.n_tokens - n_tokens,
            },
            fingerprint=combine_fingerprints(harvester.fingerprint, tokens.fingerprint, dtype, str(n_tokens)),
            metadata=dict(metadata or {}),
        )
        write_json(temporary / INDEX, to_mapping(index))
    return ActivationShards.load(folder, verify=False)


class ActivationShards:
    """A store of activations as `Activations`, read through a memory map and shuffled over all of its tokens."""

    def __init__(self, index: StoreIndex, shards: list[dict[str, Tensor]]) -> None:
        self.index, self.sites, self.d_model, self.fingerprint = index, index.sites, index.d_model, index.fingerprint
        self._shards = shards
        self._ends = torch.tensor([shard.tokens for shard in index.shards]).cumsum(0)
        self.n_tokens = int(self._ends[-1])

    @classmethod
    def load(cls, folder: str | Path, *, verify: bool = True) -> ActivationShards:
        """The store in `folder`. `verify=False` checks names and sizes but not the hashes.

        Raises:
            FileNotFoundError: no finished store is there.
            DamagedArtifactError: a file is missing, truncated or altered; names it.
        """
        folder = Path(folder)
        verify_directory(folder, schema=SCHEMA, hashes=verify)
        index = from_mapping(StoreIndex, read_json(folder / INDEX), where=str(folder / INDEX))
        return cls(index, [_open_shard(folder, shard, index) for shard in index.shards])

    @property
    def sequences_T(self) -> Tensor:
        return torch.cat([tensors["sequence_T"] for tensors in self._shards])

    @property
    def positions_T(self) -> Tensor:
        return torch.cat([tensors["position_T"] for tensors in self._shards])

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
            here, end = shard_T == number, self._ends[number]
            within_t = tokens_T[here] - (end - self.index.shards[number].tokens)
            x_TLD[here] = self._shards[number]["x_TLD"].index_select(0, within_t).float()
        return x_TLD

    def epoch_rows(self, start: int, stop: int, *, seed: int, epoch: int) -> Tensor:
        return self.gather(order_slice(self.n_tokens, start, stop, seed=seed, epoch=epoch))

    def site_scale(self, kind: SiteKind) -> Tensor:
        if kind == "write":
            return torch.tensor(self.index.write_scale)
        return torch.tensor(self.index.scale)[int(self.sites[0] == 0) :]


def stored_source(train: str | Path, held_out: str | Path | None, kind: SiteKind, *, verify: bool = True) -> SiteSource:
    """The stores in two folders as a source, verified as `ActivationShards.load` does."""
    other = None if held_out is None else ActivationShards.load(held_out, verify=verify)
    return SiteSource(ActivationShards.load(train, verify=verify), other, kind)


def _require_room(folder: Path, n_tokens: int, n_layers: int, d_model: int, dtype: torch.dtype) -> None:
    needed = n_tokens * (n_layers * d_model * dtype.itemsize + 4 * len(_ORIGINS)) + _SLACK_BYTES
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OSError(
            f"the store needs {human_bytes(needed)} ({n_tokens:,} tokens x {n_layers} layers x {d_model} "
            f"wide x {dtype.itemsize} bytes) and {existing} has {human_bytes(free)} free; lower max_tokens, "
            "choose fewer layers, use dtype bfloat16, or harvest as you train"
        )


def _harvest_shards(
    stream: ActivationStream, n_tokens: int, size: int, dtype: torch.dtype
) -> Iterator[dict[str, Tensor]]:
    """The tensors of each shard: `size` tokens, the last one fewer."""
    sequence_T, position_T = stream.sequences_T, stream.positions_T
    document_T = torch.from_numpy(stream.tokens.documents.copy())[sequence_T]
    parts = harvest_blocks(stream.harvester, stream.tokens, stream.blocks)
    read, part_TLD = 0, torch.empty(0)
    for start in range(0, n_tokens, size):
        here = slice(start, min(start + size, n_tokens))
        x_TLD = torch.empty(here.stop - start, len(stream.sites), stream.d_model, dtype=dtype)
        filled = 0
        while filled < len(x_TLD):
            if not len(part_TLD):
                part_TLD = next(parts).cpu()
                _require_finite(part_TLD, stream, read)
                read += len(part_TLD)
            taken_TLD = part_TLD[: len(x_TLD) - filled]
            x_TLD[filled : filled + len(taken_TLD)] = taken_TLD
            filled, part_TLD = filled + len(taken_TLD), part_TLD[len(taken_TLD) :]
        origins = zip(_ORIGINS, (document_T, sequence_T, position_T), strict=True)
        yield {"x_TLD": x_TLD, **{name: number_T[here] for name, number_T in origins}}


def _require_finite(x_TLD: Tensor, stream: ActivationStream, first: int) -> None:
    bad = (~x_TLD.isfinite()).any(-1).T.nonzero()  # lowest site first: attention spreads what is not finite
    if len(bad):
        slot, token = bad[0].tolist()
        block, position = (int(number_T[first + token]) for number_T in (stream.sequences_T, stream.positions_T))
        raise ValueError(
            f"the activation at site {stream.sites[slot]}, block {block}, position {position} is not finite; check the "
            "model's weights, or load it in float32"
        )


def _open_shard(folder: Path, shard: Shard, index: StoreIndex) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

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
