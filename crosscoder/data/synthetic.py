"""A world whose features are known: sparse, independent, each with planted directions in some layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from crosscoder.data.tokens import seeded_generator

Kind = Literal["local", "persistent", "drifting"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """The planted features.

    A `local` feature lives in one layer, a `persistent` one keeps its direction through a window of
    neighbouring layers, a `drifting` one turns at each layer of its window so that neighbours have cosine
    `drift_cosine`.
    """

    n_features: int = 64
    n_layers: int = 4
    d_model: int = 16
    kinds: tuple[Kind, ...] = ("local", "persistent", "drifting")
    p_min: float = 0.01
    p_max: float = 0.05
    drift_cosine: float = 0.8
    equal_energy: bool = True
    """True: a feature's squared norms sum to 1 over layers. False: its norm is 1 wherever it lives."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise on every activation."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_features", "n_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.d_model < 2:
            raise ValueError(f"d_model is {self.d_model}, expected at least 2 (directions must be able to turn)")
        unknown = set(self.kinds) - {"local", "persistent", "drifting"}
        if not self.kinds or unknown:
            raise ValueError(f"kinds are {self.kinds}, expected some of local, persistent, drifting")
        if self.n_layers == 1 and set(self.kinds) != {"local"}:
            raise ValueError("with one layer every feature is local; use kinds=('local',) or more layers")
        if not 0 < self.p_min <= self.p_max <= 1:
            raise ValueError(f"expected 0 < p_min <= p_max <= 1, got {self.p_min} and {self.p_max}")
        if not -1 <= self.drift_cosine <= 1:
            raise ValueError(f"drift_cosine is {self.drift_cosine}, expected -1 to 1")
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise ValueError(f"noise is {self.noise}, expected 0 or more")


class World:
    """The truth (`decoder_FLD`, `probability_F`, `kind_F` into `config.kinds`) and samples of it."""

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        generator = seeded_generator("world", config.seed)
        self.kind_F = torch.arange(config.n_features) % len(config.kinds)
        exponent_F = torch.rand(config.n_features, generator=generator)
        self.probability_F = config.p_min * (config.p_max / config.p_min) ** exponent_F
        decoder_FLD = torch.stack([self._profile(config.kinds[kind], generator) for kind in self.kind_F])
        if config.equal_energy:
            decoder_FLD = decoder_FLD / decoder_FLD.flatten(1).norm(dim=1)[:, None, None]
        self.decoder_FLD = decoder_FLD

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`(x_BLD, activations_BF)` of `n` tokens: active features are uniform in [0.7, 1.3]."""
        shape = (n, self.config.n_features)
        active_BF = torch.rand(shape, generator=generator) < self.probability_F
        activations_BF = active_BF * (0.7 + 0.6 * torch.rand(shape, generator=generator))
        x_BLD = torch.einsum("bf,fld->bld", activations_BF, self.decoder_FLD)
        if self.config.noise:
            x_BLD = x_BLD + self.config.noise * torch.randn(x_BLD.shape, generator=generator)
        return x_BLD, activations_BF

    def batches(self, batch_size: int, n_steps: int, seed: int) -> Iterator[Tensor]:
        """`n_steps` batches `x_BLD`; batch i is a pure function of (seed, i, batch_size)."""
        for index in range(n_steps):
            yield self.sample(batch_size, seeded_generator("world batch", seed, index))[0]

    def _profile(self, kind: Kind, generator: torch.Generator) -> Tensor:
        """One feature's direction at every layer, `[L, D]`: unit norm inside its window, zero outside."""
        config = self.config
        profile_LD = torch.zeros(config.n_layers, config.d_model)
        width = 1 if kind == "local" else _integer(2, config.n_layers, generator)
        first = _integer(0, config.n_layers - width, generator)
        direction_D = _unit(torch.randn(config.d_model, generator=generator))
        for layer in range(first, first + width):
            profile_LD[layer] = direction_D
            if kind == "drifting":
                direction_D = _turned(direction_D, config.drift_cosine, generator)
        return profile_LD


def _integer(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _unit(vector_D: Tensor) -> Tensor:
    return vector_D / vector_D.norm()


def _turned(direction_D: Tensor, cosine: float, generator: torch.Generator) -> Tensor:
    """A unit vector at exactly `cosine` to a unit vector, in a random plane."""
    other_D = torch.randn(direction_D.shape, generator=generator)
    across_D = _unit(other_D - (other_D @ direction_D) * direction_D)
    return _unit(cosine * direction_D + math.sqrt(1 - cosine**2) * across_D)
