"""`backward_encoder`: gradients of the encoder's rows and biases from the gradients of the kept pre-activations.

`d_encoder[f] = sum of d_z * (x[row] - center[g])` and `d_bias[f] = sum of d_z` over the pairs of feature f, in one
pass: the centred rows are never materialised, and the biases come with the first column tile. The kernel is
`scatter_outer`'s, feature-major; its floor is one read of x and one write of the gradient, `(B + F) * G * N` elements.
The centre is taken from each row before the product: `sum(d_z * x) - d_bias * center` would cancel.
Deterministic: see `scatter_outer`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels.arguments import Code
from triton_kernels.gpu.feature_major import feature_major
from triton_kernels.gpu.scatter_outer import scatter_rows


def backward_encoder(code: Code, x_BGN: Tensor, center_GN: Tensor, n_features: int) -> tuple[Tensor, Tensor]:
    """`d_encoder` as `[G, F, N]` and `d_bias` as `[G, F]`, both in the centre's dtype; x may be narrower."""
    d_z_P, features_P, offsets = code
    n_groups, width = center_GN.shape
    if features_P.numel() == 0:
        return center_GN.new_zeros(n_groups, n_features, width), center_GN.new_zeros(n_groups, n_features)
    n_rows = n_groups * n_features
    d_encoder_FN = torch.empty(n_rows, width, dtype=center_GN.dtype, device=center_GN.device)
    d_bias_F = torch.empty(n_rows, dtype=center_GN.dtype, device=center_GN.device)
    transpose = feature_major(features_P, offsets, n_rows)
    scatter_rows(d_z_P, transpose, x_BGN.reshape(-1, width), center_GN, d_encoder_FN, d_bias_F)
    return d_encoder_FN.view(n_groups, n_features, width), d_bias_F.view(n_groups, n_features)
