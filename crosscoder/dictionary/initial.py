"""Where a dictionary starts: rows of norm 1, and the bias at the data's centre."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from crosscoder.dictionary.code import Grouped


def unit_rows(rows: Tensor, *, n_axes: int, mask: Tensor | None = None) -> Tensor:
    """The rows, masked, with norm 1 over their last `n_axes` axes together, as a tensor of its own."""
    if mask is not None:
        rows = rows * mask
    return rows / rows.norm(dim=tuple(range(-n_axes, 0)), keepdim=True)


def geometric_median(x_BN: Tensor, *, n_steps: int = 50, tolerance: float = 1e-5) -> Tensor:
    """The point with the least summed distance to the rows, `[N]` (Weiszfeld's iteration).

    Half the rows may be moved arbitrarily far without moving it far, which the mean does not survive.
    """
    # Squares of large numbers would overflow; by a power of two, so that other numbers keep their bits.
    size = torch.ldexp(x_BN.new_ones(()), torch.frexp(x_BN.abs().amax()).exponent)
    x_BN = x_BN / size
    point_N = x_BN.mean(0)
    for _ in range(n_steps):
        distance_B = (x_BN - point_N).norm(dim=1).clamp_min(1e-12)
        weight_B = distance_B.reciprocal()
        moved_N = (weight_B @ x_BN) / weight_B.sum()
        step = (moved_N - point_N).norm()
        point_N = moved_N
        if step <= tolerance * moved_N.norm().clamp_min(1e-12):
            break
    return point_N * size


@torch.no_grad()
def initialize_bias(grouped: Grouped, x_BLD: Tensor, *, method: Literal["geometric_median", "mean", "zero"]) -> None:
    """Set the decoder bias of every layer to the centre of a first batch."""
    center_GN = grouped.center_GN
    x_BGN = grouped.split(x_BLD).to(center_GN)
    match method:
        case "geometric_median":
            center_GN.copy_(torch.stack([geometric_median(x_BGN[:, g]) for g in range(x_BGN.shape[1])]))
        case "mean":
            center_GN.copy_(x_BGN.mean(0))
        case "zero":
            center_GN.zero_()
