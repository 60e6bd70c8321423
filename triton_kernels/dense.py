"""Dense forms of decoding and of both backward passes, for where few features are active many times.

A gather moves a whole row of the table for each pair; a product moves none twice. Where a code is not sparse, as in a
dictionary hardly larger than its k, writing it out and multiplying wins (`pays`). Stock torch operators, for any
device; same names and results as the sparse forms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from triton_kernels.arguments import Code
from triton_kernels.reference import row_of_pair, sum_dtype

# F / K up to which the dense form is taken. CPU: measured (scripts/bench_crossover.py); at one feature in two it wins
# for rows of 1,536 and loses below, at one in three it loses everywhere. GPU: by arithmetic, tensor cores against
# gathers from L2, until measured.
FEATURES_PER_ACTIVE = {"cpu": 2, "cuda": 181}
MAX_ELEMENTS = {"cpu": 2**22, "cuda": 2**28}  # of a code written out


def pays(device: torch.device, n_pairs: int, n_rows: int, n_features: int) -> bool:
    """Whether the dense form is faster for `n_pairs` pairs in `n_rows` rows over `n_features` features."""
    n_elements = n_rows * n_features
    return 0 < n_elements <= min(MAX_ELEMENTS[device.type], FEATURES_PER_ACTIVE[device.type] * n_pairs)


def positions(code: Code, n_groups: int, n_features: int) -> Tensor:
    """Where each pair stands in the flat `[B, G, F]` code."""
    token_P = row_of_pair(code.offsets[::n_groups], code.features_P.numel())
    return token_P * (n_groups * n_features) + code.features_P


def written_out(values_P: Tensor, positions_P: Tensor, shape_BGF: tuple[int, int, int]) -> Tensor:
    """The code as `[G, B, F]`, a view of a `[B, G, F]` tensor."""
    flat = values_P.new_zeros(math.prod(shape_BGF)).scatter_add_(0, positions_P, values_P)
    return flat.view(shape_BGF).transpose(0, 1)


def decode_loss(code: Code, decoder_GFN: Tensor, bias_GN: Tensor, x_BGN: Tensor, n_parts: int) -> tuple[Tensor, Tensor]:
    n_groups, n_features, _ = decoder_GFN.shape
    shape = (x_BGN.shape[0], n_groups, n_features)
    code_GBF = written_out(code.values_P, positions(code, n_groups, n_features), shape)
    error_BGN = torch.bmm(code_GBF, decoder_GFN).transpose(0, 1).contiguous()
    error_BGN.add_(bias_GN).sub_(x_BGN)
    return error_BGN, squares_of_parts(error_BGN, n_parts)


def squares_of_parts(error_BGN: Tensor, n_parts: int) -> Tensor:
    """Squares of the error summed by part of N, `[G, n_parts]`, without a pass of its own over the squares."""
    parts = error_BGN.unflatten(2, (n_parts, -1))
    norms_BGL = torch.linalg.vector_norm(parts, dim=3, dtype=torch.float64)
    return norms_BGL.square().sum(0).to(sum_dtype(error_BGN.dtype))


def reconstruction_gradient(error_BGN: Tensor, weight_GL: Tensor) -> Tensor:
    """Gradient of `sum(weight * squares)` to the reconstruction, `[B, G, N]`, in the error's dtype."""
    parts = error_BGN.unflatten(2, (weight_GL.shape[1], -1))
    return (parts * (2 * weight_GL)[..., None]).flatten(2).to(error_BGN.dtype)


def backward_decoder(code: Code, error_BGN: Tensor, weight_GL: Tensor, decoder_GFN: Tensor) -> tuple[Tensor, Tensor]:
    n_groups, n_features, _ = decoder_GFN.shape
    shape = (error_BGN.shape[0], n_groups, n_features)
    grad_GBN = reconstruction_gradient(error_BGN, weight_GL).transpose(0, 1)
    positions_P = positions(code, n_groups, n_features)
    d_code_GBF = torch.bmm(grad_GBN, decoder_GFN.transpose(1, 2))
    d_values = d_code_GBF.transpose(0, 1).reshape(-1)[positions_P]
    code_GBF = written_out(code.values_P, positions_P, shape)
    return d_values, torch.bmm(code_GBF.transpose(1, 2), grad_GBN)


def backward_encoder(code: Code, x_BGN: Tensor, center_GN: Tensor, n_features: int) -> tuple[Tensor, Tensor]:
    """See `reference.backward_encoder`; the code holds the gradients to the pairs' pre-activations."""
    n_groups = center_GN.shape[0]
    centered_BGN = (x_BGN - center_GN).to(code.values_P.dtype)
    shape = (x_BGN.shape[0], n_groups, n_features)
    d_z_GBF = written_out(code.values_P, positions(code, n_groups, n_features), shape)
    return torch.bmm(d_z_GBF.transpose(1, 2), centered_BGN.transpose(0, 1)), d_z_GBF.sum(1)
