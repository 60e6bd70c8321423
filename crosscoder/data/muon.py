"""Muon for many small matrices: those of one shape are orthogonalised together.

`torch.optim.Muon` takes one matrix at a time, which for the 56 of an 8x64 subject is a quarter of a step; together they
take a quarter of that. The update is the same (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of the quintic whose iteration drives all singular values to about 1."""
N_ITERATIONS = 5


class StackedMuon(torch.optim.Optimizer):
    """Momentum, orthogonalised; for matrices alone.

    lr: what a step moves a square or wide matrix by, as its root mean square over singular directions; a tall one moves
        by sqrt(rows / columns) of it, as in `torch.optim.Muon`.
    """

    def __init__(self, params: Any, *, lr: float = 1e-3, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.1, "momentum": momentum, "eps": 1e-7})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # ty: ignore[incompatible-method-override]
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for (n_rows, n_columns), matrices in by_shape.items():
                gradient_nAB = torch.stack([matrix.grad for matrix in matrices if matrix.grad is not None])
                state = self.state[matrices[0]]
                if "momentum_nAB" not in state:
                    state["momentum_nAB"] = torch.zeros_like(gradient_nAB)
                momentum_nAB = state["momentum_nAB"].lerp_(gradient_nAB, 1 - group["momentum"])
                update_nAB = orthogonalised(gradient_nAB.lerp(momentum_nAB, group["momentum"]), eps=group["eps"])
                rate = group["lr"] * max(1.0, n_rows / n_columns) ** 0.5
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, list(update_nAB.to(gradient_nAB)), alpha=-rate)


def orthogonalised(matrix_nAB: Tensor, *, eps: float = 1e-7) -> Tensor:
    """About U V of each matrix `U S V`: five iterations in bfloat16, which leave singular values in .5 to 1.5."""
    is_tall = matrix_nAB.shape[-2] > matrix_nAB.shape[-1]
    x_nAB = (matrix_nAB.mT if is_tall else matrix_nAB).bfloat16()
    x_nAB = x_nAB / x_nAB.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    a, b, c = COEFFICIENTS
    for _ in range(N_ITERATIONS):
        gram_nAA = x_nAB @ x_nAB.mT
        x_nAB = torch.baddbmm(x_nAB, torch.baddbmm(gram_nAA, gram_nAA, gram_nAA, beta=b, alpha=c), x_nAB, beta=a)
    return x_nAB.mT if is_tall else x_nAB
