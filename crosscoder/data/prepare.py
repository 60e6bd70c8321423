"""Documents to token blocks, whatever their size: at most a batch of them is in memory.

The documents are read once. Their tokens (or, where a tokenizer is trained first, their text) go to a temporary Arrow
file with a key of 64 bits each; once all keys are known the split is chosen, and blocks are packed from that file.
A preparation that was stopped reads its documents again and takes the tokens of those that it had.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from array import array
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crosscoder.data.split import check_fraction, cut_document, document_bytes, document_key, held_out_limit
from crosscoder.data.spool import Encoded, KeptTokens, reading, token_array, tokens_of, writing
from crosscoder.data.text import DEMO_SOURCE, Document, Documents
from crosscoder.data.tokenizer import count_ids, find_bos, find_end, special_ids, tokenizer_hash, train_tokenizer
from crosscoder.data.tokens import (
    SCHEMA,
    Chunk,
    PreparedTokens,
    TokenBlocks,
    load_tokenizer_of,
    save_tokenizer,
    write_chunks,
)
from crosscoder.foundation.artifact import committed_directory
from crosscoder.foundation.config import require_count
from crosscoder.foundation.console import Progress, say
from crosscoder.foundation.failpoints import failpoint
from crosscoder.foundation.lock import locked, remove_leftovers
from crosscoder.foundation.origin import TextOrigin, TokenOrigin
from crosscoder.foundation.signals import Stopped, safe_points, watching

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 2_000_000
"""Characters (or token ids) of the documents that are looked at together."""
_CHARACTERS_A_TOKEN = 16
"""More than any vocabulary's tokens have on average."""

Batch = tuple[list[Document], list[int]]
"""Documents and their keys."""


@watching()
def prepare_tokens(
    source: str | Documents = DEMO_SOURCE,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    vocab_size: int | None = None,
    sequence_length: int = 128,
    held_out_fraction: float = 0.05,
    seed: int = 0,
    max_documents: int | None = None,
    max_tokens: int | None = None,
    bos: bool | None = None,
    special_tokens: bool = False,
    name: str | None = None,
    revision: str | None = None,
    folder: str | Path | None = None,
    quiet: bool = True,
) -> PreparedTokens:
    """Documents of `source`, split by document and packed; a new tokenizer sees the training documents only.

    max_tokens: reading stops with the document that reaches it. bos: whether every block begins with the tokenizer's
    BOS; by default where the tokenizer itself puts one before a text. special_tokens: read markup that spells special
    tokens as those, and not as text. name, revision: of the tokenizer, for the record. folder: where to write; without
    one the blocks are in a temporary folder and `PreparedTokens.save` copies them. One that was stopped in a folder
    goes on there.

    Raises:
        ValueError: both or neither of `tokenizer` and `vocab_size` are given, the source is too small, or a BOS is
            wanted of a tokenizer that has none.
        FileExistsError: `folder` holds something else.
    """
    if (tokenizer is None) == (vocab_size is None):
        raise ValueError("give either a tokenizer or the vocab_size of one to train, not both and not neither")
    check_fraction(held_out_fraction)
    _check_length(sequence_length, max_tokens)
    if tokenizer is not None:
        find_bos(tokenizer, bos), find_end(tokenizer)
    documents = _documents(source, max_documents)
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
        folder = Path(folder)
        stack.enter_context(locked(folder))
        remove_leftovers(folder)
        # Entered before the work, so that a folder that is not ours is refused before it; `held_out` is whole last.
        held_out_at, train_at = (
            stack.enter_context(committed_directory(folder / side, schema=SCHEMA)) for side in ("held_out", "train")
        )
        made_by = vocab_size if tokenizer is None else tokenizer_hash(tokenizer)
        work = stack.enter_context(_work(folder, f"{documents.settings()} {seed} {special_tokens} {made_by}"))
        settings = {"special_tokens": special_tokens, "max_tokens": max_tokens, "quiet": quiet}
        read = _Reading(documents, work, held_out_fraction=held_out_fraction, seed=seed, **settings)
        tokenizer = read.train_tokenizer(vocab_size or 0) if tokenizer is None else tokenizer
        limit = read.write_tokens(tokenizer)
        origin = TokenOrigin(
            tokenizer=tokenizer_hash(tokenizer),
            name=name or tokenizer.name_or_path or None,
            revision=revision,
            bos=find_bos(tokenizer, bos),
            special_ids=special_ids(tokenizer),
            special_tokens=special_tokens,
            context=sequence_length,
            text=read.origin(),
        )
        about = {"vocab_size": count_ids(tokenizer), "tokenizer_hash": origin.tokenizer, "origin": origin}
        made = {}
        for side, home in (("train", train_at), ("held_out", held_out_at)):
            packed = _Packing(read.side(limit, held_out=side == "held_out"), sequence_length, bos=origin.bos, side=side)
            write_chunks(home, packed)
            made[side] = TokenBlocks.of_chunks(home, sequence_length, n_dropped=packed.n_dropped, **about)
            made[side].describe(home)
        save_tokenizer(tokenizer, folder)
        return PreparedTokens(train=made["train"], held_out=made["held_out"], tokenizer=tokenizer)


def pack_documents(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, sequence_length: int
) -> TokenBlocks:
    """The documents' tokens, each document followed by the end token, laid end to end and cut into blocks in memory.

    What does not fill the last block is dropped and counted in `n_dropped`. Text that spells a special
    token is encoded as text. No BOS is put.
    """
    _check_length(sequence_length)
    packed = _Packing((_encode(texts, tokenizer) for texts, _ in _batches(documents, 0)), sequence_length)
    chunks = list(packed)
    return TokenBlocks(
        [ids for ids, _ in chunks],
        vocab_size=count_ids(tokenizer),
        documents=np.concatenate([numbers for _, numbers in chunks]),
        tokenizer_hash=tokenizer_hash(tokenizer),
        n_dropped=packed.n_dropped,
    )


class _Tally:
    """What went by: the keys of documents (8 bytes each), a hash of all, the first, and sizes."""

    def __init__(self) -> None:
        self.keys, self.content, self.n_documents, self.size = array("Q"), hashlib.sha256(), 0, 0
        self.first: Document = ""

    def add(self, documents: Sequence[Document], keys: Sequence[int], size: int) -> None:
        if not self.n_documents:
            self.first = documents[0]
        self.keys.extend(keys)
        self.n_documents += len(documents)
        self.size += size
        for document in documents:
            self.content.update(document_bytes(document) + b"\0")


class _Reading:
    """One pass over documents, with what must be kept of it in temporary files in `work`."""

    def __init__(
        self,
        documents: Documents,
        work: Path,
        *,
        held_out_fraction: float,
        seed: int,
        special_tokens: bool,
        max_tokens: int | None,
        quiet: bool,
    ) -> None:
        self._documents, self._work = documents, work
        self._texts, self._tokens = work / "texts.arrow", work / "tokens.arrow"
        self._fraction, self._special, self._most, self._quiet = held_out_fraction, special_tokens, max_tokens, quiet
        self._batches: Iterable[Batch] = _batches(documents, seed)
        self._limit: int | None = None
        self._alone: _Tally | None = None  # of a text that is one document, which is cut in two
        self._tally, self._n_documents = _Tally(), 0

    def train_tokenizer(self, vocab_size: int) -> PreTrainedTokenizerBase:
        """A tokenizer of the documents that are not held out; their text is kept, and read from there afterwards."""
        import pyarrow as pa

        most = None if self._most is None else _CHARACTERS_A_TOKEN * self._most
        tally = _Tally()
        shown = Progress("read", None, unit="character", quiet=self._quiet)
        with shown as progress, writing(self._texts, pa.string()) as write:
            for texts, keys in safe_points(self._batches):
                size = sum(map(len, texts))
                write(pa.array(texts, pa.string()), keys)
                tally.add(texts, keys, size)
                progress.advance(size, share=self._documents.share)
                if most is not None and tally.size >= most:
                    break
        self._n_documents = tally.n_documents
        self._limit, cut = self._choose_limit(tally)
        training = (
            text
            for texts, keys in cut or _read_texts(self._texts)
            for text, key in zip(texts, keys)
            if key > self._limit and isinstance(text, str)
        )
        self._batches = cut or _read_texts(self._texts)
        return self._trained(training, vocab_size, tally.content.hexdigest())

    def _trained(self, training: Iterable[str], vocab_size: int, content: str) -> PreTrainedTokenizerBase:
        """The tokenizer of these texts, kept until all is done; tokens of another one's are not used."""
        kept = self._work / f"of-{content[:32]}"
        try:
            trained = load_tokenizer_of(kept)
        except (FileNotFoundError, ValueError):
            for left in self._work.glob("tokens.arrow*"):
                left.unlink()
            save_tokenizer(train_tokenizer(safe_points(training), vocab_size=vocab_size), kept)
            trained = load_tokenizer_of(kept)  # so that it is the same tokenizer after a stop, in every field
        trained.name_or_path = ""
        return trained

    def write_tokens(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Tokenise every document; returns the largest key that is held out."""
        self._documents.vocab_size = count_ids(tokenizer)
        self._tally = self._write(tokenizer, self._batches, self._most)
        if self._limit is None:
            self._limit, cut = self._choose_limit(self._tally)
            if cut is not None:
                self._write(tokenizer, cut, None)
        elif self._alone is None and min(self._tally.keys) > self._limit:
            raise ValueError(
                f"--max-tokens {self._most} is reached after {self._tally.n_documents} documents, none of which is "
                "held out; raise it, or --held-out-fraction"
            )
        self._tally = self._alone or self._tally
        return self._limit

    def origin(self) -> TextOrigin:
        """The record of the text, which is also said."""
        found = self._documents.origin(content=self._tally.content.hexdigest(), n_documents=self._tally.n_documents)
        left = ", ".join(f"{count:,} {reason}" for reason, count in found.skipped.items())
        if not self._quiet:
            say(f"{found.source}: {found.n_documents:,} documents" + (f"; left out: {left}" if left else ""))
        return found

    def side(self, limit: int, *, held_out: bool) -> Iterator[Encoded]:
        """The tokens of one side of the split, and how many each document has."""
        for batch in safe_points(reading(self._tokens)):
            ids, lengths = tokens_of(batch)
            chosen = (batch["key"].to_numpy() <= limit) == held_out
            yield ids[np.repeat(chosen, lengths)], lengths[chosen]

    def _choose_limit(self, tally: _Tally) -> tuple[int, list[Batch] | None]:
        """The largest key that is held out; and of a document that is alone its two parts, the second held out."""
        keys = np.frombuffer(tally.keys, dtype=np.uint64)
        if (keys == keys[0]).all():
            say("the text is one document; its end is held out")
            self._alone = tally
            return 0, [([*cut_document(tally.first, self._fraction)], [1, 0])]
        return held_out_limit(keys, self._fraction), None

    def _write(self, tokenizer: PreTrainedTokenizerBase, batches: Iterable[Batch], most: int | None) -> _Tally:
        import pyarrow as pa

        tally, kept = _Tally(), KeptTokens(self._tokens)
        shown = Progress("prepare", None, unit="token", quiet=self._quiet)
        with shown as progress, writing(self._tokens, pa.list_(pa.int32())) as write:
            for documents, keys in safe_points(batches):
                failpoint("prepare.batch")
                ids, lengths = kept.next_of(keys) or _encode(documents, tokenizer, special_tokens=self._special)
                ends = np.cumsum(lengths)
                n = len(ends) if most is None else min(len(ends), int(np.searchsorted(ends, most - tally.size)) + 1)
                write(token_array(ids[: ends[n - 1]], lengths[:n]), keys[:n])
                tally.add(documents[:n], keys[:n], int(ends[n - 1]))
                progress.advance(int(ends[n - 1]), share=self._share(tally, most))
                if most is not None and tally.size >= most:
                    break
        return tally

    def _share(self, tally: _Tally, most: int | None) -> float | None:
        known = self._documents.share if not self._n_documents else tally.n_documents / self._n_documents
        return min(max(known or 0.0, tally.size / most), 1.0) if most else known


class _Packing:
    """The blocks of documents' tokens, `[b, S]` at a time with the number of each one's document; run through once."""

    def __init__(
        self, parts: Iterable[Encoded], sequence_length: int, *, bos: int | None = None, side: str = ""
    ) -> None:
        self._parts, self._bos, self._side, self.n_dropped = parts, bos, side, 0
        self._width = sequence_length - (bos is not None)

    def __iter__(self) -> Iterator[Chunk]:
        ids, numbers = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32)
        n_documents = n_blocks = 0
        for flat, lengths in self._parts:
            here = np.arange(n_documents, n_documents + len(lengths), dtype=np.int32)
            ids, numbers = np.concatenate([ids, flat]), np.concatenate([numbers, np.repeat(here, lengths)])
            n_documents += len(lengths)
            n_whole = len(ids) // self._width
            if n_whole:
                n_blocks, end = n_blocks + n_whole, n_whole * self._width
                blocks = ids[:end].reshape(n_whole, self._width)
                if self._bos is not None:
                    blocks = np.insert(blocks, 0, self._bos, axis=1)
                yield blocks, numbers[: end : self._width]
                ids, numbers = ids[end:], numbers[end:]
        self.n_dropped = len(ids)
        if not n_blocks:
            what = {"train": "training ", "held_out": "held-out "}.get(self._side, "")
            raise ValueError(
                f"{n_documents} {what}documents give {len(ids)} tokens, fewer than one block of {self._width}; give "
                "more text, a shorter sequence length (--context) or another --held-out-fraction"
            )


def _batches(documents: Iterable[Document], seed: int) -> Iterator[Batch]:
    chosen, keys, size = [], [], 0
    for document in documents:
        chosen.append(document)
        keys.append(document_key(document, seed=seed))
        size += len(document)
        if size >= _BATCH:
            yield chosen, keys
            chosen, keys, size = [], [], 0
    if chosen:
        yield chosen, keys


def _encode(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, *, special_tokens: bool = False
) -> Encoded:
    """The documents' ids, each one's followed by one end token, without a BOS where ids are given; and how many each
    has."""
    end = find_end(tokenizer)
    if len({isinstance(document, str) for document in documents}) > 1:
        raise ValueError("the column holds text in some rows and token ids in others; make it one of both")
    if isinstance(documents[0], str):
        given: Any = list(documents)
        encoded: Any = tokenizer(
            given,
            add_special_tokens=False,
            split_special_tokens=not special_tokens,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
    else:
        begin = find_bos(tokenizer) if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        encoded = [ids[1 if ids[0] == begin else 0 : -1 if ids[-1] == end else None] for ids in documents]
    found = [np.asarray([*ids, end], dtype=np.int32) for ids in encoded]
    return np.concatenate(found), np.array([len(one) for one in found])


def _read_texts(path: Path) -> Iterator[Batch]:
    for batch in reading(path):
        yield batch["item"].to_pylist(), batch["key"].to_pylist()


def _documents(source: str | Documents, max_documents: int | None) -> Documents:
    if isinstance(source, str):
        return Documents(source, max_documents=max_documents)
    if max_documents is not None:
        raise ValueError("max_documents would change nothing here; give it to Documents")
    return source


@contextlib.contextmanager
def _work(folder: Path, key: str) -> Generator[Path]:
    """A folder for what is needed meanwhile, where what a stopped preparation of this key left is there again."""
    work = folder / f".part-prepare-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    for left in folder.glob(".part-prepare-*"):
        if left != work:
            shutil.rmtree(left, ignore_errors=True)
    work.mkdir(exist_ok=True)
    try:
        yield work
    except Stopped as stop:
        raise Stopped(f"{stop}; the tokens of what was read are kept in {work}") from stop
    except ValueError:  # would come again
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work, ignore_errors=True)


def _check_length(sequence_length: int, max_tokens: int | None = None) -> None:
    require_count(max_tokens=max_tokens)
    require_count(2, sequence_length=sequence_length)
