"""The sparse primitives: in C for fp32, else in the fastest form that stock torch operators give.

`embedding_bag` is a CSR-times-dense product and its per-sample-weight gradient is the sampled dense-dense product, so
nothing here materialises `[P, N]`. Products that own one row a feature run in feature-major order: a stable sort of
the pairs by feature streams every table row once, and makes each sum's order, hence its bits, the same in every run.

Measured at R = 1024, N = 1536, F = 8192, 32 pairs a row, two threads: the feature-major `gather_dot` takes 4 ms where
the row-major one takes 13-17 ms, since the big table is then read in order and the small one stays in cache.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_kernels.arguments import Code
from triton_kernels.cache import TransposeCache
from triton_kernels.cpu import native, workspace
from triton_kernels.reference import row_of_pair, starts


class Transpose(NamedTuple):
    """The transpose of a CSR code: where each feature's pairs begin, and the pairs by feature, ties in row order."""

    starts: Tensor  # [F + 1], int32
    rows_P: Tensor  # the row of each sorted pair, int32
    order_P: Tensor  # position in the row-major code, int64


@TransposeCache
def feature_major(features_P: Tensor, offsets: Tensor, n_features: int) -> Transpose:
    """The code's pairs in feature-major order, from one stable sort; features are int32; the last one is cached."""
    if native.serves():
        native.check_code(features_P, offsets, n_features)
        out = Transpose(
            torch.empty(n_features + 1, dtype=torch.int32),
            torch.empty(features_P.numel(), dtype=torch.int32),
            torch.empty(features_P.numel(), dtype=torch.int64),
        )
        native.call("feature_major", offsets.numel() - 1, n_features, features_P, offsets, *out)
        return out
    order_P = torch.sort(features_P, stable=True).indices
    rows_P = row_of_pair(offsets, features_P.numel()).to(torch.int32)[order_P]
    begins = starts(torch.bincount(features_P, minlength=n_features)).to(torch.int32)
    return Transpose(begins, rows_P, order_P)


def _weighted_bags(values_P: Tensor, indices_P: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    return F.embedding_bag(
        indices_P,
        table,
        offsets.to(indices_P.dtype),
        mode="sum",
        per_sample_weights=values_P.contiguous(),
        include_last_offset=True,
    )


def gather_sum(code: Code, table_FN: Tensor) -> Tensor:
    if code.features_P.numel() == 0:
        return table_FN.new_zeros(code.offsets.numel() - 1, table_FN.shape[1])
    if native.serves(code.values_P, table_FN):
        native.check_code(code.features_P, code.offsets, table_FN.shape[0])
        out_RN = table_FN.new_empty(code.offsets.numel() - 1, table_FN.shape[1])
        native.call("gather_sum", *out_RN.shape, *code, table_FN, out_RN)
        return out_RN
    return _weighted_bags(*code, table_FN.contiguous())


def gather_dot(x_RN: Tensor, features_P: Tensor, offsets: Tensor, table_FN: Tensor) -> Tensor:
    if features_P.numel() == 0:
        return x_RN.new_zeros(0)
    major = feature_major(features_P, offsets, table_FN.shape[0])
    if native.serves(x_RN, table_FN):
        out_P = x_RN.new_empty(features_P.numel())
        native.call("gather_dot", *table_FN.shape, *major, x_RN, table_FN, out_P)
        return out_P
    # The roles are swapped on purpose: bags are features, so the long table is streamed and x is gathered.
    dots_P = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        table_FN.contiguous(), x_RN.contiguous(), major.rows_P, major.starts[:-1], features_P[major.order_P], 0, -1
    )
    return torch.empty_like(dots_P).scatter_(0, major.order_P, dots_P)


def scatter_outer(code: Code, x_RN: Tensor, n_features: int) -> Tensor:
    values_P, features_P, offsets = code
    if features_P.numel() == 0:
        return x_RN.new_zeros(n_features, x_RN.shape[1])
    major = feature_major(features_P, offsets, n_features)
    if native.serves(values_P, x_RN):
        return scatter_in_c(values_P, major, x_RN)[0]
    values_P, x_RN = values_P[major.order_P], x_RN.contiguous()
    if not _recycles(x_RN, n_features):
        return _weighted_bags(values_P, major.rows_P, major.starts, x_RN)
    # embedding_bag cannot write into a given block; the sparse product can.
    out_FN = workspace.empty((n_features, x_RN.shape[1]), dtype=x_RN.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        code_FR = torch.sparse_csr_tensor(
            major.starts, major.rows_P, values_P, size=(n_features, x_RN.shape[0]), check_invariants=False
        )
    return torch.addmm(out_FN, code_FR, x_RN, beta=0, out=out_FN)


def scatter_in_c(
    values_P: Tensor, major: Transpose, x_RN: Tensor, center_GN: Tensor | None = None, sums_F: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`scatter_outer` of `x - center` `[F, N]`, and its rows' squared norms `[F]`; `sums_F` gets the sums of values.

    Sets of dictionaries, one after the other in the code, may share the rows of x.
    """
    n_features, n_groups = major.starts.numel() - 1, 1 if center_GN is None else center_GN.shape[0]
    out_FN = workspace.empty((n_features, x_RN.shape[-1]), dtype=torch.float32)
    squares_F = x_RN.new_empty(n_features)
    sizes = (n_features, n_groups, x_RN.numel() // out_FN.shape[1], out_FN.shape[1])
    native.call("scatter_outer", *sizes, *major, values_P, x_RN, center_GN, out_FN, sums_F, squares_F)
    return out_FN, squares_F


def _recycles(x_RN: Tensor, n_features: int) -> bool:
    """Whether a result `[F, N]` is large enough for recycled memory, and the library that writes into it is here."""
    n_bytes = n_features * x_RN.shape[1] * x_RN.itemsize
    is_plain = x_RN.device.type == "cpu" and x_RN.dtype in (torch.float32, torch.float64)
    return is_plain and n_bytes > workspace.RECYCLED_BYTES and torch.backends.mkl.is_available()
