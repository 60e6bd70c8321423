"""Dictionaries trained on planted tokens and read, and what they found scored against the truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from crosscoder.data.sources import PlantedSource
from crosscoder.data.world import World
from crosscoder.foundation.config import config
from crosscoder.measure import recovery
from crosscoder.measure.reading import Reading, read_dictionary
from crosscoder.results.table import Place, Row, rows_at
from crosscoder.studies.budget import Arm, DictionaryBudget
from crosscoder.studies.cells import fit
from crosscoder.training import TrainConfig

BY_KIND = ("recall_by_kind", "precision_by_kind", "kind_confusion")
TRAIN_STREAM, HELD_OUT_STREAM = 1, 2
Draw = Callable[[int, int | str, int], Tensor]
"""`(n, stream, index) -> x_BLD`: batch number `index` of a stream of planted tokens."""


@config
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

    def source(
        self, draw: Draw, shape: tuple[int, int], *, scale: float = 1.0, held_out_stream: int = HELD_OUT_STREAM
    ) -> PlantedSource:
        """The tokens of a world of `(layers, width)`, every layer multiplied by `scale`."""
        n_layers, d_model = shape
        return PlantedSource(
            lambda n, stream, index: draw(n, stream, index) * scale,
            scale_L=torch.full((n_layers,), scale),
            d_model=d_model,
            held_out_stream=held_out_stream,
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
        "l0": reading.l0,
        "l0_true": l0_true,
        "l0_error": recovery.relative_error(reading.l0, l0_true),
    }
    rows = rows_at(at, {**scores, **dictionary})
    for kind in kinds:
        rows += rows_at(replace(at, kind=kind), {key: by_kind[key][kind] for key in BY_KIND})
    return rows
