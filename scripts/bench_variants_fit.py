"""How the variants of `bench_variants.py` are trained: every kind of dictionary on the same activations at one L0.

L0 is the number of active features of a token in the whole model: of a crosscoder's code, or summed over the layers of
a bank. Rules that keep k are given it; the coefficient of a penalty is searched for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from crosscoder.data.order import seeded_generator
from crosscoder.data.sources import Source
from crosscoder.data.world import PlantedSource, World, WorldConfig
from crosscoder.dictionary import (
    DICTIONARIES,
    BatchTopK,
    DictionaryConfig,
    JumpReLU,
    L0Penalty,
    NormPenalty,
    ReLU,
    Sparsity,
)
from crosscoder.measure.reading import measure_dictionary
from crosscoder.studies.budget import CLASSES, Arm, DictionaryBudget

CALIBRATION = 8  # batches that set a BatchTopK threshold
PREFIXES = (0.125, 0.25, 0.5)
SEARCH_FACTOR, FINAL_FACTOR = 4.0, 1.3
"""How far a search for a coefficient steps at first: in short runs, and from what these gave."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kind of dictionary: an arm, what it changes of a budget, and for a penalty the rule of a coefficient."""

    arm: Arm
    changes: dict[str, Any] = field(default_factory=dict)
    rule: Callable[[float], Sparsity] | None = None


VARIANTS: dict[str, Variant] = {
    "batch_topk, acausal": Variant(arm="crosscoder"),
    "topk": Variant(arm="crosscoder", changes={"selection": "topk"}),
    "jumprelu": Variant(
        arm="crosscoder", changes={"selection": "jumprelu"}, rule=lambda c: JumpReLU(penalty=L0Penalty(c / 100))
    ),
    "l1_of_norms": Variant(
        arm="crosscoder", changes={"selection": "l1_of_norms"}, rule=lambda c: ReLU(NormPenalty("l1", c))
    ),
    "l2_of_norms": Variant(
        arm="crosscoder", changes={"selection": "l2_of_norms"}, rule=lambda c: ReLU(NormPenalty("l2", c))
    ),
    "matryoshka": Variant(arm="crosscoder", changes={"prefixes": PREFIXES}),
    "weakly causal": Variant(arm="crosscoder", changes={"structure": "weakly_causal"}),
    "strictly causal": Variant(arm="crosscoder", changes={"structure": "strictly_causal"}),
    "transcoder": Variant(arm="crosscoder", changes={"structure": "transcoder"}),
    "window of 2": Variant(arm="crosscoder", changes={"structure": "window", "window": 2}),
    "window of 4": Variant(arm="crosscoder", changes={"structure": "window", "window": 4}),
    "bank": Variant(arm="layerwise"),
    "bank, same start": Variant(arm="layerwise", changes={"bank": "same_start"}),
    "bank, warm chain": Variant(arm="layerwise", changes={"bank": "warm_chain"}),
    "MLSAE": Variant(arm="layerwise", changes={"bank": "shared"}),
}


@dataclass(frozen=True, kw_only=True)
class VariantsConfig:
    """What every variant is given.

    l0: active features of a token in the whole model; a bank divides it by its layers.
    n_features: of the acausal crosscoder.
    match: `features` gives all dictionaries that many in all, so that a bank divides them by its layers; `parameters`
        gives each as many as make its weights as many as the crosscoder's.
    search_steps: length of the runs that look for a coefficient; the final run corrects it where L0 is off by more than
        `tolerance`.
    most_searches: of either kind.
    """

    l0: int = 32
    n_features: int = 1024
    match: Literal["features", "parameters"] = "features"
    steps: int = 1000
    batch: int = 1024
    learning_rate: float = 3e-3
    dead_after_tokens: int = 20_000
    search_steps: int = 250
    tolerance: float = 0.05
    most_searches: int = 8
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for name in ("l0", "n_features", "steps", "batch", "search_steps", "most_searches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.match not in ("features", "parameters"):
            raise ValueError(f"match is {self.match!r}; expected 'features' or 'parameters'")
        if not self.seeds:
            raise ValueError("there are no seeds; give at least one")


def planted_source(config: WorldConfig, *, held_out_tokens: int = 16_384) -> PlantedSource:
    """A world whose features are known, scaled so that a number's mean square is 1."""
    world = World(config)
    sample_BLD = world.sample(4096, seeded_generator("variants scale", config.seed))[0]
    scale = sample_BLD.square().mean().rsqrt()

    def draw(n: int, stream: int | str, index: int) -> Tensor:
        purpose = stream if isinstance(stream, str) else "train"
        return world.sample(n, seeded_generator(f"variants {purpose}", index))[0] * scale

    return PlantedSource(
        draw,
        scale_L=scale.expand(config.n_layers),
        d_model=config.d_model,
        held_out_stream="held out",
        held_out_tokens=held_out_tokens,
    )


def applicable(n_layers: int) -> dict[str, Variant]:
    """The variants that make sense for this many layers: windows are narrower, transcoders have as many outputs as
    inputs."""

    def fits(variant: Variant) -> bool:
        match variant.changes.get("structure"):
            case "window":
                return variant.changes["window"] < n_layers
            case "transcoder":
                return n_layers % 2 == 0
            case _:
                return True

    return {name: variant for name, variant in VARIANTS.items() if fits(variant)}


def variant_budget(variant: Variant, config: VariantsConfig, *, n_layers: int, d_model: int) -> DictionaryBudget:
    """What one variant is trained with, its features and k set for the match; a penalty's coefficient is the rule's.

    Raises:
        ValueError: the layers of a bank do not divide L0 or the features.
    """
    if config.l0 % n_layers or config.n_features % n_layers:
        raise ValueError(
            f"l0 = {config.l0} and n_features = {config.n_features} are shared out over {n_layers} layers; expected "
            "multiples"
        )
    budget = DictionaryBudget(
        n_features=config.n_features,
        k_crosscoder=config.l0,
        k_layerwise=config.l0 // n_layers,
        steps=config.steps,
        batch=config.batch,
        learning_rate=config.learning_rate,
        dead_after_tokens=config.dead_after_tokens,
        **variant.changes,
    )
    if budget.selection.endswith("of_norms"):
        budget = replace(budget, resample_every=max(1, config.steps // 6))
    groups = n_layers if variant.arm == "layerwise" and budget.bank != "shared" else 1
    total = config.n_features
    if config.match == "parameters":
        total = round(total * n_layers / _layers_per_feature(variant.arm, budget, n_layers, d_model))
    return replace(budget, n_features=max(total // groups, budget.k(variant.arm)))


def _layers_per_feature(arm: Arm, budget: DictionaryBudget, n_layers: int, d_model: int) -> float:
    """Mean number of layers for which a feature has weights, of reading and writing."""
    if arm == "layerwise":
        return 1.0
    masks = DictionaryConfig(n_layers=n_layers, d_model=d_model, **budget.settings(arm)).masks()
    return n_layers if masks is None else sum(int(mask.sum()) for mask in masks) / (2 * budget.n_features)


def count_weights(dictionary: Any) -> int:
    """Trained numbers of a dictionary, without those that its structure forbids."""
    total = sum(parameter.numel() for parameter in dictionary.parameters())
    for mask in dictionary.config.masks() or ():
        total -= int((~mask.expand(dictionary.encoder.shape)).sum())
    return total


def calibrate_threshold(dictionary: Any, batches: Iterable[Tensor]) -> None:
    """Set the inference threshold of a finished BatchTopK dictionary to the mean of its cuts on `batches`.

    The running mean that training leaves lags behind the last steps, and L0 at inference with it.
    """
    dictionary.train()
    cuts = []
    for x_BLD in batches:
        dictionary.threshold.fill_(torch.nan)  # so that the next cut is taken whole
        dictionary.encode(x_BLD)
        cuts.append(dictionary.threshold.clone())
    dictionary.threshold.copy_(torch.stack(cuts).mean(0))
    dictionary.eval()


def fit_variant(
    variant: Variant,
    budget: DictionaryBudget,
    source: Source,
    *,
    coefficient: float | None = None,
    seed: int,
    device: str = "cpu",
) -> dict[str, Any]:
    """One trained dictionary's row: L0, explained variance, alive and dead features, weights and seconds."""
    settings = budget.settings(variant.arm)
    if variant.rule is not None and coefficient is not None:
        settings["sparsity"] = variant.rule(coefficient)
    settings |= {"n_layers": source.n_layers, "d_model": source.d_model}
    dictionary = DICTIONARIES[CLASSES[variant.arm]](**settings, seed=seed)

    batches = source.batches(budget.batch, seed=budget.data_seed, steps=budget.steps)
    started = time.perf_counter()
    budget.trainer(variant.arm)(dictionary, batches, config=budget.train_config(), device=device, quiet=True)
    seconds = time.perf_counter() - started
    if isinstance(dictionary.config.sparsity, BatchTopK):
        sample = source.batches(budget.batch, seed=budget.data_seed, steps=CALIBRATION)(0)
        calibrate_threshold(dictionary, (x_BLD.to(device) for x_BLD in sample))
    measured = measure_dictionary(dictionary, (x.to(device) for x in source.held_out()))
    n_groups = dictionary.grouped().center_GN.shape[0]
    alive_RF = measured.alive_GF
    alive_GF = alive_RF.reshape(-1, n_groups, alive_RF.shape[1]).any(0)  # of a shared SAE: at any layer
    later_L = measured.explained_variance_L[1:]
    later_L = later_L[np.isfinite(later_L)]  # layers that nobody writes
    return {
        "l0": measured.code.nnz / measured.code.shape[0],
        "explained_variance": measured.explained_variance,
        "explained_variance_later": float(np.mean(later_L)) if len(later_L) else None,
        "dead_share": 1 - float(alive_GF.mean()),
        "alive": int(alive_GF.sum()),
        "features": alive_GF.size,
        "parameters": count_weights(dictionary),
        "coefficient": coefficient,
        "seconds": seconds,
    }


def search_coefficient(
    l0_at: Callable[[float], float], target: float, *, start: float, factor: float, tolerance: float, most: int
) -> float:
    """A coefficient whose L0 is within `tolerance` of `target`, or the closest of `most` that were tried.

    Steps by `factor`, growing, until the target lies between two L0, then halves their interval on the logarithmic
    scale; L0 must not rise with the coefficient.
    """
    too_low = too_high = None  # coefficients
    tried: dict[float, float] = {}
    coefficient = start
    for _ in range(most):
        l0 = l0_at(coefficient)
        tried[coefficient] = abs(l0 / target - 1)
        if tried[coefficient] <= tolerance:
            break
        if l0 > target:
            too_low = coefficient
        else:
            too_high = coefficient
        if too_low is None:
            coefficient, factor = coefficient / factor, factor**1.5
        elif too_high is None:
            coefficient, factor = coefficient * factor, factor**1.5
        else:
            coefficient = math.sqrt(too_low * too_high)
    return min(tried, key=lambda key: tried[key])


def measure_variant(
    name: str, config: VariantsConfig, source: Source, *, seed: int, device: str = "cpu"
) -> dict[str, Any]:
    """The row of one variant and seed at the L0 that `config` asks for; `searches` counts the runs beside the last."""
    variant = VARIANTS[name]
    budget = variant_budget(variant, config, n_layers=source.n_layers, d_model=source.d_model)
    rows: list[dict[str, Any]] = []

    def l0_at(coefficient: float, **changes: Any) -> float:
        given = replace(budget, **changes)
        rows.append(fit_variant(variant, given, source, coefficient=coefficient, seed=seed, device=device))
        return rows[-1]["l0"]

    if variant.rule is not None:
        limits = {"tolerance": config.tolerance, "most": config.most_searches}
        resample_every = min(budget.resample_every, max(1, config.search_steps // 6))
        short = {"steps": config.search_steps, "resample_every": resample_every}
        near = search_coefficient(lambda c: l0_at(c, **short), config.l0, start=1.0, factor=SEARCH_FACTOR, **limits)
        n_short = len(rows)
        found = search_coefficient(l0_at, config.l0, start=near, factor=FINAL_FACTOR, **limits)
        row = next(row for row in rows[n_short:] if row["coefficient"] == found)
    else:
        row = fit_variant(variant, budget, source, seed=seed, device=device)
        rows.append(row)
    matched = abs(row["l0"] / config.l0 - 1) <= config.tolerance
    return {"variant": name, "seed": seed, **row, "matched": matched, "searches": len(rows) - 1}
