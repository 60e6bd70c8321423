"""Which features several dictionaries of one training find again, and whether the rest of them spans the same space.

A dictionary that uses all its features says by its size how many there are, not by what it found. What it shares with
dictionaries of other seeds and data orders is found, feature by feature; of the others a space may be, see `Rest`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import linalg

from crosscoder.measure.counting import LINK, binary_entropy
from crosscoder.measure.matching import WHOLE_BYTES, decoder_cosine, mutual_nearest_pairs
from crosscoder.measure.profile import known_mean
from crosscoder.measure.reading import Reading
from crosscoder.results.table import Value

OFTEN = 0.75  # share of the dictionaries in which a stable feature is found, its own included
ALIGNED = 0.9  # cosine of a principal angle above which two spaces share a direction


@dataclass(frozen=True)
class Rest:
    """The spaces that the features of two dictionaries span which are not matched between the two.

    rank_first, rank_second: dimensions of the two spaces.
    shared: principal angles between them with a cosine above .9: directions that both have.
    forced: how many are shared because the two do not fit beside each other, `rank_first + rank_second - L D`.
    chance: how many two random spaces of the same dimensions share, forced ones among them. Only what is `shared`
        beyond `chance` says anything about the subject.
    """

    rank_first: int
    rank_second: int
    shared: int
    forced: int
    chance: int


@dataclass(frozen=True)
class Stability:
    """How far D dictionaries of one training agree.

    found: for each dictionary, in how many each of its features is found, `[F]`.
    stable_share, load_share, energy_share: of each dictionary, the share of its features that are stable, and what they
        hold of its load `sum H(p)` and of its energy `sum E[f^2] |W|^2`; nan where there is none. `[D]`.
    rests: for every two dictionaries; empty, with a reason, where the spaces are too large.
    """

    found: tuple[np.ndarray, ...]
    stable_share: np.ndarray
    load_share: np.ndarray
    energy_share: np.ndarray
    rests: tuple[Rest, ...]
    reason: str | None = None

    def summary(self) -> dict[str, Value]:
        """Means over dictionaries, and of ranks over pairs of them; nan for ranks that there are not."""
        ranks = [((one.rank_first + one.rank_second) / 2, one.shared, one.forced, one.chance) for one in self.rests]
        rest = np.mean(ranks, axis=0) if ranks else np.full(4, np.nan)
        return {
            "stability_dictionaries": len(self.found),
            "stable_share": known_mean(self.stable_share),
            "stable_load_share": known_mean(self.load_share),
            "stable_energy_share": known_mean(self.energy_share),
            **dict(zip(("rest_rank", "rest_shared", "rest_forced", "rest_chance"), rest.tolist(), strict=True)),
        }


def measure_stability(readings: Sequence[Reading]) -> Stability:
    """How far the features of three or more dictionaries agree, all of one training and of other seeds or data orders.

    A feature is found in another dictionary where the two are each other's nearest by joint decoder cosine, which is at
    least .7, in units of the dictionaries' inputs.
    """
    pairs = {
        (i, j): mutual_nearest_pairs(decoder_cosine(readings[i].decoder_FLD, readings[j].decoder_FLD), LINK)
        for i, j in combinations(range(len(readings)), 2)
    }
    found = tuple(np.ones(len(reading), dtype=np.int64) for reading in readings)
    for (i, j), pairs_m2 in pairs.items():
        found[i][pairs_m2[:, 0]] += 1
        found[j][pairs_m2[:, 1]] += 1
    kept = [found_F >= math.ceil(OFTEN * len(readings)) for found_F in found]
    largest = max(reading.rows_FN.nbytes for reading in readings)
    reason = f"decoders of {largest / 2**20:.0f} MiB are too large for principal angles" * (largest > WHOLE_BYTES)
    return Stability(
        found=found,
        stable_share=np.array([known_mean(kept_F) for kept_F in kept]),
        load_share=_held([binary_entropy(reading.probability_F) for reading in readings], kept),
        energy_share=_held([reading.energy_F for reading in readings], kept),
        rests=() if reason else tuple(_compare(readings[i], readings[j], m2) for (i, j), m2 in pairs.items()),
        reason=reason or None,
    )


def _held(weights: Sequence[np.ndarray], kept: Sequence[np.ndarray]) -> np.ndarray:
    """The share of each dictionary's weight that its kept features have, `[D]`."""
    return np.array([w[k].sum() / w.sum() if w.any() else np.nan for w, k in zip(weights, kept, strict=True)])


def _compare(first: Reading, second: Reading, pairs_m2: np.ndarray) -> Rest:
    width = first.rows_FN.shape[1]
    sides = zip((first, second), pairs_m2.T, strict=True)
    bases = [linalg.orth(np.delete(reading.rows_FN, matched, axis=0).T) for reading, matched in sides]
    ranks = [basis.shape[1] for basis in bases]
    # Of two random spaces one may as well be that of the first axes.
    random = linalg.orth(np.random.default_rng(0).standard_normal((width, ranks[1])))
    shared, chance = _count_aligned(bases[0].T @ bases[1]), _count_aligned(random[: ranks[0]])
    return Rest(ranks[0], ranks[1], shared, max(0, sum(ranks) - width), chance)


def _count_aligned(product: np.ndarray) -> int:
    """Principal angles with a cosine above .9, given the product of two orthonormal bases."""
    return int((linalg.svdvals(product) > ALIGNED).sum()) if product.size else 0
