"""The C kernels for fp32 on the CPU: whether they serve, and the way to call them.

What stock torch operators cannot do in one pass over memory: gradients of a table written once and past the caches,
both gradients of the decoder from one reading of the error, Adam with what belongs to a row, rounding together with
its norms, and selection without sorting. Sums are in a fixed order and one thread owns each of them, so the bits do
not depend on the number of threads, which is torch's own. Each file of `cpu` has its C forms beside its stock ones.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from triton_kernels.cpu.native import build


def serves(*tensors: Tensor | None) -> bool:
    """Whether all tensors are fp32 on the CPU and the library is there."""
    given = [tensor for tensor in tensors if tensor is not None]
    plain = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in given)
    return plain and build.library() is not None


def call(name: str, *arguments: Tensor | float | None) -> None:
    """Runs a C function. A tensor is a pointer to its numbers, an int an `int64_t`, a float a `float`, None is NULL.

    Inputs may be strided. What the function writes to must be contiguous: it would write to a copy.
    """
    held = [one.contiguous() if isinstance(one, Tensor) else one for one in arguments]  # copies outlive the call
    getattr(build.library(), name)(*map(_as_c, held))


def _as_c(argument: Tensor | float | None) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if argument is None:
        return ctypes.c_void_p()
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_float(argument)


def check_code(features_P: Tensor, offsets: Tensor, n_features: int) -> None:
    """Refuses a code that would lead outside its tables.

    Raises:
        IndexError: a feature is not among the table's, or the offsets do not ascend from 0 to the number of pairs.
    """
    if features_P.numel():
        least, most = (int(bound) for bound in torch.aminmax(features_P))
        if least < 0 or most >= n_features:
            raise IndexError(f"the code has features from {least} to {most}; the table has {n_features} rows")
    if int(offsets[0]) != 0 or int(offsets[-1]) != features_P.numel() or bool((offsets.diff() < 0).any()):
        raise IndexError(f"offsets must ascend from 0 to {features_P.numel()}, the number of pairs")
