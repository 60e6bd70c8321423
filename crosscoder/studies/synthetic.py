"""The instruments against planted truth: every estimator on worlds whose features are known.

A world is drawn for each seed; crosscoders of several sizes and banks merged by each rule are trained on it and scored
by `measure.recovery`. Pairs of worlds then show whether the comparison of a deep narrow and a shallow wide subject
returns the ratio R that was planted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.sparse import csgraph
from torch import Tensor

from crosscoder.data.sources import EVALUATION_BATCH, PlantedSource, Source
from crosscoder.data.world import World, WorldConfig
from crosscoder.data.world_pair import SIDES, PairConfig, Side, WorldPair, planted_density_ratio, planted_slot_ratio
from crosscoder.dictionary import BatchTopK, Crosscoder, LayerwiseSAE
from crosscoder.foundation.artifact import replace_file, write_json
from crosscoder.foundation.config import to_mapping
from crosscoder.foundation.provenance import describe_run
from crosscoder.measure import counting, dimension, matching, recovery
from crosscoder.measure.reading import DUPLICATE, alive_features, measure_dictionary
from crosscoder.report.planted import render_markdown, render_picture, render_verdicts
from crosscoder.studies import planted_verdict
from crosscoder.studies.folder import Clock
from crosscoder.studies.planted_readings import VerdictConfig
from crosscoder.studies.workers import run_jobs
from crosscoder.training import TrainConfig, train

SCHEMA = "crosscoder/synthetic/1"
TRAIN_SEED, HELD_OUT_SEED = 1, 2
TARGETS = {"mcc": 0.93, "count_error": 0.08, "rho_error": 0.05, "d_eff_error": 0.10}
"""What a crosscoder is to reach in every world: at least this MCC, at most these errors either way."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How every dictionary of the study is trained, on tokens that never repeat."""

    steps: int = 800
    batch: int = 1024
    learning_rate: float = 1e-2
    k_factor: float = 1.0
    """Active features per token, as a multiple of the truth; anything but 1 mixes or splits features."""
    held_out: int = 20_480

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not self.k_factor > 0:
            raise ValueError(f"k_factor is {self.k_factor}; expected more than 0")


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Which worlds, which dictionaries. `sizes` are crosscoders, `bank_sizes` features a layer."""

    world: WorldConfig = field(default_factory=lambda: WorldConfig(p_min=0.015, p_max=0.055))
    fit: FitConfig = field(default_factory=FitConfig)
    sizes: tuple[int, ...] = (96,)
    bank_sizes: tuple[int, ...] = (64,)
    seeds: tuple[int, ...] = (0,)
    """One world and one dictionary seed each; `world.seed` is not used."""
    pair: PairConfig = field(default_factory=lambda: PairConfig(p_min=0.015, p_max=0.055))
    pair_size: int = 96
    gammas: tuple[float, ...] = (0.0, 1.0)
    """A pair of worlds for each exponent of the lifespan, with features that do not turn; `pair.gamma` is not used."""
    verdicts: int = 0
    """Seeds on which each planted answer goes through the whole chain to the rule."""
    verdict: VerdictConfig = field(default_factory=VerdictConfig)

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds are {self.seeds}; expected at least one, all different")


_LARGE_WORLD = WorldConfig(
    n_features=256, n_layers=4, d_model=32, kinds=("local", "persistent", "drifting", "split"), p_min=0.005, p_max=0.035
)
_LARGE_PAIR = PairConfig(n_features=256, n_layers=4, d_model=32, p_min=0.005, p_max=0.035)
PRESETS: dict[str, SyntheticConfig] = {
    "ci": SyntheticConfig(),
    "quick": SyntheticConfig(
        world=_LARGE_WORLD,
        fit=FitConfig(steps=1500),
        sizes=(384, 1024),
        bank_sizes=(256,),
        seeds=(0, 1),
        pair=_LARGE_PAIR,
        pair_size=384,
        gammas=(0.0, 0.5, 1.0),
    ),
    "full": SyntheticConfig(
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


@dataclass(frozen=True)
class Found:
    """The alive features of a trained dictionary on held-out tokens."""

    decoder_FLD: np.ndarray
    code: sparse.csc_array  # [T, F]
    group_F: np.ndarray  # the layer of a bank; 0 for a crosscoder
    size: int  # features of the dictionary, all layers together
    l0: float  # active (feature, group) pairs of a token, the dead included
    explained_variance: float

    @property
    def probability_F(self) -> np.ndarray:
        """Share of tokens on which each is active."""
        return np.diff(self.code.indptr) / self.code.shape[0]


def fit_dictionary(dictionary: Any, source: Source, fit: FitConfig, *, device: str = "cpu") -> Found:
    """Train `dictionary` on a source and measure it on the held-out part."""
    config = TrainConfig(
        steps=fit.steps, learning_rate=fit.learning_rate, dead_after_tokens=10_000, log_every=fit.steps
    )
    batches = source.batches(fit.batch, seed=TRAIN_SEED, steps=fit.steps)
    train(dictionary, batches, config=config, device=device, quiet=True)
    measured = measure_dictionary(dictionary, (x.to(device) for x in source.held_out()))
    activity = measured.activity
    alive_GF = alive_features(activity)
    alive = alive_GF.ravel().nonzero()[0]
    return Found(
        decoder_FLD=dictionary.decoder_FLD().float().cpu().numpy()[alive],
        code=activity.code.tocsc()[:, alive],
        group_F=alive // activity.n_features,
        size=alive_GF.size,
        l0=activity.code.nnz / activity.n_tokens,
        explained_variance=measured.explained_variance,
    )


def distinct_decoders(found: Found) -> np.ndarray:
    """One decoder for each distinct feature of a crosscoder, `[C, L, D]`: of duplicates, the most active."""
    rows = found.decoder_FLD.reshape(len(found.decoder_FLD), -1)
    cosine = matching.decoder_cosine(rows, rows)
    correlation = matching.activation_correlation(found.code, found.code)
    pairs = np.argwhere((cosine > DUPLICATE) & (correlation > DUPLICATE))
    label_F = _labels(len(rows), pairs)
    order = np.argsort(-found.probability_F, kind="stable")
    _, first = np.unique(label_F[order], return_index=True)
    return found.decoder_FLD[np.sort(order[first])]


def merged_decoders(found: Found, rule: str) -> np.ndarray:
    """Joint decoders of a bank's chains, `[C, L, D]`: linked between neighbouring layers by activation correlation.

    A chain's decoder is the sum of its members' rows, each as long as its mean activation while active.
    """
    links = [np.zeros((0, 2), dtype=np.int64)]
    members = [np.flatnonzero(found.group_F == layer) for layer in range(found.decoder_FLD.shape[1])]
    for a, b in pairwise(members):
        correlation = matching.activation_correlation(found.code[:, a], found.code[:, b])
        pairs = counting.RULES[rule](correlation, counting.LINK)
        links.append(np.stack([a[pairs[:, 0]], b[pairs[:, 1]]], axis=1))
    label_F = _labels(len(found.decoder_FLD), np.concatenate(links))
    active_F = np.maximum(np.diff(found.code.indptr), 1)
    mean_F = np.asarray(found.code.sum(0)).ravel() / active_F
    chains = np.zeros((label_F.max(initial=-1) + 1, *found.decoder_FLD.shape[1:]))
    np.add.at(chains, label_F, mean_F[:, None, None] * found.decoder_FLD)
    return chains


def _labels(n_nodes: int, pairs: np.ndarray) -> np.ndarray:
    graph = sparse.coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(n_nodes, n_nodes))
    return csgraph.connected_components(graph, directed=False)[1]


def measure_crosscoder(config: SyntheticConfig, size: int, seed: int, device: str = "cpu") -> list[dict[str, Any]]:
    """The scores of one crosscoder in one world, as one row."""
    world = World(replace(config.world, seed=seed))
    l0_true = float(world.probability_F.sum())
    k = max(1, round(config.fit.k_factor * l0_true))
    dictionary = Crosscoder(**_shape(config.world), n_features=size, sparsity=BatchTopK(k=min(k, size)), seed=seed)
    source = planted_source(world.draw, config.fit, **_shape(config.world))
    found = fit_dictionary(dictionary, source, config.fit, device=device)
    return [_row("crosscoder", world, found, distinct_decoders(found), size=size, k=k, l0_true=l0_true)]


def measure_bank(config: SyntheticConfig, size: int, seed: int, device: str = "cpu") -> list[dict[str, Any]]:
    """The scores of one bank in one world, a row for each merging rule; L0 counts (feature, layer) pairs."""
    world = World(replace(config.world, seed=seed))
    l0_true = float(world.probability_F @ world.rho_F)
    k = max(1, round(config.fit.k_factor * l0_true / config.world.n_layers))
    dictionary = LayerwiseSAE(**_shape(config.world), n_features=size, sparsity=BatchTopK(k=min(k, size)), seed=seed)
    source = planted_source(world.draw, config.fit, **_shape(config.world))
    found = fit_dictionary(dictionary, source, config.fit, device=device)
    return [
        _row(f"bank, {rule}", world, found, merged_decoders(found, rule), size=size, k=k, l0_true=l0_true)
        for rule in counting.RULES
    ]


def _shape(world: WorldConfig) -> dict[str, int]:
    return {"n_layers": world.n_layers, "d_model": world.d_model}


def planted_source(draw: Callable[..., Tensor], fit: FitConfig, *, n_layers: int, d_model: int) -> PlantedSource:
    """Tokens as `draw` gives them; whole batches are held out, as many as `fit` asks for."""
    n_batches = -(-fit.held_out // EVALUATION_BATCH)
    return PlantedSource(
        draw,
        scale_L=torch.ones(n_layers),
        d_model=d_model,
        held_out_stream=HELD_OUT_SEED,
        held_out_tokens=n_batches * EVALUATION_BATCH,
    )


def _row(
    estimator: str, world: World, found: Found, decoders: np.ndarray, *, size: int, k: int, l0_true: float
) -> dict[str, Any]:
    alive = len(found.decoder_FLD)
    scores = recovery.score_features(
        decoders, world.decoder_FLD.numpy(), world.kind_F.numpy(), world.config.kinds, count=len(decoders)
    )
    return {
        "estimator": estimator,
        "size": size,
        "k": k,
        "world_seed": world.config.seed,
        "alive": alive,
        "saturated": recovery.is_saturated(alive, found.size),
        "explained_variance": found.explained_variance,
        "l0": found.l0,
        "l0_true": l0_true,
        "l0_error": recovery.relative_error(found.l0, l0_true),
        **scores,
    }


def measure_pair(config: SyntheticConfig, gamma: float, seed: int, device: str = "cpu") -> list[dict[str, Any]]:
    """The ratios R that crosscoders of both sides of a pair return, beside the planted ones, as one row.

    The error of R of density is against the directions that were drawn, whose d_eff scatters about the planted one.
    """
    pair = WorldPair(replace(config.pair, gamma=gamma, seed=seed))
    sides = {side: _measure_side(pair, side, config, device) for side in SIDES}
    a, b = sides["A"], sides["B"]
    slots = 2 * (b["count"] / a["count"]) * (b["rho"] / a["rho"])
    density = (b["entropy_load"] / b["d_eff"]) / (a["entropy_load"] / a["d_eff"])
    slots_true, density_true = planted_slot_ratio(gamma), planted_density_ratio(pair.delta)
    drawn = pair.drawn_dimension("A") / pair.drawn_dimension("B")
    return [
        {
            "gamma": gamma,
            "delta": pair.delta,
            "world_seed": seed,
            "sides": sides,
            "r_slots": slots,
            "r_slots_true": slots_true,
            "r_slots_error": recovery.relative_error(slots, slots_true),
            "r_density": density,
            "r_density_true": density_true,
            "r_density_drawn": drawn,
            "r_density_error": recovery.relative_error(density, drawn),
        }
    ]


def _measure_side(pair: WorldPair, side: Side, config: SyntheticConfig, device: str) -> dict[str, float]:
    n_layers, d_model = pair.config.shape(side)
    k = max(1, round(config.fit.k_factor * float(pair.probability_F.sum())))
    dictionary = Crosscoder(
        n_layers=n_layers,
        d_model=d_model,
        n_features=config.pair_size,
        sparsity=BatchTopK(k=k),
        seed=pair.config.seed,
    )
    source = planted_source(partial(pair.draw, side), config.fit, n_layers=n_layers, d_model=d_model)
    found = fit_dictionary(dictionary, source, config.fit, device=device)
    decoders = distinct_decoders(found)
    if len(decoders) < 2:
        raise ValueError(f"{len(decoders)} features found on side {side}; R needs two: train for more steps")
    return {
        "count": len(decoders),
        "mcc": recovery.mean_cosine(recovery.assign(decoders, pair.decoder_FLD[side].numpy())),
        "rho": recovery.mean_rho(decoders),
        "d_eff": dimension.effective_dimension(decoders.reshape(len(decoders), -1)),
        "entropy_load": float(counting.binary_entropy(found.probability_F).sum()),
        "explained_variance": found.explained_variance,
    }


def summarize_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each estimator and size: mean, low and high over worlds of every number that all of them have."""
    summary = []
    for name, size in dict.fromkeys((row["estimator"], row["size"]) for row in rows):
        group = [row for row in rows if (row["estimator"], row["size"]) == (name, size)]
        entry: dict[str, Any] = {"estimator": name, "size": size, "n_worlds": len(group)}
        for key, value in group[0].items():
            if key in entry or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            values = [row[key] for row in group if row[key] is not None]
            if len(values) == len(group):
                entry[key] = {"mean": float(np.mean(values)), "low": min(values), "high": max(values)}
        entry["recall_by_kind"] = {
            kind: float(np.mean([row["recall_by_kind"][kind] for row in group]))
            for kind, value in group[0]["recall_by_kind"].items()
            if value is not None
        }
        entry["saturated"] = any(row["saturated"] for row in group)
        summary.append(entry)
    return summary


def check_targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each crosscoder size and target: the mean and the worst world, and whether every world met it."""
    checks = []
    crosscoders = [row for row in rows if row["estimator"] == "crosscoder"]
    for size in dict.fromkeys(row["size"] for row in crosscoders):
        for key, target in TARGETS.items():
            values = [row[key] for row in crosscoders if row["size"] == size]
            known = [abs(value) for value in values if value is not None]
            worst = (min if key == "mcc" else max)(known, default=None)
            met = worst is not None and len(known) == len(values)
            met = met and (worst >= target if key == "mcc" else worst <= target)
            mean = float(np.mean(known)) if known else None
            checks.append({"size": size, "score": key, "target": target, "mean": mean, "worst": worst, "met": met})
    return checks


def study_jobs(config: SyntheticConfig, device: str) -> dict[str, Callable[[], list[dict[str, Any]]]]:
    """Every training of the study by name; names of pairs begin with `pair`, of verdicts with `verdicts`."""
    jobs: dict[str, Callable[[], list[dict[str, Any]]]] = {}
    for seed in config.seeds:
        for size in config.sizes:
            jobs[f"crosscoder {size}, world {seed}"] = partial(measure_crosscoder, config, size, seed, device)
        for size in config.bank_sizes:
            jobs[f"bank {size}, world {seed}"] = partial(measure_bank, config, size, seed, device)
    for gamma in config.gammas:
        jobs[f"pair gamma {gamma:g}"] = partial(measure_pair, config, gamma, config.seeds[0], device)
    return jobs | planted_verdict.verdict_jobs(config.verdict, config.verdicts, device)


def run_synthetic(
    config: SyntheticConfig, *, folder: Path, preset: str, device: str = "cpu", workers: int = 1
) -> dict[str, Any]:
    """Run the study and write `results.json`, `report.md` and `recovery.png` to `folder`; returns the results."""
    clock = Clock()
    folder.mkdir(parents=True, exist_ok=True)
    done = run_jobs(study_jobs(config, device), workers=workers, device=device, label="planted worlds")

    def rows_of(*kinds: str) -> list[dict[str, Any]]:
        return [row for name, found in done.items() if name.split()[0].strip(",") in kinds for row in found]

    rows, verdicts = rows_of("crosscoder", "bank"), rows_of("verdicts")
    clock.lap("training and scoring")
    results = {
        "schema": SCHEMA,
        "preset": preset,
        "run": describe_run(to_mapping(config)),
        "definitions": {**recovery.DEFINITIONS, **(planted_verdict.DEFINITIONS if verdicts else {})},
        "rows": rows,
        "summary": summarize_rows(rows),
        "targets": check_targets(rows),
        "pairs": rows_of("pair"),
        "verdicts": {"rows": verdicts, "summary": planted_verdict.summarize_verdicts(verdicts)},
        "seconds": clock.seconds,
    }
    write_json(folder / "results.json", results)
    replace_file(folder / "report.md", render_markdown(results).encode())
    replace_file(folder / "recovery.png", render_picture(results))
    if results["verdicts"]["summary"]:
        replace_file(folder / "verdicts.png", render_verdicts(results["verdicts"]))
    return results
