"""A few entries for each of many features, kept while a text streams by, in memory that does not grow with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

More = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""What else is kept of entries, given which of those that are added they are."""


class Kept:
    """The entries of each feature with the largest keys, the largest first; of equal keys the earliest token.

    What is kept depends on the entries alone, not on how they were split into calls. `key_Fk` is -inf and `token_Fk` -1
    where there are fewer than `size`. `more` holds further arrays `[F, k, *shape]`, of the shapes that are given.
    """

    def __init__(self, n_features: int, size: int, **shapes: tuple[int, ...]) -> None:
        self.size = size
        self.key_Fk = np.full((n_features, size), -np.inf)
        self.token_Fk = np.full((n_features, size), -1, dtype=np.int64)
        self.value_Fk = np.zeros((n_features, size), dtype=np.float32)
        self.more = {name: np.zeros((n_features, size, *shape), np.float32) for name, shape in shapes.items()}

    def add(
        self, feature_P: np.ndarray, key_P: np.ndarray, token_P: np.ndarray, value_P: np.ndarray, more: More
    ) -> None:
        """Entries of tokens later than any before; `more` is asked only for those that are kept."""
        chosen_p = np.flatnonzero(key_P > self.key_Fk[feature_P, -1]) if self.size else np.zeros(0, dtype=np.int64)
        chosen_p = chosen_p[np.lexsort((token_P[chosen_p], -key_P[chosen_p], feature_P[chosen_p]))]
        rank_p = _rank(feature_P[chosen_p])
        chosen_p, rank_p = chosen_p[rank_p < self.size], rank_p[rank_p < self.size]
        if not len(chosen_p):
            return
        touched, row_p = np.unique(feature_P[chosen_p], return_inverse=True)
        new = _padded(key_P[chosen_p], row_p, rank_p, (len(touched), self.size), -np.inf)
        order = np.argsort(-np.concatenate([self.key_Fk[touched], new], axis=1), axis=1, kind="stable")[:, : self.size]
        stays_p = (order[row_p] == self.size + rank_p[:, None]).any(1)
        chosen_p, row_p, rank_p = chosen_p[stays_p], row_p[stays_p], rank_p[stays_p]
        columns = {"key_Fk": key_P[chosen_p], "token_Fk": token_P[chosen_p], "value_Fk": value_P[chosen_p]}
        for held, values_p in (
            *((getattr(self, name), values) for name, values in columns.items()),
            *((self.more[name], values) for name, values in more(chosen_p).items()),
        ):
            fill = -np.inf if held is self.key_Fk else -1 if held is self.token_Fk else 0
            both = np.concatenate(
                [held[touched], _padded(values_p, row_p, rank_p, (len(touched), self.size), fill)], axis=1
            )
            held[touched] = np.take_along_axis(both, order.reshape(*order.shape, *[1] * (held.ndim - 2)), axis=1)

    @property
    def is_there_Fk(self) -> np.ndarray:
        return self.token_Fk >= 0


def _padded(
    values_p: np.ndarray, row_p: np.ndarray, rank_p: np.ndarray, shape: tuple[int, int], fill: float
) -> np.ndarray:
    out = np.full((*shape, *values_p.shape[1:]), fill, dtype=values_p.dtype)
    out[row_p, rank_p] = values_p
    return out


def _rank(sorted_P: np.ndarray) -> np.ndarray:
    """The place of each entry among those of its number, in an array where equal numbers stand together."""
    if not len(sorted_P):
        return np.zeros(0, dtype=np.int64)
    begins = np.r_[True, sorted_P[1:] != sorted_P[:-1]]
    starts = np.flatnonzero(begins)
    return np.arange(len(sorted_P)) - starts[begins.cumsum() - 1]


def first_of_each(*numbers: np.ndarray) -> np.ndarray:
    """Where each new combination of sorted numbers begins, as a mask."""
    differs = np.zeros(max(0, len(numbers[0]) - 1), dtype=bool)
    for one in numbers:
        differs |= one[1:] != one[:-1]
    return np.r_[np.ones(min(1, len(numbers[0])), dtype=bool), differs]


def hashed(token_P: np.ndarray, feature_P: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each token and feature, as random as SplitMix64 (Steele et al. 2014), the same in any run.

    The entries with the largest are a uniform sample without replacement, however the text is read.
    """
    with np.errstate(over="ignore"):
        mixed = token_P.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= feature_P.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03) + np.uint64(seed)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53
