"""Pairs of worlds: the same features, firing on the same tokens, in a deep narrow space A and a shallow wide space B.

A has L layers of width D, B has L / 4 of width 2 D: equal parameters, half the neurons. A third shape C lies between
them, L / 2 layers of width D sqrt(2), for slopes. How long features last and how they turn is chosen, so the answer
that a comparison of the two should give is known beforehand.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from crosscoder.data.order import seeded_generator
from crosscoder.data.world import (
    Firing,
    Probability,
    check_probabilities,
    draw_activations,
    firing_probabilities,
    mean_interference_dimension,
    window_profile,
)
from crosscoder.foundation.config import config

Side = Literal["A", "B", "C"]
SIDES: tuple[Side, Side] = ("A", "B")
DEPTH_RATIO, WIDTH_RATIO = 4, 2
TOLERANCE = 0.01  # relative: how far a wished d_eff may lie beyond what windows can give


def planted_slot_ratio(gamma: float) -> float:
    """R = 2 * 4^-gamma: features in occupied slots per neuron, B over A, if lifespans grow as L^gamma."""
    return WIDTH_RATIO * DEPTH_RATIO**-gamma


def planted_density_ratio(delta: float) -> float:
    """R = 4^delta / 2: entropy load per effective dimension, B over A, if d_eff grows as D L^delta."""
    return DEPTH_RATIO**delta / WIDTH_RATIO


@config
class PairConfig:
    """One set of features for two shapes.

    gamma: a feature lasts L^gamma layers on average, in one window. 0: one layer; 1: all.
    delta: d_eff = D L^delta, reached by how far features turn from layer to layer; None is 1 - gamma, features that do
        not turn. Windows allow 1 - gamma to 1 if L^gamma divides L, and a little less otherwise.
    """

    n_features: Annotated[int, Field(ge=2)] = 64
    n_layers: Annotated[int, Field(ge=DEPTH_RATIO, multiple_of=DEPTH_RATIO)] = 4
    """Layers of A; a multiple of 4."""
    d_model: Annotated[int, Field(ge=2)] = 16
    """Width of A."""
    gamma: Probability = 0.5
    delta: float | None = None
    p_min: Annotated[float, Field(gt=0)] = 0.01
    p_max: Probability = 0.05
    firing: Firing = Firing()
    noise: NonNegativeFloat = 0.0
    seed: int = 0
    training_seed: int = 0
    """Another one is another training of the same shapes: the same features on the same tokens, other directions."""
    sides: tuple[Side, ...] = SIDES
    """A, B and, where wished, C."""
    crowding: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Directions lie in D L^-crowding dimensions of each layer, so that d_eff = D L^(delta - crowding)."""

    def __post_init__(self) -> None:
        if not set(SIDES) <= set(self.sides):
            raise ValueError(f"sides are {self.sides}, expected A, B and perhaps C")
        check_probabilities(self.firing, self.p_min, self.p_max)

    def shape(self, side: Side) -> tuple[int, int]:
        """`(layers, width)` of one side."""
        if side == "A":
            return self.n_layers, self.d_model
        if side == "C":
            return self.n_layers // 2, round(self.d_model * math.sqrt(2))
        return self.n_layers // DEPTH_RATIO, self.d_model * WIDTH_RATIO

    def rank(self, side: Side) -> int:
        """How many dimensions of each layer the directions of one side lie in."""
        n_layers, d_model = self.shape(side)
        return max(2, round(d_model * n_layers**-self.crowding))


class WorldPair:
    """Truth of both sides: `decoder_FLD` and `cosine` (of neighbouring layers) by side, `probability_F` in common.

    Feature i is the same on both sides: it fires on the same tokens with the same activation, and its window lies at
    the same relative depth. Its joint direction has norm 1 on either side.
    """

    def __init__(self, config: PairConfig) -> None:
        self.config = config
        generator = seeded_generator("world pair", config.seed)
        n_features = config.n_features
        quantile_F = torch.rand(n_features, generator=generator)
        self.probability_F = firing_probabilities(quantile_F, config.p_min, config.p_max, config.firing)
        # Evenly spaced and shuffled, so that layers are filled evenly and mean widths are exact.
        depth_F = (torch.randperm(n_features, generator=generator) + 0.5) / n_features
        length_F = (torch.randperm(n_features, generator=generator) + 0.5) / n_features
        again = [config.training_seed] if config.training_seed else []
        self.decoder_FLD: dict[Side, Tensor] = {}
        self.cosine: dict[Side, float] = {}
        for side in config.sides:
            n_layers, d_model = config.shape(side)
            windows = _windows(n_layers, n_layers**config.gamma, depth_F, length_F)
            cosine = _turning(windows, n_layers, self.delta)
            own = seeded_generator("world pair", config.seed, side, *again)
            rank = config.rank(side)
            rows = [window_profile(n_layers, rank, *window, cosine, own) for window in windows]
            scale_F = torch.tensor([width**-0.5 for _, width in windows])
            decoder_FLD = torch.stack(rows) * scale_F[:, None, None]
            self.decoder_FLD[side] = torch.nn.functional.pad(decoder_FLD, (0, d_model - rank))
            self.cosine[side] = cosine

    @property
    def delta(self) -> float:
        """The planted exponent of d_eff in L."""
        return 1 - self.config.gamma if self.config.delta is None else self.config.delta

    def drawn_dimension(self, side: Side) -> float:
        """d_eff of the directions that were drawn; for many features near `rank` times L^delta."""
        return mean_interference_dimension(self.decoder_FLD[side])

    def activations(self, n: int, stream: int | str, index: int) -> Tensor:
        """Activations `[n, F]` of the tokens that `draw` gives of any side."""
        generator = seeded_generator("pair batch", stream, index)
        return draw_activations(n, self.probability_F, self.config.firing, generator)

    def draw(self, side: Side, n: int, stream: int | str, index: int) -> Tensor:
        """`x_BLD` of `n` tokens of one side, a pure function; another side shows the same tokens of a stream."""
        x_BLD = torch.einsum("bf,fld->bld", self.activations(n, stream, index), self.decoder_FLD[side])
        if self.config.noise:
            generator = seeded_generator("pair noise", side, stream, index)
            x_BLD = x_BLD + self.config.noise * torch.randn(x_BLD.shape, generator=generator)
        return x_BLD


def _windows(n_layers: int, mean_width: float, depth_F: Tensor, length_F: Tensor) -> list[tuple[int, int]]:
    """`(first layer, width)` of each feature: whole widths around `mean_width`, laid side by side from layer 0.

    Windows of one width do not overlap (but for the last, where the width does not divide L): only so can features
    that do not turn have d_eff = D L / width.
    """
    narrow = math.floor(mean_width + 1e-9)
    windows = []
    for depth, length in zip(depth_F.tolist(), length_F.tolist()):
        width = min(narrow + (length < mean_width - narrow), n_layers)
        n_places = -(-n_layers // width)
        windows.append((min(int(depth * n_places) * width, n_layers - width), width))
    return windows


def _turning(windows: list[tuple[int, int]], n_layers: int, delta: float) -> float:
    """The cosine of neighbouring layers, 0 to 1, at which these windows have d_eff = D L^delta, by bisection."""
    wished = n_layers**delta
    most, least = (_dimension_per_width(windows, cosine) for cosine in (0.0, 1.0))
    if not least * (1 - TOLERANCE) <= wished <= most * (1 + TOLERANCE):
        low, high = (math.log(value) / math.log(n_layers) if n_layers > 1 else 0.0 for value in (least, most))
        raise ValueError(
            f"delta = {delta:g} cannot be had at {n_layers} layers with these lifespans; "
            f"expected {low:.2f} to {high:.2f}"
        )
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _dimension_per_width(windows, middle) > wished else (low, middle)
    return 1.0 if least >= wished * (1 - TOLERANCE / 10) else high


def _dimension_per_width(windows: list[tuple[int, int]], cosine: float) -> float:
    """d_eff / D expected of features drawn at random from these windows.

    Independent features with shares o of common layers have E[G^2] = sum_lm cosine^(2|l - m|) / (D w_i w_j) over
    pairs of common layers, because a direction k layers on still has the mean cosine^k along the first.
    """
    kinds = sorted(set(windows))
    count = [windows.count(kind) for kind in kinds]
    total = 0.0
    for (first, width), count_a in zip(kinds, count):
        for (other_first, other_width), count_b in zip(kinds, count):
            common = min(first + width, other_first + other_width) - max(first, other_first)
            terms = [(common - k) * cosine ** (2 * k) * (1 if k == 0 else 2) for k in range(max(common, 0))]
            total += count_a * count_b * sum(terms) / (width * other_width)
    return len(windows) ** 2 / total
