"""Answers kept for who asks the same again: about a code's indices, and about gradients just written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Answer = TypeVar("Answer")


class _Entry(NamedTuple):
    inputs: tuple[Tensor, Tensor]
    key: tuple[object, ...]
    offsets: tuple[object, ...]
    answer: object

    def has_offsets(self, offsets: Tensor, identity: tuple[object, ...]) -> bool:
        """Whether the entry was made from these offsets, or from equal ones that nobody has written to since."""
        if self.offsets == identity:
            return True
        kept = self.inputs[1]
        return offsets.is_cpu and _identity(kept) == self.offsets and torch.equal(offsets, kept)


class Latest(Generic[Answer]):
    """One kept answer about `features_P` and `offsets`.

    A backward pass asks for the same transpose several times in a row. The entry holds its inputs, so their memory
    cannot be given to another code, and their version counters tell whether they were written to since. Writes that
    torch does not count, through `.data` or `.numpy()`, go unseen. Offsets that were made anew may be equal instead:
    on the CPU that costs nothing to find out.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def get(
        self, features_P: Tensor, offsets: Tensor, settings: tuple[object, ...], make: Callable[[], Answer]
    ) -> Answer:
        """The kept answer if inputs and settings are those it was made from, else a new one from `make`."""
        if features_P.is_inference() or offsets.is_inference():  # they have no version counter
            return make()
        key, its_offsets = (*settings, *_identity(features_P)), _identity(offsets)
        entry = self._entry
        if entry is not None and entry.key == key and entry.has_offsets(offsets, its_offsets):
            return entry.answer  # ty: ignore[invalid-explicit-return]
        answer = make()
        self._entry = _Entry((features_P.detach(), offsets.detach()), key, its_offsets, answer)
        return answer

    def clear(self) -> None:
        """Keep nothing."""
        self._entry = None


def _identity(tensor: Tensor) -> tuple[object, ...]:
    storage = tensor.untyped_storage()._cdata
    return (storage, tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


class _Note(NamedTuple):
    storage: StorageWeakRef
    where: tuple[object, ...]
    squares_R: Tensor


class RowSquares:
    """Squared norms of the rows of gradients, as the kernels that wrote them found them on the way.

    Clipping asks for them a moment later, and finding them again reads a whole table. A note holds no memory of the
    gradient: it ends with it, and with the first write to it.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._notes: list[_Note] = []

    def note(self, gradient: Tensor, squares_R: Tensor) -> None:
        """Keep the squares of a contiguous gradient that was just made."""
        alive = [note for note in self._notes if not note.storage.expired()]
        note = _Note(StorageWeakRef(gradient.untyped_storage()), _where(gradient), squares_R)
        self._notes = [*alive, note][-self._room :]

    def find(self, gradient_RN: Tensor) -> Tensor | None:
        """The squares of these rows, if nobody has written to them since; None where they are not known."""
        where, key = _where(gradient_RN), gradient_RN.untyped_storage()._cdata
        for note in self._notes:
            is_same = note.storage.cdata == key and not note.storage.expired() and note.where == where
            if is_same and note.squares_R.numel() == gradient_RN.shape[0]:
                return note.squares_R
        return None

    def clear(self) -> None:
        """Keep nothing."""
        self._notes = []


def _where(tensor: Tensor) -> tuple[object, ...]:
    return (
        tensor.data_ptr(),
        None if tensor.is_inference() else tensor._version,
        tensor.numel(),
        tensor.is_contiguous(),
    )
