"""One crosscoder over two subjects at once: which of its features are one subject's alone.

Activity correlation (`measure.universality`) compares dictionaries that never saw each other's subject. Here one
dictionary reads both, `Diffing` in `dictionary.structure`, so that a shared feature is one latent. Three kinds of pairs
are trained: A and B; two trainings of A's shape, which differ in nothing but the seed; and A and B untrained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosscoder.data.shards import ActivationShards
from crosscoder.data.store import select_sites
from crosscoder.dictionary import Crosscoder, Diffing, stack_subjects
from crosscoder.measure import counting, features, probes, universality
from crosscoder.studies.budget import DictionaryBudget
from crosscoder.studies.cell_values import finite
from crosscoder.studies.cells import EVALUATION_BATCH, MOST_PROBED, Site, State, Stores
from crosscoder.studies.presets import Run
from crosscoder.training import train


@dataclass(frozen=True, kw_only=True)
class JointCell:
    """Two subjects in one crosscoder."""

    first: Run
    second: Run
    state: State
    site: Site
    budget: DictionaryBudget
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        """A file name that tells the cells of one study apart."""
        both = "+".join(f"{name}{t}" for name, t in (self.first, self.second))
        return f"{both}-{self.state}-{self.site}-joint-n{self.budget.n_features}-k{self.budget.k_crosscoder}"


class Pair:
    """Activations of two subjects on the same tokens, stacked; both have the same total energy.

    Raises:
        ValueError: the two stores do not hold the same tokens.
    """

    def __init__(self, stores: tuple[Stores, Stores], site: Site) -> None:
        self.site: Site = site
        self.train = [ActivationShards.load(store.train, verify=False) for store in stores]
        self.held_out = [ActivationShards.load(store.held_out, verify=False) for store in stores]
        for first, second in (self.train, self.held_out):
            same = first.n_tokens == second.n_tokens and torch.equal(first.sequences_T, second.sequences_T)
            if not (same and torch.equal(first.positions_T, second.positions_T)):
                raise ValueError(
                    f"one store holds {first.n_tokens:,} tokens, the other {second.n_tokens:,}, or others; a joint "
                    "crosscoder needs both subjects on the same tokens in the same order"
                )

    @cached_property
    def views(self) -> list[Any]:
        """The site of each subject, with the scales that make a layer's usual norm sqrt(D)."""
        return [source.view(self.site) for source in self.train]

    @property
    def n_layers(self) -> tuple[int, ...]:
        """Layers of each subject."""
        return tuple(view.n_layers for view in self.views)

    @property
    def d_models(self) -> tuple[int, ...]:
        """Width of each subject."""
        return tuple(view.d_model for view in self.views)

    @cached_property
    def weights(self) -> list[float]:
        """What each subject is multiplied by, so that its layers' energies sum to the mean of both."""
        energy = [layers * width for layers, width in zip(self.n_layers, self.d_models, strict=True)]
        return [math.sqrt(sum(energy) / len(energy) / one) for one in energy]

    def batch(self, index: int, size: int, seed: int) -> Tensor:
        """Training batch number `index`, `[size, sum of L, largest D]`."""
        parts = [view.batch(index, size, seed) * w for view, w in zip(self.views, self.weights, strict=True)]
        return stack_subjects(parts)

    def held(self) -> Iterator[Tensor]:
        """Held-out activations in stored order."""
        for start in range(0, self.held_out[0].n_tokens, EVALUATION_BATCH):
            stop = min(start + EVALUATION_BATCH, self.held_out[0].n_tokens)
            parts = []
            for store, view, weight in zip(self.held_out, self.views, self.weights, strict=True):
                x_TLD = select_sites(store.rows(start, stop), store.sites, self.site)
                parts.append(x_TLD * view.scale_L[:, None] * weight)
            yield stack_subjects(parts)

    def layer_energy(self) -> np.ndarray:
        """Mean square of each stacked layer, by construction of the scales, `[sum of L]`."""
        each = [w**2 * d for w, d in zip(self.weights, self.d_models, strict=True)]
        return np.repeat(each, self.n_layers)


def run_joint(cell: JointCell, stores: tuple[Stores, Stores], *, device: str = "cpu") -> dict[str, Any]:
    """Train and read every seed of a pair; one row of the results, see docs/results.md."""
    pair = Pair(stores, cell.site)
    return {
        "first": cell.first[0],
        "second": cell.second[0],
        "training_seeds": [cell.first[1], cell.second[1]],
        "state": cell.state,
        "site": cell.site,
        "n_features": cell.budget.n_features,
        "k": cell.budget.k_crosscoder,
        "per_seed": [_train_seed(cell, pair, seed, device) for seed in cell.seeds],
    }


def _train_seed(cell: JointCell, pair: Pair, seed: int, device: str) -> dict[str, Any]:
    budget = cell.budget
    dictionary = Crosscoder(
        n_layers=sum(pair.n_layers),
        d_model=max(pair.d_models),
        n_features=budget.n_features,
        sparsity=budget.sparsity("crosscoder"),
        decoder=budget.decoder(),
        prefixes=budget.prefixes,
        structure=Diffing(pair.n_layers, pair.d_models),
        seed=seed,
    )

    def batches(start: int) -> Iterator[Tensor]:
        for index in range(start, budget.steps):
            yield pair.batch(index, budget.batch, budget.data_seed)

    def held() -> Iterator[Tensor]:
        return (x.to(device) for x in pair.held())

    label = f"{cell.name} seed {seed}"
    train(dictionary, batches, config=budget.train_config(), device=device, label=label, quiet=True)
    measured = features.measure_dictionary(dictionary, held())
    alive_F = counting.alive_features(measured.activity)[0]
    found = probes.measure_functional_spread(
        dictionary,
        held,
        document_T=pair.held_out[0].sequences_T.numpy(),
        config=probes.ProbeConfig(n_features=MOST_PROBED if alive_F.sum() > MOST_PROBED else None),
    )
    n_first = pair.n_layers[0]
    decoder_FLD = dictionary.decoder_FLD().float().cpu().numpy() / np.sqrt(pair.layer_energy())[:, None]
    profile_FL = features.layer_profile(decoder_FLD)
    own = universality.exclusive_shares(profile_FL[alive_F], n_first)
    probed = profile_FL[found.feature_n], found.auc_nL
    hidden = universality.hidden_shares(*probed, n_first)
    explained_L = measured.explained_variance_L
    return {
        "seed": seed,
        "alive": int(alive_F.sum()),
        "dead_share": 1 - float(alive_F.mean()),
        "l0_token": measured.activity.code.nnz / measured.activity.n_tokens,
        "explained_variance_first": finite(explained_L[:n_first].mean()),
        "explained_variance_second": finite(explained_L[n_first:].mean()),
        "exclusive_first": own[0],
        "exclusive_second": own[1],
        "hidden_first": hidden[0],
        "hidden_second": hidden[1],
    }
