"""Where a dictionary starts: decoder directions, the encoder as their transpose, the bias at the data's centre."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from crosscoder.dictionary.interface import Dictionary
from crosscoder.dictionary.sparsity import BatchTopK, JumpReLU, Sparsity


def directions(shape: tuple[int, ...], *, layer_dim: int, initial: Literal["independent", "same"], seed: int) -> Tensor:
    """Gaussian rows, a pure function of `seed`; with `same` they do not change along `layer_dim`."""
    drawn = list(shape)
    if initial == "same":
        drawn[layer_dim] = 1
    return torch.randn(drawn, generator=torch.Generator().manual_seed(seed)).expand(shape)


def unit_rows(rows: Tensor, *, row_dims: int, mask: Tensor | None = None) -> Tensor:
    """The rows, masked, with norm 1 over their last `row_dims` axes together, as a tensor of its own."""
    if mask is not None:
        rows = rows * mask
    dims = tuple(range(-row_dims, 0))
    return rows / rows.norm(dim=dims, keepdim=True)


def log_threshold(shapes: dict[str, tuple[int, ...]], sparsity: Sparsity) -> nn.Parameter | None:
    """The logarithm of JumpReLU's threshold, the same for every feature at first; None for other rules."""
    if not isinstance(sparsity, JumpReLU):
        return None
    return nn.Parameter(torch.full(shapes["log_threshold"], math.log(sparsity.threshold)))


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
def initialize_bias(
    dictionary: Dictionary, x_BLD: Tensor, *, method: Literal["geometric_median", "mean", "zero"]
) -> None:
    """Set the decoder bias of every layer to the centre of a first batch."""
    center_GN = dictionary.grouped().center_GN
    x_BGN = x_BLD.reshape(-1, *center_GN.shape).to(center_GN)
    match method:
        case "geometric_median":
            center_GN.copy_(torch.stack([geometric_median(x_BGN[:, g]) for g in range(x_BGN.shape[1])]))
        case "mean":
            center_GN.copy_(x_BGN.mean(0))
        case "zero":
            center_GN.zero_()


def update_threshold(dictionary: Dictionary, cut_G: Tensor | None) -> None:
    """Move the inference threshold towards a training step's cut; without gradient this is no step, and nothing moves.

    The first cut is taken whole, later ones with weight 1 - momentum.
    """
    sparsity = dictionary.config.sparsity
    if cut_G is None or not isinstance(sparsity, BatchTopK) or not torch.is_grad_enabled():
        return
    with torch.no_grad():
        old_G = dictionary.threshold
        cut_G = cut_G.to(old_G.dtype)
        old_G.copy_(torch.where(old_G.isnan(), cut_G, torch.lerp(cut_G, old_G, sparsity.momentum)))
