"""How many features there are: alive, distinct, merged across layers, and corrected for disagreement of seeds.

Definitions follow the project's preregistered quantities, `results.quantities`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, pairwise

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from crosscoder.measure import dimension, matching, profile
from crosscoder.measure.reading import Reading
from crosscoder.results.table import Value

LINK = 0.7  # similarity from which features of neighbouring layers, or of two seeds, count as the same
ULTRA_DENSE = 0.1  # firing probability above which a feature is reported apart

RULES: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "mutual nearest": matching.mutual_nearest_pairs,
    "hungarian": matching.hungarian_pairs,
    "threshold": matching.threshold_pairs,
}
SIMILARITIES = ("correlation", "cosine", "both")


def binary_entropy(p: np.ndarray) -> np.ndarray:
    """`H(p) = -p ln p - (1 - p) ln(1 - p)` in nats, 0 at 0 and 1."""
    p = np.asarray(p, dtype=np.float64)
    inside = (p > 0) & (p < 1)
    q = np.where(inside, p, 0.5)
    return np.where(inside, -q * np.log(q) - (1 - q) * np.log1p(-q), 0.0)


def components(n_nodes: int, pairs: np.ndarray) -> int:
    """Connected components of `n_nodes` nodes joined by `pairs` `[m, 2]`."""
    graph = sparse.coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(n_nodes, n_nodes))
    return int(csgraph.connected_components(graph, directed=False, return_labels=False))


def chapman(n_first: int, n_second: int, n_matched: int) -> float:
    """Capture-recapture estimate of how many features two dictionaries sample from."""
    return (n_first + 1) * (n_second + 1) / (n_matched + 1) - 1


def seed_corrected_lifespan(q_adjacent: float, q_same: float, n_layers: int) -> tuple[float, float]:
    """Survival s and lifespan; s is capped at 1, and nan where no two seeds agree on anything."""
    if not q_same > 0:
        return float("nan"), float("nan")
    s = min(1.0, q_adjacent / q_same)
    return s, float(n_layers) if s == 1 else (1 - s**n_layers) / (1 - s)


def similarity(a: Reading, b: Reading, kind: str) -> np.ndarray:
    """`correlation` of activity, `cosine` of directions, or the smaller of `both`, `[Fa, Fb]`."""
    match kind:
        case "correlation":
            return matching.activation_correlation(a.code, b.code)
        case "cosine":
            return matching.decoder_cosine(a.decoder_FLD, b.decoder_FLD)
    return np.minimum(similarity(a, b, "correlation"), similarity(a, b, "cosine"))


def merged_counts(reading: Reading) -> dict[str, dict[str, int]]:
    """Distinct features of a bank by every similarity and rule, as `counts[similarity][rule]`; neighbours only."""
    starts = np.concatenate([[0], np.cumsum([len(group) for group in reading.groups])])
    computed = [(similarity(a, b, "correlation"), similarity(a, b, "cosine")) for a, b in pairwise(reading.groups)]
    counts: dict[str, dict[str, int]] = {}
    for kind in SIMILARITIES:
        counts[kind] = {}
        for name, rule in RULES.items():
            links = [np.zeros((0, 2), dtype=np.int64)]
            for index, (correlation, cosine) in enumerate(computed):
                matrix = {"correlation": correlation, "cosine": cosine}.get(kind)
                pairs = rule(np.minimum(correlation, cosine) if matrix is None else matrix, LINK)
                links.append(pairs + starts[index : index + 2])
            counts[kind][name] = components(int(starts[-1]), np.concatenate(links))
    return counts


def adjacent_share(reading: Reading) -> float:
    """q_adjacent: mean over neighbouring layers of the matched share by activation correlation; nan for one layer."""
    shares = [matching.matched_share(similarity(a, b, "correlation"), LINK) for a, b in pairwise(reading.groups)]
    shares = [share for share in shares if not np.isnan(share)]  # a layer without alive features says nothing
    return float(np.mean(shares)) if shares else float("nan")


def count_features(reading: Reading) -> dict[str, Value]:
    """Counts of one dictionary by the names of quantities.

    A feature counts on every layer that it occupies, so that the features of a layer are the distinct ones times mean
    rho over L; of a bank, rho is 1. Features of one layer each, as those of a bank, are also merged along the layers.
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
        every = [count for rules in merged.values() for count in rules.values()]
        values |= {
            "merged": merged["correlation"]["mutual nearest"],
            "merged_low": min(every),
            "merged_high": max(every),
        }
        joint = values["merged"] if n_layers > 1 else distinct
    per_layer = distinct * float(reading.rho_F.mean()) / n_layers if len(reading) else 0.0
    return values | {
        "features_per_layer": per_layer,
        "per_neuron_layer": per_layer / d_model,
        "per_neuron_joint": joint / (n_layers * d_model),
    }


def compare_seeds(readings: Sequence[Reading]) -> dict[str, Value]:
    """How dictionaries of several seeds agree, the mean over all pairs; nothing for a single one.

    Features are matched layer by layer; those of a crosscoder, all at once.
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
    matched, estimated, shares = 0, 0.0, []
    for a, b in zip(first.groups, second.groups, strict=True):
        pairs = matching.mutual_nearest_pairs(similarity(a, b, "correlation"), LINK)
        matched += len(pairs)
        estimated += chapman(len(a), len(b), len(pairs))
        if len(a) and len(b):
            shares.append(len(pairs) / min(len(a), len(b)))
    return {"matched": matched, "matched_share": float(np.mean(shares)) if shares else 0.0, "chapman": estimated}
