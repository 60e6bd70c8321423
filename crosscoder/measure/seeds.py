"""How many features there are, from what several dictionary seeds of one subject find: stable ones, and estimates."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from crosscoder.measure import saturation
from crosscoder.measure.comparison import Statistic
from crosscoder.measure.density import SeedPair, ShapeReadings
from crosscoder.results.table import Estimate

NEEDS_THREE = "needs three dictionary seeds of one training; this study has fewer"


def seed_counts(subject: ShapeReadings) -> list[Statistic]:
    """Chapman over all training seeds of a subject, Chao2 and the stable count of its first.

    Chapman compares the first two dictionary seeds of each training: the mean, from the lowest to the highest end of
    their intervals. Chao2 and the stable count (mean over seeds, interval their range) need at least three.
    """
    group = subject.seeds[0]
    names = {key: f"{key} {subject.name}" for key in ("chapman", "chao2", "stable")}
    if len(group) < 2:
        missing = "needs two dictionary seeds of one training"
        return [Statistic(name, None, _definition(key), missing) for key, name in names.items()]
    pairs = {(i, j): SeedPair(group[i], group[j]) for i, j in combinations(range(len(group)), 2)}
    each = [
        saturation.chapman_interval(len(pair.first), len(pair.second), len(pair.pairs_m2))
        for pair in (SeedPair(*one[:2]) for one in subject.seeds)
    ]
    chapman = Estimate(
        float(np.mean([one.value for one in each])), min(one.low for one in each), max(one.high for one in each)
    )
    found = [Statistic(names["chapman"], chapman, "chapman_interval")]
    if len(group) < 3:
        return found + [Statistic(names[key], None, key, NEEDS_THREE) for key in ("chao2", "stable")]
    links = {key: pair.pairs_m2 for key, pair in pairs.items()}
    seen = saturation.incidence([len(reading) for reading in group], links)
    found.append(Statistic(names["chao2"], saturation.chao2(seen), "chao2"))
    counts = [_stable(i, len(reading), links) for i, reading in enumerate(group)]
    stable = Estimate(float(np.mean(counts)), float(min(counts)), float(max(counts)))
    return [*found, Statistic(names["stable"], stable, "stable")]


def _definition(key: str) -> str:
    return "chapman_interval" if key == "chapman" else key


def _stable(seed: int, n_features: int, links: dict[tuple[int, int], np.ndarray]) -> int:
    mine = [pairs if key[0] == seed else pairs[:, ::-1] for key, pairs in links.items() if seed in key]
    return int(saturation.stable_features(n_features, mine).sum())


def size_limit(name: str, sizes: Sequence[float], counts: Sequence[float]) -> Statistic:
    """F_inf: the number of features that growing dictionaries approach, or why that cannot be told."""
    key = f"F_inf {name}"
    if not counts or min(counts) <= 0:
        return Statistic(key, None, "saturation", "no counts, or an empty dictionary")
    fit = saturation.fit_saturation(sizes, counts, seed=0)
    return Statistic(key, fit.limit, "saturation", fit.reason)
