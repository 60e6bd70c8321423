"""Decoding with its loss, and both backward passes: in C for fp32, else out of the sparse primitives.

The gradient with respect to the reconstruction is `2 w e`: it is made from the error where it is needed, and the
forward pass keeps the error alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels.cpu import native, sparse, workspace
from triton_kernels.kept import RowSquares
from triton_kernels.reference import sum_dtype

row_squares = RowSquares(room=4)
"""Of the gradients that the backward passes wrote last."""


def decode_loss(
    values_P: Tensor,
    features_P: Tensor,
    offsets: Tensor,
    decoder_GFN: Tensor,
    bias_GN: Tensor,
    x_BGN: Tensor,
    n_parts: int,
) -> tuple[Tensor, Tensor]:
    """See `reference.decode_loss`."""
    if native.serves(values_P, decoder_GFN, bias_GN, x_BGN):
        error_BGN, squares_GL = native.decode_loss(values_P, features_P, offsets, decoder_GFN, bias_GN, x_BGN, n_parts)
        return error_BGN, squares_GL.float()
    n_groups, _, width = decoder_GFN.shape
    table_FN = decoder_GFN.reshape(-1, width)
    error_BGN = sparse.gather_sum(values_P, features_P, offsets, table_FN).view(-1, n_groups, width)
    error_BGN.add_(bias_GN).sub_(x_BGN)
    parts = error_BGN.unflatten(2, (n_parts, -1))
    norms_BGL = torch.linalg.vector_norm(parts, dim=3, dtype=torch.float64)  # no pass of its own over the squares
    return error_BGN, norms_BGL.square().sum(0).to(sum_dtype(error_BGN.dtype))


def backward_decoder(
    values_P: Tensor,
    features_P: Tensor,
    offsets: Tensor,
    error_BGN: Tensor,
    weight_GL: Tensor,
    decoder_GFN: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `reference.backward_decoder`."""
    n_groups, n_features, width = decoder_GFN.shape
    n_parts = weight_GL.shape[1]
    if native.serves(values_P, error_BGN, weight_GL, decoder_GFN):
        major = sparse.feature_major(features_P, offsets, n_groups * n_features)
        d_decoder = workspace.empty((n_groups, n_features, width), dtype=torch.float32)
        d_values, squares_F = native.backward_decoder(values_P, major, error_BGN, weight_GL, decoder_GFN, d_decoder)
        row_squares.note(d_decoder, squares_F)
        return d_values, d_decoder
    grad_BGN = (error_BGN.unflatten(2, (n_parts, -1)) * (2 * weight_GL)[..., None]).flatten(2).to(error_BGN.dtype)
    table_FN, grad_RN = decoder_GFN.reshape(-1, width), grad_BGN.reshape(-1, width)
    d_values = sparse.gather_dot(grad_RN, features_P, offsets, table_FN)
    d_table = sparse.scatter_outer(values_P, features_P, offsets, grad_RN, n_groups * n_features)
    return d_values, d_table.view(decoder_GFN.shape)


def backward_encoder(
    d_z_P: Tensor,
    features_P: Tensor,
    offsets: Tensor,
    x_BGN: Tensor,
    center_GN: Tensor,
    n_features: int,
) -> tuple[Tensor, Tensor]:
    """See `reference.backward_encoder`."""
    n_groups, width = center_GN.shape
    if native.serves(d_z_P, x_BGN, center_GN):
        major = sparse.feature_major(features_P, offsets, n_groups * n_features)
        d_encoder = workspace.empty((n_groups, n_features, width), dtype=torch.float32)
        d_bias = d_z_P.new_empty(n_groups, n_features)
        out_FN = d_encoder.view(-1, width)
        squares_F = native.scatter_outer(d_z_P, major, x_BGN, out_FN, center_GN=center_GN, sums_F=d_bias)
        row_squares.note(d_encoder, squares_F)
        return d_encoder, d_bias
    centered_BGN = (x_BGN - center_GN).to(d_z_P.dtype)
    wide = sum_dtype(d_z_P.dtype)
    sums_F = torch.zeros(n_groups * n_features, dtype=wide).index_add_(0, features_P, d_z_P.to(wide))
    d_bias = sums_F.to(d_z_P.dtype).view(n_groups, n_features)
    rows_RN = centered_BGN.reshape(-1, width)
    d_encoder = sparse.scatter_outer(d_z_P, features_P, offsets, rows_RN, n_groups * n_features)
    return d_encoder.view(n_groups, n_features, width), d_bias
