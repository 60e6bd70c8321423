"""What one trained dictionary does on a held-out text: which features are alive, when they fire, what they write.

`Measured` holds all features, `Reading` the alive ones. Only this module decides which features are alive and which are
duplicates. Every count and comparison (two seeds, two trainings, two shapes) is a function of readings taken on the
same tokens. In a bank the features of layer l are the columns `l * F : (l + 1) * F`.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from crosscoder.data.sources import Marked, chosen_tokens
from crosscoder.data.tokens import TokenBlocks
from crosscoder.dictionary import Dictionary, SparseCode
from crosscoder.dictionary.codec import to_global
from crosscoder.foundation.damage import reading as reading_file
from crosscoder.foundation.failpoints import failpoint
from crosscoder.foundation.tensors import load_tensors, save_tensors
from crosscoder.measure import matching, profile

DUPLICATE = 0.9  # joint decoder cosine and activation correlation above which two features are duplicates
NO_VARIANCE = 1e-12  # share of a layer's sum of squares below which its variance is rounding
MEND = "delete it and run the study again"
Batches = Iterable[Tensor | Marked]
Watch = Callable[[Marked, SparseCode], None] | None
_NUMBERS = ("explained_variance", "dead_share", "l0", "l0_layer")


@dataclass(frozen=True)
class Outliers:
    """Tokens of unusual norm (see `SiteSource`) among all that were read, whether they were kept or not.

    explained_variance_usual: without them; explained_variance_every: with them, from the dictionary as it is.
    share: share of tokens that are outliers at some layer; share_L: at each. energy_L: the share of each layer's
        squared norm that tokens which are outliers at some layer hold.
    """

    explained_variance_usual: float
    explained_variance_every: float
    share: float
    share_L: np.ndarray
    energy_L: np.ndarray


@dataclass(frozen=True)
class Measured:
    """What all features of a dictionary did in one pass over T held-out tokens."""

    code: sparse.csr_array  # [T, G * F], float32, no stored zeros, tokens in the text's order
    n_groups: int
    explained_variance_L: np.ndarray  # each layer: 1 - squared error / variance; nan where none is written or varies
    explained_variance: float  # the same ratio of sums over all layers of the scaled activations
    token_T: np.ndarray  # int64, the tokens' numbers in the text
    outliers: Outliers
    explained_left_E: np.ndarray | None = None  # explained variance without each document of the text

    @property
    def probability_F(self) -> np.ndarray:
        """Share of tokens on which each feature is active, `p` `[G * F]`."""
        return np.bincount(self.code.indices, minlength=self.code.shape[1]) / self.code.shape[0]

    @property
    def alive_GF(self) -> np.ndarray:
        return (self.probability_F > minimum_probability(self.code.shape[0])).reshape(self.n_groups, -1)


@torch.no_grad()
def measure_dictionary(
    dictionary: Dictionary, batches: Batches, text: TokenBlocks | None = None, watch: Watch = None
) -> Measured:
    """Code and explained variance of `dictionary` on `batches` `[B, L, D]`, in evaluation mode.

    Of marked batches (`Source.marked`) the kept tokens are measured, and explained variance with and without outliers.
    Sums are float64 over all tokens, so the batch size does not matter. Layers that the dictionary's structure never
    writes are left out of the sums. The groups are the layers of a bank, also where they share their weights.

    text: whose tokens the batches are of; then explained variance without each of its documents (or groups of them,
        `TokenBlocks.document_groups`) is measured too.
    watch: is given every batch with its code.

    Raises:
        ValueError: there is no token, or every layer is constant.
    """
    n_features, n_groups, was_training = dictionary.config.n_features, 1, dictionary.training
    dictionary.eval()
    usual, outliers = (_Sums(dictionary, 1 if text is None else text.n_groups) for _ in range(2))
    parts, tokens, n_kept, every_kept = [], [], 0, True
    n_outliers_L = np.zeros(dictionary.config.n_layers)
    for batch in batches:
        failpoint("evaluation.batch")
        if isinstance(batch, Tensor):
            batch = Marked.plain(batch, torch.arange(n_kept, n_kept + len(batch)))
        out, outlier_B = dictionary(batch.x_BLD), batch.outlier_BL.any(1)
        if watch is not None:
            watch(batch, out.code)
        n_groups = math.prod(out.code.batch_shape[1:])
        rows, kept_B = sparse_rows(out.code, len(outlier_B), n_groups, n_features), batch.kept_B.cpu()
        parts.append(rows if bool(kept_B.all()) else sparse.csr_array(rows[kept_B.numpy()]))
        tokens.append(batch.token_B[kept_B].numpy())
        n_kept += parts[-1].shape[0]
        every_kept &= bool(kept_B.all())
        document_B = torch.zeros(len(outlier_B), dtype=torch.long)
        if text is not None:
            document_B = torch.from_numpy(text.document_groups[batch.token_B.numpy() // text.sequence_length])
        for sums, chosen_B in ((usual, ~outlier_B), (outliers, outlier_B)):
            sums.add(batch.x_BLD, out.recon, document_B, chosen_B)
        n_outliers_L = n_outliers_L + batch.outlier_BL.sum(0).cpu().numpy()
    dictionary.train(was_training)
    if n_kept == 0:
        raise ValueError("no tokens to measure the dictionary on; the held-out activations are empty")
    every = usual.joined(outliers)
    kept = every if every_kept else usual
    found = Outliers(
        explained_variance_usual=usual.explained()[1] if usual.n_tokens else math.nan,
        explained_variance_every=every.explained()[1],
        share=outliers.n_tokens / every.n_tokens,
        share_L=n_outliers_L / every.n_tokens,
        energy_L=(outliers.square_EL.sum(0) / every.square_EL.sum(0)).numpy(),
    )
    code = sparse.csr_array(sparse.vstack(parts, format="csr"))
    explained_L, explained = kept.explained()
    left_E = None if text is None else kept.explained_left()
    return Measured(code, n_groups, explained_L, explained, np.concatenate(tokens), found, left_E)


class _Sums:
    """Squared errors, squares and sums of tokens, by document and layer."""

    def __init__(self, dictionary: Dictionary, n_documents: int) -> None:
        n_layers = dictionary.config.n_layers
        self.written = dictionary.config.written()
        self.error_EL, self.square_EL = (torch.zeros(n_documents, n_layers, dtype=torch.float64) for _ in range(2))
        self.sum_ELD = torch.zeros(n_documents, n_layers, dictionary.config.d_model, dtype=torch.float64)
        self.tokens_E = torch.zeros(n_documents, dtype=torch.float64)

    @property
    def n_tokens(self) -> int:
        return int(self.tokens_E.sum())

    def add(self, x_BLD: Tensor, recon_BLD: Tensor, document_B: Tensor, chosen_B: Tensor) -> None:
        if not bool(chosen_B.any()):
            return
        x_BLD, recon_BLD = (chosen_tokens(one, chosen_B) for one in (x_BLD, recon_BLD))
        document_B = chosen_tokens(document_B, chosen_B.cpu())
        self.error_EL.index_add_(0, document_B, (x_BLD - recon_BLD).double().square().sum(2).cpu())
        self.square_EL.index_add_(0, document_B, x_BLD.double().square().sum(2).cpu())
        for document in document_B.unique().tolist():  # few in a batch, and rows are large
            own_BLD = chosen_tokens(x_BLD, (document_B == document).to(x_BLD.device))
            self.sum_ELD[document] += own_BLD.double().sum(0).cpu()
        self.tokens_E += torch.bincount(document_B, minlength=len(self.tokens_E))

    def joined(self, other: _Sums) -> _Sums:
        joined = copy.copy(self)
        for name in ("error_EL", "square_EL", "sum_ELD", "tokens_E"):
            setattr(joined, name, getattr(self, name) + getattr(other, name))
        return joined

    def explained(self) -> tuple[np.ndarray, float]:
        """Explained variance of each layer, nan where none writes or nothing varies, and of all."""
        error_L, variance_L = self._error_and_variance()
        if not bool(torch.isfinite(error_L + variance_L).all()):
            raise ValueError("sums of squares are not finite: activations or reconstructions are too large for float32")
        varies_L = variance_L > NO_VARIANCE * self.square_EL.sum(0)  # of a constant layer it is rounding
        varies_L[: self.written.start] = False
        if not bool(varies_L.any()):
            raise ValueError(f"every layer is constant over the {self.n_tokens} held-out tokens: nothing to explain")
        explained_L = torch.where(varies_L, 1 - error_L / variance_L, torch.nan)
        return explained_L.numpy(), float(1 - error_L[self.written].sum() / variance_L[varies_L].sum())

    def explained_left(self) -> np.ndarray:
        """Explained variance of all layers without each document, nan where nothing varies then, `[E]`."""
        parts = [self._error_and_variance(without=document) for document in range(len(self.tokens_E))]
        return np.array([float(1 - e[self.written].sum() / v[self.written].sum()) for e, v in parts])

    def _error_and_variance(self, *, without: int | None = None) -> tuple[Tensor, Tensor]:
        tensors = (self.error_EL, self.square_EL, self.sum_ELD, self.tokens_E)
        sums = (one.sum(0) if without is None else one.sum(0) - one[without] for one in tensors)
        error_L, square_L, sum_LD, n_tokens = sums
        return error_L, square_L - sum_LD.square().sum(1) / n_tokens


def sparse_rows(code: SparseCode, n_tokens: int, n_groups: int, n_features: int) -> sparse.csr_array:
    """The active features of a batch's code as one matrix `[T, G * F]`, float32, without stored zeros."""
    values = code.values.float().cpu().numpy()
    columns = to_global(code, n_groups).cpu().numpy()
    starts = code.offsets[::n_groups].cpu().numpy()  # rows of one token are neighbours
    rows = sparse.csr_array((values, columns, starts), shape=(n_tokens, n_groups * n_features))
    rows.eliminate_zeros()
    return rows


def minimum_probability(n_tokens: int) -> float:
    """p_min: the firing probability above which `n_tokens` held-out tokens show a feature more than ten times."""
    return 10.0 / n_tokens


@dataclass(frozen=True)
class Reading:
    """Alive features of one dictionary on T tokens.

    seed: of the dictionary.
    decoder_FLD: what each feature writes; a feature of a bank writes one layer.
    code: activations of the features, `[T, F]`.
    l0: active features of a token. l0_layer: those of them whose lifespan includes a layer, the mean over layers.
    index_F: the features' numbers in the dictionary.
    n_groups: dictionaries of a bank; 1 where features read all layers.
    token_T: the tokens' numbers in the text, int64. outliers: not kept in files.
    explained_left_E: explained variance without each document of the text; None: its documents are not known.
    size: features of the dictionary. Like this, l0, l0_layer, dead_share and the explained variances include the dead.
    """

    seed: int
    decoder_FLD: np.ndarray
    code: sparse.csc_array
    explained_variance: float
    dead_share: float
    l0: float
    index_F: np.ndarray
    n_groups: int = 1
    size: int = 0
    l0_layer: float = math.nan
    explained_variance_L: np.ndarray = field(default_factory=lambda: np.zeros(0))
    token_T: np.ndarray | None = None
    outliers: Outliers | None = None
    explained_left_E: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.decoder_FLD)

    @property
    def n_tokens(self) -> int:
        return self.code.shape[0]

    @cached_property
    def probability_F(self) -> np.ndarray:
        """Share of tokens on which each feature is active."""
        return np.diff(self.code.indptr) / self.n_tokens

    @cached_property
    def energy_F(self) -> np.ndarray:
        """`E[f_i^2] |W_i|^2`, the mean squared norm that each feature writes on a token."""
        return matching.mean_square(self.code) * matching.layer_squares(self.decoder_FLD).sum(1)

    @cached_property
    def rows_FN(self) -> np.ndarray:
        """Joint decoder rows, `[F, L * D]`, float64."""
        return matching.joint_rows(self.decoder_FLD).astype(np.float64)

    @cached_property
    def profile_FL(self) -> np.ndarray:
        return profile.layer_profile(self.decoder_FLD)

    @cached_property
    def rho_F(self) -> np.ndarray:
        """Layers that each feature occupies (participation ratio of its decoder)."""
        return profile.participation_ratio(self.profile_FL)

    @cached_property
    def groups(self) -> tuple[Reading, ...]:
        """The reading of each dictionary of a bank, on its own layer; the reading itself where there is one."""
        if self.n_groups == 1:
            return (self,)
        group_F = self.index_F // (self.size // self.n_groups)
        parts = [(layer, self.only(group_F == layer)) for layer in range(self.n_groups)]
        return tuple(replace(one, decoder_FLD=one.decoder_FLD[:, [i]], n_groups=1) for i, one in parts)

    @cached_property
    def distinct(self) -> Reading:
        """The reading with one feature for each set of duplicates: the most active."""
        starts = np.cumsum([0, *(len(group) for group in self.groups)])
        # A bank's features of two layers share no entry of their joint rows: only those of one layer can be duplicates.
        return self.only(np.concatenate([representatives(g) + i for g, i in zip(self.groups, starts)]))

    def on_tokens(self, token_T: np.ndarray) -> Reading:
        """The reading on some of its tokens, given by their numbers in the text."""
        if self.token_T is None or len(self.token_T) == len(token_T):
            return self
        code = sparse.csc_array(self.code.tocsr()[np.isin(self.token_T, token_T)])
        return replace(self, code=code, token_T=token_T)

    def only(self, kept_F: np.ndarray) -> Reading:
        """The reading of the features that `kept_F` (a mask or indices) names."""
        return replace(
            self,
            decoder_FLD=self.decoder_FLD[kept_F],
            code=sparse.csc_array(self.code[:, kept_F]),
            index_F=self.index_F[kept_F],
        )


def read_dictionary(
    dictionary: Dictionary, batches: Batches, text: TokenBlocks | None = None, watch: Watch = None
) -> Reading:
    """The reading of a dictionary from one pass over held-out batches `[B, L, D]`, in the dictionary's own scale.

    text, watch: as of `measure_dictionary`.
    """
    measured = measure_dictionary(dictionary, batches, text, watch)
    n_tokens, alive = measured.code.shape[0], measured.alive_GF.ravel().nonzero()[0]
    decoder_FLD = dictionary.decoder_FLD().float().cpu().numpy()
    held_F = profile.lifespan(profile.layer_profile(decoder_FLD))
    tokens_F = np.bincount(measured.code.indices, minlength=len(decoder_FLD))
    return Reading(
        seed=dictionary.config.seed,
        decoder_FLD=decoder_FLD[alive],
        code=sparse.csc_array(measured.code.tocsc()[:, alive]),
        explained_variance=measured.explained_variance,
        dead_share=1 - len(alive) / len(decoder_FLD),
        l0=measured.code.nnz / n_tokens,
        index_F=alive,
        n_groups=measured.n_groups,
        size=len(decoder_FLD),
        l0_layer=float(tokens_F @ held_F) / n_tokens / decoder_FLD.shape[1],
        explained_variance_L=measured.explained_variance_L,
        token_T=measured.token_T,
        outliers=measured.outliers,
        explained_left_E=measured.explained_left_E,
    )


def common_tokens(readings: Sequence[Reading]) -> np.ndarray:
    """Numbers in the text of the tokens that all readings have; an outlier of one model may be usual in another."""
    known = [reading.token_T for reading in readings if reading.token_T is not None]
    common = functools.reduce(np.intersect1d, known) if len(known) == len(readings) else np.zeros(0)
    if not len(common):
        raise ValueError(f"{len(readings)} readings have no token in common; read them on the same text")
    return common


def representatives(reading: Reading) -> np.ndarray:
    """Indices of the most active feature of each set of duplicates, ascending."""
    correlation = matching.activation_correlation(reading.code, reading.code)
    pairs_m2 = matching.joined_pairs(matching.marked_pairs(i, block > DUPLICATE) for i, block in correlation.blocks())
    alike = matching.pair_cosines(reading.decoder_FLD, reading.decoder_FLD, pairs_m2) > DUPLICATE
    label_F = matching.joined(len(reading), pairs_m2[alike])
    order = np.argsort(-np.diff(reading.code.indptr), kind="stable")
    return np.sort(order[np.unique(label_F[order], return_index=True)[1]])


def save_reading(reading: Reading, path: str | Path) -> None:
    """Write a reading to one file, atomically, sealed."""
    code = sparse.csc_array(reading.code)
    tensors = {
        "decoder_FLD": np.ascontiguousarray(reading.decoder_FLD, dtype=np.float32),
        "values": code.data.astype(np.float32),
        "rows": code.indices.astype(np.int32),
        "starts": code.indptr.astype(np.int64),
        "whole": np.array([reading.seed, *code.shape, reading.n_groups, reading.size], dtype=np.int64),
        "numbers": np.array([getattr(reading, name) for name in _NUMBERS], dtype=np.float64),
        "explained_variance_L": reading.explained_variance_L.astype(np.float64),
        "index_F": reading.index_F.astype(np.int64),
    }
    for name, kind in (("token_T", np.int64), ("explained_left_E", np.float64)):
        if (known := getattr(reading, name)) is not None:
            tensors[name] = known.astype(kind)
    save_tensors({name: torch.from_numpy(array) for name, array in tensors.items()}, path)


def load_reading(path: str | Path) -> Reading:
    """The reading in a file; a DamagedArtifactError if it is not whole, a FileNotFoundError if there is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such reading; run the study's cells first")
    found = {name: tensor.numpy() for name, tensor in load_tensors(path, mend=MEND).items()}
    with reading_file(path, mend=MEND):
        seed, n_tokens, n_features, n_groups, size = (int(value) for value in found["whole"])
        if len(found["decoder_FLD"]) != n_features:
            raise ValueError(f"{len(found['decoder_FLD'])} decoder rows for {n_features} features")
        code = sparse.csc_array((found["values"], found["rows"], found["starts"]), shape=(n_tokens, n_features))
        code.check_format()
        return Reading(
            seed=seed,
            decoder_FLD=found["decoder_FLD"],
            code=code,
            index_F=found["index_F"],
            token_T=found.get("token_T"),
            explained_left_E=found.get("explained_left_E"),
            n_groups=n_groups,
            size=size,
            explained_variance_L=found["explained_variance_L"],
            **dict(zip(_NUMBERS, found["numbers"].tolist(), strict=True)),
        )
