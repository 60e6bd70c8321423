"""How many features there are: alive, distinct, merged across layers, and corrected for disagreement of seeds.

Definitions follow the project's preregistered quantities, `results.quantities`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, pairwise, product

import numpy as np

from crosscoder.measure import dimension, matching, profile
from crosscoder.measure.reading import Reading
from crosscoder.results.table import Value

LINK = 0.7  # similarity from which features of neighbouring layers, or of two seeds, are matched
ULTRA_DENSE = 0.1  # firing probability above which a feature is reported apart

RULES: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "mutual nearest": matching.mutual_nearest_pairs,
    "hungarian": matching.hungarian_pairs,
    "threshold": matching.threshold_pairs,
}


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


def match_features(a: Reading, b: Reading) -> np.ndarray:
    """Mutual nearest neighbours by activation correlation, as `[m, 2]`."""
    return matching.mutual_nearest_pairs(matching.activation_correlation(a.code, b.code), LINK)


def chains(bank: Reading) -> dict[tuple[str, str], np.ndarray]:
    """The chain of each feature, numbered from 0, where features of neighbouring layers are linked, `[F]`.

    By similarity and rule. Similarities: `correlation` of activity, `cosine` of directions, the smaller of `both`.
    """
    starts = np.cumsum([0, *(len(group) for group in bank.groups)])
    links = {key: [np.zeros((0, 2), dtype=np.int64)] for key in product(("correlation", "cosine", "both"), RULES)}
    for index, (a, b) in enumerate(pairwise(bank.groups)):
        correlation = matching.activation_correlation(a.code, b.code)
        cosine = matching.decoder_cosine(a.decoder_FLD, b.decoder_FLD)
        similarities = {"correlation": correlation, "cosine": cosine, "both": np.minimum(correlation, cosine)}
        for (kind, rule), pairs in links.items():
            pairs.append(RULES[rule](similarities[kind], LINK) + starts[index : index + 2])
    return {key: matching.joined(len(bank), np.concatenate(pairs)) for key, pairs in links.items()}


def merged_counts(bank: Reading) -> dict[tuple[str, str], int]:
    """How many features a bank has after merging those of a chain, by similarity and rule."""
    return {key: len(np.unique(chain_F)) for key, chain_F in chains(bank).items()}


def adjacent_share(reading: Reading) -> float:
    """q_adjacent: mean over neighbouring layers of the matched share by activation correlation; nan for one layer."""
    pairs = pairwise(reading.groups)
    # A layer without alive features says nothing, and has no share.
    return profile.known_mean(
        np.array([matching.matched_share(match_features(a, b), len(a), len(b)) for a, b in pairs])
    )


def count_features(reading: Reading) -> dict[str, Value]:
    """Counts of one dictionary by the names of quantities.

    A feature counts on every layer that it occupies: features per layer are the distinct ones times mean rho, over L.
    In a bank rho is 1. Features that each have one layer, such as a bank's, are also merged across layers.
    """
    n_layers, d_model = reading.decoder_FLD.shape[1:]
    groups = reading.groups
    distinct = joint = len(reading.distinct)
    load = binary_entropy(reading.probability_F).sum() / len(groups)
    values: dict[str, Value] = {
        "dictionary_size": reading.size,
        "alive": len(reading),
        "alive_per_layer": profile.occupied_layers(reading.profile_FL).sum(0).tolist(),
        "dead_share": reading.dead_share,
        "ultra_dense": int((reading.probability_F > ULTRA_DENSE).sum()),
        "distinct": distinct,
        "entropy_load": float(load),
        "effective_dimension": np.mean([dimension.effective_dimension(group.decoder_FLD) for group in groups]),
    }
    if len(groups) == n_layers:
        merged = merged_counts(reading)
        usual = merged["correlation", "mutual nearest"]
        values |= {"merged": usual, "merged_low": min(merged.values()), "merged_high": max(merged.values())}
        joint = usual if n_layers > 1 else distinct
    per_layer = distinct * float(reading.rho_F.mean()) / n_layers if len(reading) else 0.0
    return values | {
        "features_per_layer": per_layer,
        "per_neuron_layer": per_layer / d_model,
        "per_neuron_joint": joint / (n_layers * d_model),
    }


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
    groups = [(a, b, match_features(a, b)) for a, b in zip(first.groups, second.groups, strict=True)]
    share = profile.known_mean(np.array([matching.matched_share(pairs, len(a), len(b)) for a, b, pairs in groups]))
    return {
        "matched": sum(len(pairs) for _, _, pairs in groups),
        "matched_share": 0.0 if np.isnan(share) else share,
        "chapman": sum(chapman(len(a), len(b), len(pairs)) for a, b, pairs in groups),
    }
