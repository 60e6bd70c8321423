"""Dense products: the encoder's, and the forms that beat gathering where many of few features are active.

A gather moves a whole row of the table for each pair; a product moves none twice. Where a code is small and not very
sparse, as in a bank of narrow layers, writing it out and multiplying wins (`pays`).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from triton_kernels.reference import row_of_pair

MAX_ELEMENTS = 2**22  # a code is never written out beyond 16 MiB
FEATURES_PER_ACTIVE = 24  # measured crossover: scripts/bench_kernels.py --crossover


@functools.cache
def _onednn_dtypes() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available():
        return ()
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if has_bf16 else (torch.float32,)


def affine(x_RN: Tensor, weight_FN: Tensor, bias_F: Tensor) -> Tensor:
    """`x @ weight.T + bias`, as `[R, F]`, in the dtype of `x`.

    On the CPU in fp32 and bf16 this goes to oneDNN, which in fp32 is true fp32 and was 1.2-1.4 times faster than the
    default product on the machines measured; the global precision flags are neither read nor changed.
    """
    if x_RN.dtype in _onednn_dtypes():
        return torch.ops.mkldnn._linear_pointwise(x_RN.contiguous(), weight_FN, bias_F, "none", [], "")
    return torch.addmm(bias_F, x_RN, weight_FN.t())


def pays(n_pairs: int, n_rows: int, n_features: int) -> bool:
    """Whether the dense form is faster for `n_pairs` pairs in `n_rows` rows over `n_features` features."""
    n_elements = n_rows * n_features
    return 0 < n_elements <= min(MAX_ELEMENTS, FEATURES_PER_ACTIVE * n_pairs)


def positions(features_P: Tensor, offsets: Tensor, n_groups: int, n_features: int) -> Tensor:
    """Where each pair stands in the flat `[B, G, F]` code."""
    token_P = row_of_pair(offsets[::n_groups], features_P.numel())
    return token_P * (n_groups * n_features) + features_P


def written_out(values_P: Tensor, positions_P: Tensor, shape_BGF: tuple[int, int, int]) -> Tensor:
    """The code as `[G, B, F]`, a view of a `[B, G, F]` tensor."""
    n_elements = shape_BGF[0] * shape_BGF[1] * shape_BGF[2]
    return values_P.new_zeros(n_elements).scatter_(0, positions_P, values_P).view(shape_BGF).transpose(0, 1)


def decode(values_P: Tensor, features_P: Tensor, offsets: Tensor, table_GFN: Tensor) -> Tensor:
    """Weighted sums of table rows, `[B, G, N]`."""
    n_groups, n_features, _ = table_GFN.shape
    shape = ((offsets.numel() - 1) // n_groups, n_groups, n_features)
    code_GBF = written_out(values_P, positions(features_P, offsets, n_groups, n_features), shape)
    return torch.bmm(code_GBF, table_GFN).transpose(0, 1).contiguous()


def decode_backward(
    values_P: Tensor, features_P: Tensor, offsets: Tensor, grad_BGN: Tensor, table_GFN: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `decode` with respect to the values `[P]` and the table `[G, F, N]`."""
    n_groups, n_features, _ = table_GFN.shape
    shape = (grad_BGN.shape[0], n_groups, n_features)
    positions_P = positions(features_P, offsets, n_groups, n_features)
    code_GBF = written_out(values_P, positions_P, shape)
    grad_GBN = grad_BGN.transpose(0, 1)
    d_code_BGF = torch.bmm(grad_GBN, table_GFN.transpose(1, 2)).transpose(0, 1).reshape(-1)
    return d_code_BGF[positions_P], torch.bmm(code_GBF.transpose(1, 2), grad_GBN)


def outer(values_P: Tensor, features_P: Tensor, offsets: Tensor, x_BGN: Tensor, n_features: int) -> Tensor:
    """`out[g, f] = sum over pairs of values * x[row]`, as `[G, F, N]`."""
    n_rows, n_groups, _ = x_BGN.shape
    shape = (n_rows, n_groups, n_features)
    code_GBF = written_out(values_P, positions(features_P, offsets, n_groups, n_features), shape)
    return torch.bmm(code_GBF.transpose(1, 2), x_BGN.transpose(0, 1))
