"""What the optimiser calls: one pass over the rows of a parameter, and the gradient norms that clipping needs."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels.ops import implementation, on_device_of


@torch.no_grad()
def adam_rows(
    parameter_RN: Tensor,
    gradient_RN: Tensor,
    first_RN: Tensor,
    second_RN: Tensor,
    *,
    step: int,
    rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    scale_G: Tensor | None = None,
    unit: bool = False,
    working_RN: Tensor | None = None,
) -> None:
    """One step of AdamW in place on the rows of a parameter: see `reference.adam_rows`.

    step: counted from 1. scale_G: what the gradient rows are multiplied by, one number for each of G equal runs of
    rows. unit: rows have norm 1, stay so, and the gradient's part along them is removed. working_RN: receives
    the new rows in another dtype.
    """
    with on_device_of(parameter_RN):
        implementation(parameter_RN).adam_rows(
            parameter_RN,
            gradient_RN,
            first_RN,
            second_RN,
            step=step,
            rate=rate,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            scale_G=scale_G,
            unit=unit,
            working_RN=working_RN,
        )
    torch.autograd.graph.increment_version(parameter_RN)


@torch.no_grad()
def row_squares(gradient_RN: Tensor, unit_RN: Tensor | None = None) -> Tensor:
    """Squared norm of each gradient row, `[R]`, without its part along the given row of norm 1, if one is given."""
    with on_device_of(gradient_RN):
        return implementation(gradient_RN).row_squares(gradient_RN, unit_RN)
