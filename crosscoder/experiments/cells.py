"""One cell of a study: one arm on one activation store, trained with every seed, measured and counted.

A cell's result is plain values, so that cells can run in any process and order, be kept as JSON, and be skipped
when a study is started again. Both arms of a comparison read the same tokens in the same order: the order depends
on the data seed, never on the dictionary's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

from crosscoder.analysis import capacity, counting, features, matching, probes
from crosscoder.analysis.reading import Reading, read_dictionary, save_reading
from crosscoder.analysis.splice import splice_losses
from crosscoder.data.residuals import find_blocks
from crosscoder.data.shards import ActivationShards
from crosscoder.data.shuffled import shuffle_layers, shuffle_stream
from crosscoder.data.store import select_site_numbers, select_sites
from crosscoder.dictionary import DICTIONARIES, BatchTopK
from crosscoder.experiments.budget import CLASSES, Arm, DictionaryBudget
from crosscoder.training import train

Site = Literal["residual", "write"]
State = Literal["trained", "untrained", "shuffled"]  # shuffled: trained, each layer's tokens in an order of its own
Role = Literal["main", "size", "k"]
EVALUATION_BATCH = 4096
SHUFFLE_SEED = 1
PROBED_SITE = "write"
MOST_PROBED = 2048  # features; of larger dictionaries so many are drawn at random
_SPREAD_IDENTITY = ("subject", "state", "site", "n_features", "k", "training_seed")
HISTOGRAM_BINS = 20
HEATMAP_ROWS = 200


@dataclass(frozen=True, kw_only=True)
class Stores:
    """Where a subject's activations lie, and what a spliced evaluation needs of it."""

    train: Path
    held_out: Path
    subject: Path | str | None = None
    """Folder or name of the subject, for splicing; None leaves splicing out."""
    held_out_ids: Path | None = None
    """Token blocks `[n, S]` to splice on, as safetensors."""
    blocks_path: str | None = None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is trained: one arm on one site of one subject in one state."""

    subject: str
    state: State
    site: Site
    arm: Arm
    role: Role
    budget: DictionaryBudget
    seeds: tuple[int, ...] = (0, 1)
    training_seed: int = 0
    """Position of the subject's training seed in the study's list."""

    @property
    def name(self) -> str:
        """A file name that tells the cells of one study apart."""
        k = self.budget.k(self.arm)
        run = f"{self.subject}{self.training_seed}"
        return f"{run}-{self.state}-{self.site}-{self.arm}-n{self.budget.n_features}-k{k}"

    @property
    def compared(self) -> bool:
        """Whether its dictionaries are read by the verdict: the main crosscoders."""
        return self.role == "main" and self.arm == "crosscoder"

    def reading_name(self, seed: int) -> str:
        """The file that one seed's reading is kept in."""
        return f"{self.name}-seed{seed}.safetensors"

    def identity(self) -> dict[str, Any]:
        """The columns that say which cell a row of results belongs to."""
        return {
            "subject": self.subject,
            "state": self.state,
            "site": self.site,
            "arm": self.arm,
            "role": self.role,
            "n_features": self.budget.n_features,
            "k": self.budget.k(self.arm),
            "training_seed": self.training_seed,
        }


@dataclass(frozen=True)
class _Trained:
    """One seed's dictionary and what it did on the held-out tokens, alive features only."""

    seed: int
    measured: features.Measured
    alive_GF: np.ndarray
    decoder: np.ndarray  # [G * F, L, D]
    layers: list[counting.LayerFeatures]  # one for each group, alive features
    threshold: list[float] | None
    splice: dict[str, Any] | None
    functional: dict[str, float | None] | None = None


def run_cell(
    cell: Cell,
    stores: Stores,
    *,
    device: str = "cpu",
    save_to: Path | None = None,
    readings_to: Path | None = None,
) -> dict[str, Any]:
    """Train, measure and count every seed of `cell`; the result's keys are documented in docs/results.md.

    Readings of compared cells are kept in `readings_to`, dictionaries in `save_to`.
    """
    source = ActivationShards.load(stores.train, verify=False)
    held_out = ActivationShards.load(stores.held_out, verify=False)
    homes = save_to, readings_to
    trained = [_train_seed(cell, seed, source, held_out, stores, device, homes) for seed in cell.seeds]
    n_held_out = trained[0].measured.activity.n_tokens
    counts = [_count(cell.arm, one) for one in trained]
    quality = [_quality(cell.arm, one) for one in trained]
    result: dict[str, Any] = {
        "counts": {
            **cell.identity(),
            "tokens_train": cell.budget.steps * cell.budget.batch,
            "tokens_held_out": n_held_out,
            "p_min": counting.minimum_probability(n_held_out),
            "per_seed": counts,
            "pair": _compare_seeds(cell, trained),
            "summary": summarize(counts),
        },
        "quality": {**cell.identity(), "per_seed": quality, "summary": summarize(quality)},
        "spread": None,
    }
    if cell.arm == "crosscoder":
        spread = [_spread(one) for one in trained]
        result["spread"] = {
            **{key: cell.identity()[key] for key in _SPREAD_IDENTITY},
            "role": cell.role,
            "per_seed": spread,
            "heatmap": _heatmap(trained[0]),
            "layers": [str(site) for site in select_site_numbers(source.sites, cell.site)],
            "summary": summarize(spread),
        }
    return result


class Sized(Protocol):
    """What a dictionary must know of activations to fit them."""

    n_layers: int
    d_model: int
    scale_L: Tensor


def new_dictionary(arm: Arm, view: Sized, budget: DictionaryBudget, *, seed: int) -> Any:
    """An untrained dictionary of one arm that fits the activations of `view` and carries their scales."""
    dictionary = DICTIONARIES[CLASSES[arm]](
        n_layers=view.n_layers,
        d_model=view.d_model,
        n_features=budget.n_features,
        sparsity=budget.sparsity(arm),
        decoder=budget.decoder(),
        prefixes=budget.prefixes,
        seed=seed,
    )
    dictionary.input_scale.copy_(view.scale_L)
    return dictionary


def _train_seed(
    cell: Cell,
    seed: int,
    source: ActivationShards,
    held_out: ActivationShards,
    stores: Stores,
    device: str,
    homes: tuple[Path | None, Path | None],
) -> _Trained:
    save_to, readings_to = homes
    view = source.view(cell.site)
    budget = cell.budget
    dictionary = new_dictionary(cell.arm, view, budget, seed=seed)
    shuffled = cell.state == "shuffled"
    drawn = shuffle_layers(view, SHUFFLE_SEED) if shuffled else view

    def batches(start: int) -> Iterator[Tensor]:
        for index in range(start, budget.steps):
            yield drawn.batch(index, budget.batch, budget.data_seed)

    def held() -> Iterator[Tensor]:
        stream = _held_out_batches(held_out, cell.site, view.scale_L)
        return (x.to(device) for x in (shuffle_stream(stream, SHUFFLE_SEED) if shuffled else stream))

    label = f"{cell.name} seed {seed}"
    train(dictionary, batches, config=budget.train_config(), device=device, label=label, quiet=True)
    measured = features.measure_dictionary(dictionary, held())
    splice = None
    if stores.subject is not None and seed == cell.seeds[0]:
        splice = _splice(cell, dictionary, source, stores, device)
    if save_to is not None:
        dictionary.save_pretrained(save_to / f"{cell.name}-seed{seed}")
    one = _describe_dictionary(dictionary, measured, seed=seed, splice=splice)
    if cell.compared and readings_to is not None:
        one = _keep_reading(cell, one, dictionary, held, readings_to)
    return one


def _keep_reading(
    cell: Cell, one: _Trained, dictionary: Any, held: Callable[[], Iterator[Tensor]], home: Path
) -> _Trained:
    """Write the reading of a compared dictionary; on the primary site with what its features are read from."""
    reading: Reading = read_dictionary(one.measured, one.decoder, seed=one.seed)
    if cell.site == PROBED_SITE and len(reading) and one.decoder.shape[1] > 1:
        config = probes.ProbeConfig(n_features=None if reading.decoder_FLD.shape[0] <= MOST_PROBED else MOST_PROBED)
        found = probes.measure_functional_spread(dictionary, held, config=config)
        one = replace(one, functional={key: _finite(value) for key, value in found.summary().items()})
        if config.n_features is None and reading.index_F is not None:
            reading = replace(reading, genuine_F=found.genuine_F()[reading.index_F])
    home.mkdir(parents=True, exist_ok=True)
    save_reading(reading, home / cell.reading_name(one.seed))
    return one


def _describe_dictionary(
    dictionary: Any, measured: features.Measured, *, seed: int, splice: dict[str, Any] | None = None
) -> _Trained:
    alive_GF = counting.alive_features(measured.activity)
    decoder_GFN = dictionary.grouped().decoder_GFN.detach().float().cpu()
    groups = decoder_GFN.expand(len(alive_GF), -1, -1).numpy()  # layers that share an SAE share its decoder
    layers = [
        counting.LayerFeatures(groups[g][alive], measured.activity.group(g)[:, alive.nonzero()[0]])
        for g, alive in enumerate(alive_GF)
    ]
    is_batch = isinstance(dictionary.config.sparsity, BatchTopK)
    threshold = dictionary.threshold.tolist() if is_batch else None
    decoder = dictionary.decoder_FLD().float().cpu().numpy()
    return _Trained(seed, measured, alive_GF, decoder, layers, threshold, splice)


def evaluate_dictionary(dictionary: Any, held_out: ActivationShards, *, site: Site, device: str) -> dict[str, Any]:
    """Quality and counts of a trained dictionary on a held-out store, as one seed's rows of a study."""
    arm: Arm = "crosscoder" if type(dictionary).__name__ == CLASSES["crosscoder"] else "layerwise"
    scale_L = dictionary.input_scale.cpu()
    batches = (x.to(device) for x in _held_out_batches(held_out, site, scale_L))
    one = _describe_dictionary(
        dictionary, features.measure_dictionary(dictionary, batches), seed=dictionary.config.seed
    )
    spread = _spread(one) if arm == "crosscoder" else None
    return {"counts": _count(arm, one), "quality": _quality(arm, one), "spread": spread}


def _held_out_batches(store: ActivationShards, site: Site, scale_L: Tensor) -> Iterator[Tensor]:
    """Held-out activations in stored order, scaled by the training data's factors."""
    for start in range(0, store.n_tokens, EVALUATION_BATCH):
        x_TLD = store.rows(start, min(start + EVALUATION_BATCH, store.n_tokens))
        yield select_sites(x_TLD, store.sites, site) * scale_L[:, None]


def _splice(cell: Cell, dictionary: Any, source: ActivationShards, stores: Stores, device: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    from crosscoder.data.subject import load_model

    assert stores.subject is not None
    assert stores.held_out_ids is not None
    model = load_model(stores.subject, device=device)
    ids = load_file(stores.held_out_ids)["ids"].long().to(device).split(16)
    layers = select_site_numbers(source.sites, cell.site)
    blocks = find_blocks(model, stores.blocks_path)
    return splice_losses(dictionary, model, list(blocks), ids, layers=layers, kind=cell.site)


def _count(arm: Arm, one: _Trained) -> dict[str, Any]:
    """Counts of one seed, each by the definition of the same name."""
    probability = one.measured.activity.firing_probability().reshape(one.alive_GF.shape)
    alive = int(one.alive_GF.sum())
    _, n_layers, d_model = one.decoder.shape
    row: dict[str, Any] = {
        "seed": one.seed,
        "dictionary_size": one.alive_GF.size,
        "alive": alive,
        "dead_share": 1 - alive / one.alive_GF.size,
        "ultra_dense": int((probability > counting.ULTRA_DENSE).sum()),
        "distinct": None,
        "merged": None,
        "merged_low": None,
        "merged_high": None,
        "entropy_load": float(counting.binary_entropy(probability[one.alive_GF]).sum()) / len(one.layers),
        "effective_dimension": _finite(np.mean([capacity.effective_dimension(x.decoder) for x in one.layers])),
    }
    if arm == "crosscoder":
        profile_FL = features.layer_profile(one.decoder[one.alive_GF[0]])
        row["distinct"] = joint = counting.distinct_features(one.layers[0].decoder, one.layers[0].code)
        row["alive_per_layer"] = features.occupied_layers(profile_FL).sum(0).tolist()
        mean_rho = float(features.participation_ratio(profile_FL).mean()) if alive else 0.0
        row["features_per_layer"] = joint * mean_rho / n_layers
    else:
        merged = counting.merged_counts(one.layers)
        every = [count for rules in merged.values() for count in rules.values()]
        row["merged"] = joint = merged["correlation"]["mutual nearest"]
        row["merged_low"], row["merged_high"] = min(every), max(every)
        row["alive_per_layer"] = one.alive_GF.sum(1).tolist()
        row["features_per_layer"] = alive / n_layers
    row["per_neuron_layer"] = row["features_per_layer"] / d_model
    row["per_neuron_joint"] = joint / (n_layers * d_model)
    return row


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _finite(value: Any) -> float | None:
    """`value`, or None where it is undefined, as JSON can say."""
    return float(value) if np.isfinite(value) else None


def _quality(arm: Arm, one: _Trained) -> dict[str, Any]:
    activity = one.measured.activity
    n_layers = one.decoder.shape[1]
    l0_token = activity.code.nnz / activity.n_tokens
    if arm == "crosscoder":
        span = features.lifespan(features.layer_profile(one.decoder))
        l0_token_layer = float(activity.firing_probability() @ span) / n_layers
    else:
        l0_token_layer = l0_token / n_layers
    return {
        "seed": one.seed,
        "explained_variance": one.measured.explained_variance,
        "explained_variance_per_layer": [_finite(value) for value in one.measured.explained_variance_L],
        "l0_token": l0_token,
        "l0_token_layer": l0_token_layer,
        "dead_share": 1 - float(one.alive_GF.mean()),
        "threshold": one.threshold,
        "splice": one.splice,
    }


def _spread(one: _Trained) -> dict[str, Any]:
    """How the alive features of one crosscoder lie over the layers."""
    decoder_FLD = one.decoder[one.alive_GF[0]]
    profile_FL = features.layer_profile(decoder_FLD)
    n_layers = profile_FL.shape[1]
    rho = features.participation_ratio(profile_FL)
    span = features.lifespan(profile_FL)
    cosine = features.adjacent_cosine(decoder_FLD, profile_FL)
    cosine = cosine[~np.isnan(cosine)]
    counts, edges = np.histogram(rho / n_layers, bins=HISTOGRAM_BINS, range=(0, 1))
    return {
        "seed": one.seed,
        "mean_rho": _mean(rho),
        "mean_rho_share": _mean(rho / n_layers),
        "mean_lifespan": _mean(span),
        "single_layer_share": _mean(span == 1),
        "mean_adjacent_cosine": _mean(cosine),
        "rho_histogram": {"edges": [round(float(edge), 6) for edge in edges], "counts": counts.tolist()},
        "lifespan_counts": np.bincount(span, minlength=n_layers + 1)[1:].tolist(),
        "functional": one.functional,
    }


def _heatmap(one: _Trained) -> list[list[float]]:
    """Layer profiles of up to 200 alive features, evenly drawn from all sorted by centre of mass."""
    profile_FL = features.layer_profile(one.decoder[one.alive_GF[0]])
    order = np.argsort(features.center_of_mass(profile_FL), kind="stable")
    rows = order[np.linspace(0, len(order) - 1, min(HEATMAP_ROWS, len(order))).round().astype(int)]
    return np.round(profile_FL[rows], 4).tolist()


def _compare_seeds(cell: Cell, trained: Sequence[_Trained]) -> dict[str, Any] | None:
    """Agreement of dictionary seeds, the mean over all pairs; None with a single seed."""
    if len(trained) < 2:
        return None
    rows = [_compare_two(first, second) for first, second in combinations(trained, 2)]
    pair: dict[str, Any] = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    pair.update(q_adjacent=None, q_same=None, survival=None, lifespan=None, corrected=None)
    n_layers = len(trained[0].layers)
    if cell.arm == "layerwise" and n_layers > 1:
        q_adjacent = float(np.mean([counting.adjacent_share(one.layers) for one in trained]))
        q_same = pair["matched_share"]
        survival, span = counting.seed_corrected_lifespan(q_adjacent, q_same, n_layers)
        alive = float(np.mean([one.alive_GF.sum() for one in trained]))
        pair.update(q_adjacent=_finite(q_adjacent), q_same=q_same)
        if np.isfinite(survival):
            pair.update(survival=survival, lifespan=span, corrected=alive / span)
    return pair


def _compare_two(first: _Trained, second: _Trained) -> dict[str, float]:
    """Matched features of two seeds, layer by layer; for a crosscoder all layers are one."""
    matched, chapman, shares = 0, 0.0, []
    for a, b in zip(first.layers, second.layers, strict=True):
        similarity = counting.similarity(a, b, "correlation")
        pairs = matching.mutual_nearest_pairs(similarity, counting.LINK)
        matched += len(pairs)
        chapman += counting.chapman(*similarity.shape, len(pairs))
        if min(similarity.shape):
            shares.append(len(pairs) / min(similarity.shape))
    return {"matched": matched, "matched_share": float(np.mean(shares)) if shares else 0.0, "chapman": chapman}


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and range over seeds of every number that all rows have."""
    summary = {}
    for key, value in rows[0].items():
        if key == "seed" or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        values = [float(row[key]) for row in rows if isinstance(row[key], int | float)]
        if len(values) == len(rows):
            summary[key] = {"mean": float(np.mean(values)), "low": min(values), "high": max(values)}
    return summary
