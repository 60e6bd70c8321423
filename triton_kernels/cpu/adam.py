"""Adam by blocks of rows: what belongs to a row is done to it while it is in cache.

Each block is read and written once for clipping, projection, the update and the norm together: in C for fp32, else
around torch's fused AdamW.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels.cpu import fused, native
from triton_kernels.reference import sum_dtype

BLOCK_ELEMENTS = 2**18  # 1 MiB of each of parameter, gradient and both moments


def adam_rows(
    parameter_RN: Tensor,
    gradient_RN: Tensor,
    first_RN: Tensor,
    second_RN: Tensor,
    *,
    step: int,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale_G: Tensor | None,
    unit: bool,
    working_RN: Tensor | None,
) -> None:
    """See `reference.adam_rows`."""
    for name, tensor in {"parameter": parameter_RN, "first": first_RN, "second": second_RN}.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; it is changed in place and must be contiguous")
    if native.serves(parameter_RN, gradient_RN, first_RN, second_RN, scale_G):
        settings = {"step": step, "rate": rate, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        native.adam_rows(parameter_RN, gradient_RN, first_RN, second_RN, **settings, scale_G=scale_G, unit=unit)
        if working_RN is not None:
            working_RN.copy_(parameter_RN)
        return
    n_rows, width = parameter_RN.shape
    gradient_RN = gradient_RN.contiguous()
    block = max(1, BLOCK_ELEMENTS // max(1, width))
    scale_R = None if scale_G is None else scale_G.repeat_interleave(n_rows // scale_G.numel())[:, None]
    for start in range(0, n_rows, block):
        rows = slice(start, start + block)
        parameter, gradient = parameter_RN[rows], gradient_RN[rows]
        if unit:
            along = torch.linalg.vecdot(gradient, parameter)[:, None]
            gradient = torch.addcmul(gradient, along, parameter, value=-1)
        if scale_R is not None:
            gradient = gradient * scale_R[rows]
        torch._fused_adamw_(
            [parameter],
            [gradient],
            [first_RN[rows]],
            [second_RN[rows]],
            [],
            [torch.tensor(float(step))],
            lr=rate,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
        if unit:
            parameter.div_(torch.linalg.vector_norm(parameter, dim=1, keepdim=True).clamp_min_(1e-12))
        if working_RN is not None:
            working_RN[rows] = parameter.to(working_RN.dtype)


def row_squares(gradient_RN: Tensor, unit_RN: Tensor | None) -> Tensor:
    """See `reference.row_squares`."""
    known_R = fused.row_squares.find(gradient_RN) if unit_RN is None else None
    if known_R is not None:
        return known_R
    if native.serves(gradient_RN, unit_RN):
        return native.row_squares(gradient_RN, unit_RN)
    dtype = sum_dtype(gradient_RN.dtype)
    if unit_RN is None:
        return torch.linalg.vector_norm(gradient_RN, dim=1, dtype=dtype).square()
    squares = gradient_RN.new_empty(gradient_RN.shape[0], dtype=dtype)
    block = max(1, BLOCK_ELEMENTS // max(1, gradient_RN.shape[1]))
    for start in range(0, gradient_RN.shape[0], block):
        rows = slice(start, start + block)
        gradient = gradient_RN[rows]
        along = torch.linalg.vecdot(gradient, unit_RN[rows])[:, None]
        across = torch.addcmul(gradient, along, unit_RN[rows], value=-1)  # a difference of squares would cancel
        squares[rows] = torch.linalg.vector_norm(across, dim=1, dtype=dtype).square()
    return squares
