"""Two caches keyed by the identity and version of tensors: transposes of codes, and row norms of gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Transpose = TypeVar("Transpose")


class _Entry(NamedTuple):
    key: tuple[object, ...]
    features_P: Tensor  # held, so that its memory is not given to another code
    offsets: Tensor
    offsets_version: tuple[object, ...]
    copies: tuple[Tensor, Tensor] | None
    transpose: object

    def is_unwritten(self) -> bool:
        """Whether the code is known to hold the numbers that it was transposed from."""
        kept = self.copies
        return kept is not None and torch.equal(self.features_P, kept[0]) and torch.equal(self.offsets, kept[1])

    def has_offsets(self, offsets: Tensor) -> bool:
        """Whether the entry was made from these offsets, or from equal ones that nobody has written to since."""
        if _version(offsets) == self.offsets_version:
            return True
        return offsets.is_cpu and _version(self.offsets) == self.offsets_version and torch.equal(offsets, self.offsets)


class _Codes:
    unwritten = False


@contextlib.contextmanager
def codes_unwritten() -> Generator[None]:
    """While it lasts codes are made, and nobody else has them to write to: transposes are kept without a check."""
    before, _Codes.unwritten = _Codes.unwritten, True
    try:
        yield
    finally:
        _Codes.unwritten = before


class TransposeCache(Generic[Transpose]):
    """A function that transposes a code and keeps the last answer: a backward pass needs it several times.

    The entry holds its inputs, so their memory cannot be given to another code, and their version counters tell
    whether they were written to since. Torch does not count all writes, such as those through `.data`, and those of
    collectives: the numbers themselves are compared with copies, but where no code is written (`codes_unwritten`).
    Offsets that were made anew may be equal instead: on the CPU that costs nothing to find out.
    """

    def __init__(self, make: Callable[[Tensor, Tensor, int], Transpose]) -> None:
        self._make = make
        self._entry: _Entry | None = None

    def __call__(self, features_P: Tensor, offsets: Tensor, n_features: int) -> Transpose:
        """The cached transpose if it was made from these inputs, else a new one."""
        if features_P.is_inference() or offsets.is_inference():  # they have no version counter
            return self._make(features_P, offsets, n_features)
        key, entry = (n_features, *_version(features_P)), self._entry
        if (
            entry is not None
            and entry.key == key
            and entry.has_offsets(offsets)
            and (_Codes.unwritten or entry.is_unwritten())
        ):
            return entry.transpose  # ty: ignore[invalid-explicit-return]
        transpose = self._make(features_P, offsets, n_features)
        copies = None if _Codes.unwritten else (features_P.detach().clone(), offsets.detach().clone())
        self._entry = _Entry(key, features_P.detach(), offsets.detach(), _version(offsets), copies, transpose)
        return transpose


def _version(tensor: Tensor) -> tuple[object, ...]:
    storage = tensor.untyped_storage()._cdata
    return (storage, tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


class _Squares(NamedTuple):
    storage: StorageWeakRef
    where: tuple[object, ...]
    squares_R: Tensor


class SquaresCache:
    """Squared row norms of the last gradients, noted by the kernels that wrote them.

    Clipping needs them a moment later, and computing them again reads a whole table. An entry keeps no memory of its
    gradient alive: it ends with the gradient, and with the first write to it that torch counts. Not counted are those
    through `.data` and those of collectives, so that only who knows that there was none may ask (`untouched`).
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: list[_Squares] = []

    def note(self, gradient: Tensor, squares_R: Tensor) -> None:
        """Keep the squared row norms of a contiguous gradient that was just made."""
        alive = [entry for entry in self._entries if not entry.storage.expired()]
        entry = _Squares(StorageWeakRef(gradient.untyped_storage()), _where(gradient), squares_R)
        self._entries = [*alive, entry][-self._size :]

    def find(self, gradient_RN: Tensor) -> Tensor | None:
        """The squared norms of these rows, if nobody has written to them since; None where they are not known."""
        where, key = _where(gradient_RN), gradient_RN.untyped_storage()._cdata
        for entry in self._entries:
            is_same = entry.storage.cdata == key and not entry.storage.expired() and entry.where == where
            if is_same and entry.squares_R.numel() == gradient_RN.shape[0]:
                return entry.squares_R
        return None


def _where(tensor: Tensor) -> tuple[object, ...]:
    version = None if tensor.is_inference() else tensor._version
    return (tensor.data_ptr(), version, tensor.numel(), tensor.is_contiguous())
