"""Which features stay active: frozen settings, each with its source."""

from __future__ import annotations

from dataclasses import dataclass


def _check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k is {k!r}; expected a whole number of at least 1")


@dataclass(frozen=True)
class TopK:
    """Each token keeps its k largest scores (Gao et al. 2024, arXiv 2406.04093, eq. 3); in a bank, at each layer.

    Equal scores go to the lowest feature. A kept score below zero has value 0.
    """

    k: int = 32

    def __post_init__(self) -> None:
        _check_k(self.k)


@dataclass(frozen=True)
class BatchTopK:
    """A batch of B tokens keeps its B * k largest positive scores (Bussmann et al. 2024, arXiv 2412.06410).

    In a bank each layer makes its own cut. In evaluation mode a running mean of the training cuts serves as a fixed
    threshold, so that a token's code does not depend on its neighbours; `momentum` is that mean's memory per step.
    """

    k: int = 32
    momentum: float = 0.99

    def __post_init__(self) -> None:
        _check_k(self.k)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum!r}; expected 0 <= momentum < 1")


Sparsity = TopK | BatchTopK
