"""What kept readings say, from the definitions: of one dictionary, and of two shapes' features beside each other.

`recheck.py` says what for. A reading's file holds the alive features of one dictionary: what they write
(`decoder_FLD`, in units of the dictionary's inputs), when they fire (a CSC matrix of T tokens by F features: `values`,
`rows`, `starts`), and numbers that need the activations and so cannot be made again here: explained variances, and
L0 where some features are dead, since dead ones are not kept. Nothing is imported from the library.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file
from scipy import sparse, special
from scipy.sparse import csgraph

MATCHED, DUPLICATE, QUOTED = 0.7, 0.9, 0.9
"""Correlation of a match; cosine and correlation of a duplicate; self-cosine from which a debiased d_eff is quoted."""
SEEN = 10
"""Tokens of which an alive feature fires on more."""
FEWEST_PAIRS = 30
NULL_SHIFTS = 20


@dataclass(frozen=True)
class Kept:
    """One reading, in float64; `code` has the columns of the alive features alone."""

    rows_FLD: np.ndarray
    code: sparse.csc_array
    token_T: np.ndarray
    n_groups: int
    size: int
    explained: float
    dead_share: float
    l0: float
    l0_layer: float
    explained_L: np.ndarray
    index_F: np.ndarray
    explained_left_E: np.ndarray | None = None

    @cached_property
    def p_F(self) -> np.ndarray:
        """Share of tokens on which each feature's value is above 0."""
        return np.asarray((self.code > 0).sum(0)).ravel() / self.code.shape[0]

    @cached_property
    def load_F(self) -> np.ndarray:
        """Binary entropy of each firing probability, nats."""
        return special.entr(self.p_F) + special.entr(1 - self.p_F)

    @cached_property
    def unit_FN(self) -> np.ndarray:
        """Joint rows over their norms."""
        rows_FN = self.rows_FLD.reshape(len(self.rows_FLD), -1)
        norm_F1 = np.sqrt((rows_FN**2).sum(1, keepdims=True))
        return rows_FN / np.where(norm_F1 > 0, norm_F1, 1)

    @property
    def energy_F(self) -> np.ndarray:
        """E[f^2] |W|^2."""
        square_F = np.asarray(self.code.multiply(self.code).sum(0)).ravel() / self.code.shape[0]
        return square_F * (self.rows_FLD**2).sum((1, 2))

    def features(self, kept_F: np.ndarray) -> Kept:
        """Some of the features."""
        parts: dict[str, Any] = {"code": sparse.csc_array(self.code[:, kept_F]), "rows_FLD": self.rows_FLD[kept_F]}
        return replace(self, **parts, index_F=self.index_F[kept_F])

    def tokens(self, token_T: np.ndarray) -> Kept:
        """Some of the tokens."""
        rows = sparse.csr_array(self.code)[np.flatnonzero(np.isin(self.token_T, token_T))]
        return replace(self, code=sparse.csc_array(rows), token_T=token_T)


def read_kept(path: Path) -> Kept:
    """The reading in a file."""
    found = load_file(path)
    _, n_tokens, n_features, n_groups, size = found["whole"].tolist()
    parts = (found["values"].astype(np.float64), found["rows"], found["starts"])
    code = sparse.csc_array(parts, shape=(n_tokens, n_features))
    explained, dead, l0, l0_layer = found["numbers"].tolist()
    rows_FLD, layers = found["decoder_FLD"].astype(np.float64), found["explained_variance_L"]
    numbers = n_groups, size, explained, dead, l0, l0_layer, layers, found["index_F"], found.get("explained_left_E")
    return Kept(rows_FLD, code, found["token_T"], *numbers)


def dimension(unit_FN: np.ndarray, weight_F: np.ndarray | None = None, other_FN: np.ndarray | None = None) -> float:
    """d_eff: 1 over the weighted mean over pairs of features of G1 G2, G the cosines; with one dictionary G2 = G1."""
    weight_F = np.ones(len(unit_FN)) if weight_F is None else weight_F
    gram_FF = unit_FN @ unit_FN.T
    product_FF = gram_FF * (gram_FF if other_FN is None else other_FN @ other_FN.T)
    pair_FF = np.outer(weight_F, weight_F)
    np.fill_diagonal(pair_FF, 0)
    above, below = float(pair_FF.sum()), float((pair_FF * product_FF).sum())
    return np.nan if above == 0 else above / below if below > 0 else np.inf


def occupied(rows_FLD: np.ndarray) -> np.ndarray:
    """Layers that hold at least half of a feature's largest share of squared norm, `[F, L]`."""
    share_FL = (rows_FLD**2).sum(2)
    return (share_FL >= 0.5 * share_FL.max(1, keepdims=True)) & (share_FL > 0)


def spread(rows_FLD: np.ndarray) -> np.ndarray:
    """rho: 1 over the sum of squared shares of layers, `[F]`."""
    norm_FL = (rows_FLD**2).sum(2)
    return norm_FL.sum(1) ** 2 / (norm_FL**2).sum(1)


def find_twins(rows_FLD: np.ndarray) -> np.ndarray:
    """True where on every occupied layer another feature that occupies it has cosine .9, and none .5 jointly (.7 of
    those that occupy two layers, and where there are two or one)."""
    here_FL, n_layers = occupied(rows_FLD), rows_FLD.shape[1]
    norm_FL = np.sqrt((rows_FLD**2).sum(2))
    layers = [rows_FLD[:, i] / np.maximum(norm_FL[:, i, None], 1e-300) for i in range(n_layers)]
    joint_FN = rows_FLD.reshape(len(rows_FLD), -1)
    joint_FN = joint_FN / np.sqrt((joint_FN**2).sum(1, keepdims=True))
    joint_FF = joint_FN @ joint_FN.T - 2 * np.eye(len(joint_FN))
    twin_F = joint_FF.max(1) < np.where((here_FL.sum(1) == 2) | (n_layers <= 2), 0.7, 0.5)
    for i, unit_FD in enumerate(layers):
        near_FF = (unit_FD @ unit_FD.T - 2 * np.eye(len(unit_FD)) >= 0.9) & here_FL[:, i][None]
        twin_F &= near_FF.any(1) | ~here_FL[:, i]
    return twin_F


def reading_numbers(kept: Kept, scale_L: np.ndarray | None) -> dict[str, Any]:
    """Quantities of one dictionary by key; with `scale_L`, what its layers were multiplied by, rho in the subject's
    units too."""
    group_F = kept.index_F // (kept.size // kept.n_groups)
    groups = [kept.unit_FN[group_F == group] for group in range(kept.n_groups)]
    rooms = [dimension(unit_FN) for unit_FN in groups]
    load, room, held_FL = float(kept.load_F.sum()) / kept.n_groups, float(np.mean(rooms)), occupied(kept.rows_FLD)
    alive, n_layers = len(kept.p_F), kept.rows_FLD.shape[1]
    values: dict[str, Any] = {
        "dictionary_size": kept.size,
        "alive": int((kept.p_F > SEEN / kept.code.shape[0]).sum()),
        "alive_per_layer": held_FL.sum(0).tolist(),
        "dead_share": 1 - alive / kept.size,
        "ultra_dense": int((kept.p_F > 0.1).sum()),
        "entropy_load": load,
        "effective_dimension": room,
    }
    if alive == kept.size:
        per_layer = float(kept.p_F @ held_FL.sum(1)) / n_layers
        values |= {"l0_token": float(kept.p_F.sum()), "l0_token_layer": per_layer}
    if kept.n_groups > 1:
        return values
    rho_F, twin_F = spread(kept.rows_FLD), find_twins(kept.rows_FLD)
    rest = dimension(kept.unit_FN[~twin_F])
    values |= {
        "mean_rho": float(rho_F.mean()),
        "mean_rho_share": float(rho_F.mean()) / n_layers,
        "mean_lifespan": float(held_FL.sum(1).mean()),
        "single_layer_share": float((held_FL.sum(1) == 1).mean()),
        "twin_share": float(twin_F.mean()),
        "raw_density": load / room,
        "raw_density_rest": float(kept.load_F[~twin_F].sum()) / rest,
    }
    if scale_L is not None:
        values["mean_rho_model"] = float(spread(kept.rows_FLD / scale_L[:, None]).mean())
    return values


def load_left(kept: Kept, document_T: np.ndarray) -> np.ndarray:
    """The load of one layer, or of all together, without the tokens of each document."""
    fires, loads = sparse.csr_array(kept.code > 0), []
    for document in range(int(document_T.max()) + 1):
        rest = fires[np.flatnonzero(document_T != document)]
        p_F = np.asarray(rest.sum(0)).ravel() / rest.shape[0]
        loads.append(float((special.entr(p_F) + special.entr(1 - p_F)).sum()) / kept.n_groups)
    return np.array(loads)


def correlation(first: sparse.csc_array, second: sparse.csc_array) -> np.ndarray:
    """Pearson's over tokens, `[F1, F2]`; 0 where a feature is constant."""
    n = first.shape[0]
    means, sds = [], []
    for code in (first, second):
        means.append(np.asarray(code.sum(0)).ravel() / n)
        squares = np.asarray(code.multiply(code).sum(0)).ravel() / n
        sds.append(np.sqrt(np.maximum(squares - means[-1] ** 2, 0)))
    covariance = (first.T @ second).toarray() / n - np.outer(*means)
    scale = np.outer(*sds)
    return np.where(scale > 0, covariance / np.where(scale > 0, scale, 1), 0)


def without_duplicates(kept: Kept) -> Kept:
    """Of features joined by cosine and correlation both above .9, the one that fires most; of equals the first."""
    same_FF = (kept.unit_FN @ kept.unit_FN.T > DUPLICATE) & (correlation(kept.code, kept.code) > DUPLICATE)
    label_F = csgraph.connected_components(sparse.csr_array(same_FF), directed=False)[1]
    most = {}
    for feature in np.lexsort((np.arange(len(label_F)), -kept.p_F)):
        most.setdefault(label_F[feature], feature)
    return kept.features(np.sort(np.array(list(most.values()))))


def matches(found_FF: np.ndarray) -> np.ndarray:
    """Pairs that are each other's most correlated, at .7 or more, `[m, 2]`."""
    first, second = found_FF.argmax(1), found_FF.argmax(0)
    kept = [(i, j) for i, j in enumerate(first) if second[j] == i and found_FF[i, j] >= MATCHED]
    return np.array(kept, dtype=np.int64).reshape(-1, 2)


class Pair(NamedTuple):
    """Two dictionaries: u, the pairs that it is of (each side's nearest), share matched, median and ln sd of ln rate
    (None for few matches), which features match, self-cosine, debiased."""

    u: float
    nearest: list[tuple[np.ndarray, np.ndarray]]
    matched: float
    rate: np.ndarray | None
    same_2m: np.ndarray
    cosine: float | None = None
    debiased: float | None = None


def compare_two(first: Kept, second: Kept, *, one_subject: bool = False) -> Pair:
    """How features of two dictionaries match; of one subject, directions too."""
    found_FF = correlation(first.code, second.code)
    i, j = matches(found_FF).T
    pools, n = [np.arange(size) for size in found_FF.shape], min(found_FF.shape)
    # u is of equally many features of both: of the larger side as many as the smaller has, drawn with seed 0.
    pools = [
        one if len(one) == n else np.sort(np.random.default_rng(0).choice(len(one), n, replace=False)) for one in pools
    ]
    among_FF = found_FF[np.ix_(*pools)]
    nearest = [(pools[0], pools[1][among_FF.argmax(1)]), (pools[0][among_FF.argmax(0)], pools[1])]
    u, matched = mean_best(among_FF), len(i) / n
    rate = spread_of(first.p_F[i], second.p_F[j]) if len(i) >= FEWEST_PAIRS else None
    if not one_subject or len(i) < 2:
        return Pair(u, nearest, matched, rate, np.array([i, j]))
    sides = first.unit_FN[i], second.unit_FN[j]
    cosine = float((sides[0] * sides[1]).sum(1).mean())
    weight_m = np.sqrt(first.energy_F[i] * second.energy_F[j])
    debiased = dimension(sides[0], weight_m, sides[1]) if cosine >= QUOTED else None
    return Pair(u, nearest, matched, rate, np.array([i, j]), cosine, debiased)


def spread_of(first_m: np.ndarray, second_m: np.ndarray) -> np.ndarray:
    """Median and ln sd of the ln ratio of two rates, or counts on the same tokens."""
    log_m = np.log(second_m / first_m)
    return np.array([np.median(log_m), np.log(log_m.std(ddof=1))])


def mean_best(found_FF: np.ndarray) -> float:
    """u: the largest correlation of each feature with one of the other side, averaged both ways."""
    return float((found_FF.max(1).mean() + found_FF.max(0).mean()) / 2)


def chance_u(first: Kept, second: Kept, document_T: np.ndarray) -> float | None:
    """u with the second's activity moved round by at least the longest document, the mean over 20 draws of seed 0."""
    n = len(document_T)
    starts = np.flatnonzero(np.r_[True, document_T[1:] != document_T[:-1]])
    longest = int(np.diff(np.r_[starts, n]).max())
    if 2 * longest > n:
        return None
    moved = []
    for shift in np.random.default_rng(0).integers(longest, n - longest + 1, size=NULL_SHIFTS):
        turned = sparse.csc_array(sparse.csr_array(second.code)[(np.arange(n) - shift) % n])
        moved.append(mean_best(correlation(first.code, turned)))
    return float(np.mean(moved))


def training_numbers(each: list[Kept]) -> dict[str, float | None]:
    """Of the main dictionaries of one training, and of pairs of them."""
    pairs = [compare_two(*two, one_subject=True) for two in combinations(each, 2)]
    values: dict[str, list[Any]] = {
        "d_eff_raw": [dimension(kept.unit_FN) for kept in each],
        "d_eff_weighted": [dimension(kept.unit_FN, kept.energy_F) for kept in each],
        "d_eff_debiased": [pair.debiased for pair in pairs],
        "self_cosine": [pair.cosine for pair in pairs],
        "point_matched_share": [pair.matched for pair in pairs],
    }
    return {key: float(np.mean(found)) if found and None not in found else None for key, found in values.items()}


def documents(run: Path) -> np.ndarray:
    """The document of each held-out block."""
    import pyarrow as pa  # the text is an Arrow file

    (path,) = (run / "tokens" / "held_out").glob("*.arrow")
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_stream(file).read_all().column("document").to_numpy()
