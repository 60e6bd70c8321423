"""The constant C of the ceiling phi = 1 / (C p ln(1 / p)), measured: how dense a planted world may be to be found.

At each density phi of features per dimension the firing probability p is raised until a crosscoder with as many active
features as there truly are finds fewer than 90 % of them. C is a property of the world, of the training that it is
given and of what counts as found, so it belongs with its sizes and is no law: `dimension.CEILING` is the value measured
at the sizes in benchmarks/ceiling.md. Hours of one core.

    python scripts/bench_ceiling.py
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from crosscoder.data.world import World, WorldConfig
from crosscoder.measure import recovery
from crosscoder.measure.statistics import exponentiate, two_level_bootstrap
from crosscoder.results.table import Estimate
from crosscoder.studies.calibration import FitConfig

FIRST_ACTIVE = (2, 4, 8)  # active features per token, of which the first that succeeds begins the search
FINE = 1.2  # the search ends when the last success and the first failure are this factor apart, or neighbours


@dataclass(frozen=True, kw_only=True)
class CeilingConfig:
    """Worlds of local features, all firing with one probability.

    densities: features per dimension L * D, the effective dimension of local features.
    size_factor: features of the dictionary over those of the world.
    fit: short training raises C, most at high density: 3 features per dimension with 4 active were found to .87 after
        1,000 steps and to .97 after 3,000.
    """

    n_layers: int = 2
    d_model: int = 32
    densities: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    recall: float = 0.9
    size_factor: float = 1.5
    noise: float = 0.0
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=1000, batch=256, held_out=8192))

    def __post_init__(self) -> None:
        if not self.densities or min(self.densities) <= 0 or len(set(self.densities)) != len(self.densities):
            raise ValueError(f"densities are {self.densities}; expected at least one, all different and above 0")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds are {self.seeds}; expected at least one, all different")
        if not 0 < self.recall <= 1:
            raise ValueError(f"recall is {self.recall}; expected a share above 0")
        if self.size_factor < 1:
            raise ValueError(f"size_factor is {self.size_factor}; expected at least 1, or features cannot all be found")

    def n_features(self, density: float) -> int:
        """Features of a world of this density."""
        return max(2, round(density * self.n_layers * self.d_model))


@dataclass(frozen=True)
class CeilingPoint:
    """How far one world could be filled."""

    density: float  # phi, features over L * D
    seed: int
    n_features: int
    probability: float | None  # None: nothing was found even at the lowest p, or all of it up to p = 1 / e
    tried: tuple[tuple[int, float], ...]  # active features a token, and the share found

    @property
    def constant(self) -> float | None:
        """C of this point alone."""
        return None if self.probability is None else ceiling_constant(self.density, self.probability)


@dataclass(frozen=True)
class Ceiling:
    """C with its interval over seeds, and what it was measured from."""

    constant: Estimate | None  # None where no world has a point at every density
    by_density: dict[float, float]  # C at each density alone: a trend says that the form does not fit
    points: tuple[CeilingPoint, ...]
    config: CeilingConfig


def ceiling_constant(density: float, probability: float) -> float:
    """`C = 1 / (phi p ln(1 / p))`, at which `dimension.highest_probability(phi, C)` is p.

    Raises:
        ValueError: the density is not positive, or p is not in (0, 1 / e], where the ceiling falls with p.
    """
    if not (density > 0 and 0 < probability <= 1 / math.e):
        raise ValueError(f"density is {density} and p {probability}; expected more than 0, and p up to 1 / e")
    return 1 / (density * probability * math.log(1 / probability))


def find_ceiling(
    recall_at: Callable[[int], float], *, most: int, wanted: float
) -> tuple[float | None, dict[int, float]]:
    """Where `recall_at(k)` falls below `wanted`, between whole k, and every k tried.

    k doubles from 2 until one fails or `most` succeeds; the gap is then halved (in ratio) until it is narrow, and the
    crossing interpolated. Training with very few active features can fail for reasons of its own, so failures at 2 and
    4 are passed over. None where 2, 4 and 8 fail, or none does. Takes recall to fall with k from there on.
    """
    tried: dict[int, float] = {}

    def found(k: int) -> bool:
        if k not in tried:
            tried[k] = recall_at(k)
        return tried[k] >= wanted

    low = high = next((k for k in FIRST_ACTIVE if k <= most and found(k)), 0)
    if not low:
        return None, tried
    while high < most:
        high = min(2 * high, most)
        if not found(high):
            break
        low = high
    else:
        return None, tried
    while high > low + 1 and high > FINE * low:
        middle = min(max(round(math.sqrt(low * high)), low + 1), high - 1)
        low, high = (middle, high) if found(middle) else (low, middle)
    share = (tried[low] - wanted) / (tried[low] - tried[high])
    return low + share * (high - low), tried


def planted_recall(config: CeilingConfig, n_features: int, k: int, seed: int, device: str = "cpu") -> float:
    """Share of a world's features that a crosscoder of the true k finds, all firing with p = k / F."""
    world = World(
        WorldConfig(
            n_features=n_features,
            n_layers=config.n_layers,
            d_model=config.d_model,
            kinds=("local",),
            p_min=k / n_features,
            p_max=k / n_features,
            noise=config.noise,
            seed=seed,
        )
    )
    source = config.fit.source(world.draw, (config.n_layers, config.d_model))
    size = round(config.size_factor * n_features)
    found_FLD = config.fit.run("crosscoder", source, n_features=size, k=k, seed=seed, device=device).decoder_FLD
    return float(recovery.assign(found_FLD, world.decoder_FLD.numpy()).recalled_F.mean())


def measure_point(config: CeilingConfig, density: float, seed: int, device: str = "cpu") -> CeilingPoint:
    """The largest p at which one world of this density is found."""
    n_features = config.n_features(density)
    most = max(1, math.floor(n_features / math.e))
    k, tried = find_ceiling(
        lambda k: planted_recall(config, n_features, k, seed, device), most=most, wanted=config.recall
    )
    phi = n_features / (config.n_layers * config.d_model)
    return CeilingPoint(phi, seed, n_features, None if k is None else k / n_features, tuple(sorted(tried.items())))


def summarize_ceiling(points: Sequence[CeilingPoint], config: CeilingConfig) -> Ceiling:
    """C from the logs of its points: the mean over densities within a seed, and its interval over seeds.

    A seed counts only if it has a point at every density, since leaving out what could not be reached would favour the
    densities that could.
    """
    logs: dict[int, list[float]] = {}
    by_density: dict[float, list[float]] = {}
    for point in points:
        if point.constant is not None:
            logs.setdefault(point.seed, []).append(math.log(point.constant))
            by_density.setdefault(point.density, []).append(math.log(point.constant))
    whole = [[float(np.mean(values))] for values in logs.values() if len(values) == len(config.densities)]
    constant = exponentiate(two_level_bootstrap(whole, seed=0, n_draws=2000).estimate()) if whole else None
    shown = {density: math.exp(float(np.mean(values))) for density, values in sorted(by_density.items())}
    return Ceiling(constant, shown, tuple(points), config)


def calibrate_ceiling(config: CeilingConfig | None = None, *, device: str = "cpu") -> Ceiling:
    """C at the sizes of `config`: one search of p for each density and seed, several trainings each."""
    config = config or CeilingConfig()
    points = [measure_point(config, density, seed, device) for seed in config.seeds for density in config.densities]
    return summarize_ceiling(points, config)


def markdown_table(found: Ceiling) -> list[str]:
    """C at each density and over all of them, as Markdown."""
    lines = ["| phi | F | largest p by world | C |", "|---|---|---|---|"]
    for density in sorted({point.density for point in found.points}):
        here = [point for point in found.points if point.density == density]
        shown = " / ".join("none" if p.probability is None else f"{p.probability:.3f}" for p in here)
        constant = f"{found.by_density[density]:.2f}" if density in found.by_density else "-"
        lines.append(f"| {density:g} | {here[0].n_features} | {shown} | {constant} |")
    c = found.constant
    whole = "no world has a point at every density" if c is None else f"{c.value:.2f} [{c.low:.2f}, {c.high:.2f}]"
    return [*lines, "", f"C = {whole} (geometric mean, 90 % interval over worlds)"]


def main() -> None:
    """Measure C and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(CeilingConfig().seeds))
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    found = calibrate_ceiling(CeilingConfig(seeds=tuple(given.seeds)), device=given.device)
    print("\n".join(markdown_table(found)))


if __name__ == "__main__":
    main()
