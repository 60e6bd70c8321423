"""One crosscoder over two subjects at once: which of its features are one subject's alone.

Activity correlation (`measure.universality`) compares dictionaries that never saw each other's subject. Here one
dictionary reads both, `Diffing` in `dictionary.structure`, so that a shared feature is one latent. Three kinds of pairs
are trained: A and B; two trainings of A's shape, which differ in nothing but the seed; and A and B untrained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from crosscoder.data.sources import StackedSource
from crosscoder.dictionary import Crosscoder, Diffing
from crosscoder.measure import profile, universality
from crosscoder.measure.reading import read_dictionary
from crosscoder.results.table import Place, Row, Site, State, rows_at
from crosscoder.studies.budget import DictionaryBudget
from crosscoder.studies.cells import Stores, file_name, probe, train_on
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
    def place(self) -> Place:
        """Where its numbers are measured."""
        (subject, training_seed), (other, other_seed) = self.first, self.second
        return Place(
            subject=subject,
            training_seed=training_seed,
            other=f"{other}{other_seed}",
            state=self.state,
            site=self.site,
            arm="joint",
            role="main",
            n_features=self.budget.n_features,
            k=self.budget.k_crosscoder,
        )

    @property
    def name(self) -> str:
        """A file name that tells the cells of one study apart."""
        return file_name(self.place)


def run_joint(cell: JointCell, stores: tuple[Stores, Stores], *, device: str = "cpu") -> list[Row]:
    """Train and read every seed of a pair.

    Raises:
        ValueError: the two stores do not hold the same tokens.
    """
    source = StackedSource([store.source(cell.site) for store in stores])
    return [row for seed in cell.seeds for row in train_joint(cell, source, seed, device)]


def train_joint(cell: JointCell, source: StackedSource, seed: int, device: str) -> list[Row]:
    """What one seed's crosscoder says of which features are exclusive to a subject.

    Decoder energies are compared in units in which every layer has the same mean square.
    """
    at, budget = replace(cell.place, seed=seed), cell.budget
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
    held_out = train_on(dictionary, source, budget, trainer=train, at=at, device=device)
    reading = read_dictionary(dictionary, held_out())
    found = probe(dictionary, held_out, len(reading), document_T=source.held_out_sequences_T.numpy())
    n_first = source.layer_counts[0]
    energy_L1 = np.sqrt(source.energy_L)[:, None]
    profile_FL = profile.layer_profile(dictionary.decoder_FLD().float().cpu().numpy() / energy_L1)
    own = universality.exclusive_shares(profile_FL[reading.index_F], n_first)
    hidden = universality.hidden_shares(profile_FL[found.feature_n], found.auc_nL, n_first)
    return rows_at(
        at,
        {
            "alive": len(reading),
            "dead_share": reading.dead_share,
            "l0_token": reading.l0,
            "explained_variance_first": reading.explained_variance_L[:n_first].mean(),
            "explained_variance_second": reading.explained_variance_L[n_first:].mean(),
            "exclusive_first": own[0],
            "exclusive_second": own[1],
            "hidden_first": hidden[0],
            "hidden_second": hidden[1],
        },
    )
