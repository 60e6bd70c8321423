"""Sparse operators, row updates and selection in C, for fp32 on the CPU.

What stock torch operators cannot do in one pass over memory: gradients of a table written once and past the caches,
both gradients of the decoder from one reading of the error, Adam with what belongs to a row, rounding together with
its norms, and selection without sorting. Sums are in a fixed order and one thread owns each of them, so the bits do
not depend on the number of threads, which is torch's own.

`serves` says whether tensors can be given to the functions here, which refuse those of another kind.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from triton_kernels.arguments import AdamRows, AdamSettings, Code
from triton_kernels.cpu.native import build
from triton_kernels.reference import starts

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
    given = [tensor for tensor in tensors if tensor is not None]
    plain = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in given)
    return plain and build.library() is not None


def _call(name: str, *arguments: Tensor | float | None) -> None:
    """Runs a C function on arguments of the kinds that its declaration names; None is NULL.

    Raises:
        TypeError: an argument is of another kind: in C that would be another's memory.
    """
    wanted = build.declarations()[name]
    if len(wanted) != len(arguments):
        raise TypeError(f"{name} takes {len(wanted)} arguments, not {len(arguments)}")
    passed = [_as_c(name, *pair) for pair in zip(wanted, arguments, strict=True)]
    getattr(build.library(), name)(*(value for value, _ in passed))


def _as_c(name: str, wanted: build.Parameter, argument: Tensor | float | None) -> tuple[ctypes._SimpleCData, object]:
    """The C value, and what must outlive the call."""
    if not wanted.is_pointer:
        if isinstance(argument, Tensor) or argument is None:
            raise TypeError(f"{name}: {wanted.name} is {argument}; expected a number")
        return (ctypes.c_int64(int(argument)) if wanted.kind == "int64_t" else ctypes.c_float(argument)), None
    if argument is None:
        return ctypes.c_void_p(), None
    dtype = DTYPES[wanted.kind]
    if not isinstance(argument, Tensor) or argument.dtype != dtype or argument.device.type != "cpu":
        raise TypeError(f"{name}: {wanted.name} is {argument!r}; expected a tensor of {dtype} on the CPU")
    if not argument.is_contiguous():
        if not wanted.is_const:
            raise TypeError(f"{name}: {wanted.name} has strides {argument.stride()}; it is written to in order")
        argument = argument.contiguous()
    return ctypes.c_void_p(argument.data_ptr()), argument


class Transpose(NamedTuple):
    """The transpose of a CSR code: pairs sorted by feature (ties in row order), and where each feature begins."""

    order_P: Tensor  # position in the row-major code, int64
    rows_P: Tensor  # the row of each sorted pair, int32
    offsets: Tensor  # [F + 1], int32


def _require_code(features_P: Tensor, offsets: Tensor, n_features: int) -> None:
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


def feature_major(features_P: Tensor, offsets: Tensor, n_features: int) -> Transpose:
    """The code's pairs in feature-major order; features are int32."""
    _require_code(features_P, offsets, n_features)
    order_P = torch.empty(features_P.numel(), dtype=torch.int64)
    rows_P, begins = torch.empty_like(order_P, dtype=torch.int32), torch.empty(n_features + 1, dtype=torch.int32)
    _call("feature_major", offsets.numel() - 1, n_features, features_P, offsets.long(), begins, rows_P, order_P)
    return Transpose(order_P, rows_P, begins)


def gather_sum(code: Code, table_FN: Tensor) -> Tensor:
    """See `reference.gather_sum`."""
    values_P, features_P, offsets = code
    _require_code(features_P, offsets, table_FN.shape[0])
    out_RN = table_FN.new_empty(offsets.numel() - 1, table_FN.shape[1])
    _call("gather_sum", *out_RN.shape, values_P, features_P, offsets.long(), table_FN, out_RN)
    return out_RN


def gather_dot(x_RN: Tensor, transpose: Transpose, table_FN: Tensor) -> Tensor:
    """See `reference.gather_dot`."""
    out_P = x_RN.new_empty(transpose.order_P.numel())
    _call("gather_dot", *table_FN.shape, transpose.offsets, transpose.rows_P, transpose.order_P, x_RN, table_FN, out_P)
    return out_P


def scatter_outer(
    values_P: Tensor,
    transpose: Transpose,
    x_RN: Tensor,
    out_FN: Tensor,
    *,
    center_GN: Tensor | None = None,
    sums_F: Tensor | None = None,
) -> Tensor:
    """Writes `reference.scatter_outer` of `x - center` to `out_FN`, and each feature's sum of values to `sums_F`.

    Returns the squared norm of each row that it wrote.
    """
    n_groups = 1 if center_GN is None else center_GN.shape[0]
    squares_F = out_FN.new_empty(out_FN.shape[0])
    sizes = (out_FN.shape[0], n_groups, out_FN.shape[1])
    indices = (transpose.offsets, transpose.rows_P, transpose.order_P)
    _call("scatter_outer", *sizes, *indices, values_P, x_RN, center_GN, out_FN, sums_F, squares_F)
    return squares_F


def decode_loss(code: Code, decoder_GFN: Tensor, bias_GN: Tensor, x_BGN: Tensor, n_parts: int) -> tuple[Tensor, Tensor]:
    """See `reference.decode_loss`."""
    n_groups, n_features, width = decoder_GFN.shape
    n_rows = x_BGN.shape[0] * n_groups
    _require_code(code.features_P, code.offsets, n_groups * n_features)
    error_BGN = torch.empty_like(x_BGN, memory_format=torch.contiguous_format)
    squares_BGL = error_BGN.new_empty(*x_BGN.shape[:2], n_parts, dtype=torch.float64)
    progress_R = torch.empty(n_rows, dtype=torch.int64)
    sizes = (n_rows, n_groups, n_groups * n_features, width, n_parts)
    inputs = (code.values_P, code.features_P, code.offsets.long(), decoder_GFN, bias_GN, x_BGN)
    _call("decode_loss", *sizes, *inputs, error_BGN, squares_BGL, progress_R)
    return error_BGN, squares_BGL.sum(0).float()


def backward_decoder(
    values_P: Tensor,
    transpose: Transpose,
    error_BGN: Tensor,
    weight_GL: Tensor,
    decoder_GFN: Tensor,
    d_decoder_GFN: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `reference.backward_decoder`; the decoder's gradient is written to `d_decoder_GFN`.

    Returns the gradient to the values, and the squared norm of each row of the decoder's.
    """
    n_groups, n_features, width = decoder_GFN.shape
    d_values_P, squares_F = torch.empty(values_P.shape), torch.empty(n_groups * n_features)
    sizes = (n_groups * n_features, n_groups, width, weight_GL.shape[1])
    indices = (transpose.offsets, transpose.rows_P, transpose.order_P)
    inputs = (values_P, error_BGN, weight_GL, decoder_GFN)
    _call("backward_decoder", *sizes, *indices, *inputs, d_values_P, d_decoder_GFN, squares_F)
    return d_values_P, squares_F


def adam_rows(rows: AdamRows, settings: AdamSettings) -> None:
    """See `reference.adam_rows`, without the working copy; what is changed in place must be contiguous."""
    step, rate, betas, eps, weight_decay, scale_G, unit = settings
    n_groups = 1 if scale_G is None else scale_G.numel()
    n_rows, width = rows.parameter_RN.shape
    numbers = (rate / (1 - betas[0] ** step), 1.0 - betas[0], betas[1], 1.0 - betas[1], eps)
    root, keep = (1 - betas[1] ** step) ** 0.5, 1.0 - rate * weight_decay
    _call("adam_rows", n_rows, n_groups, width, *rows[:4], *numbers, root, keep, scale_G, int(unit))


def row_squares(gradient_RN: Tensor, unit_RN: Tensor | None) -> Tensor:
    """See `reference.row_squares`."""
    squares_R = gradient_RN.new_empty(gradient_RN.shape[0])
    _call("row_squares", *gradient_RN.shape, gradient_RN, unit_RN, squares_R)
    return squares_R


def round_rows(table_RN: Tensor, scale_R: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rows times their scale in bf16 `[R, N]`, and the norms `[R]` of the rows and of what rounding took from them.

    Rows of the table may lie apart, but each must be contiguous.
    """
    low_RN = torch.empty(table_RN.shape, dtype=torch.bfloat16)
    squares_R, errors_R = table_RN.new_empty(2, table_RN.shape[0])
    stride = table_RN.stride(0)
    rows = table_RN.as_strided((max(0, (table_RN.shape[0] - 1) * stride) + table_RN.shape[1],), (1,))
    _call("round_rows", *table_RN.shape, stride, rows, scale_R, low_RN, squares_R, errors_R)
    return low_RN, squares_R.sqrt_(), errors_R.sqrt_()


def sieved(
    bits_RF: Tensor, n_groups: int, k: int, slack: float, margin_R: Tensor, least_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `lists.sieved`; `least_R` must be contiguous. Columns, keys and each row's count of them."""
    bounds_R, counts_R = bits_RF.new_empty(bits_RF.shape[0]), torch.empty(bits_RF.shape[0], dtype=torch.int64)
    sizes = (*bits_RF.shape, n_groups, k, float(slack))
    _call("sieve_rows", *sizes, bits_RF, margin_R, least_R, bounds_R, counts_R)
    return _listed(bits_RF, bounds_R, counts_R)


def not_below(bits_RF: Tensor, bounds_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns, int32 and ascending, and keys of the scores not below their row's bound, and each row's count."""
    counts_R = torch.empty(bits_RF.shape[0], dtype=torch.int64)
    _call("count_rows", *bits_RF.shape, bits_RF, bounds_R, counts_R)
    return _listed(bits_RF, bounds_R, counts_R)


def _listed(bits_RF: Tensor, bounds_R: Tensor, counts_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    offsets = starts(counts_R)
    columns = torch.empty(int(offsets[-1]), dtype=torch.int32)
    keys = torch.empty_like(columns, dtype=torch.int16)
    _call("list_rows", *bits_RF.shape, bits_RF, bounds_R, offsets, columns, keys)
    return columns, keys, counts_R


def kth_of_lists(offsets: Tensor, keys: Tensor, n_rows: int, n_chunks: int, k: int) -> Tensor:
    """The k-th largest key of each row's lists, `[R]`."""
    out_R = keys.new_empty(n_rows)
    _call("kth_of_lists", n_chunks, n_rows, k, offsets, keys, out_R)
    return out_R


def merged_lists(
    offsets: Tensor, columns: Tensor, keys: Tensor, n_rows: int, n_chunks: int, bounds_R: Tensor, n_features: int
) -> tuple[Tensor, Tensor]:
    """Features, int32 and ascending, of the keys not below their row's bound, and the offsets of the rows."""
    counts_R = torch.empty(n_rows, dtype=torch.int64)
    _call("count_lists", n_chunks, n_rows, offsets, keys, bounds_R, counts_R)
    row_starts = starts(counts_R)
    features = torch.empty(int(row_starts[-1]), dtype=torch.int32)
    _call("merge_lists", n_chunks, n_rows, n_features, offsets, columns, keys, bounds_R, row_starts, features)
    return features, row_starts


def above(z_RF: Tensor, scale_F: Tensor | None, bound_F: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `selection.above`."""
    counts_R = torch.empty(z_RF.shape[0], dtype=torch.int64)
    given = (*z_RF.shape, z_RF, scale_F, bound_F, least)
    _call("count_above", *given, counts_R)
    offsets = starts(counts_R)
    values, scores = z_RF.new_empty(2, int(offsets[-1]))
    columns = torch.empty(values.shape, dtype=torch.int32)
    _call("list_above", *given, offsets, values, scores, columns)
    return values, scores, columns, offsets


def top_k_of_lists(score_P: Tensor, offsets: Tensor, k: int) -> Tensor:
    """Positions, ascending, of the k largest scores of each row of a CSR code, `[R, k]` int64."""
    kept = torch.empty(offsets.numel() - 1, k, dtype=torch.int64)
    _call("top_k_of_lists", *kept.shape, offsets, score_P, kept)
    return kept


def top_k_of_rows(score_RF: Tensor, n_groups: int, k: int) -> Tensor:
    """Columns, ascending, of the k largest scores of each row, `[R, k]` int64; `n_groups` >= k, or 0 for no groups."""
    columns = torch.empty(score_RF.shape[0], k, dtype=torch.int64)
    _call("top_k_of_rows", *score_RF.shape, n_groups, k, score_RF, columns)
    return columns
