"""What one trained dictionary's rows of the results hold: counts, quality, spread, and how its seeds agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from crosscoder.measure import counting, dimension, matching, profile
from crosscoder.measure.reading import Measured
from crosscoder.studies.budget import Arm

HISTOGRAM_BINS = 20
HEATMAP_ROWS = 200


@dataclass(frozen=True)
class Trained:
    """One seed's dictionary and what it did on the held-out tokens, alive features only."""

    seed: int
    measured: Measured
    alive_GF: np.ndarray
    decoder: np.ndarray  # [G * F, L, D]
    layers: list[counting.LayerFeatures]  # one for each group, alive features
    threshold: list[float] | None
    splice: dict[str, Any] | None
    functional: dict[str, float | None] | None = None


def count(arm: Arm, one: Trained) -> dict[str, Any]:
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
        "effective_dimension": finite(np.mean([dimension.effective_dimension(x.decoder) for x in one.layers])),
    }
    if arm == "crosscoder":
        profile_FL = profile.layer_profile(one.decoder[one.alive_GF[0]])
        row["distinct"] = joint = counting.distinct_features(one.layers[0].decoder, one.layers[0].code)
        row["alive_per_layer"] = profile.occupied_layers(profile_FL).sum(0).tolist()
        mean_rho = float(profile.participation_ratio(profile_FL).mean()) if alive else 0.0
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


def finite(value: Any) -> float | None:
    """`value`, or None where it is undefined, as JSON can say."""
    return float(value) if np.isfinite(value) else None


def quality(arm: Arm, one: Trained) -> dict[str, Any]:
    activity = one.measured.activity
    n_layers = one.decoder.shape[1]
    l0_token = activity.code.nnz / activity.n_tokens
    if arm == "crosscoder":
        span = profile.lifespan(profile.layer_profile(one.decoder))
        l0_token_layer = float(activity.firing_probability() @ span) / n_layers
    else:
        l0_token_layer = l0_token / n_layers
    return {
        "seed": one.seed,
        "explained_variance": one.measured.explained_variance,
        "explained_variance_per_layer": [finite(value) for value in one.measured.explained_variance_L],
        "l0_token": l0_token,
        "l0_token_layer": l0_token_layer,
        "dead_share": 1 - float(one.alive_GF.mean()),
        "threshold": one.threshold,
        "splice": one.splice,
    }


def spread(one: Trained) -> dict[str, Any]:
    """How the alive features of one crosscoder lie over the layers."""
    decoder_FLD = one.decoder[one.alive_GF[0]]
    profile_FL = profile.layer_profile(decoder_FLD)
    n_layers = profile_FL.shape[1]
    rho = profile.participation_ratio(profile_FL)
    span = profile.lifespan(profile_FL)
    cosine = profile.adjacent_cosine(decoder_FLD, profile_FL)
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


def heatmap(one: Trained) -> list[list[float]]:
    """Layer profiles of up to 200 alive features, evenly drawn from all sorted by centre of mass."""
    profile_FL = profile.layer_profile(one.decoder[one.alive_GF[0]])
    order = np.argsort(profile.center_of_mass(profile_FL), kind="stable")
    rows = order[np.linspace(0, len(order) - 1, min(HEATMAP_ROWS, len(order))).round().astype(int)]
    return np.round(profile_FL[rows], 4).tolist()


def compare_seeds(arm: Arm, trained: Sequence[Trained]) -> dict[str, Any] | None:
    """Agreement of dictionary seeds, the mean over all pairs; None with a single seed."""
    if len(trained) < 2:
        return None
    rows = [_compare_two(first, second) for first, second in combinations(trained, 2)]
    pair: dict[str, Any] = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    pair.update(q_adjacent=None, q_same=None, survival=None, lifespan=None, corrected=None)
    n_layers = len(trained[0].layers)
    if arm == "layerwise" and n_layers > 1:
        q_adjacent = float(np.mean([counting.adjacent_share(one.layers) for one in trained]))
        q_same = pair["matched_share"]
        survival, span = counting.seed_corrected_lifespan(q_adjacent, q_same, n_layers)
        alive = float(np.mean([one.alive_GF.sum() for one in trained]))
        pair.update(q_adjacent=finite(q_adjacent), q_same=q_same)
        if np.isfinite(survival):
            pair.update(survival=survival, lifespan=span, corrected=alive / span)
    return pair


def _compare_two(first: Trained, second: Trained) -> dict[str, float]:
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
