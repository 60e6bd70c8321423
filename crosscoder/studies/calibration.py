"""What a study's own dictionary would find if the truth were known: planted worlds of the study's very sizes.

A world with the subject's L and D is planted with half as many features as the dictionary has, as many of them active
on a token as the dictionary may use, and a crosscoder is trained on it as the study's cells are: size, k, steps, batch,
learning rate, the number of distinct tokens that it sees over and over, the tokens held out. What its counts and
spreads miss there, they may miss on a model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from crosscoder.data.residuals import estimate_scales
from crosscoder.data.sources import PlantedSource
from crosscoder.data.world import World, WorldConfig
from crosscoder.foundation.artifact import read_json, write_json
from crosscoder.foundation.config import to_mapping
from crosscoder.measure import recovery
from crosscoder.measure.reading import Reading, read_dictionary
from crosscoder.studies.budget import DictionaryBudget
from crosscoder.studies.cells import new_dictionary
from crosscoder.training import train
from crosscoder.verdict.evidence import Calibration

SCHEMA = "crosscoder.calibration/1"
SCALE_TOKENS = 4096
PROBABILITY_RANGE = 7.0  # the most frequent planted feature over the rarest
MOST_FREQUENT = 0.9
PLANTED_SHARE = 0.5  # planted features over the dictionary's

DEFINITIONS = {
    "calibration": "A crosscoder trained as the study's own, on a planted world of the subject's L and D: "
    f"{PLANTED_SHARE:g} n features, local, persistent, drifting and split in equal parts (all local for one layer), "
    "each with the same energy, firing probabilities log-uniform over a factor "
    f"{PROBABILITY_RANGE:g} and summing to the dictionary's k. Scores are of its distinct alive features against all "
    "planted ones; the gates take the worst world.",
}


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """One planted world of a study's sizes, and the dictionary trained on it."""

    n_layers: int
    d_model: int
    budget: DictionaryBudget
    tokens_train: int = 200_000
    """Distinct tokens, read over and over."""
    tokens_held_out: int = 30_000
    equal_energy: bool = True
    """False: a feature has norm 1 at every layer it lives in, so that local ones are the weakest."""
    seed: int = 0
    """Of the world."""
    dictionary_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "tokens_train", "tokens_held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
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
        mean = self.budget.k_crosscoder / self.n_planted
        low = mean * math.log(PROBABILITY_RANGE) / (PROBABILITY_RANGE - 1)
        return low, low * PROBABILITY_RANGE

    def world(self) -> World:
        """The planted world; its probabilities sum to k exactly."""
        low, high = self.probabilities()
        config = WorldConfig(
            n_features=self.n_planted,
            n_layers=self.n_layers,
            d_model=self.d_model,
            kinds=("local",) if self.n_layers == 1 else ("local", "persistent", "drifting", "split"),
            p_min=low,
            p_max=high,
            equal_energy=self.equal_energy,
            seed=self.seed,
        )
        world = World(config)
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


def read_planted(config: CalibrationConfig, device: str = "cpu") -> tuple[Reading, World]:
    """The reading of a crosscoder trained as a study's cell is, and the world it was trained on."""
    source, world = planted_source(config, device)
    budget = config.budget
    dictionary = new_dictionary("crosscoder", source, budget, seed=config.dictionary_seed)
    batches = source.batches(budget.batch, seed=budget.data_seed, steps=budget.steps)
    train(dictionary, batches, config=budget.train_config(), device=device, quiet=True)
    return read_dictionary(dictionary, source.held_out()).distinct, world


def score_reading(reading: Reading, world: World, config: CalibrationConfig) -> dict[str, Any]:
    """Plain values by the names of `recovery.DEFINITIONS`; None where one is undefined."""
    truth_FLD = world.decoder_FLD.cpu().numpy()
    scores = recovery.score_features(
        reading.decoder_FLD, truth_FLD, world.kind_F.numpy(), world.config.kinds, count=len(reading)
    )
    n_features = config.budget.n_features
    alive = round((1 - reading.dead_share) * n_features)
    return {
        **scores,
        "n_features": n_features,
        "k": config.budget.k_crosscoder,
        "n_layers": config.n_layers,
        "d_model": config.d_model,
        "world_seed": config.seed,
        "equal_energy": config.equal_energy,
        "alive": alive,
        "dead_share": reading.dead_share,
        "saturated": recovery.is_saturated(alive, n_features),
        "explained_variance": reading.explained_variance,
        "l0": reading.l0,
        "l0_error": recovery.relative_error(reading.l0, config.budget.k_crosscoder),
    }


def calibrate(config: CalibrationConfig, *, root: Path | None = None, device: str = "cpu") -> dict[str, Any]:
    """The scores of one planted world; read from `root` where an equal calibration has been kept.

    Raises:
        ValueError: k is so large that planted features would be active nearly always.
    """
    path = None if root is None else calibration_path(root, config)
    if path is not None and path.is_file():
        kept = read_json(path)
        if kept.get("schema") == SCHEMA and kept.get("config") == to_mapping(config):
            return kept["scores"]
    reading, world = read_planted(config, device)
    scores = score_reading(reading, world, config)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"schema": SCHEMA, "config": to_mapping(config), "scores": scores})
    return scores


def calibration_path(root: Path, config: CalibrationConfig) -> Path:
    """Where a calibration is kept: named by a hash of its inputs and of the schema."""
    text = json.dumps([SCHEMA, to_mapping(config)], sort_keys=True)
    return root / f"calibration-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def worst_calibration(rows: Sequence[dict[str, Any]], *, same_sizes: bool = True) -> Calibration:
    """The largest errors over worlds and shapes, for the gates; None where one of them is undefined."""

    def worst(key: str) -> float | None:
        values = [row[key] for row in rows]
        if not values or any(value is None for value in values):
            return None
        return max(abs(value) for value in values)

    return Calibration(
        count_error=worst("count_error"),
        rho_error=worst("rho_error"),
        d_eff_error=worst("d_eff_error"),
        same_sizes=same_sizes,
    )
