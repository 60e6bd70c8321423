"""Large CPU results that reuse the memory of results nobody holds any more.

The C library gives blocks above 32 MiB back to the system when they are freed, and a fresh 50 MiB block costs twelve
thousand page faults (8-18 ms here, more than filling it). A weight gradient of that size is made and dropped every
step, so, as the CUDA allocator does, we keep such blocks. At most `KEPT_BLOCKS` are kept; smaller results, which the
C library recycles by itself, are ordinary allocations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

RECYCLED_BYTES = 32 * 2**20
KEPT_BLOCKS = 4

_blocks: list[torch.UntypedStorage] = []


def empty(shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor that shares memory with no living tensor."""
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes <= RECYCLED_BYTES:
        return torch.empty(shape, dtype=dtype)
    for block in _blocks:
        # Held by this list alone: no tensor, view or saved gradient still reads it.
        if block.nbytes() == n_bytes and torch._C._storage_Use_Count(block._cdata) == 1:
            return torch.empty(0, dtype=dtype).set_(block).view(shape)
    out = torch.empty(shape, dtype=dtype)
    _blocks.append(out.untyped_storage())
    if len(_blocks) > KEPT_BLOCKS:
        del _blocks[0]
    return out
