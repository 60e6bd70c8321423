"""Large CPU results that reuse the memory of results nobody holds any more.

The C library gives blocks above 32 MiB back to the system when they are freed, and a fresh 50 MiB block costs twelve
thousand page faults (8-18 ms here, more than filling it). A weight gradient of that size is made and dropped every
step, so, as the CUDA allocator does, we keep such blocks. At most `KEPT_BLOCKS` unused ones are kept; smaller results,
which the C library recycles by itself, are ordinary allocations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

RECYCLED_BYTES = 32 * 2**20
KEPT_BLOCKS = 4

_blocks: list[torch.UntypedStorage] = []


def _is_free(block: torch.UntypedStorage) -> bool:
    """Whether this module alone holds the block: no tensor, view or saved gradient still reads it."""
    return torch._C._storage_Use_Count(block._cdata) == 1


def empty(shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor that shares memory with no living tensor."""
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes <= RECYCLED_BYTES:
        return torch.empty(shape, dtype=dtype)
    free = [index for index, block in enumerate(_blocks) if _is_free(block)]
    for index in free:
        if _blocks[index].nbytes() == n_bytes:
            return torch.empty(0, dtype=dtype).set_(_blocks[index]).view(shape)
    for index in reversed(free[: max(0, len(free) - KEPT_BLOCKS + 1)]):
        del _blocks[index]  # free and of other sizes: the oldest go
    out = torch.empty(shape, dtype=dtype)
    _blocks.append(out.untyped_storage())
    return out
