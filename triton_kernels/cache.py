"""Two caches keyed by the identity and version of tensors: transposes of codes, and row norms of gradients."""

from __future__ import annotations

from collections.abc import Callable
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
    transpose: object

    def has_offsets(self, offsets: Tensor) -> bool:
        """Whether the entry was made from these offsets, or from equal ones that nobody has written to since."""
        if _version(offsets) == self.offsets_version:
            return True
        return offsets.is_cpu and _version(self.offsets) == self.offsets_version and torch.equal(offsets, self.offsets)


class TransposeCache(Generic[Transpose]):
    """A function that transposes a code and keeps the last answer: a backward pass needs it several times.

    The entry holds its inputs, so their memory cannot be given to another code, and their version counters tell
    whether they were written to since. Writes that torch does not count, through `.data` or `.numpy()`, go unseen.
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
        if entry is not None and entry.key == key and entry.has_offsets(offsets):
            return entry.transpose  # ty: ignore[invalid-explicit-return]
        transpose = self._make(features_P, offsets, n_features)
        self._entry = _Entry(key, features_P.detach(), offsets.detach(), _version(offsets), transpose)
        return transpose

    def clear(self) -> None:
        """Forget the transpose."""
        self._entry = None


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
    gradient alive: it ends with the gradient, and with the first write to it.
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

    def clear(self) -> None:
        """Forget all of them."""
        self._entries = []


def _where(tensor: Tensor) -> tuple[object, ...]:
    version = None if tensor.is_inference() else tensor._version
    return (tensor.data_ptr(), version, tensor.numel(), tensor.is_contiguous())
