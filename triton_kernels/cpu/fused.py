"""Decoding with its loss, and both backward passes: in C for fp32, else out of the sparse primitives.

The gradient with respect to the reconstruction is `2 w e`: it is made from the error where it is needed, and the
forward pass keeps the error alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels.arguments import Code
from triton_kernels.cache import SquaresCache
from triton_kernels.cpu import native, sparse, workspace
from triton_kernels.dense import reconstruction_gradient, squares_of_parts
from triton_kernels.reference import sum_dtype

gradient_squares = SquaresCache(size=4)
"""Of the gradients that the backward passes wrote last, for clipping."""


def decode_loss(code: Code, decoder_GFN: Tensor, bias_GN: Tensor, x_BGN: Tensor, n_parts: int) -> tuple[Tensor, Tensor]:
    n_groups, n_features, width = decoder_GFN.shape
    n_sets, own_shape = n_groups // x_BGN.shape[1], x_BGN.shape
    if native.serves(code.values_P, decoder_GFN, bias_GN, x_BGN):
        native.check_code(code.features_P, code.offsets, n_groups * n_features)
        error_SBGN = decoder_GFN.new_empty(n_sets, *own_shape)
        squares_SBGL = error_SBGN.new_empty(*error_SBGN.shape[:3], n_parts, dtype=torch.float64)
        n_rows = n_sets * own_shape[0] * own_shape[1]
        progress_R = torch.empty(n_rows, dtype=torch.int64)
        sizes = (n_rows, n_sets, own_shape[1], n_groups * n_features, width, n_parts)
        native.call("decode_loss", *sizes, *code, decoder_GFN, bias_GN, x_BGN, error_SBGN, squares_SBGL, progress_R)
        squares_GL = torch.cat([squares_BGL.sum(0) for squares_BGL in squares_SBGL]).float()
        return error_SBGN.flatten(0, 1), squares_GL
    error_SBGN = sparse.gather_sum(code, decoder_GFN.reshape(-1, width)).view(n_sets, *own_shape)
    error_SBGN.add_(bias_GN.view(n_sets, 1, -1, width)).sub_(x_BGN)
    squares = [squares_of_parts(error_BGN, n_parts) for error_BGN in error_SBGN]
    return error_SBGN.flatten(0, 1), torch.cat(squares)


def backward_decoder(code: Code, error_BGN: Tensor, weight_GL: Tensor, decoder_GFN: Tensor) -> tuple[Tensor, Tensor]:
    n_groups, n_features, width = decoder_GFN.shape
    if native.serves(code.values_P, error_BGN, weight_GL, decoder_GFN):
        major = sparse.feature_major(code.features_P, code.offsets, n_groups * n_features)
        d_values, d_decoder = torch.empty_like(code.values_P), workspace.empty(decoder_GFN.shape, dtype=torch.float32)
        squares_F = error_BGN.new_empty(n_groups * n_features)
        sizes = (n_groups * n_features, n_groups, width, weight_GL.shape[1])
        inputs = (*major, code.values_P, error_BGN, weight_GL, decoder_GFN)
        native.call("backward_decoder", *sizes, *inputs, d_values, d_decoder, squares_F)
        gradient_squares.note(d_decoder, squares_F)
        return d_values, d_decoder
    sets = zip(error_BGN.chunk(n_groups // error_BGN.shape[1]), weight_GL.split(error_BGN.shape[1]), strict=True)
    grad_RN = torch.cat([reconstruction_gradient(*one).reshape(-1, width) for one in sets])
    d_values = sparse.gather_dot(grad_RN, code.features_P, code.offsets, decoder_GFN.reshape(-1, width))
    d_table = sparse.scatter_outer(code, grad_RN, n_groups * n_features)
    return d_values, d_table.view(decoder_GFN.shape)


def backward_encoder(code: Code, x_BGN: Tensor, center_GN: Tensor, n_features: int) -> tuple[Tensor, Tensor]:
    """See `reference.backward_encoder`; the code holds the gradients to the pairs' pre-activations."""
    d_z_P, features_P, offsets = code
    n_groups, width = center_GN.shape
    if native.serves(d_z_P, x_BGN, center_GN):
        major = sparse.feature_major(features_P, offsets, n_groups * n_features)
        d_bias = d_z_P.new_empty(n_groups, n_features)
        d_encoder, squares_F = sparse.scatter_in_c(d_z_P, major, x_BGN, center_GN, d_bias)
        gradient_squares.note(d_encoder, squares_F)
        return d_encoder.view(n_groups, n_features, width), d_bias
    wide = sum_dtype(d_z_P.dtype)
    sums_F = torch.zeros(n_groups * n_features, dtype=wide).index_add_(0, features_P, d_z_P.to(wide))
    d_bias = sums_F.to(d_z_P.dtype).view(n_groups, n_features)
    center_SGN = center_GN.view(-1, *x_BGN.shape[1:])
    rows_RN = (x_BGN - center_SGN[:, None]).to(d_z_P.dtype).reshape(-1, width)
    d_encoder = sparse.scatter_outer(code, rows_RN, n_groups * n_features)
    return d_encoder.view(n_groups, n_features, width), d_bias
