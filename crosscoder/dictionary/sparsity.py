"""Which features stay active, and what their activity costs: frozen settings, each with its source.

A row is what one dictionary reads of one token: the token for a crosscoder, each (token, layer) for a bank. A penalty
is a mean over rows, beside an error that is a mean over numbers.

Gated SAEs (Rajamanoharan et al. 2024, arXiv 2404.16014) are left out: their forward pass with tied weights is that of
JumpReLU (their appendix), and their gate needs a second pre-activation and a reconstruction of its own in the loss,
which no other rule has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal


def _check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k is {k!r}; expected a whole number of at least 1")


def _check_positive(**settings: float) -> None:
    for name, value in settings.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value!r}; expected a positive number")


def _check_coefficient(coefficient: float) -> None:
    if not (math.isfinite(coefficient) and coefficient >= 0):
        raise ValueError(f"coefficient is {coefficient!r}; expected 0 or more")


@dataclass(frozen=True)
class NormPenalty:
    """A feature costs its value times its decoder's norm: `coefficient / width * mean over rows of sum_i f_i |W_i|`.

    Width is what a row reconstructs, L * D or in a bank D, so that the coefficient is that of the literature, which
    sums squared errors over the width, for inputs of norm sqrt(width).

    norm: `l1` is "L1 of norms", `|W_i| = sum_l ||W_il||`, the loss of Lindsey et al. 2024, "Sparse Crosscoders"; `l2`
        is "L2 of norms", `|W_i| = ||W_i||` over all layers together, which they compare it with. In a bank the two are
        equal. With `l1` one feature in L layers costs what L features, one a layer, would cost.
    """

    norm: Literal["l1", "l2"] = "l1"
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        if self.norm not in ("l1", "l2"):
            raise ValueError(f"norm is {self.norm!r}; expected 'l1' or 'l2'")
        _check_coefficient(self.coefficient)


@dataclass(frozen=True)
class TanhPenalty:
    """A count of active features that forgives small values: `coefficient * mean over rows of sum_i tanh(scale f_i
    ||W_i||)` (Anthropic, "Circuits Updates", February 2024; in this form, January 2025, with scale 4)."""

    scale: float = 4.0
    coefficient: float = 3e-3

    def __post_init__(self) -> None:
        _check_positive(scale=self.scale)
        _check_coefficient(self.coefficient)


@dataclass(frozen=True)
class L0Penalty:
    """The mean number of active features of a row, times `coefficient` (Rajamanoharan et al. 2024, section 3).

    Thresholds alone get its gradient: `-1 / window` for each score within half a window, straight through the step.
    With inputs of norm sqrt(width) the coefficient is the paper's lambda.
    """

    coefficient: float = 3e-3

    def __post_init__(self) -> None:
        _check_coefficient(self.coefficient)


@dataclass(frozen=True)
class TargetL0Penalty:
    """`coefficient * (L0 / target - 1)^2`, L0 the mean number of active features of a row over the batch, by layer in
    a bank, with the gradient of `L0Penalty` (Rajamanoharan et al. 2024, the appendix's loss for a desired sparsity)."""

    target: float = 32.0
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(target=self.target)
        _check_coefficient(self.coefficient)


Penalty = NormPenalty | TanhPenalty | L0Penalty | TargetL0Penalty


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


@dataclass(frozen=True)
class ReLU:
    """Every feature with a positive pre-activation is active; `penalty` makes them few (Lindsey et al. 2024).

    Meant for `decoder="free"`: the penalty weighs values by decoder norms, which a unit decoder holds at 1. A feature
    that is positive on no token gets no gradient: the trainer's `resample_every` starts it again.
    """

    penalty: NormPenalty | TanhPenalty = field(default_factory=NormPenalty)

    def __post_init__(self) -> None:
        if not isinstance(self.penalty, NormPenalty | TanhPenalty):
            raise ValueError(
                f"penalty is {self.penalty!r}; without a learned threshold it must be a NormPenalty or a TanhPenalty"
            )


@dataclass(frozen=True)
class JumpReLU:
    """A feature is active, with its value z, where z exceeds its own learned threshold theta (Rajamanoharan et al.
    2024, arXiv 2407.14435, section 3): `f_i = z_i H(z_i - theta_i)`.

    `log_threshold` is the parameter, one for each feature and layer of a bank. In training its gradient is straight
    through a rectangle of width `window`: `-theta / window` of that to the value, for positive z within half a window
    of theta. `threshold` is where theta starts. Both are in units of z, which at first spreads by about 1 where inputs
    have norm sqrt(width); theta moves by factors, so that from a small one the way is long.
    """

    threshold: float = 1.0
    window: float = 0.5
    penalty: Penalty = field(default_factory=TargetL0Penalty)

    def __post_init__(self) -> None:
        _check_positive(threshold=self.threshold, window=self.window)
        if not isinstance(self.penalty, Penalty):
            raise ValueError(f"penalty is {self.penalty!r}; expected a penalty such as TargetL0Penalty(target=32)")


Sparsity = TopK | BatchTopK | ReLU | JumpReLU
