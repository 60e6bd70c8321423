"""Which feature of one dictionary is which feature of another: similarities, and rules that turn them into pairs.

Two dictionaries of 65,000 features have 4 billion pairs, so similarities are worked out in blocks of rows and never
held all at once. Correlations do not depend on the blocks, cosines to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy import optimize, sparse
from scipy.sparse import csgraph

from crosscoder.foundation.signals import safe_points

BLOCK_BYTES = 2**27
"""Size of one block of similarities as float64; at most six such arrays exist at once, beside one copy of the codes
and decoders."""
ALIGNED_ROWS = 192
"""Blocks are a multiple of so many rows, so that matrix products treat each row as they would in one piece."""
ROUNDING = 64
"""Times the resolution of its numbers: a variance that is a smaller share of the mean square is taken for rounding."""
WHOLE_BYTES = 2**27
"""Size up to which all similarities may be held at once, as one-to-one assignment needs: 4,096 by 4,096 features."""


@dataclass(frozen=True)
class Similarity:
    """How alike each feature of one dictionary and each of another are, `[Fa, Fb]`, worked out when it is asked for.

    rows: `(start, stop) -> [stop - start, Fb]`.
    """

    shape: tuple[int, int]
    rows: Callable[[int, int], np.ndarray]

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """The first row and the similarities of each block of rows, in order; of one shape always the same blocks."""
        for start, stop in row_spans(*self.shape):
            yield start, self.rows(start, stop)

    @property
    def fits(self) -> bool:
        """Whether all of it may be held at once."""
        return 8 * math.prod(self.shape) <= WHOLE_BYTES

    def whole(self) -> np.ndarray:
        """All of it at once."""
        if not self.fits:
            raise ValueError(
                f"{self.shape[0]:,} by {self.shape[1]:,} similarities are {8 * math.prod(self.shape) / 2**30:.1f} GiB, "
                f"more than the {WHOLE_BYTES / 2**20:.0f} MiB that may be held at once; compare fewer features"
            )
        return self.rows(0, self.shape[0])


def row_spans(n_rows: int, n_columns: int) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) of the rows of each block of at most `BLOCK_BYTES`, of one row at least."""
    size = max(1, BLOCK_BYTES // (8 * max(1, n_columns)))
    size -= size % ALIGNED_ROWS if size > ALIGNED_ROWS else 0
    return ((start, min(start + size, n_rows)) for start in safe_points(range(0, n_rows, size)))


def activation_correlation(a: sparse.csc_array, b: sparse.csc_array) -> Similarity:
    """Pearson correlation over the same T tokens between columns of `a` and of `b`; 0 for a constant one."""
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"activities cover {a.shape[0]} and {b.shape[0]} tokens; correlate them on the same tokens")
    n_tokens, of_tokens = a.shape[0], sparse.csr_array(b)
    mean_a, mean_b = (np.asarray(code.sum(0), dtype=np.float64).ravel() / n_tokens for code in (a, b))
    inverse_a, inverse_b = _inverse_deviation(a, mean_a), _inverse_deviation(b, mean_b)

    def rows(start: int, stop: int) -> np.ndarray:
        covariance = np.asarray((a[:, start:stop].T @ of_tokens).todense(), dtype=np.float64)
        covariance /= n_tokens
        covariance -= np.outer(mean_a[start:stop], mean_b)
        covariance *= inverse_a[start:stop, None]
        covariance *= inverse_b
        return covariance

    return Similarity((a.shape[1], b.shape[1]), rows)


def mean_square(code: sparse.csc_array) -> np.ndarray:
    """Mean over tokens of each column's square, `[F]`."""
    return np.asarray(code.multiply(code).sum(0), dtype=np.float64).ravel() / code.shape[0]


def _inverse_deviation(code: sparse.csc_array, mean: np.ndarray) -> np.ndarray:
    """One over the standard deviation of each column; 0 for one that is constant but for the rounding of its sums."""
    square = mean_square(code)
    variance = square - mean**2
    resolution = np.finfo(np.result_type(code.dtype, np.float32)).eps
    deviation = np.sqrt(np.where(variance > ROUNDING * resolution * square, variance, 0.0))
    return np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 0)


def joint_rows(decoder_FLD: np.ndarray) -> np.ndarray:
    """What each feature writes on all layers as one row, `[F, L * D]`, also of no features."""
    return decoder_FLD.reshape(len(decoder_FLD), math.prod(decoder_FLD.shape[1:]))


def decoder_cosine(a_FLD: np.ndarray, b_FLD: np.ndarray) -> Similarity:
    """Cosine between the joint rows of `a` and of `b`; 0 for a zero row."""
    rows_a, unit_b = joint_rows(a_FLD), unit_rows(joint_rows(b_FLD))
    return Similarity((len(rows_a), len(unit_b)), lambda start, stop: unit_rows(rows_a[start:stop]) @ unit_b.T)


def shared_cosine(a_FLD: np.ndarray, b_FLD: np.ndarray) -> Similarity:
    """Cosine between what features of `a` and of `b` write, over the layers that both write; 0 where there is none.

    Of features that write all layers this is that of their joint rows; of a bank's feature and a crosscoder's, that of
    their rows on the bank's layer. Float32; features that write the same layers are multiplied together.
    """
    cosines = cosines_with(b_FLD)
    return Similarity((len(a_FLD), len(b_FLD)), lambda start, stop: cosines(a_FLD[start:stop]))


def cosines_with(b_FLD: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """What gives `shared_cosine` of rows `[f, L, D]` with all of `b`, of which one copy is held."""
    parts_b = _by_layers(b_FLD)

    def rows(rows_fLD: np.ndarray) -> np.ndarray:
        found = np.zeros((len(rows_fLD), len(b_FLD)), dtype=np.float32)
        for one in _by_layers(rows_fLD):
            for other in parts_b:
                if not (shared := [layer for layer in one.layers if layer in other.layers]):
                    continue
                here, there = ([part.layers.index(layer) for layer in shared] for part in (one, other))
                dot = sum(one.rows_LFD[i] @ other.rows_LFD[j].T for i, j in zip(here, there, strict=True))
                dot /= np.sqrt(one.squares_LF[here].sum(0))[:, None]
                dot /= np.sqrt(other.squares_LF[there].sum(0))
                found[one.index_f[:, None], other.index_f] = dot
        return found

    return rows


def pair_cosines(a_FLD: np.ndarray, b_FLD: np.ndarray, pairs_m2: np.ndarray) -> np.ndarray:
    """`shared_cosine` of some pairs of features, `[m]`, float64; nan where there is none."""
    found = np.full(len(pairs_m2), np.nan)
    for start, stop in row_spans(len(pairs_m2), a_FLD[:1].size):
        first, second = (one[rows].astype(np.float64) for one, rows in zip((a_FLD, b_FLD), pairs_m2[start:stop].T))
        both_mL = first.any(2) & second.any(2)
        norms = np.sqrt((layer_squares(first) * both_mL).sum(1) * (layer_squares(second) * both_mL).sum(1))
        np.divide(np.einsum("mld,mld->m", first, second), norms, out=found[start:stop], where=norms > 0)
    return found


@dataclass(frozen=True)
class _SameLayers:
    """The features that write the same layers: which they are, and their rows on each of these layers."""

    index_f: np.ndarray
    layers: tuple[int, ...]
    rows_LFD: np.ndarray
    squares_LF: np.ndarray


def _by_layers(rows_FLD: np.ndarray) -> list[_SameLayers]:
    squares_FL = layer_squares(rows_FLD)
    kinds, kind_F = np.unique(squares_FL > 0, axis=0, return_inverse=True)
    found = []
    for number, written_L in enumerate(kinds):
        index_f, layers = np.flatnonzero(kind_F.ravel() == number), np.flatnonzero(written_L)
        rows_LFD = np.stack([rows_FLD[index_f, layer] for layer in layers]) if len(layers) else rows_FLD[:0, :0]
        squares_LF = squares_FL[index_f].T[layers].astype(np.float32)
        found.append(_SameLayers(index_f, tuple(layers.tolist()), rows_LFD, squares_LF))
    return found


def layer_squares(rows_FLD: np.ndarray) -> np.ndarray:
    """Squared norm of each feature's row on each layer, `[F, L]`, float64."""
    parts = np.array_split(rows_FLD, 1 + len(rows_FLD) // 4096)  # a bank's rows are L times those of its SAEs
    return np.concatenate([np.square(part, dtype=np.float64).sum(2) for part in parts])


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows divided by their norms; zero rows stay zero."""
    unit = np.zeros_like(rows)
    for start, stop in row_spans(*rows.shape):
        norm = np.linalg.norm(rows[start:stop], axis=1, keepdims=True)
        np.divide(rows[start:stop], norm, out=unit[start:stop], where=norm > 0)
    return unit


class Nearest:
    """The most similar feature of the other side for every feature of two dictionaries; of equals the first.

    Similarities `[Fa, Fb]` are added in blocks of rows, in order. `best_*` are the similarities, `index_*` whose.
    """

    def __init__(self, n_second: int) -> None:
        self._rows: list[tuple[np.ndarray, np.ndarray]] = []
        self.index_b, self.best_b = np.zeros(n_second, dtype=np.int64), np.full(n_second, -np.inf)

    def add(self, start: int, block: np.ndarray) -> None:
        """Rows from `start` on, at least one, of at least one column."""
        index = block.argmax(1)
        self._rows.append((index, block[np.arange(len(block)), index]))
        top = block.max(0)
        better = np.flatnonzero(top > self.best_b)
        self.index_b[better] = start + block[:, better].argmax(0)
        self.best_b[better] = top[better]

    @property
    def index_a(self) -> np.ndarray:
        return np.concatenate([index for index, _ in self._rows])

    @property
    def best_a(self) -> np.ndarray:
        return np.concatenate([best for _, best in self._rows])

    def mutual_pairs(self, minimum: float) -> np.ndarray:
        """Pairs that are each other's most similar, with similarity >= `minimum`, as `[m, 2]`."""
        if not self._rows:
            return np.zeros((0, 2), dtype=np.int64)
        index_a = self.index_a
        a = np.flatnonzero((self.index_b[index_a] == np.arange(len(index_a))) & (self.best_a >= minimum))
        return np.stack([a, index_a[a]], axis=1)


def nearest(similarity: Similarity | np.ndarray, found: Nearest | None = None) -> Nearest:
    """The most similar features in both directions; `found` may be one that keeps more of them."""
    found = Nearest(similarity.shape[1]) if found is None else found
    if 0 not in similarity.shape:
        for start, block in _blocks(similarity):
            found.add(start, block)
    return found


def _blocks(similarity: Similarity | np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    return iter([(0, similarity)]) if isinstance(similarity, np.ndarray) else similarity.blocks()


def mutual_nearest_pairs(similarity: Similarity | np.ndarray, minimum: float) -> np.ndarray:
    """Pairs that are each other's most similar, with similarity >= `minimum`, as `[m, 2]`."""
    return nearest(similarity).mutual_pairs(minimum)


def hungarian_pairs(similarity: Similarity | np.ndarray, minimum: float) -> np.ndarray:
    """The one-to-one assignment with the largest summed similarity, its pairs >= `minimum` only, as `[m, 2]`."""
    whole = similarity if isinstance(similarity, np.ndarray) else similarity.whole()
    rows, columns = optimize.linear_sum_assignment(whole, maximize=True)
    kept = whole[rows, columns] >= minimum
    return np.stack([rows[kept], columns[kept]], axis=1)


def marked_pairs(start: int, block: np.ndarray) -> np.ndarray:
    """Pairs that a mask of the rows from `start` on marks, `[m, 2]`."""
    return np.argwhere(block) + np.array([start, 0])


def joined_pairs(parts: Iterable[np.ndarray]) -> np.ndarray:
    """All pairs of the parts, `[m, 2]`, also of no parts."""
    return np.concatenate([np.zeros((0, 2), dtype=np.int64), *parts])


def matched_share(pairs_m2: np.ndarray, n_first: int, n_second: int) -> float:
    """Matched pairs over the size of the smaller side; nan if one side is empty."""
    smaller = min(n_first, n_second)
    return len(pairs_m2) / smaller if smaller else float("nan")


def joined(n_nodes: int, pairs_m2: np.ndarray) -> np.ndarray:
    """The connected component of each node, numbered from 0, where `pairs_m2` are joined, `[n_nodes]`."""
    graph = sparse.coo_array((np.ones(len(pairs_m2)), pairs_m2.T), shape=(n_nodes, n_nodes))
    return csgraph.connected_components(graph, directed=False)[1]
