"""What a study's own dictionary would find if the truth were known: planted worlds of the study's very sizes.

A world with the subject's L and D is planted with half as many features as the dictionary has, as many of them active
on a token as the dictionary may use, and a crosscoder is trained on it as the study's cells are: size, k, steps, batch,
learning rate, the number of distinct tokens that it sees over and over, the tokens held out. What its counts and
spreads miss there, they may miss on a model.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

from pydantic import PositiveInt
from torch import Tensor

from crosscoder.data.residuals import estimate_scales
from crosscoder.data.sources import PlantedSource
from crosscoder.data.world import World, WorldConfig
from crosscoder.foundation.artifact import read_json, write_json
from crosscoder.foundation.config import config as settings
from crosscoder.foundation.config import to_mapping
from crosscoder.results.file import from_blocks, to_blocks
from crosscoder.results.table import COMPARED, LongTable, Place, Row, rows_at
from crosscoder.studies.budget import DictionaryBudget
from crosscoder.studies.cells import new_dictionary
from crosscoder.studies.fit import fit_dictionary, log_uniform_bounds, score
from crosscoder.studies.presets import StudyConfig
from crosscoder.studies.workers import run_jobs
from crosscoder.verdict.evidence import Calibration

SCHEMA = "crosscoder.calibration/2"
SCALE_TOKENS = 4096
PROBABILITY_RANGE = 7.0  # the most frequent planted feature over the rarest
MOST_FREQUENT = 0.9
PLANTED_SHARE = 0.5  # planted features over the dictionary's


@settings
class CalibrationConfig:
    """One planted world of a study's sizes, and the dictionary trained on it."""

    n_layers: PositiveInt
    d_model: PositiveInt
    budget: DictionaryBudget
    tokens_train: PositiveInt = 200_000
    """Distinct tokens, read over and over."""
    tokens_held_out: PositiveInt = 30_000
    equal_energy: bool = True
    """False: a feature has norm 1 at every layer it lives in, so that local ones are the weakest."""
    seed: int = 0
    """Of the world."""
    dictionary_seed: int = 0

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
                equal_energy=self.equal_energy,
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
    dictionary = new_dictionary("crosscoder", source, budget, seed=config.dictionary_seed)
    reading = fit_dictionary(
        dictionary, source, budget.train_config(), batch=budget.batch, seed=budget.data_seed, device=device
    )
    at = Place(role="calibration", n_features=budget.n_features, k=budget.k_crosscoder, seed=config.seed)
    rows = score(at, reading.distinct.decoder_FLD, world, reading, l0_true=budget.k_crosscoder)
    about = {"n_layers": config.n_layers, "d_model": config.d_model, "equal_energy": config.equal_energy}
    return [*rows, *rows_at(at, about)]


def calibrate(config: CalibrationConfig, *, root: Path | None = None, device: str = "cpu") -> list[Row]:
    """The scores of one planted world; read from `root` where an equal calibration has been kept."""
    path = None if root is None else calibration_path(root, config)
    if path is not None and path.is_file():
        kept = read_json(path)
        if kept.get("schema") == SCHEMA and kept.get("config") == to_mapping(config):
            return from_blocks(kept["rows"])
    rows = measure_calibration(config, device)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"schema": SCHEMA, "config": to_mapping(config), "rows": to_blocks(rows)}, sort_keys=False)
    return rows


def calibration_path(root: Path, config: CalibrationConfig) -> Path:
    """Where a calibration is kept: named by a hash of its inputs and of the schema."""
    text = json.dumps([SCHEMA, to_mapping(config)], sort_keys=True)
    return root / f"calibration-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def calibrate_study(config: StudyConfig, folder: Path, *, device: str, workers: int) -> list[Row]:
    """Scores of planted worlds of the compared shapes' own sizes, kept beside the studies so that others reuse them.

    Raises:
        ValueError: k is so large that planted features would be active nearly always.
    """
    jobs = {}
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
            jobs[f"{name}-world{seed}"] = partial(calibrate, wanted, root=folder.parent / "calibration", device=device)
    found = run_jobs(jobs, workers=workers, device=device, label="calibration") if jobs else {}
    return [replace(row, at=replace(row.at, subject=name[0])) for name, rows in found.items() for row in rows]


def worst_calibration(table: LongTable, *, same_sizes: bool = True) -> Calibration:
    """The largest errors over worlds and shapes, for the gates; None where one of them is undefined."""

    def worst(key: str) -> float | None:
        found = table.seed_range(key, role="calibration")
        return None if found is None else max(abs(found.low), abs(found.high))

    keys = ("count_error", "rho_error", "d_eff_error")
    return Calibration(**{key: worst(key) for key in keys}, same_sizes=same_sizes)
