"""How many dimensions writes fill, from their covariance alone and no dictionary; and how that grows with shape.

The room is the participation ratio of the joint covariance C of all layers' writes, `tr(C)^2 / tr(C^2)`: N for equal
variance in N dimensions, 1 for one direction. It weights dimensions by variance, so its units matter: of 8 layers of 64
trained on 500,000 tokens block 1 has 83 % of the variance, and the room is 10.5 in model units, 8.0 of block 1 alone,
and 32 with each layer at its scale.

`shares_of_ln2` says where the factor of two goes, in two ledgers that add up: by load, persistence, geometry and width.
B has a quarter of A's layers and twice its width, so equal parameters and half the joint dimensions. Were loads equal
and room proportional to dimensions, B would be twice as crowded. The layers' ledger says where that goes when each
layer is counted by its own bank; the joint ledger when all layers are one room. They share the load alone, so shares of
the one are not to be added to those of the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats
from torch import Tensor

from crosscoder.measure.statistics import linear_combination
from crosscoder.results.table import CONFIDENCE, Estimate

LN2, LN4 = math.log(2), math.log(4)
MOMENT_BYTES = 2**30
"""Of the second moments of all layers together, as float64: 11,585 dimensions."""
LARGEST_CORRECTION = 2.0
"""Times the plain ratio that the corrected one may be."""
LARGEST_INFLATION = 100.0
"""Of the variance of an exponent for widths and depths that vary together; above it, rounding of shapes decides."""


class WriteMoments:
    """Moments of writes that come some tokens at a time, in float64, about the mean of the first batch."""

    def __init__(self, n_layers: int, d_model: int) -> None:
        n_joint = n_layers * d_model
        if 8 * n_joint**2 > MOMENT_BYTES:
            raise ValueError(
                f"{n_layers} layers of {d_model} have second moments of {8 * n_joint**2 / 2**30:.1f} GiB, more than "
                f"the {MOMENT_BYTES / 2**30:.1f} GiB that may be held; give fewer layers"
            )
        self.n_layers, self.d_model, self.n_tokens = n_layers, d_model, 0
        self.origin_N = np.zeros(n_joint)
        self.sum_N, self.square_NN = np.zeros(n_joint), np.zeros((n_joint, n_joint))
        # Of each layer's squared norm, for the fourth moment: with itself, and with every dimension.
        self.norms_LL, self.norms_LN = np.zeros((n_layers, n_layers)), np.zeros((n_layers, n_joint))

    def add(self, x_TLD: np.ndarray | Tensor) -> None:
        """Add tokens in the model's own units, of usual norm: outliers would be most of the covariance."""
        x = x_TLD.detach().cpu().double().numpy() if isinstance(x_TLD, Tensor) else np.asarray(x_TLD, np.float64)
        x_TN = x.reshape(len(x), -1)
        if self.n_tokens == 0 and len(x):
            self.origin_N = x_TN.mean(0)
        x_TN = x_TN - self.origin_N
        norm_TL = np.square(x_TN).reshape(x.shape).sum(2)
        self.n_tokens += len(x)
        self.sum_N += x_TN.sum(0)
        self.square_NN += x_TN.T @ x_TN
        self.norms_LL += norm_TL.T @ norm_TL
        self.norms_LN += norm_TL.T @ x_TN


@dataclass(frozen=True)
class ParticipationRatio:
    """The room of writes. plain: without the correction for finite T. energy_L: each layer's share of tr(C)."""

    value: float
    plain: float
    n_tokens: int
    energy_L: np.ndarray


def participation_ratio(
    moments: WriteMoments, scale_L: Sequence[float] | np.ndarray | None = None
) -> ParticipationRatio | str:
    """`tr(C)^2 / tr(C^2)` of the joint covariance, in model units or with each layer multiplied by its scale.

    The sample covariance of T tokens has too large a `tr(C^2)`, by about `tr(C)^2 / T`, so the plain ratio is too small
    by a share of about ratio / T. Here `tr(C)^2` and `tr(C^2)` are each unbiased whatever the distribution, from the
    second and fourth moments (Himeno and Yamada 2014, the U-statistics of Chen, Zhang and Zhong 2010); what is left in
    their ratio is of order 1 / T. Tokens are taken as independent: where neighbours are alike T counts for less, and a
    part of the shortfall stays.

    Where variance is equal in all L D dimensions the value may come out a little above L D.

    There is a reason where writes are constant, or T is so small (about the ratio itself) that the correction would be
    more than `LARGEST_CORRECTION` times.
    """
    n_layers, n_joint, n = moments.n_layers, len(moments.sum_N), moments.n_tokens
    scales = np.ones(n_layers) if scale_L is None else np.asarray(scale_L, dtype=np.float64)
    if n < 4:
        return f"{n} tokens; an unbiased covariance needs four"
    scale_N = np.repeat(scales, moments.d_model)
    mean_N = scale_N * moments.sum_N / n
    square_NN = scale_N[:, None] * moments.square_NN * scale_N
    covariance_NN = (square_NN - n * np.outer(mean_N, mean_N)) / (n - 1)
    energy_L = np.diag(covariance_NN).reshape(n_layers, -1).sum(1)
    trace, trace_square = float(energy_L.sum()), float(np.square(covariance_NN).sum())
    if not trace_square > 0:
        return "the writes are constant, so they fill no room"
    fourth = _fourth_moment(moments, scales, mean_N, square_NN) / (n - 1)
    # Both times n (n - 2) (n - 3) / (n - 1).
    above = 2 * trace_square + (n**2 - 3 * n + 1) * trace**2 - n * fourth
    below = (n - 1) * (n - 2) * trace_square + trace**2 - n * fourth
    plain = trace**2 / trace_square
    if not below * plain * LARGEST_CORRECTION > above:
        return f"{n} tokens are too few for {n_joint} dimensions: most of the plain ratio, {plain:.3g}, is their number"
    return ParticipationRatio(float(above / below), plain, n, energy_L / trace)


def _fourth_moment(moments: WriteMoments, scale_L: np.ndarray, mean_N: np.ndarray, square_NN: np.ndarray) -> float:
    """Sum over tokens of `|x - mean|^4` of scaled writes."""
    n, weight_L, centre = moments.n_tokens, np.square(scale_L), float(mean_N @ mean_N)
    with_norm_N = np.repeat(scale_L, moments.d_model) * (weight_L @ moments.norms_LN)
    norms = weight_L @ moments.norms_LL @ weight_L
    crossed = 4 * (mean_N @ square_NN @ mean_N) - 4 * (mean_N @ with_norm_N)
    return float(norms + crossed + 2 * centre * np.trace(square_NN) - 3 * n * centre**2)


class ShapeRoom(NamedTuple):
    """The room of one training of a shape; dictionaries have no part in it."""

    n_layers: int
    d_model: int
    room: float


@dataclass(frozen=True)
class RoomLaw:
    """`ln room = c + beta ln D + delta ln L`, fitted to trainings or shapes.

    misfit: the probability of deviations of the shapes from the law as large as these if only trainings vary (the F
    test for lack of fit); None without two trainings of a shape, without a fourth shape, or where shapes were fitted.
    Where it is small the law does not hold, and intervals over trainings are too narrow.
    """

    coefficient_3: np.ndarray  # c, beta, delta
    covariance_33: np.ndarray
    freedom: int
    misfit: float | None

    def contrast(self, beta: float, delta: float) -> Estimate:
        """`beta * (exponent of D) + delta * (exponent of L)` with its t interval."""
        weight = np.array([0.0, beta, delta])
        value = float(weight @ self.coefficient_3)
        error = float(np.sqrt(weight @ self.covariance_33 @ weight))
        reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, self.freedom)) * error
        return Estimate(value, value - reach, value + reach)

    @property
    def beta(self) -> Estimate:
        return self.contrast(1, 0)

    @property
    def delta(self) -> Estimate:
        return self.contrast(0, 1)

    @property
    def excess_depth(self) -> Estimate:
        """`delta - beta / 2`: 0 exactly if room is a function of the parameters, which go as `L D^2`."""
        return self.contrast(-0.5, 1)


def fit_room(runs: Sequence[ShapeRoom], *, unit: Literal["training", "shape"] = "training") -> RoomLaw | str:
    """The law of rooms by ordinary least squares, over trainings or over shapes, or why the grid cannot say it.

    Over trainings its intervals hold if every shape lies on the law and trainings of all vary alike. On a grid of 8
    shapes and 36 trainings they cover 90 % so; 84 to 87 % if shapes of two layers vary .12 and others .05; and 52 to
    66 % if each shape is 10 % off the law. Over shapes the mean log of each shape's trainings is one point, deviations
    are part of the scatter, and the last case is covered too; that needs four shapes, and is wide with few.

    A grid where depth is fixed by width, such as shapes of equal `L D^2` alone, holds one exponent and not two; it is
    refused where the variance of an exponent is inflated more than `LARGEST_INFLATION` times by it, since widths are
    rounded and no such grid is exactly degenerate.
    """
    table = np.array([tuple(run) for run in runs], dtype=np.float64).reshape(-1, 3)
    if not (np.isfinite(table) & (table > 0)).all():
        raise ValueError(f"expected depths, widths and rooms above 0, got {[tuple(run) for run in runs]}")
    shapes, shape_T = np.unique(table[:, :2], axis=0, return_inverse=True)
    if unit == "shape":
        log_S = np.bincount(shape_T, np.log(table[:, 2])) / np.bincount(shape_T)
        table, shape_T = np.column_stack([shapes, np.exp(log_S)]), np.arange(len(shapes))
    if len(shapes) < 3 or len(table) < 4:
        return f"{len(table)} {unit}s, of {len(shapes)} shapes; two exponents need four, of three"
    depth_T, width_T, y_T = np.log(table).T
    if np.ptp(depth_T) == 0 or np.ptp(width_T) == 0:
        return f"all shapes have one {'depth' if np.ptp(depth_T) == 0 else 'width'}, so its exponent is unknown"
    kept = 1 - np.corrcoef(depth_T, width_T)[0, 1] ** 2
    if not kept * LARGEST_INFLATION > 1:
        return (
            f"depth is fixed by width in the shapes {_listed(shapes)} (of ln L all but {kept:.1g} goes with ln D): "
            "their exponents cannot be told apart; add shapes of another size"
        )
    design_T3 = np.stack([np.ones(len(y_T)), width_T, depth_T], axis=1)
    coefficient_3 = np.linalg.lstsq(design_T3, y_T, rcond=None)[0]
    residual = float(np.square(y_T - design_T3 @ coefficient_3).sum())
    freedom = len(y_T) - 3
    if not residual > 1e-20 * float(np.square(y_T).sum()):
        return "the trainings lie on the law exactly: copies, which have no interval"
    mean_S = np.bincount(shape_T, y_T) / np.bincount(shape_T)
    pure = float(np.square(y_T - mean_S[shape_T]).sum())
    covariance_33 = residual / freedom * np.linalg.inv(design_T3.T @ design_T3)
    return RoomLaw(coefficient_3, covariance_33, freedom, _misfit(residual, pure, len(y_T), len(shapes)))


def _misfit(residual: float, pure: float, n_runs: int, n_shapes: int) -> float | None:
    if n_shapes < 4 or n_runs == n_shapes or not pure > 0:
        return None
    ratio = (residual - pure) / (n_shapes - 3) / (pure / (n_runs - n_shapes))
    return float(stats.f.sf(ratio, n_shapes - 3, n_runs - n_shapes))


def _listed(shapes: np.ndarray) -> str:
    return ", ".join(f"{depth:g}x{width:g}" for depth, width in shapes)


@dataclass(frozen=True)
class Shares:
    """Shares of ln 2, each with its interval; negative where something adds to the crowding of B.

    load: -q / ln 2, B's features say less. persistence: g ln 4 / ln 2, a feature of A is counted by more layers.
    left_layers: r / ln 2. These three sum to 1, by definition.
    geometry: 2 (beta - delta), depth adds less room than width. width: 1 - beta, doubling the width gives less than
    twice the room, which costs B. left_joint: ln R / ln 2 of the joint room's law. These two, load and left_joint sum
    to 1.
    gap: ln R as measured less that of the law, over ln 2: None where it was not measured on the pair.
    """

    load: Estimate
    persistence: Estimate
    left_layers: Estimate
    geometry: Estimate
    width: Estimate
    left_joint: Estimate
    gap: float | None


def shares_of_ln2(*, q: Estimate, g: Estimate, r: Estimate, law: RoomLaw, log_ratio: Estimate | None = None) -> Shares:
    """The shares of `q = ln(load B / load A)`, sharing g, `r = ln 2 + q - g ln 4` and the law of the joint room.

    `log_ratio` is `q + ln(room A / room B)` as measured. That of the law is `q + (2 delta - beta) ln 2`, with q and the
    law taken as independent.
    """
    made = LN2 + q.value - g.value * LN4
    if not math.isclose(r.value, made, abs_tol=1e-6):
        raise ValueError(f"r is {r.value:g}, and ln 2 + q - g ln 4 is {made:g}; take all three of the same trainings")
    room = law.contrast(-1, 2)
    left_joint = linear_combination([(1 / LN2, q), (1.0, room)])
    return Shares(
        load=linear_combination([(-1 / LN2, q)]),
        persistence=linear_combination([(LN4 / LN2, g)]),
        left_layers=linear_combination([(1 / LN2, r)]),
        geometry=law.contrast(2, -2),
        width=linear_combination([(-1.0, law.beta)], constant=1.0),
        left_joint=left_joint,
        gap=None if log_ratio is None else log_ratio.value / LN2 - left_joint.value,
    )
