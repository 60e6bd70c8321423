"""Activations kept on disk: hashed safetensors shards in one committed folder, read through a memory map."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from crosscoder.data.order import order_slice
from crosscoder.data.residuals import (
    HARVEST_TOKENS,
    ResidualHarvester,
    estimate_scales,
    harvest_sample,
    kept_per_block,
    spread_blocks,
)
from crosscoder.data.sources import SiteKind, SiteSource, are_neighbours, combine_fingerprints, select_sites
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

    file: str
    tokens: int


@config
class StoreIndex:
    """What a store holds and where it came from."""

    shards: tuple[Shard, ...]
    sites: tuple[int, ...]
    d_model: int
    dtype: StoredDtype
    scale: tuple[float, ...]
    write_scale: tuple[float, ...]
    """Scales of the blocks' writes; empty where the sites are not neighbours."""
    dropped: Any
    """Tokens left out, by reason."""
    fingerprint: str
    metadata: Any


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

    With `max_tokens` the blocks are taken evenly spread over all of them, not from the front. Less text
    than that gives a smaller store, never a repeated one. `metadata` is kept for the reader and takes no
    part in the fingerprint.

    Raises:
        OSError: the disk has less room than the store needs; the sum is shown, and nothing is written.
        ValueError: an activation is not finite; names the site, block and position.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {sorted(_DTYPES)}")
    if tokens_per_shard < 1:
        raise ValueError(f"tokens_per_shard is {tokens_per_shard}, expected at least 1")
    n_tokens = _count_tokens(harvester, tokens, max_tokens)
    sample_TLD = harvest_sample(harvester, tokens)
    _require_room(Path(folder), n_tokens, sample_TLD.shape[1], sample_TLD.shape[2], _DTYPES[dtype])
    shards: list[Shard] = []
    dropped: dict[str, int] = {}
    with committed_directory(folder, schema=SCHEMA) as temporary:
        parts = _harvest_parts(harvester, tokens, n_tokens, dropped)
        with Progress("harvest", n_tokens, unit="token", quiet=quiet) as progress:
            for part in _regroup(parts, tokens_per_shard):
                part["x_TLD"] = part["x_TLD"].to(_DTYPES[dtype])
                shards.append(_write_shard(temporary, len(shards), part))
                progress.advance(shards[-1].tokens)
        index = StoreIndex(
            shards=tuple(shards),
            sites=harvester.sites,
            d_model=sample_TLD.shape[2],
            dtype=dtype,
            scale=tuple(estimate_scales(sample_TLD).tolist()),
            write_scale=_write_scale(sample_TLD, harvester.sites),
            dropped=dropped,
            fingerprint=combine_fingerprints(harvester.fingerprint, tokens.fingerprint, dtype, str(n_tokens)),
            metadata=dict(metadata or {}),
        )
        write_json(temporary / INDEX, to_mapping(index))
    return ActivationShards.load(folder, verify=False)


class ActivationShards:
    """A store of activations as `Activations`, read through a memory map and shuffled over all of its tokens."""

    def __init__(self, index: StoreIndex, x_shards: list[Tensor], origins: list[dict[str, Tensor]]) -> None:
        self.index, self.sites, self.d_model, self.fingerprint = index, index.sites, index.d_model, index.fingerprint
        self._shards, self._origins = x_shards, origins
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
        opened = [_open_shard(folder, shard, index) for shard in index.shards]
        if not opened:
            raise DamagedArtifactError(f"{folder / INDEX} lists no shards; harvest again")
        return cls(index, [tensors["x_TLD"] for tensors in opened], opened)

    @property
    def sequences_T(self) -> Tensor:
        return torch.cat([tensors["sequence_T"] for tensors in self._origins])

    @property
    def positions_T(self) -> Tensor:
        return torch.cat([tensors["position_T"] for tensors in self._origins])

    def rows(self, start: int, stop: int) -> Tensor:
        if not 0 <= start <= stop <= self.n_tokens:
            raise ValueError(f"rows {start} to {stop} of a store of {self.n_tokens} tokens")
        return self.gather(torch.arange(start, stop))

    def gather(self, tokens_T: Tensor) -> Tensor:
        """The tokens of these stored numbers, float32 `[t, L, D]`, not scaled."""
        if len(self._shards) == 1:
            return self._shards[0].index_select(0, tokens_T).float()
        x_TLD = torch.empty(len(tokens_T), len(self.sites), self.d_model)
        shard_T = torch.bucketize(tokens_T, self._ends, right=True)
        first = 0
        for number, end in enumerate(self._ends.tolist()):
            here = (shard_T == number).nonzero().squeeze(1)
            if len(here):
                x_TLD[here] = self._shards[number].index_select(0, tokens_T[here] - first).float()
            first = end
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


def _count_tokens(harvester: ResidualHarvester, tokens: TokenBlocks, max_tokens: int | None) -> int:
    available = len(tokens) * kept_per_block(harvester, tokens)
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, expected at least 1 (or None for all)")
    return available if max_tokens is None else min(available, max_tokens)


def _write_scale(x_TLD: Tensor, sites: tuple[int, ...]) -> tuple[float, ...]:
    if not are_neighbours(sites):
        return ()
    return tuple(estimate_scales(select_sites(x_TLD, sites, "write")).tolist())


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


def _harvest_parts(
    harvester: ResidualHarvester, tokens: TokenBlocks, n_tokens: int, dropped: dict[str, int]
) -> Iterator[dict[str, Tensor]]:
    kept = kept_per_block(harvester, tokens)
    chosen = spread_blocks(len(tokens), -(-n_tokens // kept))
    documents = torch.from_numpy(tokens.documents.copy())
    left = n_tokens
    for numbers in chosen.split(max(1, HARVEST_TOKENS // tokens.sequence_length)):
        harvest = harvester.harvest(tokens[numbers])
        sequence_T = numbers[harvest.sequence_T.cpu()]
        x_TLD = harvest.x_TLD.cpu()
        _require_finite(x_TLD, harvester.sites, sequence_T, harvest.position_T)
        part = {
            "x_TLD": x_TLD,
            "document_T": documents[sequence_T],
            "sequence_T": sequence_T.int(),
            "position_T": harvest.position_T.cpu().int(),
        }
        for reason, count in {**harvest.dropped, "beyond_max_tokens": max(0, len(x_TLD) - left)}.items():
            dropped[reason] = dropped.get(reason, 0) + count
        yield {name: tensor[:left] for name, tensor in part.items()}
        left -= min(left, len(x_TLD))


def _require_finite(x_TLD: Tensor, sites: tuple[int, ...], sequence_T: Tensor, position_T: Tensor) -> None:
    if bool(x_TLD.sum().isfinite()):
        return
    bad = (~x_TLD.isfinite()).any(-1).T.nonzero()  # lowest site first: attention spreads what is not finite
    if len(bad):
        slot, token = bad[0].tolist()
        raise ValueError(
            f"the activation at site {sites[slot]}, block {int(sequence_T[token])}, position "
            f"{int(position_T[token])} is not finite; check the model's weights, or load it in float32"
        )


def _regroup(parts: Iterator[dict[str, Tensor]], size: int) -> Iterator[dict[str, Tensor]]:
    """The same tokens in groups of exactly `size`, the last one smaller."""
    held: list[dict[str, Tensor]] = []
    count = 0
    for part in parts:
        held.append(part)
        count += len(part["x_TLD"])
        if count < size:
            continue
        joined = {name: torch.cat([piece[name] for piece in held]) for name in part}
        whole = count - count % size
        for first in range(0, whole, size):
            yield {name: tensor[first : first + size].contiguous() for name, tensor in joined.items()}
        held, count = [{name: tensor[whole:] for name, tensor in joined.items()}], count - whole
    if count:
        yield {name: torch.cat([piece[name] for piece in held]) for name in held[0]}


def _write_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> Shard:
    from safetensors.torch import save_file

    shard = Shard(file=f"shard-{number:05d}.safetensors", tokens=len(tensors["x_TLD"]))
    save_file(tensors, folder / shard.file)
    return shard


def _open_shard(folder: Path, shard: Shard, index: StoreIndex) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    if Path(shard.file).name != shard.file:
        raise DamagedArtifactError(f"{folder / INDEX} lists {shard.file!r}, which is not a plain file name")
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
