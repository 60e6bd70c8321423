"""Dictionaries trained on planted truth and scored; what a study's own dictionary would find if the truth were known.

A world with the subject's L and D is planted with half as many features as the dictionary has, as many of them active
on a token as the dictionary may use, and a crosscoder is trained on it as the study's cells are: size, k, steps, batch,
learning rate, the number of distinct tokens that it sees over and over, the tokens held out. What its counts and
spreads miss there, they may miss on a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from crosscoder.data.residuals import estimate_scales
from crosscoder.data.sources import PlantedSource
from crosscoder.data.world import World, WorldConfig
from crosscoder.foundation.config import config as settings
from crosscoder.measure import recovery
from crosscoder.measure.reading import Reading, read_dictionary
from crosscoder.results.table import COMPARED, LongTable, Place, Row, rows_at
from crosscoder.studies.budget import Arm, DictionaryBudget
from crosscoder.studies.cells import fit
from crosscoder.studies.folder import StudyFolder, study_folder
from crosscoder.studies.presets import StudyConfig
from crosscoder.training import TrainConfig
from crosscoder.verdict.evidence import Calibration

SCALE_TOKENS = 4096
PROBABILITY_RANGE = 7.0  # the most frequent planted feature over the rarest
MOST_FREQUENT = 0.9
PLANTED_SHARE = 0.5  # planted features over the dictionary's
BY_KIND = ("recall_by_kind", "precision_by_kind", "kind_confusion")
TRAIN_STREAM, HELD_OUT_STREAM = 1, 2
Draw = Callable[[int, int | str, int], Tensor]
"""`(n, stream, index) -> x_BLD`: batch number `index` of a stream of planted tokens."""


@settings
class FitConfig:
    """How every dictionary of a planted study is trained, on tokens that never repeat."""

    steps: PositiveInt = 800
    batch: PositiveInt = 1024
    learning_rate: PositiveFloat = 1e-2
    k_factor: PositiveFloat = 1.0
    """Active features per token, as a multiple of the truth; anything but 1 mixes or splits features."""
    held_out: PositiveInt = 20_480

    def k(self, l0_true: float, n_features: int) -> int:
        """Active features of a dictionary in a world where `l0_true` are active."""
        return min(max(1, round(self.k_factor * l0_true)), n_features)

    def source(self, draw: Draw, shape: tuple[int, int]) -> PlantedSource:
        """The tokens of a world of `(layers, width)`, as they are drawn."""
        return PlantedSource(
            draw,
            scale_L=torch.ones(shape[0]),
            d_model=shape[1],
            held_out_stream=HELD_OUT_STREAM,
            held_out_tokens=self.held_out,
        )

    def run(
        self,
        arm: Arm,
        source: PlantedSource,
        *,
        n_features: int,
        k: int,
        seed: int,
        stream: int = TRAIN_STREAM,
        device: str = "cpu",
    ) -> Reading:
        """The reading of a dictionary after training on one stream of a source."""
        given: dict[str, Any] = {"steps": self.steps, "learning_rate": self.learning_rate, "dead_after_tokens": 10_000}
        budget = DictionaryBudget(
            n_features=n_features, k_crosscoder=k, k_layerwise=k, batch=self.batch, data_seed=stream, **given
        )
        training = TrainConfig(**given, log_every=self.steps)
        dictionary, held_out = fit(arm, source, budget, seed=seed, training=training, device=device)
        return read_dictionary(dictionary, held_out())


def log_uniform_bounds(mean: float, ratio: float) -> tuple[float, float]:
    """The least and the greatest of log-uniform probabilities with this mean, `ratio` apart."""
    low = mean * math.log(ratio) / (ratio - 1)
    return low, low * ratio


def score(at: Place, found_FLD: np.ndarray, world: World, reading: Reading, *, l0_true: float) -> list[Row]:
    """What an estimate that calls `found_FLD` the features of a world got right, and what its dictionary did."""
    kinds, truth_FLD = world.config.kinds, world.decoder_FLD.cpu().numpy()
    scores = recovery.score_features(found_FLD, truth_FLD, world.kind_F.numpy(), kinds, count=len(found_FLD))
    by_kind = {key: scores.pop(key) for key in BY_KIND}
    dictionary = {
        "alive": len(reading),
        "dead_share": reading.dead_share,
        "saturated": recovery.is_saturated(len(reading), reading.size),
        "explained_variance": reading.explained_variance,
        **recovery.beside_truth("l0", reading.l0, l0_true),
    }
    rows = rows_at(at, {**scores, **dictionary})
    for kind in kinds:
        rows += rows_at(replace(at, kind=kind), {key: by_kind[key][kind] for key in BY_KIND})
    return rows


@settings
class CalibrationConfig:
    """One planted world of a study's sizes, and the dictionary trained on it."""

    n_layers: PositiveInt
    d_model: PositiveInt
    budget: DictionaryBudget
    tokens_train: PositiveInt = 200_000
    """Distinct tokens, read over and over."""
    tokens_held_out: PositiveInt = 30_000
    seed: int = 0
    """Of the world."""

    def __post_init__(self) -> None:
        highest = self.probabilities()[1]
        if highest > MOST_FREQUENT:
            raise ValueError(
                f"k = {self.budget.k_crosscoder} of {self.n_planted} planted features would have some active on "
                f"{highest:.0%} of the tokens; expected at most {MOST_FREQUENT:.0%}: raise n_features or lower k"
            )

    @property
    def n_planted(self) -> int:
        """Features of the world."""
        return max(2, round(PLANTED_SHARE * self.budget.n_features))

    def probabilities(self) -> tuple[float, float]:
        """The least and the greatest firing probability, so that about k features are active on a token."""
        return log_uniform_bounds(self.budget.k_crosscoder / self.n_planted, PROBABILITY_RANGE)

    def world(self) -> World:
        """The planted world; its probabilities sum to k exactly."""
        low, high = self.probabilities()
        world = World(
            WorldConfig(
                n_features=self.n_planted,
                n_layers=self.n_layers,
                d_model=self.d_model,
                kinds=("local",) if self.n_layers == 1 else ("local", "persistent", "drifting", "split"),
                p_min=low,
                p_max=high,
                seed=self.seed,
            )
        )
        world.probability_F = world.probability_F * (self.budget.k_crosscoder / world.probability_F.sum())
        return world


def planted_source(config: CalibrationConfig, device: str = "cpu") -> tuple[PlantedSource, World]:
    """A world's tokens as a study reads its activations, and that world, its directions scaled as the tokens are.

    Training reads the same tokens again after `tokens_train`, whatever the seed of the order.
    """
    world = config.world().to(device)

    def draw(n: int, stream: int | str, index: int) -> Tensor:
        purpose = stream if isinstance(stream, str) else "train"
        return world.sample(n, world.generator("calibration", purpose, config.seed, index))[0]

    scale_L = estimate_scales(draw(SCALE_TOKENS, "scale", 0))
    world.decoder_FLD = world.decoder_FLD * scale_L.to(device)[:, None]
    source = PlantedSource(
        draw,
        scale_L=scale_L,
        d_model=config.d_model,
        held_out_stream="held out",
        held_out_tokens=config.tokens_held_out,
        distinct_tokens=config.tokens_train,
    )
    return source, world


def measure_calibration(config: CalibrationConfig, device: str = "cpu") -> list[Row]:
    """The scores of a crosscoder trained on a planted world as a study's cell is trained."""
    source, world = planted_source(config, device)
    budget = config.budget
    dictionary, held_out = fit("crosscoder", source, budget, seed=0, device=device)
    reading = read_dictionary(dictionary, held_out())
    at = Place(role="calibration", n_features=budget.n_features, k=budget.k_crosscoder, seed=config.seed)
    rows = score(at, reading.distinct.decoder_FLD, world, reading, l0_true=budget.k_crosscoder)
    about = {"n_layers": config.n_layers, "d_model": config.d_model, "equal_energy": world.config.equal_energy}
    return [*rows, *rows_at(at, about)]


def calibrate_study(config: StudyConfig, study: StudyFolder) -> list[Row]:
    """Scores of planted worlds of the compared shapes' own sizes, kept beside the studies so that others reuse them.

    Raises:
        ValueError: k is so large that planted features would be active nearly always.
    """
    jobs: dict[Path, Callable[[], list[Row]]] = {}
    for name in COMPARED:
        shape = config.subjects.shapes()[name]
        for seed in range(config.calibration_worlds):
            wanted = CalibrationConfig(
                n_layers=shape.n_layers,
                d_model=shape.d_model,
                budget=shape.budget(config.dictionaries),
                tokens_train=config.tokens_train,
                tokens_held_out=config.tokens_held_out,
                seed=seed,
            )
            home = study_folder(wanted, f"{name}-world{seed}", study.root.parent / "calibration")
            path = home.with_suffix(".json")
            jobs[path] = partial(measure_calibration, wanted, study.device)
    found = study.measure(jobs, "calibration")
    return [replace(row, at=replace(row.at, subject=path.name[0])) for path, rows in found.items() for row in rows]


def worst_calibration(table: LongTable) -> Calibration:
    """The largest errors over worlds and shapes, for the gates; None where one of them is undefined."""
    keys = ("count_error", "rho_error", "d_eff_error")
    found = {key: table.seed_range(key, role="calibration") for key in keys}
    worst = {key: None if one is None else max(abs(one.low), abs(one.high)) for key, one in found.items()}
    return Calibration(**worst, same_sizes=True)
