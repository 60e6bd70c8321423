"""The C kernels for fp32 on the CPU: whether they serve, and the way to call them.

What stock torch operators cannot do in one pass over memory: gradients of a table written once and past the caches,
both gradients of the decoder from one reading of the error, Adam with what belongs to a row, rounding together with
its norms, and selection without sorting. Sums are in a fixed order and one thread owns each of them, so the bits do
not depend on the number of threads, which is torch's own. Each file of `cpu` has its C forms beside its stock ones.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from triton_kernels.cpu.native import build

DTYPES = {
    "float": torch.float32,
    "double": torch.float64,
    "int16_t": torch.int16,
    "uint16_t": torch.bfloat16,
    "int32_t": torch.int32,
    "int64_t": torch.int64,
}
"""What each C type holds."""


def serves(*tensors: Tensor | None) -> bool:
    """Whether all tensors are fp32 on the CPU and the library is there."""
    for tensor in tensors:
        if tensor is not None and not (tensor.dtype == torch.float32 and tensor.is_cpu):
            return False
    return build.library() is not None


def call(name: str, *arguments: Tensor | float | None) -> None:
    """Runs a C function on arguments of the kinds that its declaration names; None is NULL.

    Inputs may be strided and are copied then; what the function writes to must be contiguous.

    Raises:
        TypeError: an argument is of another kind: C would read or write other memory as if it were this.
        ValueError: there are too few or too many arguments.
    """
    library = build.library()
    assert library is not None
    function, parameters = _bound(library, name)
    numbers, held = [], []
    for (dtype, parameter), argument in zip(parameters, arguments, strict=True):
        if isinstance(argument, Tensor):
            if argument.dtype != dtype or not argument.is_cpu or not argument.is_contiguous():
                argument = _mended(name, parameter, argument)
                held.append(argument)  # a copy must outlive the call
            numbers.append(argument.data_ptr())
        elif (dtype is None) == (argument is None):
            raise _other_kind(name, parameter, argument)
        else:
            numbers.append(argument)
    function(*numbers)


@functools.cache
def _bound(library: ctypes.CDLL, name: str) -> tuple[Any, list[tuple[torch.dtype | None, build.Parameter]]]:
    """A function of the library that takes plain numbers, and its parameters with the dtype behind each pointer."""
    parameters = build.declarations()[name]
    function = getattr(library, name)
    function.restype = None
    function.argtypes = [
        ctypes.c_void_p if one.is_pointer else ctypes.c_int64 if one.kind == "int64_t" else ctypes.c_float
        for one in parameters
    ]
    return function, [(DTYPES[one.kind] if one.is_pointer else None, one) for one in parameters]


def _mended(name: str, parameter: build.Parameter, argument: Tensor) -> Tensor:
    """A contiguous copy of an input with strides; anything else is refused."""
    if not parameter.is_pointer or argument.dtype != DTYPES[parameter.kind] or not argument.is_cpu:
        raise _other_kind(name, parameter, argument)
    if not parameter.is_const:
        raise TypeError(f"{name}: {parameter.name} has strides {argument.stride()}; it is written to in order")
    return argument.contiguous()


def _other_kind(name: str, parameter: build.Parameter, argument: Any) -> TypeError:
    expected = f"a tensor of {DTYPES[parameter.kind]} on the CPU" if parameter.is_pointer else "a number"
    return TypeError(f"{name}: {parameter.name} is {argument!r}; expected {expected}")


def check_code(features_P: Tensor, offsets: Tensor, n_features: int) -> None:
    """Refuses a code that would lead outside its tables.

    Raises:
        IndexError: a feature is not among the table's, or the offsets do not ascend from 0 to the number of pairs.
    """
    found, n_pairs = torch.zeros(3, dtype=torch.int64), features_P.numel()
    if offsets.numel():
        call("look_at_code", offsets.numel() - 1, n_pairs, features_P, offsets, found)
    least, most, ascend = found.tolist()
    if n_pairs and not 0 <= least <= most < n_features:
        raise IndexError(f"the code has features from {least} to {most}; the table has {n_features} rows")
    if not ascend:
        raise IndexError(f"offsets must ascend from 0 to {n_pairs}, the number of pairs")
