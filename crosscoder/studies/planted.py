"""The instruments against planted truth: dictionaries trained on worlds whose features are known, and scored.

Crosscoders of several sizes and banks merged by each rule are trained on a world for each seed. Pairs of worlds then
show whether the comparison of a deep narrow and a shallow wide subject returns the ratio R that was planted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import PositiveInt

from crosscoder.data.world import World, WorldConfig
from crosscoder.data.world_pair import SIDES, PairConfig, Side, WorldPair, planted_density_ratio, planted_slot_ratio
from crosscoder.foundation.config import config
from crosscoder.measure import counting, dimension, recovery
from crosscoder.measure.reading import Reading
from crosscoder.report.planted import write_page
from crosscoder.results.file import Results, save_results
from crosscoder.results.table import Place, Row, rows_at
from crosscoder.studies.budget import SPANNING, Arm, Seeds
from crosscoder.studies.calibration import FitConfig, score
from crosscoder.studies.folder import StudyFolder
from crosscoder.studies.presets import named_configs


@config
class PlantedConfig:
    """Which worlds, which dictionaries. `sizes` are crosscoders, `bank_sizes` features a layer."""

    world: WorldConfig = field(default_factory=lambda: WorldConfig(p_min=0.015, p_max=0.055))
    fit: FitConfig = field(default_factory=FitConfig)
    sizes: tuple[PositiveInt, ...] = (96,)
    bank_sizes: tuple[PositiveInt, ...] = (64,)
    seeds: Seeds = (0,)
    """One world and one dictionary seed each; `world.seed` is not used."""
    pair: PairConfig = field(default_factory=lambda: PairConfig(p_min=0.015, p_max=0.055))
    pair_size: PositiveInt = 96
    gammas: tuple[float, ...] = (0.0, 1.0)
    """A pair of worlds for each exponent of the lifespan, with features that do not turn; `pair.gamma` is not used."""


PRESETS = named_configs(PlantedConfig, "planted")


def measure_arm(
    config: PlantedConfig, arm: Arm, size: int, seed: int, device: str = "cpu", folder: Path | None = None
) -> list[Row]:
    """The scores of one dictionary in one world: a crosscoder's features, or a bank's merged by each rule.

    L0 counts features of a crosscoder, (feature, layer) pairs of a bank. folder: what its training goes on from.
    """
    world = World(replace(config.world, seed=seed))
    shape = world.config.n_layers, world.config.d_model
    spans = arm in SPANNING
    l0_true = float(world.probability_F.sum() if spans else world.probability_F @ world.rho_F)
    k = config.fit.k(l0_true / (1 if spans else world.config.n_layers), size)
    source = config.fit.source(world.draw, shape)
    reading = config.fit.run(arm, source, n_features=size, k=k, seed=seed, device=device, folder=folder)
    at = Place(arm=arm, n_features=size, k=k, seed=seed)
    if reading.n_groups == 1:
        return score(at, reading.distinct.decoder_FLD, world, reading, l0_true=l0_true)
    rows: list[Row] = []
    for rule in counting.RULES:
        here = replace(at, estimator=rule.replace(" ", "-"))
        rows += score(here, merged_decoders(reading, rule), world, reading, l0_true=l0_true)
    return rows


def merged_decoders(bank: Reading, rule: str) -> np.ndarray:
    """Joint decoders of a bank's chains, `[C, L, D]`: linked between neighbouring layers by activation correlation.

    A chain's decoder is the sum of its members' rows, each as long as its mean activation while active.
    """
    chain_F = counting.chains(bank)["correlation", rule]
    mean_F = np.asarray(bank.code.sum(0)).ravel() / np.maximum(np.diff(bank.code.indptr), 1)
    chains = np.zeros((chain_F.max(initial=-1) + 1, *bank.decoder_FLD.shape[1:]))
    np.add.at(chains, chain_F, mean_F[:, None, None] * bank.decoder_FLD)
    return chains


def measure_pair(
    config: PlantedConfig, gamma: float, seed: int, device: str = "cpu", folder: Path | None = None
) -> list[Row]:
    """The ratios R that crosscoders of both sides of a pair return, beside the planted ones.

    The error of R of density is against the directions that were drawn, whose d_eff scatters about the planted one.
    """
    pair = WorldPair(replace(config.pair, gamma=gamma, seed=seed))
    sides = {side: _measure_side(pair, side, config, device, folder) for side in SIDES}
    a, b = sides["A"], sides["B"]
    slots = 2 * (b["count"] / a["count"]) * (b["rho"] / a["rho"])
    density = (b["entropy_load"] / b["d_eff"]) / (a["entropy_load"] / a["d_eff"])
    drawn = pair.drawn_dimension("A") / pair.drawn_dimension("B")
    at = Place(arm="crosscoder", n_features=config.pair_size, seed=seed, kind=f"gamma-{gamma:g}")
    values = {
        "planted_gamma": gamma,
        "planted_delta": pair.delta,
        **recovery.beside_truth("r_slots", slots, planted_slot_ratio(gamma)),
        "r_density": density,
        "r_density_true": planted_density_ratio(pair.delta),
        "r_density_drawn": drawn,
        "r_density_error": recovery.relative_error(density, drawn),
    }
    return [*rows_at(at, values), *(row for side in SIDES for row in rows_at(replace(at, subject=side), sides[side]))]


def _measure_side(
    pair: WorldPair, side: Side, config: PlantedConfig, device: str, folder: Path | None
) -> dict[str, Any]:
    n_layers, d_model = pair.config.shape(side)
    k, size = config.fit.k(float(pair.probability_F.sum()), config.pair_size), config.pair_size
    source = config.fit.source(partial(pair.draw, side), (n_layers, d_model))
    how: dict[str, Any] = {"device": device, "folder": None if folder is None else folder / side}
    reading = config.fit.run("crosscoder", source, n_features=size, k=k, seed=pair.config.seed, **how)
    decoder_FLD = reading.distinct.decoder_FLD
    if len(decoder_FLD) < 2:
        raise ValueError(f"{len(decoder_FLD)} features found on side {side}; R needs two: train for more steps")
    return {
        "n_layers": n_layers,
        "d_model": d_model,
        "count": len(decoder_FLD),
        "mcc": recovery.mean_cosine(recovery.assign(decoder_FLD, pair.decoder_FLD[side].numpy())),
        "rho": recovery.mean_rho(decoder_FLD),
        "d_eff": dimension.effective_dimension(decoder_FLD),
        "entropy_load": float(counting.binary_entropy(reading.probability_F).sum()),
        "explained_variance": reading.explained_variance,
    }


def study_jobs(config: PlantedConfig, study: StudyFolder) -> dict[str, Callable[[], list[Row]]]:
    """Every training of the study by name."""
    jobs: dict[str, Callable[[], list[Row]]] = {}

    def add(name: str, measure: Callable[..., list[Row]], *given: Any) -> None:
        jobs[name] = partial(measure, config, *given, study.device, study.unfinished(name))

    for seed in config.seeds:
        for size in config.sizes:
            add(f"crosscoder-{size}-world-{seed}", measure_arm, "crosscoder", size, seed)
        for size in config.bank_sizes:
            add(f"bank-{size}-world-{seed}", measure_arm, "layerwise", size, seed)
    for gamma in config.gammas:
        add(f"pair-gamma-{gamma:g}", measure_pair, gamma, config.seeds[0])
    return jobs


def run_planted(config: PlantedConfig, *, folder: Path, preset: str, device: str = "cpu", workers: int = 1) -> Results:
    """Run the study and write `results.json`, `report.md` and pictures to `folder`; one that was stopped goes on."""
    study = StudyFolder(folder, device=device, workers=workers)
    with study.alone():
        jobs = {folder / "cells" / f"{name}.json": job for name, job in study_jobs(config, study).items()}
        rows = [row for found in study.measure(jobs, "planted worlds").values() for row in found]
        study.lap("training")
        return _written(study, rows, config, preset)


def _written(study: StudyFolder, rows: list[Row], config: PlantedConfig, preset: str) -> Results:
    results = study.results(rows, config=config, kind="synthetic", preset=preset, text="planted worlds")
    save_results(results, study.root)
    write_page(results, study.root)
    return results
