"""The constants of the decision rule and the values it looks at."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from crosscoder.measure.dimension import SELF_COSINE
from crosscoder.results.table import CONFIDENCE, Estimate


@dataclass(frozen=True)
class Rule:
    """The constants of the rule; a change of any of them is a new version."""

    version: str = "crosscoder.verdict/2"  # 1 asked that an interval cover 0, whatever its width
    confidence: float = CONFIDENCE
    loss_gap: float = 0.01
    explained_variance_gap: float = 0.05
    dead_share: float = 0.1
    self_cosine: float = SELF_COSINE
    calibration_error: float = 0.1
    universal: float = 0.8
    not_universal: float = 0.5
    complete: tuple[float, float] = (1.6, 2.5)
    equal: tuple[float, float] = (0.8, 1.25)
    delta: tuple[float, float] = (0.35, 0.65)
    gamma: float = 0.25
    alternative_alpha: float = 2.0
    removal_share: float = 0.5
    ceiling: float = 1.0
    zero_gamma: tuple[float, float] = (0.05, 0.25)  # negligible, bound
    zero_cross_layer: tuple[float, float] = (0.05, 0.25)
    zero_count_gain: tuple[float, float] = (0.1, 0.4)

    def constants(self) -> dict[str, Any]:
        """Every constant by name, pairs as lists."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


RULE = Rule()
STATISTICS = ("universality", "alpha", "gamma", "gamma_excess", "delta", "cross_layer", "count_gain")
"""What the rule needs beside R, all of the primary site."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Errors on planted worlds, the worst over worlds: relative, absolute value; None where not measured."""

    count_error: float | None = None
    rho_error: float | None = None
    d_eff_error: float | None = None  # shown; no gate
    same_sizes: bool = False


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that the rule looks at; None is a value that was not measured.

    Shares and gaps are from 0 to 1; `loss_gap` is relative to the lower loss. Of several subjects or seeds the worst
    value belongs here. `removal_shift` is needed only where X is above 0.
    """

    loss_gap: float | None
    loss_matched: bool  # checkpoints were chosen for equal loss
    explained_variance: tuple[float, float] | None  # A, B
    dead_share: float | None
    self_cosine: float | None
    calibration: Calibration
    trained_difference: Estimate | None  # trained less untrained, of the primary statistic
    ratio: Estimate | None  # R on what blocks write
    universality: Estimate | None
    alpha: Estimate | None
    gamma: Estimate | None
    gamma_excess: Estimate | None
    delta: Estimate | None
    cross_layer: Estimate | None  # X
    count_gain: Estimate | None
    removal_shift: Estimate | None = None
    ratio_residual: Estimate | None = None  # R on the residual stream
    headroom: Estimate | None = None
    trained_difference_by: str | None = None  # the estimator of R that both the trained and the untrained pair have
    n_training_seeds: int = 1  # of the shape with fewest
