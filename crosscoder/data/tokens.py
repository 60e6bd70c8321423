"""Token blocks of one length, kept as an Arrow file that is mapped, not read, with the tokenizer that made them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from crosscoder.data.tokenizer import count_ids, tokenizer_hash
from crosscoder.foundation.artifact import (
    DamagedArtifactError,
    committed_directory,
    read_json,
    verify_directory,
    write_json,
)
from crosscoder.foundation.config import from_mapping, to_mapping
from crosscoder.foundation.damage import reading
from crosscoder.foundation.origin import TokenOrigin

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCHEMA = "crosscoder.tokens/1"
TOKENIZER_SCHEMA = "crosscoder.tokenizer/1"
_ARROW_FILE = "data-00000-of-00001.arrow"
_RECORD = "tokens.json"
_RUN = 2**20
"""Ids that are looked at together when all are."""

Chunk = tuple[np.ndarray, np.ndarray]
"""Blocks, `[b, S]`, and the document of each one's first token, `[b]`."""

MOST_IDS = 2**24
MOST_GROUPS = 64
"""Of documents, that are left out one at a time."""


class TokenBlocks:
    """Blocks of exactly S token ids; `documents` numbers, for each block, the document of its first token.

    `ids_BS` is one array or several that follow one another, such as the parts of a file, which stay where they are.
    `origin` says what text and tokenizer they were made of; None in folders that were written before it was kept.
    """

    def __init__(
        self,
        ids_BS: np.ndarray | Tensor | Sequence[np.ndarray],
        *,
        vocab_size: int,
        documents: Sequence[int] | np.ndarray | None = None,
        tokenizer_hash: str = "",
        n_dropped: int = 0,
        origin: TokenOrigin | None = None,
        mapped: mmap.mmap | None = None,
    ) -> None:
        given = [ids_BS.cpu().numpy()] if isinstance(ids_BS, Tensor) else ids_BS
        chunks = [given] if isinstance(given, np.ndarray) else list(given)
        for ids in chunks or [np.zeros(0)]:
            if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu" or ids.shape[1] != chunks[0].shape[1]:
                raise ValueError(f"expected whole numbers [blocks, sequence length], got {ids.dtype} {list(ids.shape)}")
        self.sequence_length, self._mapped = int(chunks[0].shape[1]), mapped
        self._chunks, self._ends = chunks, np.cumsum([len(ids) for ids in chunks])
        bounds = [(int(ids.min()), int(ids.max())) for ids in self._runs()]
        low, high = min(low for low, _ in bounds), max(high for _, high in bounds)
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"token ids run from {low} to {high}, expected 0 to {vocab_size - 1}: the tokenizer "
                "does not belong to this vocabulary size"
            )
        self._chunks = [ids.astype(np.int32, copy=False) for ids in chunks]
        self.documents = np.asarray(range(len(self)) if documents is None else documents, dtype=np.int32)
        if self.documents.shape != (len(self),):
            raise ValueError(f"expected one document number a block, got {self.documents.shape} for {len(self)} blocks")
        self.vocab_size, self.tokenizer_hash, self.n_dropped = vocab_size, tokenizer_hash, n_dropped
        self.origin = origin

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __repr__(self) -> str:
        text = "" if self.origin is None or self.origin.text is None else f", of {self.origin.text.source}"
        return f"TokenBlocks({len(self):,} blocks of {self.sequence_length} tokens, {self.vocab_size:,} ids{text})"

    def __getitem__(self, indices: int | slice | Tensor) -> Tensor:
        """The blocks at `indices` as int64 `[b, S]` (or `[S]` for one number), copied."""
        # One number in a tensor would be taken for a plain index.
        indices = indices.numpy() if isinstance(indices, Tensor) else indices
        if len(self._chunks) == 1:
            return torch.from_numpy(np.array(self._chunks[0][indices], dtype=np.int64))
        wanted = np.arange(len(self))[indices]
        rows = np.atleast_1d(wanted)
        where, found = np.searchsorted(self._ends, rows, side="right"), np.empty((len(rows), self.sequence_length), int)
        for number in np.unique(where):
            here = where == number
            found[here] = self._chunks[number][rows[here] - self._ends[number] + len(self._chunks[number])]
        return torch.from_numpy(found.reshape(*wanted.shape, self.sequence_length))

    @property
    def n_tokens(self) -> int:
        return len(self) * self.sequence_length

    @property
    def n_text_tokens(self) -> int:
        """Without the BOS of every block."""
        return self.n_tokens - len(self) * (self.origin is not None and self.origin.bos is not None)

    @functools.cached_property
    def n_documents(self) -> int:
        return len(np.unique(self.documents))

    @functools.cached_property
    def document_groups(self) -> np.ndarray:
        """For each block the group of its document, from 0: whole documents, each its own group where they are few.

        What is left out, a group at a time, to know what of a number's variance is the text's; with thousands of
        documents that would be as many numbers of everything.
        """
        return np.unique(self.documents, return_inverse=True)[1] % MOST_GROUPS

    @property
    def n_groups(self) -> int:
        return min(self.n_documents, MOST_GROUPS)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the ids and documents, the tokenizer's hash, the vocabulary size and S."""
        shape = (len(self), self.sequence_length)
        digest = hashlib.sha256(f"{self.tokenizer_hash} {self.vocab_size} {shape}".encode())
        for ids in self._runs():
            digest.update(np.ascontiguousarray(ids, dtype="<i4").data)
        digest.update(np.ascontiguousarray(self.documents, dtype="<i4").data)
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write a verified folder that `TokenBlocks.load` and `datasets.load_from_disk` both read."""
        with committed_directory(folder, schema=SCHEMA) as temporary:
            starts = self._ends - [len(ids) for ids in self._chunks]
            write_chunks(
                temporary, ((ids, self.documents[at : at + len(ids)]) for at, ids in zip(starts, self._chunks))
            )
            self.describe(temporary)

    def describe(self, folder: Path) -> None:
        """Write beside the chunks in `folder` what they are."""
        value = {"dtype": "int32", "_type": "Value"}
        ids = {"feature": value, "length": self.sequence_length, "_type": "List"}
        write_json(folder / "dataset_info.json", {"features": {"input_ids": ids, "document": value}})
        state = dict.fromkeys(("_format_columns", "_format_type", "_split"))
        state |= {"_data_files": [{"filename": _ARROW_FILE}], "_fingerprint": self.fingerprint[:16]}
        state |= {"_format_kwargs": {}, "_output_all_columns": False}
        write_json(folder / "state.json", state)
        known = ("sequence_length", "vocab_size", "n_dropped", "tokenizer_hash", "fingerprint")
        counts: dict[str, Any] = {"n_blocks": len(self), "n_documents": self.n_documents}
        origin = {} if self.origin is None else {"origin": to_mapping(self.origin)}
        write_json(folder / _RECORD, {**counts, **origin, **{key: getattr(self, key) for key in known}})

    @classmethod
    def load(cls, folder: str | Path) -> TokenBlocks:
        """The blocks of a folder, checked against its manifest and fingerprint, read as needed.

        Raises:
            DamagedArtifactError: a file is altered or missing, or the content is not what the record says.
        """
        folder = Path(folder)
        verify_directory(folder, schema=SCHEMA, required=(_ARROW_FILE, _RECORD))
        record = read_json(folder / _RECORD)
        with reading(folder, mend="prepare it again"):
            kinds = {
                "vocab_size": int,
                "n_dropped": int,
                "sequence_length": int,
                "tokenizer_hash": str,
                "n_blocks": int,
            }
            if wrong := [key for key, kind in kinds.items() if type(record[key]) is not kind]:
                raise ValueError(f"{_RECORD}: {wrong[0]} is {record[wrong[0]]!r:.80}")
            length, size = record["sequence_length"], (folder / _ARROW_FILE).stat().st_size
            if length < 1 or record["n_blocks"] < 1 or 4 * record["n_blocks"] * (length + 1) > size:
                raise ValueError(f"{_RECORD} says {record['n_blocks']} blocks of {length}; the file has {size} bytes")
            origin = from_mapping(TokenOrigin, record["origin"], where=str(folder)) if record.get("origin") else None
            known = {key: record[key] for key in ("vocab_size", "tokenizer_hash", "n_dropped")}
            blocks = cls.of_chunks(folder, length, origin=origin, **known)
            if (len(blocks), blocks.fingerprint) != (record["n_blocks"], record["fingerprint"]):
                raise ValueError(f"the ids do not match the fingerprint in {_RECORD}")
        return blocks

    @classmethod
    def of_chunks(cls, folder: Path, sequence_length: int, **known: Any) -> TokenBlocks:
        """What `write_chunks` wrote into `folder`, through a memory map; `known` is the rest of what they are."""
        import pyarrow as pa

        path = folder / _ARROW_FILE
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            table = pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()
            if table.schema.types != (kinds := [pa.list_(pa.int32(), sequence_length), pa.int32()]):
                raise ValueError(f"columns are {table.schema.types}, expected {kinds}")
            table.validate(full=True)
            ids = [part.flatten().to_numpy().reshape(-1, sequence_length) for part in table.column("input_ids").chunks]
            documents = np.concatenate([part.to_numpy() for part in table.column("document").chunks])
        except (pa.ArrowException, KeyError, OSError, ValueError) as error:
            raise DamagedArtifactError(f"{path} does not hold token blocks ({error}); prepare it again") from error
        return cls(ids, documents=documents, mapped=mapped, **known)

    def _runs(self) -> Iterator[np.ndarray]:
        """All ids, some at a time; what was read of a file does not stay in memory."""
        n_rows = max(1, _RUN // self.sequence_length)
        for ids in self._chunks:
            for start in range(0, len(ids), n_rows):
                yield ids[start : start + n_rows]
                if self._mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                    self._mapped.madvise(mmap.MADV_DONTNEED)


def write_chunks(folder: Path, chunks: Iterable[Chunk]) -> None:
    """Write blocks to the Arrow file in `folder`, chunk by chunk as they come."""
    import pyarrow as pa

    writer = None
    with pa.OSFile(str(folder / _ARROW_FILE), "wb") as sink:
        for ids_bS, documents_b in chunks:
            flat = pa.array(np.ascontiguousarray(ids_bS, dtype=np.int32).reshape(-1))
            ids = pa.FixedSizeListArray.from_arrays(flat, ids_bS.shape[1])
            batch = pa.record_batch({"input_ids": ids, "document": pa.array(documents_b, type=pa.int32())})
            writer = writer or pa.ipc.new_stream(sink, batch.schema)
            writer.write_batch(batch)
        if writer is not None:
            writer.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedTokens:
    """Blocks to train on, blocks never trained on (other documents), and the tokenizer that made both."""

    train: TokenBlocks
    held_out: TokenBlocks
    tokenizer: PreTrainedTokenizerBase

    def save(self, folder: str | Path) -> None:
        """Write `train/`, `held_out/` and `tokenizer/`; what is already there and the same is left alone."""
        folder = Path(folder)
        save_tokenizer(self.tokenizer, folder)
        for name, blocks in (("train", self.train), ("held_out", self.held_out)):
            if _kept(lambda at: _same(TokenBlocks.load(at)), folder / name) != _same(blocks):
                blocks.save(folder / name)

    @classmethod
    def load(cls, folder: str | Path) -> PreparedTokens:
        """The three parts, each verified, after checking that one tokenizer made both sets of blocks.

        Raises:
            FileNotFoundError: a part is missing.
            DamagedArtifactError: a part is altered, or the parts do not belong together.
        """
        folder = Path(folder)
        train, held_out = TokenBlocks.load(folder / "train"), TokenBlocks.load(folder / "held_out")
        tokenizer = load_kept_tokenizer(folder / "tokenizer")
        made_by = tokenizer_hash(tokenizer)
        for name, blocks in (("train", train), ("held_out", held_out)):
            made = (blocks.tokenizer_hash, blocks.sequence_length, blocks.origin)
            if made != (made_by, train.sequence_length, train.origin):
                raise DamagedArtifactError(
                    f"{folder / name} was made by another tokenizer, of another text or in another way than the rest "
                    f"of {folder}; prepare the tokens again"
                )
        return cls(train=train, held_out=held_out, tokenizer=tokenizer)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Keep the tokenizer of a token folder in it, unless the same one is there."""
    if _kept(lambda at: tokenizer_hash(load_kept_tokenizer(at)), folder / "tokenizer") != tokenizer_hash(tokenizer):
        with committed_directory(folder / "tokenizer", schema=TOKENIZER_SCHEMA) as temporary:
            tokenizer.save_pretrained(temporary)


def load_tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a token folder, verified; raises as `verify_directory`."""
    return load_kept_tokenizer(folder / "tokenizer")


def _same(blocks: TokenBlocks) -> tuple[str, TokenOrigin | None]:
    return blocks.fingerprint, blocks.origin


def load_kept_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a token folder, verified; nothing but what its manifest lists is read, and no code is run."""
    from transformers import AutoTokenizer

    verify_directory(folder, schema=TOKENIZER_SCHEMA, closed=True)
    with reading(folder, mend="prepare the tokens again"):
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        except OSError as error:  # what `transformers` says of a folder without a tokenizer
            raise ValueError(f"no tokenizer: {error}") from error
        if (n_ids := count_ids(tokenizer)) > MOST_IDS:  # its library counts through all ids that are missing
            raise ValueError(f"the tokenizer has an id {n_ids - 1}, more than any vocabulary has")
    return tokenizer


def _kept(fingerprint: Callable[[Path], Any], folder: Path) -> Any:
    """The fingerprint of what is kept in `folder`, or None where nothing whole is."""
    try:
        return fingerprint(folder)
    except (FileNotFoundError, DamagedArtifactError):
        return None
