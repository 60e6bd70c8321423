"""Which documents are held out: a function of their content, so that no text is on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from crosscoder.data.text import Document


def document_key(document: Document, *, seed: int) -> int:
    """The first 64 bits of a hash of (seed, content)."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0".encode() + document_bytes(document)).digest()[:8], "big")


def document_bytes(document: Document) -> bytes:
    if isinstance(document, str):
        return document.encode("utf-8", "surrogatepass")
    return np.asarray(document, dtype="<i8").tobytes()


def held_out_limit(keys: np.ndarray, fraction: float) -> int:
    """The largest key that is held out: the first `fraction` of distinct keys are, at least one and never all.

    `keys` is sorted in place: of many millions there should not be two copies.
    """
    keys.sort()
    is_first = np.ones(len(keys), dtype=bool)
    np.not_equal(keys[1:], keys[:-1], out=is_first[1:])
    firsts = np.flatnonzero(is_first)
    if len(firsts) < 2:
        raise ValueError(
            f"{len(keys)} documents with {len(firsts)} distinct text cannot be split; give at least two different ones"
        )
    n_held_out = min(max(round(fraction * len(firsts)), 1), len(firsts) - 1)
    return int(keys[firsts[n_held_out - 1]])


def split_documents(
    documents: Sequence[str], *, held_out_fraction: float = 0.05, seed: int = 0
) -> tuple[list[str], list[str]]:
    """`(train, held_out)`, each in the given order; a function of the documents' content and `seed` only.

    Distinct documents are ranked by a hash of (seed, content) and the first `held_out_fraction` of them (at
    least one, never all) is held out, so copies of a document stay on one side.
    """
    check_fraction(held_out_fraction)
    keys = [document_key(document, seed=seed) for document in documents]
    limit = held_out_limit(np.array(keys, dtype=np.uint64), held_out_fraction)
    train = [document for document, key in zip(documents, keys) if key > limit]
    return train, [document for document, key in zip(documents, keys) if key <= limit]


def check_fraction(held_out_fraction: float) -> None:
    """A ValueError unless a share of the documents, and not all of them, is held out."""
    if not 0 < held_out_fraction < 1:
        raise ValueError(f"held_out_fraction is {held_out_fraction}, expected a number between 0 and 1, exclusive")


def cut_document(document: Document, fraction: float) -> tuple[Document, Document]:
    """One document as the part to train on and its last `fraction`, cut at a line's end or else between two words."""
    at = max(1, round(len(document) * (1 - fraction)))
    if not isinstance(document, str):
        return document[:at], document[at:]
    for end in ("\n", " "):
        before, after = document.rfind(end, 0, at) + 1, document.find(end, at) + 1
        for cut in (before, after):
            if document[:cut].strip() and document[cut:].strip():
                return document[:cut], document[cut:]
    raise ValueError("the text is one word, of which nothing can be held out; give more text")
