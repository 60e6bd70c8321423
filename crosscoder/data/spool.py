"""Temporary Arrow files of documents' text or tokens, written batch by batch and read again after a stop."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CHECKSUM = b"crc32"
Encoded = tuple[np.ndarray, np.ndarray]
"""The tokens of some documents, `[T]`, and how many each has, `[n]`."""


@contextlib.contextmanager
def writing(path: Path, kind: Any) -> Generator[Callable[[Any, list[int]], None]]:
    """Yields what writes a batch of items and their keys, with a checksum of both."""
    import pyarrow as pa

    schema = pa.schema({"item": kind, "key": pa.uint64()})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:

        def write(items: Any, keys: list[int]) -> None:
            batch = pa.record_batch([items, pa.array(keys, pa.uint64())], schema=schema)
            writer.write_batch(batch, custom_metadata={CHECKSUM: _checksum(batch)})

        yield write


def reading(path: Path) -> Iterator[Any]:
    """The file's batches, read rather than mapped: memory holds one."""
    import pyarrow as pa

    with pa.OSFile(str(path)) as source, pa.ipc.open_stream(source) as reader:
        yield from reader


def token_array(ids: np.ndarray, lengths: np.ndarray) -> Any:
    """What `writing` takes of the tokens of some documents."""
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids))


def tokens_of(batch: Any) -> Encoded:
    """What `token_array` was made of."""
    return batch["item"].values.to_numpy(), np.diff(batch["item"].offsets.to_numpy())


class KeptTokens:
    """The batches of tokens that a stopped preparation left in a file, in their order, as far as they are whole.

    The file is put aside, so that a new one can be written in its place; of two that were put aside the longer stays.
    """

    def __init__(self, path: Path) -> None:
        aside = path.with_name(f"{path.name}.kept")
        if path.is_file() and not (aside.is_file() and aside.stat().st_size > path.stat().st_size):
            path.replace(aside)
        self._batches = _whole_batches(aside) if aside.is_file() else iter(())

    def next_of(self, keys: Sequence[int]) -> Encoded | None:
        """The tokens of the next batch, if it is of documents of these keys; nothing any more once it is not."""
        batch = next(self._batches, None)
        if batch is None or batch["key"].to_pylist() != list(keys):
            self._batches = iter(())
            return None
        return tokens_of(batch)


def _whole_batches(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    try:
        with pa.OSFile(str(path)) as source, pa.ipc.open_stream(source) as reader:
            while True:
                found = reader.read_next_batch_with_custom_metadata()
                said = (found.custom_metadata or {}).get(CHECKSUM)
                if said != _checksum(found.batch):
                    return
                yield found.batch
    except (pa.ArrowException, StopIteration, EOFError, OSError):
        return  # the end, or a batch that its writer did not finish


def _checksum(batch: Any) -> bytes:
    value = 0
    for column in batch.columns:
        for buffer in column.buffers():
            value = zlib.crc32(b"" if buffer is None else buffer, value)
    return str(value).encode()
