"""What one trained dictionary says of a held-out text, kept in one file: its distinct features and when they fire.

Every comparison of dictionaries (two seeds, two trainings, two shapes, two sites) is a function of such readings taken
on the same tokens. A reading holds alive features only, duplicates joined, so that a count, a load and a dimension are
of the same set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save
from scipy import sparse
from scipy.sparse import csgraph

from crosscoder.foundation.artifact import DamagedArtifactError, replace_file
from crosscoder.measure import counting, features, geometry, matching

_KEYS = ("decoder_FLD", "values", "rows", "starts", "shape", "numbers", "index_F")


@dataclass(frozen=True)
class Reading:
    """The distinct alive features of one dictionary on T tokens.

    decoder_FLD: what each writes. code: their activations `[T, F]`. seed: the dictionary's. explained_variance, l0
    (active features a token) and dead_share (of the dictionary) are of the whole dictionary, duplicates and dead
    features included. index_F: the features' numbers in the dictionary. genuine_F: which are genuinely cross-layer,
    where that was probed.
    """

    seed: int
    decoder_FLD: np.ndarray
    code: sparse.csc_array
    explained_variance: float
    dead_share: float
    l0: float
    index_F: np.ndarray | None = None
    genuine_F: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.decoder_FLD)

    @property
    def n_tokens(self) -> int:
        """T."""
        return self.code.shape[0]

    @cached_property
    def probability_F(self) -> np.ndarray:
        """Share of tokens on which each feature is active."""
        return np.diff(self.code.indptr) / self.n_tokens

    @cached_property
    def energy_F(self) -> np.ndarray:
        """Mean squared norm that each feature writes on a token."""
        square_F = np.asarray(self.code.multiply(self.code).sum(0), dtype=np.float64).ravel() / self.n_tokens
        return geometry.feature_energy(square_F, self.rows_FN)

    @cached_property
    def rows_FN(self) -> np.ndarray:
        """Joint decoder rows, `[F, L * D]`, float64."""
        return self.decoder_FLD.reshape(len(self), math.prod(self.decoder_FLD.shape[1:])).astype(np.float64)

    @cached_property
    def rho_F(self) -> np.ndarray:
        """Layers that each feature occupies (participation ratio of its decoder)."""
        return features.participation_ratio(features.layer_profile(self.decoder_FLD))

    def only(self, kept_F: np.ndarray) -> Reading:
        """The reading of some of its features: where `kept_F` (bool or indices) says so."""
        return replace(
            self,
            decoder_FLD=self.decoder_FLD[kept_F],
            code=sparse.csc_array(self.code[:, kept_F]),
            index_F=None if self.index_F is None else self.index_F[kept_F],
            genuine_F=None if self.genuine_F is None else self.genuine_F[kept_F],
        )


def read_dictionary(measured: features.Measured, decoder_FLD: np.ndarray, *, seed: int) -> Reading:
    """The reading of a dictionary whose features write `decoder_FLD`, from one pass over held-out tokens.

    Of features joined as duplicates (`counting.distinct_features`) the most active stands for all.
    """
    activity = measured.activity
    alive = counting.alive_features(activity).ravel().nonzero()[0]
    code = sparse.csc_array(activity.code.tocsc()[:, alive])
    kept = alive[representatives(decoder_FLD[alive], code)]
    return Reading(
        seed=seed,
        decoder_FLD=np.ascontiguousarray(decoder_FLD[kept], dtype=np.float32),
        code=sparse.csc_array(activity.code.tocsc()[:, kept]),
        explained_variance=measured.explained_variance,
        dead_share=1 - len(alive) / activity.code.shape[1],
        l0=activity.code.nnz / activity.n_tokens,
        index_F=kept,
    )


def representatives(decoder_FLD: np.ndarray, code: sparse.csc_array) -> np.ndarray:
    """Indices of one feature for each set of duplicates, rising: the most active one."""
    if len(decoder_FLD) == 0:
        return np.zeros(0, dtype=np.int64)
    rows = decoder_FLD.reshape(len(decoder_FLD), -1)
    cosine = matching.decoder_cosine(rows, rows)
    same = (cosine > counting.DUPLICATE) & (matching.activation_correlation(code, code) > counting.DUPLICATE)
    label_F = csgraph.connected_components(sparse.csr_array(same), directed=False)[1]
    order = np.argsort(-np.diff(code.indptr), kind="stable")
    return np.sort(order[np.unique(label_F[order], return_index=True)[1]])


def save_reading(reading: Reading, path: str | Path) -> None:
    """Write a reading to one file, whole or not at all."""
    code = sparse.csc_array(reading.code)
    tensors = {
        "decoder_FLD": np.ascontiguousarray(reading.decoder_FLD, dtype=np.float32),
        "values": code.data.astype(np.float32),
        "rows": code.indices.astype(np.int32),
        "starts": code.indptr.astype(np.int64),
        "shape": np.array([reading.seed, *code.shape], dtype=np.int64),
        "numbers": np.array([reading.explained_variance, reading.dead_share, reading.l0], dtype=np.float64),
        "index_F": np.arange(len(reading)) if reading.index_F is None else reading.index_F.astype(np.int64),
    }
    if reading.genuine_F is not None:
        tensors["genuine_F"] = reading.genuine_F.astype(np.uint8)
    replace_file(Path(path), save(tensors))


def load_reading(path: str | Path) -> Reading:
    """The reading in a file.

    Raises:
        DamagedArtifactError: the file is not a whole reading.
        FileNotFoundError: there is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such reading; run the study's cells first")
    try:
        found = load_file(path)
        missing = [key for key in _KEYS if key not in found]
        if missing:
            raise ValueError(f"it lacks {missing}")
        seed, n_tokens, n_features = (int(value) for value in found["shape"])
        code = sparse.csc_array((found["values"], found["rows"], found["starts"]), shape=(n_tokens, n_features))
        if len(found["decoder_FLD"]) != n_features:
            raise ValueError(f"{len(found['decoder_FLD'])} decoder rows for {n_features} features")
    except Exception as error:
        raise DamagedArtifactError(f"{path} is not a reading: {error}; delete it and run the study again") from error
    explained, dead, l0 = (float(value) for value in found["numbers"])
    genuine_F = found["genuine_F"].astype(bool) if "genuine_F" in found else None
    return Reading(seed, found["decoder_FLD"], code, explained, dead, l0, found["index_F"], genuine_F)
