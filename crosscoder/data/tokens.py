"""Token blocks of one length: made from documents and kept as an Arrow file, with the tokenizer that made them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from crosscoder.data.text import DEMO_SOURCE, load_documents, split_documents
from crosscoder.foundation.artifact import (
    DamagedArtifactError,
    committed_directory,
    read_json,
    verify_directory,
    write_json,
)
from crosscoder.foundation.origin import TokenOrigin

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SCHEMA = "crosscoder.tokens/1"
TOKENIZER_SCHEMA = "crosscoder.tokenizer/1"
END_OF_TEXT = "<|endoftext|>"
N_BYTES = 256
_ARROW_FILE = "data-00000-of-00001.arrow"
_RECORD = "tokens.json"
_CHUNK = 1000
"""Documents that a tokenizer is given at once."""


def train_tokenizer(documents: Sequence[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with one special token, `<|endoftext|>` (id 0: begin, end and padding).

    Any text can be encoded and decoded again. It has fewer than `vocab_size` entries if the documents have
    too few pairs to merge. The same documents give the same tokenizer.

    Raises:
        ValueError: `vocab_size` leaves no room for the 256 bytes and the special token.
    """
    if vocab_size < N_BYTES + 1:
        raise ValueError(f"vocab_size is {vocab_size}, expected at least {N_BYTES + 1} (all bytes and {END_OF_TEXT})")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the tokenizer's rules and vocabulary, whatever its padding and truncation settings."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        rules = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps([rules, tokenizer.eos_token_id], sort_keys=True).encode()).hexdigest()


class TokenBlocks:
    """Blocks of exactly S token ids; `documents` numbers, for each block, the document of its first token."""

    def __init__(
        self,
        ids_BS: np.ndarray | Tensor,
        *,
        vocab_size: int,
        documents: Sequence[int] | np.ndarray | None = None,
        tokenizer_hash: str = "",
        n_dropped: int = 0,
    ) -> None:
        ids = ids_BS.cpu().numpy() if isinstance(ids_BS, Tensor) else np.asarray(ids_BS)
        if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise ValueError(f"expected whole numbers [blocks, sequence length], got {ids.dtype} {list(ids.shape)}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"token ids run from {low} to {high}, expected 0 to {vocab_size - 1}: the tokenizer "
                "does not belong to this vocabulary size"
            )
        self._ids = ids.astype(np.int32, copy=False)
        self.documents = np.asarray(range(len(ids)) if documents is None else documents, dtype=np.int32)
        if self.documents.shape != (len(ids),):
            raise ValueError(f"expected one document number a block, got {self.documents.shape} for {len(ids)} blocks")
        self.vocab_size, self.tokenizer_hash, self.n_dropped = vocab_size, tokenizer_hash, n_dropped
        self.origin: TokenOrigin | None = None

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, indices: int | slice | Tensor) -> Tensor:
        """The blocks at `indices` as int64 `[b, S]` (or `[S]` for one number), copied."""
        # One number in a tensor would be taken for a plain index.
        chosen = indices.numpy() if isinstance(indices, Tensor) else indices
        return torch.from_numpy(np.array(self._ids[chosen], dtype=np.int64))

    @property
    def sequence_length(self) -> int:
        return self._ids.shape[1]

    @property
    def n_tokens(self) -> int:
        return self._ids.size

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the ids and documents, the tokenizer's hash, the vocabulary size and S."""
        digest = hashlib.sha256(f"{self.tokenizer_hash} {self.vocab_size} {self._ids.shape}".encode())
        digest.update(np.ascontiguousarray(self._ids, dtype="<i4").tobytes())
        digest.update(np.ascontiguousarray(self.documents, dtype="<i4").tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write a verified folder that `TokenBlocks.load` and `datasets.load_from_disk` both read."""
        with committed_directory(folder, schema=SCHEMA) as temporary:
            _write_arrow(temporary / _ARROW_FILE, self._ids, self.documents)
            value = {"dtype": "int32", "_type": "Value"}
            ids = {"feature": value, "length": self.sequence_length, "_type": "List"}
            write_json(temporary / "dataset_info.json", {"features": {"input_ids": ids, "document": value}})
            state = dict.fromkeys(("_format_columns", "_format_type", "_split"))
            state |= {"_data_files": [{"filename": _ARROW_FILE}], "_fingerprint": self.fingerprint[:16]}
            state |= {"_format_kwargs": {}, "_output_all_columns": False}
            write_json(temporary / "state.json", state)
            known = ("sequence_length", "vocab_size", "n_dropped", "tokenizer_hash", "fingerprint")
            counts = {"n_blocks": len(self), "n_documents": len(np.unique(self.documents))}
            write_json(temporary / _RECORD, {**counts, **{key: getattr(self, key) for key in known}})

    @classmethod
    def load(cls, folder: str | Path) -> TokenBlocks:
        """The blocks of a folder, checked against its manifest and fingerprint, read as needed.

        Raises:
            DamagedArtifactError: a file is altered or missing, or the content is not what the record says.
        """
        folder = Path(folder)
        verify_directory(folder, schema=SCHEMA)
        record = read_json(folder / _RECORD)
        ids, documents = _read_arrow(folder / _ARROW_FILE, record["sequence_length"])
        known = {key: record[key] for key in ("vocab_size", "tokenizer_hash", "n_dropped")}
        blocks = cls(ids, documents=documents, **known)
        if blocks.fingerprint != record["fingerprint"]:
            raise DamagedArtifactError(f"{folder}: the ids do not match the fingerprint in {_RECORD}; prepare it again")
        return blocks


def pack_documents(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, sequence_length: int
) -> TokenBlocks:
    """The documents' tokens, each document followed by the end token, laid end to end and cut into blocks.

    What does not fill the last block is dropped and counted in `n_dropped`. Text that spells a special
    token is encoded as text.

    Raises:
        ValueError: S < 2, no end token, or too little text for one block.
    """
    if sequence_length < 2:
        raise ValueError(f"sequence_length is {sequence_length}, expected at least 2")
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ValueError("the tokenizer has no end-of-text token to separate documents; set tokenizer.eos_token")
    pieces: list[np.ndarray] = []
    for start in range(0, len(documents), _CHUNK):
        encoded = tokenizer(
            list(documents[start : start + _CHUNK]),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        pieces += [np.asarray([*ids, end], dtype=np.int32) for ids in encoded]
    flat = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32)
    n_blocks = len(flat) // sequence_length
    if n_blocks == 0:
        raise ValueError(
            f"{len(documents)} documents give {len(flat)} tokens, fewer than one block of {sequence_length}; "
            "give more text or a shorter sequence length"
        )
    ends = np.cumsum([len(piece) for piece in pieces])
    firsts = np.arange(n_blocks) * sequence_length
    return TokenBlocks(
        flat[: n_blocks * sequence_length].reshape(n_blocks, sequence_length),
        vocab_size=len(tokenizer),
        documents=np.searchsorted(ends, firsts, side="right"),
        tokenizer_hash=tokenizer_hash(tokenizer),
        n_dropped=len(flat) - n_blocks * sequence_length,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedTokens:
    """Blocks to train on, blocks never trained on (other documents), and the tokenizer that made both."""

    train: TokenBlocks
    held_out: TokenBlocks
    tokenizer: PreTrainedTokenizerBase

    def save(self, folder: str | Path) -> None:
        """Write `train/`, `held_out/` and `tokenizer/`; what is already there and the same is left alone."""
        folder = Path(folder)
        if _kept(lambda at: tokenizer_hash(_load_tokenizer(at)), folder / "tokenizer") != tokenizer_hash(
            self.tokenizer
        ):
            with committed_directory(folder / "tokenizer", schema=TOKENIZER_SCHEMA) as temporary:
                self.tokenizer.save_pretrained(temporary)
        for name, blocks in (("train", self.train), ("held_out", self.held_out)):
            if _kept(lambda at: TokenBlocks.load(at).fingerprint, folder / name) != blocks.fingerprint:
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
        tokenizer = _load_tokenizer(folder / "tokenizer")
        made_by = tokenizer_hash(tokenizer)
        for name, blocks in (("train", train), ("held_out", held_out)):
            if (blocks.tokenizer_hash, blocks.sequence_length) != (made_by, train.sequence_length):
                raise DamagedArtifactError(
                    f"{folder / name} was made by another tokenizer or for another sequence length than the rest of "
                    f"{folder}; prepare the tokens again"
                )
        return cls(train=train, held_out=held_out, tokenizer=tokenizer)


def prepare_tokens(
    source: str = DEMO_SOURCE,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    vocab_size: int | None = None,
    sequence_length: int = 128,
    held_out_fraction: float = 0.05,
    seed: int = 0,
    max_documents: int | None = None,
) -> PreparedTokens:
    """Documents of `source`, split by document and packed; a new tokenizer sees the training documents only.

    Raises:
        ValueError: both or neither of `tokenizer` and `vocab_size` are given, or the source is too small.
    """
    if (tokenizer is None) == (vocab_size is None):
        raise ValueError("give either a tokenizer or the vocab_size of one to train, not both and not neither")
    documents = load_documents(source, max_documents=max_documents)
    train, held_out = split_documents(documents, held_out_fraction=held_out_fraction, seed=seed)
    if tokenizer is None:
        tokenizer = train_tokenizer(train, vocab_size=vocab_size or 0)
    return PreparedTokens(
        train=pack_documents(train, tokenizer, sequence_length=sequence_length),
        held_out=pack_documents(held_out, tokenizer, sequence_length=sequence_length),
        tokenizer=tokenizer,
    )


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    verify_directory(folder, schema=TOKENIZER_SCHEMA)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
    return tokenizer


def _kept(fingerprint: Callable[[Path], str], folder: Path) -> str | None:
    """The fingerprint of what is kept in `folder`, or None where nothing whole is."""
    try:
        return fingerprint(folder)
    except (FileNotFoundError, DamagedArtifactError):
        return None


def _write_arrow(path: Path, ids_BS: np.ndarray, documents: np.ndarray) -> None:
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(ids_BS).reshape(-1))
    ids = pa.FixedSizeListArray.from_arrays(flat, ids_BS.shape[1])
    batch = pa.record_batch({"input_ids": ids, "document": pa.array(documents)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)


def _read_arrow(path: Path, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow as pa

    try:
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all().combine_chunks()
        ids = table.column("input_ids").chunk(0).flatten().to_numpy()
        documents = table.column("document").chunk(0).to_numpy()
        return ids.reshape(-1, sequence_length), documents
    except (pa.ArrowException, KeyError, IndexError, ValueError) as error:
        raise DamagedArtifactError(f"{path} does not hold token blocks ({error}); prepare the tokens again") from error
