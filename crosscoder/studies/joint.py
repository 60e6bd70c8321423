"""One crosscoder over two subjects at once: which of its features are one subject's alone.

Activity correlation (`measure.universality`) compares dictionaries that never saw each other's subject. Here one
dictionary reads both, `Diffing` in `dictionary.structure`, so that a shared feature is one latent. Three kinds of pairs
are trained: A and B; two trainings of A's shape, which differ in nothing but the seed; and A and B untrained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from crosscoder.data.sources import StackedSource
from crosscoder.dictionary import Crosscoder, Diffing
from crosscoder.measure import probes, profile, universality
from crosscoder.measure.reading import alive_features, measure_dictionary
from crosscoder.studies.budget import DictionaryBudget
from crosscoder.studies.cell_values import finite
from crosscoder.studies.cells import MOST_PROBED, Site, State, Stores
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


def run_joint(cell: JointCell, stores: tuple[Stores, Stores], *, device: str = "cpu") -> dict[str, Any]:
    """Train and read every seed of a pair; one row of the results, see docs/results.md."""
    source = StackedSource([store.source(cell.site) for store in stores])
    return {
        "first": cell.first[0],
        "second": cell.second[0],
        "training_seeds": [cell.first[1], cell.second[1]],
        "state": cell.state,
        "site": cell.site,
        "n_features": cell.budget.n_features,
        "k": cell.budget.k_crosscoder,
        "per_seed": [_train_seed(cell, source, seed, device) for seed in cell.seeds],
    }


def _train_seed(cell: JointCell, source: StackedSource, seed: int, device: str) -> dict[str, Any]:
    budget = cell.budget
    dictionary = Crosscoder(
        n_layers=source.n_layers,
        d_model=source.d_model,
        n_features=budget.n_features,
        sparsity=budget.sparsity("crosscoder"),
        decoder=budget.decoder(),
        prefixes=budget.prefixes,
        structure=Diffing(source.layer_counts, source.widths),
        seed=seed,
    )

    batches = source.batches(budget.batch, seed=budget.data_seed, steps=budget.steps)

    def held() -> Iterator[Tensor]:
        return (x.to(device) for x in source.held_out())

    label = f"{cell.name} seed {seed}"
    train(dictionary, batches, config=budget.train_config(), device=device, label=label, quiet=True)
    measured = measure_dictionary(dictionary, held())
    alive_F = alive_features(measured.activity)[0]
    found = probes.measure_functional_spread(
        dictionary,
        held,
        document_T=source.held_out_sequences_T.numpy(),
        config=probes.ProbeConfig(n_features=MOST_PROBED if alive_F.sum() > MOST_PROBED else None),
    )
    n_first = source.layer_counts[0]
    decoder_FLD = dictionary.decoder_FLD().float().cpu().numpy() / np.sqrt(source.energy_L)[:, None]
    profile_FL = profile.layer_profile(decoder_FLD)
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
