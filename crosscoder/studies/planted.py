"""The instruments against planted truth: dictionaries trained on worlds whose features are known, and scored.

Crosscoders of several sizes and banks merged by each rule are trained on a world for each seed. Pairs of worlds then
show whether the comparison of a deep narrow and a shallow wide subject returns the ratio R that was planted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from crosscoder.data.sources import EVALUATION_BATCH, PlantedSource
from crosscoder.data.world import World, WorldConfig
from crosscoder.data.world_pair import SIDES, PairConfig, Side, WorldPair, planted_density_ratio, planted_slot_ratio
from crosscoder.dictionary import BatchTopK, Crosscoder, Dictionary, LayerwiseSAE
from crosscoder.foundation.config import config
from crosscoder.measure import counting, dimension, matching, recovery
from crosscoder.measure.reading import Reading
from crosscoder.report.planted import write_page
from crosscoder.results.file import Results, save_results
from crosscoder.results.table import Place, Row, rows_at
from crosscoder.studies import planted_verdict
from crosscoder.studies.budget import Seeds
from crosscoder.studies.fit import fit_dictionary, score
from crosscoder.studies.folder import StudyFolder
from crosscoder.studies.planted_verdict import VerdictConfig
from crosscoder.training import TrainConfig

TRAIN_STREAM, HELD_OUT_STREAM = 1, 2
Draw = Callable[[int, int | str, int], Tensor]
"""`(n, stream, index) -> x_BLD`: batch number `index` of a stream of planted tokens."""


@config
class FitConfig:
    """How every dictionary of the study is trained, on tokens that never repeat."""

    steps: PositiveInt = 800
    batch: PositiveInt = 1024
    learning_rate: PositiveFloat = 1e-2
    k_factor: PositiveFloat = 1.0
    """Active features per token, as a multiple of the truth; anything but 1 mixes or splits features."""
    held_out: PositiveInt = 20_480

    def k(self, l0_true: float, n_features: int) -> int:
        """Active features of a dictionary in a world where `l0_true` are active."""
        return min(max(1, round(self.k_factor * l0_true)), n_features)

    def run(self, dictionary: Dictionary, draw: Draw, device: str = "cpu") -> Reading:
        """The reading of `dictionary` after training on tokens as `draw` gives them; whole batches are held out."""
        source = PlantedSource(
            draw,
            scale_L=torch.ones(dictionary.config.n_layers),
            d_model=dictionary.config.d_model,
            held_out_stream=HELD_OUT_STREAM,
            held_out_tokens=-(-self.held_out // EVALUATION_BATCH) * EVALUATION_BATCH,
        )
        config = TrainConfig(
            steps=self.steps, learning_rate=self.learning_rate, dead_after_tokens=10_000, log_every=self.steps
        )
        return fit_dictionary(dictionary, source, config, batch=self.batch, seed=TRAIN_STREAM, device=device)


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
    verdicts: NonNegativeInt = 0
    """Seeds on which each planted answer goes through the whole chain to the rule."""
    verdict: VerdictConfig = field(default_factory=VerdictConfig)


_LARGE_WORLD = WorldConfig(
    n_features=256, n_layers=4, d_model=32, kinds=("local", "persistent", "drifting", "split"), p_min=0.005, p_max=0.035
)
_LARGE_PAIR = PairConfig(n_features=256, n_layers=4, d_model=32, p_min=0.005, p_max=0.035)
PRESETS: dict[str, PlantedConfig] = {
    "ci": PlantedConfig(),
    "quick": PlantedConfig(
        world=_LARGE_WORLD,
        fit=FitConfig(steps=1500),
        sizes=(384, 1024),
        bank_sizes=(256,),
        seeds=(0, 1),
        pair=_LARGE_PAIR,
        pair_size=384,
        gammas=(0.0, 0.5, 1.0),
    ),
    "full": PlantedConfig(
        world=replace(_LARGE_WORLD, kinds=("local", "persistent", "drifting", "split", "gated")),
        fit=FitConfig(steps=3000, held_out=81_920),
        sizes=(128, 192, 256, 384, 768, 1024),
        bank_sizes=(128, 256, 512),
        seeds=(0, 1, 2, 3, 4),
        pair=replace(_LARGE_PAIR, n_layers=16),
        pair_size=384,
        gammas=(0.0, 0.5, 1.0),
    ),
}


def measure_crosscoder(config: PlantedConfig, size: int, seed: int, device: str = "cpu") -> list[Row]:
    """The scores of one crosscoder in one world."""
    world = World(replace(config.world, seed=seed))
    l0_true = float(world.probability_F.sum())
    k = config.fit.k(l0_true, size)
    dictionary = Crosscoder(
        n_layers=world.config.n_layers,
        d_model=world.config.d_model,
        n_features=size,
        sparsity=BatchTopK(k=k),
        seed=seed,
    )
    reading = config.fit.run(dictionary, world.draw, device)
    at = Place(arm="crosscoder", n_features=size, k=k, seed=seed)
    return score(at, reading.distinct.decoder_FLD, world, reading, l0_true=l0_true)


def measure_bank(config: PlantedConfig, size: int, seed: int, device: str = "cpu") -> list[Row]:
    """The scores of one bank in one world by each merging rule; L0 counts (feature, layer) pairs."""
    world = World(replace(config.world, seed=seed))
    l0_true = float(world.probability_F @ world.rho_F)
    k = config.fit.k(l0_true / config.world.n_layers, size)
    dictionary = LayerwiseSAE(
        n_layers=world.config.n_layers,
        d_model=world.config.d_model,
        n_features=size,
        sparsity=BatchTopK(k=k),
        seed=seed,
    )
    reading = config.fit.run(dictionary, world.draw, device)
    at = Place(arm="layerwise", n_features=size, k=k, seed=seed)
    rows: list[Row] = []
    for rule in counting.RULES:
        here = replace(at, estimator=rule.replace(" ", "-"))
        rows += score(here, merged_decoders(reading, rule), world, reading, l0_true=l0_true)
    return rows


def merged_decoders(bank: Reading, rule: str) -> np.ndarray:
    """Joint decoders of a bank's chains, `[C, L, D]`: linked between neighbouring layers by activation correlation.

    A chain's decoder is the sum of its members' rows, each as long as its mean activation while active.
    """
    starts = np.cumsum([0, *(len(group) for group in bank.groups)])
    links = [np.zeros((0, 2), dtype=np.int64)]
    for layer, (first, second) in enumerate(pairwise(bank.groups)):
        correlation = matching.activation_correlation(first.code, second.code)
        links.append(counting.RULES[rule](correlation, counting.LINK) + starts[layer : layer + 2])
    chain_F = matching.joined(len(bank), np.concatenate(links))
    mean_F = np.asarray(bank.code.sum(0)).ravel() / np.maximum(np.diff(bank.code.indptr), 1)
    chains = np.zeros((chain_F.max(initial=-1) + 1, *bank.decoder_FLD.shape[1:]))
    np.add.at(chains, chain_F, mean_F[:, None, None] * bank.decoder_FLD)
    return chains


def measure_pair(config: PlantedConfig, gamma: float, seed: int, device: str = "cpu") -> list[Row]:
    """The ratios R that crosscoders of both sides of a pair return, beside the planted ones.

    The error of R of density is against the directions that were drawn, whose d_eff scatters about the planted one.
    """
    pair = WorldPair(replace(config.pair, gamma=gamma, seed=seed))
    sides = {side: _measure_side(pair, side, config, device) for side in SIDES}
    a, b = sides["A"], sides["B"]
    slots = 2 * (b["count"] / a["count"]) * (b["rho"] / a["rho"])
    density = (b["entropy_load"] / b["d_eff"]) / (a["entropy_load"] / a["d_eff"])
    slots_true = planted_slot_ratio(gamma)
    drawn = pair.drawn_dimension("A") / pair.drawn_dimension("B")
    at = Place(arm="crosscoder", n_features=config.pair_size, seed=seed, kind=f"gamma-{gamma:g}")
    values = {
        "planted_gamma": gamma,
        "planted_delta": pair.delta,
        "r_slots": slots,
        "r_slots_true": slots_true,
        "r_slots_error": recovery.relative_error(slots, slots_true),
        "r_density": density,
        "r_density_true": planted_density_ratio(pair.delta),
        "r_density_drawn": drawn,
        "r_density_error": recovery.relative_error(density, drawn),
    }
    return [*rows_at(at, values), *(row for side in SIDES for row in rows_at(replace(at, subject=side), sides[side]))]


def _measure_side(pair: WorldPair, side: Side, config: PlantedConfig, device: str) -> dict[str, Any]:
    n_layers, d_model = pair.config.shape(side)
    k = config.fit.k(float(pair.probability_F.sum()), config.pair_size)
    dictionary = Crosscoder(
        n_layers=n_layers,
        d_model=d_model,
        n_features=config.pair_size,
        sparsity=BatchTopK(k=k),
        seed=pair.config.seed,
    )
    reading = config.fit.run(dictionary, partial(pair.draw, side), device)
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


def study_jobs(config: PlantedConfig, device: str) -> dict[str, Callable[[], list[Row]]]:
    """Every training of the study by name."""
    jobs: dict[str, Callable[[], list[Row]]] = {}
    for seed in config.seeds:
        for size in config.sizes:
            jobs[f"crosscoder {size}, world {seed}"] = partial(measure_crosscoder, config, size, seed, device)
        for size in config.bank_sizes:
            jobs[f"bank {size}, world {seed}"] = partial(measure_bank, config, size, seed, device)
    for gamma in config.gammas:
        jobs[f"pair gamma {gamma:g}"] = partial(measure_pair, config, gamma, config.seeds[0], device)
    return jobs | planted_verdict.verdict_jobs(config.verdict, config.verdicts, device)


def run_planted(config: PlantedConfig, *, folder: Path, preset: str, device: str = "cpu", workers: int = 1) -> Results:
    """Run the study and write `results.json`, `report.md` and pictures to `folder`."""
    study = StudyFolder(folder, device=device, workers=workers)
    done = study.run(study_jobs(config, device), "planted worlds")
    study.lap("training")
    rows = [row for found in done.values() for row in found]
    results = study.results(rows, None, config=config, kind="synthetic", preset=preset, text="planted worlds")
    save_results(results, folder)
    write_page(results, folder)
    return results
