"""Readings of planted pairs of worlds: crosscoders of every shape, training seed and dictionary seed, and banks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from crosscoder.data.sources import EVALUATION_BATCH, PlantedSource
from crosscoder.data.world_pair import PairConfig, Side, WorldPair
from crosscoder.dictionary import BatchTopK, Crosscoder, LayerwiseSAE
from crosscoder.measure.density import Subject
from crosscoder.measure.reading import Reading, read_dictionary
from crosscoder.training import TrainConfig, train
from crosscoder.verdict import decide as verdict
from crosscoder.verdict import gain


@dataclass(frozen=True, kw_only=True)
class Plant:
    """A planted answer and what the rule should say of it."""

    name: str
    gamma: float
    delta: float
    label: verdict.Label
    kinds: tuple[str, ...] = ()


PLANTS = (
    Plant(name="complete", gamma=0.0, delta=1.0, label="H0"),
    Plant(name="persistent", gamma=0.5, delta=0.5, label="H1a"),
    Plant(name="over-reconciled", gamma=1.0, delta=0.0, label="H2", kinds=("over-reconciled",)),
)


@dataclass(frozen=True, kw_only=True)
class VerdictConfig:
    """The pair, its dictionaries, and the control.

    size_factor: features of every dictionary over planted ones. The gate on dead features refuses a dictionary with
        more than a tenth to spare, so this is how large one may be, as a sweep of sizes would find.
    control_crowding: the untrained control holds the same features, the text's own, each in one layer and in
        D L^-crowding dimensions, since without training deep representations lose rank (Dong et al. 2021, arXiv
        2103.03404). A Gaussian of the same second moments would be another control, but two dictionary seeds agree on
        no direction in it; it has no debiased dimension, hence no R to differ from.
    """

    n_features: int = 120
    n_layers: int = 4
    d_model: int = 96
    active: float = 6.0
    """Features active on a token, and k of the crosscoders."""
    probability_range: float = 3.5
    noise: float = 0.0
    size_factor: float = 1.03
    training_seeds: int = 3
    dictionary_seeds: int = 2
    sides: tuple[Side, ...] = ("A", "B")
    control_crowding: float = 0.9
    steps: int = 300
    batch: int = 512
    learning_rate: float = 1e-2
    held_out: int = 8192
    plants: tuple[Plant, ...] = field(default=PLANTS)

    def __post_init__(self) -> None:
        for name in ("training_seeds", "dictionary_seeds", "steps", "batch", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not self.probability_range > 1:
            raise ValueError(f"probability_range is {self.probability_range}; expected more than 1")

    @property
    def size(self) -> int:
        """Features of every dictionary."""
        return round(self.size_factor * self.n_features)

    def pair(
        self, *, gamma: float, delta: float | None, seed: int, training_seed: int, crowding: float = 0.0
    ) -> WorldPair:
        """The pair of one training seed; its firing probabilities sum to `active`."""
        mean = self.active / self.n_features
        low = mean * math.log(self.probability_range) / (self.probability_range - 1)
        config = PairConfig(
            n_features=self.n_features,
            n_layers=self.n_layers,
            d_model=self.d_model,
            gamma=gamma,
            delta=delta,
            p_min=low,
            p_max=low * self.probability_range,
            noise=self.noise,
            seed=seed,
            training_seed=training_seed,
            sides=self.sides,
            crowding=crowding,
        )
        pair = WorldPair(config)
        pair.probability_F = pair.probability_F * (self.active / pair.probability_F.sum())
        return pair


@dataclass(frozen=True)
class Planted:
    """One plant drawn with every training seed, read through one side after another."""

    config: VerdictConfig
    gamma: float
    delta: float | None
    seed: int
    device: str = "cpu"
    crowding: float = 0.0

    @cached_property
    def pairs(self) -> tuple[WorldPair, ...]:
        """One pair for each training seed."""
        return tuple(
            self.config.pair(
                gamma=self.gamma, delta=self.delta, seed=self.seed, training_seed=t, crowding=self.crowding
            )
            for t in range(self.config.training_seeds)
        )

    def source(self, pair: WorldPair, side: Side) -> PlantedSource:
        """The tokens of one side, scaled."""
        n_layers, d_model = pair.config.shape(side)
        scale, held_out = usual_scale(pair, side), self.config.held_out
        return PlantedSource(
            lambda n, stream, index: pair.draw(side, n, stream, index) * scale,
            scale_L=torch.full((n_layers,), scale),
            d_model=d_model,
            held_out_stream=2 * self.seed + 1,
            held_out_tokens=min(EVALUATION_BATCH, held_out) * -(-held_out // EVALUATION_BATCH),
        )

    def held_out(self, pair: WorldPair, side: Side) -> list[Tensor]:
        """The same held-out tokens for every shape and seed, scaled."""
        return [x.to(self.device) for x in self.source(pair, side).held_out()]

    def measure(self, pair: WorldPair, side: Side, dictionary: Any) -> Reading:
        """`dictionary` after training on one side, measured on the held-out tokens."""
        config = self.config
        settings = TrainConfig(
            steps=config.steps,
            learning_rate=config.learning_rate,
            dead_after_tokens=10_000,
            log_every=config.steps,
        )
        batches = self.source(pair, side).batches(config.batch, seed=2 * self.seed, steps=config.steps)
        train(dictionary, batches, config=settings, device=self.device, quiet=True)
        return read_dictionary(dictionary, self.held_out(pair, side))

    def read(self, pair: WorldPair, side: Side, dictionary_seed: int) -> Reading:
        """The reading of one crosscoder on one side."""
        n_layers, d_model = pair.config.shape(side)
        dictionary = Crosscoder(
            n_layers=n_layers,
            d_model=d_model,
            n_features=self.config.size,
            sparsity=BatchTopK(k=round(self.config.active)),
            seed=1000 * self.seed + 10 * pair.config.training_seed + dictionary_seed,
        )
        return self.measure(pair, side, dictionary).distinct

    def subject(self, side: Side) -> Subject:
        """All readings of one side."""
        readings = tuple(
            tuple(self.read(pair, side, d) for d in range(self.config.dictionary_seeds)) for pair in self.pairs
        )
        return Subject(side, *self.pairs[0].config.shape(side), readings)

    def subjects(self) -> dict[str, Subject]:
        """All readings of every side."""
        return {side: self.subject(side) for side in self.config.sides}

    def bank(self, pair: WorldPair, k: int) -> gain.Point:
        """A bank on A with k active features a layer."""
        n_layers, d_model = pair.config.shape("A")
        dictionary = LayerwiseSAE(
            n_layers=n_layers,
            d_model=d_model,
            n_features=self.config.size,
            sparsity=BatchTopK(k=k),
            seed=1000 * self.seed + pair.config.training_seed,
        )
        reading = self.measure(pair, "A", dictionary)
        return gain.Point(reading.l0, reading.explained_variance)


def usual_scale(pair: WorldPair, side: Side) -> float:
    """One factor for all layers that makes the mean squared activation 1, from the truth."""
    square_F = pair.probability_F * (1 + 0.6**2 / 12)  # E[a^2] of a uniform on [0.7, 1.3]
    mean_F = pair.probability_F
    decoder_FN = pair.decoder_FLD[side].flatten(1)
    gram_FF = decoder_FN @ decoder_FN.T
    joint_FF = (mean_F[:, None] * mean_F[None, :]).fill_diagonal_(0) + square_F.diag()
    total = float((gram_FF * joint_FF).sum()) + pair.config.noise**2 * decoder_FN.shape[1]
    return math.sqrt(decoder_FN.shape[1] / total)
