"""Large CPU results that reuse the memory of results nobody holds any more.

The C library gives blocks above 32 MiB back to the system when they are freed, and a fresh 50 MiB block costs twelve
thousand page faults (8-18 ms, more than filling it): a weight gradient of that size every step. So at most
`KEPT_BLOCKS` unused ones are kept. Smaller results are ordinary allocations, which the C library recycles by itself: it
keeps what is freed up to twice the largest block that it has seen freed, so it is shown one block of nearly that size.
"""

from __future__ import annotations

import math
import sys
import threading

import torch
from torch import Tensor

RECYCLED_BYTES = 32 * 2**20
KEPT_BLOCKS = 4

_blocks: list[torch.UntypedStorage] = []
_lock = threading.Lock()


def _holders(blocks: list[torch.UntypedStorage], index: int) -> tuple[int, int]:
    """How many tensors and how many Python names hold a block, this list among them."""
    return torch._C._storage_Use_Count(blocks[index]._cdata), sys.getrefcount(blocks[index])


torch.empty(RECYCLED_BYTES - 2**20, dtype=torch.uint8)  # given back at once, and never written to
NOBODY_ELSE = _holders([torch.empty(1).untyped_storage()], 0)


def empty(shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor that shares memory with no living tensor."""
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes <= RECYCLED_BYTES:
        return torch.empty(shape, dtype=dtype)
    with _lock:
        free = [index for index in range(len(_blocks)) if _holders(_blocks, index) == NOBODY_ELSE]
        fitting = next((index for index in free if _blocks[index].nbytes() == n_bytes), None)
        if fitting is None:
            out = torch.empty(shape, dtype=dtype)
            _blocks.append(out.untyped_storage())
        else:
            out = torch.empty(0, dtype=dtype).set_(_blocks[fitting]).view(shape)
        others = [index for index in free if index != fitting]
        for index in reversed(others[: max(0, len(others) - KEPT_BLOCKS + 1)]):
            del _blocks[index]  # the oldest go
    return out
