"""How many features there are: alive, distinct, merged across layers, and corrected for disagreement of seeds.

Definitions are those of `results.quantities`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise, product

import numpy as np
from scipy import sparse

from crosscoder.data.tokens import TokenBlocks
from crosscoder.foundation.console import say
from crosscoder.measure import dimension, matching, profile
from crosscoder.measure.reading import Reading
from crosscoder.results.table import Value

LINK = 0.7  # similarity from which features of neighbouring layers, or of two seeds, are matched
ULTRA_DENSE = 0.1  # firing probability above which a feature is reported apart

SIMILARITIES, RULES = ("correlation", "cosine", "both"), ("mutual nearest", "hungarian", "threshold")


def binary_entropy(p: np.ndarray) -> np.ndarray:
    """`H(p) = -p ln p - (1 - p) ln(1 - p)` in nats, 0 at 0 and 1."""
    p = np.asarray(p, dtype=np.float64)
    inside = (p > 0) & (p < 1)
    q = np.where(inside, p, 0.5)
    return np.where(inside, -q * np.log(q) - (1 - q) * np.log1p(-q), 0.0)


def chapman(n_first: int, n_second: int, n_matched: int) -> float:
    """Capture-recapture estimate of how many features two dictionaries sample from."""
    return (n_first + 1) * (n_second + 1) / (n_matched + 1) - 1


def seed_corrected_lifespan(q_adjacent: float, q_same: float, n_layers: int) -> tuple[float, float]:
    """Survival s and lifespan; s is capped at 1, and nan where no two seeds agree on anything."""
    if not q_same > 0:
        return float("nan"), float("nan")
    s = min(1.0, q_adjacent / q_same)
    return s, float(n_layers) if s == 1 else (1 - s**n_layers) / (1 - s)


@dataclass(frozen=True)
class SeedPair:
    """Two readings of one subject, of two seeds or of neighbouring layers, and which features are the same."""

    first: Reading
    second: Reading

    @cached_property
    def pairs_m2(self) -> np.ndarray:
        """Mutual nearest neighbours by activation correlation."""
        correlation = matching.activation_correlation(self.first.code, self.second.code)
        return matching.mutual_nearest_pairs(correlation, LINK)

    @property
    def matched_share(self) -> float:
        """Matched features over the smaller reading's; nan where one has none."""
        return matching.matched_share(self.pairs_m2, len(self.first), len(self.second))

    @cached_property
    def debiased(self) -> dimension.DebiasedDimension:
        """The energy-weighted two-seed effective dimension, or why there is none."""
        a, b = self.pairs_m2.T
        weight_m = np.sqrt(self.first.energy_F[a] * self.second.energy_F[b])
        return dimension.debiased_dimension(self.first.rows_FN, self.second.rows_FN, self.pairs_m2, weight_m)


def chains(bank: Reading) -> dict[tuple[str, str], np.ndarray]:
    """The chain of each feature, numbered from 0, where features of neighbouring layers are linked, `[F]`.

    By similarity and rule. Similarities: `correlation` of activity, `cosine` of directions, the smaller of `both`. The
    Hungarian rule is left out, and it is said, where two layers have more pairs than may be held at once.
    """
    starts = np.cumsum([0, *(len(group) for group in bank.groups)])
    links: dict[tuple[str, str], list[np.ndarray]] = {key: [] for key in product(SIMILARITIES, RULES)}
    for index, (a, b) in enumerate(pairwise(bank.groups)):
        found = _links(a, b)
        links = {key: [*pairs, found[key] + starts[index : index + 2]] for key, pairs in links.items() if key in found}
    return {key: matching.joined(len(bank), matching.joined_pairs(pairs)) for key, pairs in links.items()}


def _links(a: Reading, b: Reading) -> dict[tuple[str, str], np.ndarray]:
    """Pairs `[m, 2]` of features of two layers by similarity and rule, from one pass over their similarities."""
    correlation = matching.activation_correlation(a.code, b.code)
    cosine = matching.decoder_cosine(a.decoder_FLD, b.decoder_FLD)
    nearest = {kind: matching.Nearest(len(b)) for kind in SIMILARITIES}
    links: dict[tuple[str, str], list[np.ndarray]] = {(kind, "threshold"): [] for kind in SIMILARITIES}
    if len(b):
        for (start, active), (_, written) in zip(correlation.blocks(), cosine.blocks(), strict=True):
            for kind, block in zip(SIMILARITIES, (active, written, np.minimum(active, written)), strict=True):
                nearest[kind].add(start, block)
                links[kind, "threshold"].append(matching.marked_pairs(start, block >= LINK))
    found = {key: matching.joined_pairs(pairs) for key, pairs in links.items()}
    found |= {(kind, "mutual nearest"): one.mutual_pairs(LINK) for kind, one in nearest.items()}
    if not correlation.fits:
        say(f"{len(a):,} by {len(b):,} features are too many for one-to-one assignment; other rules merge them")
        return found
    active, written = correlation.whole(), cosine.whole()
    for kind, whole in zip(SIMILARITIES, (active, written, np.minimum(active, written)), strict=True):
        found[kind, "hungarian"] = matching.hungarian_pairs(whole, LINK)
    return found


def merged_counts(bank: Reading) -> dict[tuple[str, str], int]:
    """How many features a bank has after merging those of a chain, by similarity and rule."""
    return {key: len(np.unique(chain_F)) for key, chain_F in chains(bank).items()}


def adjacent_share(reading: Reading) -> float:
    """q_adjacent: mean over neighbouring layers of the matched share by activation correlation; nan for one layer."""
    # A layer without alive features says nothing, and has no share.
    return profile.known_mean(np.array([SeedPair(a, b).matched_share for a, b in pairwise(reading.groups)]))


def count_features(reading: Reading, *, alike: bool = True) -> dict[str, Value]:
    """Counts of one dictionary by the names of quantities.

    A feature counts on every layer that it occupies: features per layer are the distinct ones times mean rho, over L.
    In a bank rho is 1. Features that each have one layer, such as a bank's, are also merged across layers.

    alike: also find features that are alike, which compares each with every other; without it counts that leave out or
        merge such features are not there.
    """
    n_layers, d_model = reading.decoder_FLD.shape[1:]
    groups = reading.groups
    load = binary_entropy(reading.probability_F).sum() / len(groups)
    values: dict[str, Value] = {
        "dictionary_size": reading.size,
        "alive": len(reading),
        "alive_per_layer": profile.occupied_layers(reading.profile_FL).sum(0).tolist(),
        "dead_share": reading.dead_share,
        "ultra_dense": int((reading.probability_F > ULTRA_DENSE).sum()),
        "entropy_load": float(load),
        "effective_dimension": np.mean([dimension.effective_dimension(group.decoder_FLD) for group in groups]),
    }
    if not alike:
        return values
    distinct = joint = len(reading.distinct)
    if len(groups) == n_layers:
        merged = merged_counts(reading)
        usual = merged["correlation", "mutual nearest"]
        values |= {"merged": usual, "merged_low": min(merged.values()), "merged_high": max(merged.values())}
        joint = usual if n_layers > 1 else distinct
    per_layer = distinct * float(reading.rho_F.mean()) / n_layers if len(reading) else 0.0
    return values | {
        "distinct": distinct,
        "features_per_layer": per_layer,
        "per_neuron_layer": per_layer / d_model,
        "per_neuron_joint": joint / (n_layers * d_model),
    }


def fired_by_document(reading: Reading, document_T: np.ndarray, n: int) -> np.ndarray:
    """Tokens of each of n documents, numbered from 0, on which each feature is active, `[n, F]`."""
    fired, n_features = sparse.coo_array(reading.code), reading.code.shape[1]
    at = document_T[fired.row].astype(np.int64) * n_features + fired.col
    return np.bincount(at, minlength=n * n_features).reshape(n, n_features)


def load_left(reading: Reading, text: TokenBlocks) -> np.ndarray:
    """The entropy load without each group of the text's documents, `[E]`; which features are alive stays."""
    if reading.token_T is None:
        raise ValueError("the reading does not say which tokens of the text it is of; read the dictionary again")
    document_T = text.document_groups[reading.token_T // text.sequence_length]
    fired_EF = fired_by_document(reading, document_T, text.n_groups)
    tokens_E = np.bincount(document_T, minlength=text.n_groups)
    left_EF = (fired_EF.sum(0) - fired_EF) / (tokens_E.sum() - tokens_E)[:, None]
    return binary_entropy(left_EF).sum(1) / len(reading.groups)


def compare_seeds(readings: Sequence[Reading]) -> dict[str, Value]:
    """How dictionaries of several seeds agree, the mean over all pairs; nothing for a single one.

    Features of a bank are matched layer by layer, those of a crosscoder all at once.
    """
    if len(readings) < 2:
        return {}
    rows = [_compare_two(first, second) for first, second in combinations(readings, 2)]
    values: dict[str, Value] = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    n_layers = readings[0].n_groups
    if n_layers == 1:
        return values
    q_adjacent = float(np.mean([adjacent_share(reading) for reading in readings]))
    q_same = float(np.mean([row["matched_share"] for row in rows]))
    survival, lifespan = seed_corrected_lifespan(q_adjacent, q_same, n_layers)
    alive = float(np.mean([len(reading) for reading in readings]))
    values |= {"q_adjacent": q_adjacent, "q_same": q_same, "survival": survival}
    return values | {"seed_corrected_lifespan": lifespan, "corrected": alive / lifespan}


def _compare_two(first: Reading, second: Reading) -> dict[str, float]:
    groups = [SeedPair(a, b) for a, b in zip(first.groups, second.groups, strict=True)]
    share = profile.known_mean(np.array([pair.matched_share for pair in groups]))
    return {
        "matched": sum(len(pair.pairs_m2) for pair in groups),
        "matched_share": 0.0 if np.isnan(share) else share,
        "chapman": sum(chapman(len(pair.first), len(pair.second), len(pair.pairs_m2)) for pair in groups),
    }
