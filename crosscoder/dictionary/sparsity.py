"""Which features stay active, and what their activity costs: frozen settings, each with its source.

A row is what one dictionary reads of one token: the token for a crosscoder, each (token, layer) for a bank. A penalty
is a mean over rows, beside an error that is a mean over numbers.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from crosscoder.foundation.config import config


@config(kw_only=False)
class NormPenalty:
    """A feature costs its value times its decoder's norm: `coefficient / width * mean over rows of sum_i f_i |W_i|`.

    Width is what a row reconstructs, L * D or in a bank D, so that the coefficient is that of the literature, which
    sums squared errors over the width, for inputs of norm sqrt(width).

    norm: `l1` is "L1 of norms", `|W_i| = sum_l ||W_il||`, the loss of Lindsey et al. 2024, "Sparse Crosscoders"; `l2`
        is "L2 of norms", `|W_i| = ||W_i||` over all layers together, which they compare it with. In a bank the two are
        equal. With `l1` one feature in L layers costs what L features, one a layer, would cost.
    """

    norm: Literal["l1", "l2"] = "l1"
    coefficient: NonNegativeFloat = 1.0


@config(kw_only=False)
class TanhPenalty:
    """A count of active features that forgives small values: `coefficient * mean over rows of sum_i tanh(scale f_i
    ||W_i||)` (Anthropic, "Circuits Updates", February 2024; in this form, January 2025, with scale 4)."""

    scale: PositiveFloat = 4.0
    coefficient: NonNegativeFloat = 3e-3


@config(kw_only=False)
class L0Penalty:
    """The mean number of active features of a row, times `coefficient` (Rajamanoharan et al. 2024, section 3).

    Thresholds alone get its gradient: `-1 / window` for each score within half a window, straight through the step.
    With inputs of norm sqrt(width) the coefficient is the paper's lambda.
    """

    coefficient: NonNegativeFloat = 3e-3


@config(kw_only=False)
class TargetL0Penalty:
    """`coefficient * (L0 / target - 1)^2`, L0 the mean number of active features of a row over the batch, by layer in
    a bank, with the gradient of `L0Penalty` (Rajamanoharan et al. 2024, the appendix's loss for a desired sparsity)."""

    target: PositiveFloat = 32.0
    coefficient: NonNegativeFloat = 1.0


Penalty = NormPenalty | TanhPenalty | L0Penalty | TargetL0Penalty


@config(kw_only=False)
class TopK:
    """Each token keeps its k largest scores (Gao et al. 2024, arXiv 2406.04093, eq. 3); in a bank, at each layer.

    Equal scores go to the lowest feature. A kept score below zero has value 0.
    """

    k: PositiveInt = 32


@config(kw_only=False)
class BatchTopK:
    """A batch of B tokens keeps its B * k largest positive scores (Bussmann et al. 2024, arXiv 2412.06410).

    In a bank each layer makes its own cut. In evaluation mode a running mean of the training cuts serves as a fixed
    threshold, so that a token's code does not depend on its neighbours; `momentum` is that mean's memory per step.
    """

    k: PositiveInt = 32
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99


@config(kw_only=False)
class ReLU:
    """Every feature with a positive pre-activation is active; `penalty` makes them few (Lindsey et al. 2024).

    Meant for `decoder="free"`: the penalty weighs values by decoder norms, which a unit decoder holds at 1. A feature
    that is positive on no token gets no gradient: the trainer's `resample_every` starts it again.
    """

    penalty: NormPenalty | TanhPenalty = NormPenalty()


@config(kw_only=False)
class JumpReLU:
    """A feature is active, with its value z, where z exceeds its own learned threshold theta (Rajamanoharan et al.
    2024, arXiv 2407.14435, section 3): `f_i = z_i H(z_i - theta_i)`.

    `log_threshold` is the parameter, one for each feature and layer of a bank. In training its gradient is straight
    through a rectangle of width `window`: `-theta / window` of that to the value, for positive z within half a window
    of theta. `threshold` is where theta starts. Both are in units of z, which at first spreads by about 1 where inputs
    have norm sqrt(width); theta moves by factors, so that from a small one the way is long.
    """

    threshold: PositiveFloat = 1.0
    window: PositiveFloat = 0.5
    penalty: Penalty = TargetL0Penalty()


Sparsity = TopK | BatchTopK | ReLU | JumpReLU
