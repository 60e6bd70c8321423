"""Which feature of one dictionary is which feature of another: similarities, and rules that turn them into pairs."""

from __future__ import annotations

import math

import numpy as np
from scipy import optimize, sparse
from scipy.sparse import csgraph


def activation_correlation(a: sparse.csc_array, b: sparse.csc_array) -> np.ndarray:
    """Pearson correlation over the same T tokens between columns of `a` and of `b`, `[Fa, Fb]`; 0 for a constant one.

    Raises:
        ValueError: the two were not measured on the same number of tokens.
    """
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"activities cover {a.shape[0]} and {b.shape[0]} tokens; correlate them on the same tokens")
    n_tokens = a.shape[0]
    product = np.asarray((a.T @ b).todense(), dtype=np.float64) / n_tokens
    mean_a, mean_b = (np.asarray(code.sum(0), dtype=np.float64).ravel() / n_tokens for code in (a, b))
    covariance = product - np.outer(mean_a, mean_b)
    scale = np.outer(_deviation(a, mean_a), _deviation(b, mean_b))
    return np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)


def mean_square(code: sparse.csc_array) -> np.ndarray:
    """Mean over tokens of each column's square, `[F]`."""
    return np.asarray(code.multiply(code).sum(0), dtype=np.float64).ravel() / code.shape[0]


def _deviation(code: sparse.csc_array, mean: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(mean_square(code) - mean**2, 0.0))


def joint_rows(decoder_FLD: np.ndarray) -> np.ndarray:
    """What each feature writes on all layers as one row, `[F, L * D]`, also of no features."""
    return decoder_FLD.reshape(len(decoder_FLD), math.prod(decoder_FLD.shape[1:]))


def decoder_cosine(a_FLD: np.ndarray, b_FLD: np.ndarray) -> np.ndarray:
    """Cosine between the joint rows of `a` and of `b`, `[Fa, Fb]`; 0 for a zero row."""
    return unit_rows(joint_rows(a_FLD)) @ unit_rows(joint_rows(b_FLD)).T


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows divided by their norms; zero rows stay zero."""
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0)


def mutual_nearest_pairs(similarity: np.ndarray, minimum: float) -> np.ndarray:
    """Pairs that are each other's most similar, with similarity >= `minimum`, as `[m, 2]`."""
    if similarity.size == 0:
        return np.zeros((0, 2), dtype=np.int64)
    best_of_a, best_of_b = similarity.argmax(1), similarity.argmax(0)
    a = np.flatnonzero(best_of_b[best_of_a] == np.arange(len(best_of_a)))
    pairs = np.stack([a, best_of_a[a]], axis=1)
    return pairs[similarity[pairs[:, 0], pairs[:, 1]] >= minimum]


def hungarian_pairs(similarity: np.ndarray, minimum: float) -> np.ndarray:
    """The one-to-one assignment with the largest summed similarity, its pairs >= `minimum` only, as `[m, 2]`."""
    rows, columns = optimize.linear_sum_assignment(similarity, maximize=True)
    kept = similarity[rows, columns] >= minimum
    return np.stack([rows[kept], columns[kept]], axis=1)


def threshold_pairs(similarity: np.ndarray, minimum: float) -> np.ndarray:
    """Every pair with similarity >= `minimum`, as `[m, 2]`; many-to-many, so chains of it can percolate."""
    return np.argwhere(similarity >= minimum)


def matched_share(pairs_m2: np.ndarray, n_first: int, n_second: int) -> float:
    """Matched pairs over the size of the smaller side; nan if one side is empty."""
    smaller = min(n_first, n_second)
    return len(pairs_m2) / smaller if smaller else float("nan")


def joined(n_nodes: int, pairs_m2: np.ndarray) -> np.ndarray:
    """The connected component of each node, numbered from 0, where `pairs_m2` are joined, `[n_nodes]`."""
    graph = sparse.coo_array((np.ones(len(pairs_m2)), pairs_m2.T), shape=(n_nodes, n_nodes))
    return csgraph.connected_components(graph, directed=False)[1]
