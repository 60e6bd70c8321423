"""Adam by blocks of rows: what belongs to a row is done to it while it is in cache.

Each block is read and written once for clipping, projection, the update and renormalising together: in C for fp32,
else around torch's fused AdamW.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_kernels.arguments import AdamRows, AdamSettings
from triton_kernels.cpu import fused, native
from triton_kernels.reference import sum_dtype

BLOCK_ELEMENTS = 2**18  # 1 MiB of each of parameter, gradient and both moments


def adam_rows(rows: AdamRows, settings: AdamSettings) -> None:
    parameter_RN, gradient_RN, first_RN, second_RN, working_RN = rows
    for name, tensor in {"parameter": parameter_RN, "first": first_RN, "second": second_RN}.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; it is changed in place and must be contiguous")
    if native.serves(parameter_RN, gradient_RN, first_RN, second_RN, settings.scale_G):
        _adam_in_c(rows, settings)
    else:
        _adam_of_blocks(rows._replace(gradient_RN=gradient_RN.contiguous()), settings)
    if working_RN is not None:
        working_RN.copy_(parameter_RN)


def _adam_in_c(rows: AdamRows, settings: AdamSettings) -> None:
    step, rate, betas, eps, weight_decay, scale_G, unit = settings
    n_groups = 1 if scale_G is None else scale_G.numel()
    n_rows, width = rows.parameter_RN.shape
    numbers = (rate / (1 - betas[0] ** step), 1 - betas[0], betas[1], 1 - betas[1], eps)
    root, keep = (1 - betas[1] ** step) ** 0.5, 1 - rate * weight_decay
    floats = map(float, (*numbers, root, keep))
    native.call("adam_rows", n_rows, n_groups, width, *rows[:4], *floats, scale_G, int(unit))


def _adam_of_blocks(rows: AdamRows, settings: AdamSettings) -> None:
    n_rows, width = rows.parameter_RN.shape
    block = max(1, BLOCK_ELEMENTS // max(1, width))
    scale_R = None
    if settings.scale_G is not None:
        scale_R = settings.scale_G.repeat_interleave(n_rows // settings.scale_G.numel())[:, None]
    numbers: dict[str, Any] = {"lr": settings.rate, "weight_decay": settings.weight_decay, "eps": settings.eps}
    numbers |= {"beta1": settings.betas[0], "beta2": settings.betas[1], "amsgrad": False, "maximize": False}
    for start in range(0, n_rows, block):
        part = slice(start, start + block)
        parameter, gradient, first, second = (tensor[part] for tensor in rows[:4])
        if settings.unit:
            along = torch.linalg.vecdot(gradient, parameter)[:, None]
            gradient = torch.addcmul(gradient, along, parameter, value=-1)
        if scale_R is not None:
            gradient = gradient * scale_R[part]
        step = torch.tensor(float(settings.step))
        torch._fused_adamw_([parameter], [gradient], [first], [second], [], [step], **numbers)
        if settings.unit:
            parameter.div_(torch.linalg.vector_norm(parameter, dim=1, keepdim=True).clamp_min_(1e-12))


def row_squares(gradient_RN: Tensor, unit_RN: Tensor | None, *, untouched: bool = False) -> Tensor:
    """See `reference.row_squares`, and `ops.row_squares`."""
    known_R = fused.gradient_squares.find(gradient_RN) if unit_RN is None and untouched else None
    if known_R is not None:
        return known_R
    if native.serves(gradient_RN, unit_RN):
        squares = gradient_RN.new_empty(gradient_RN.shape[0])
        native.call("row_squares", *gradient_RN.shape, gradient_RN, unit_RN, squares)
        return squares
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
