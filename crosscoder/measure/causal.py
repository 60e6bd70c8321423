"""On how many layers a feature acts on what the subject predicts: logits with its share of one layer, or all, gone.

The share of a feature at layer l is what its activation writes there, in the subject's own units: `f W_l / scale_l`.
At sites of kind `write` it is taken off what block l adds. A residual stream still holds what earlier blocks wrote, so
there the share of a layer is what the row gains since the dictionary's layer before, `f (W_l / s_l - W_l' / s_l')`:
with all shares gone every stream lacks `f W_l / s_l`. Later blocks read what is left, and react; activations f stay
those of the clean run. A feature is taken off a row of tokens wherever it is active there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from crosscoder.data.hooks import replacing
from crosscoder.dictionary import Dictionary
from crosscoder.foundation.console import Progress
from crosscoder.foundation.signals import safe_points
from crosscoder.measure import profile, splice
from crosscoder.measure.matching import joint_rows, mean_square
from crosscoder.measure.profile import known_mean
from crosscoder.measure.reading import minimum_probability, sparse_rows
from crosscoder.measure.splice import Sites
from crosscoder.measure.welch import without_documents
from crosscoder.results.table import Value

N_FEATURES = 50  # draws
N_ROWS = 8  # of tokens, for each feature
BEYOND = 1.2  # additivity above which layers are redundant; below 1 / BEYOND they act in conjunction
ROUNDING = 1e-10  # share of the clean logits' squared norm at or below which an effect is rounding


@dataclass(frozen=True)
class CausalLayers:
    """Effects of n features on logits: squared norms of logit differences, means over each feature's active tokens.

    Differences are less their mean over the vocabulary, which no prediction depends on. D_l is that of layer l alone,
    D_all that of all layers together, stacked over the tokens. A squared norm that is no more than rounding is 0.

    feature_n: the features' numbers in the dictionary, ascending. draws_n: how often each was drawn; they weight every
        mean over features.
    tokens_n: active tokens that were measured.
    effect_nL: |D_l|^2. whole_n: |D_all|^2. sum_n: |sum_l D_l|^2. inner_n: <D_all, sum_l D_l>.
    elsewhere_n: of the summed |D_all|^2 of all tokens, the share of those on which the feature is not active.
    left: numbers of the summary by name, without each document of the rows, `[documents]`; of the same features.
    """

    feature_n: np.ndarray
    draws_n: np.ndarray
    tokens_n: np.ndarray
    effect_nL: np.ndarray
    whole_n: np.ndarray
    sum_n: np.ndarray
    inner_n: np.ndarray
    elsewhere_n: np.ndarray
    left: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def layers_n(self) -> np.ndarray:
        """c: the participation ratio of |D_l|^2 over layers, from 1 (one layer acts) to L (all alike); nan for none."""
        c_n = profile.participation_ratio(profile.shares(self.effect_nL))
        return np.where(c_n > 0, c_n, np.nan)

    @property
    def additivity_n(self) -> np.ndarray:
        """a = <D_all, sum_l D_l> / |sum_l D_l|^2; nan for a feature without effect.

        1 where logits are linear in the writes. Below 1 where the effect levels off as more is taken off: 1 / m for an
        AND of m layers, as one gone is as bad as all; a norm that a large part is taken off too can do this. Above 1
        where it grows: an OR of layers, which stand in for one another, or anything that the whole saturates; infinite
        where the layers alone have no effect.
        """
        silent_n = (self.sum_n == 0) & (self.whole_n > 0)
        return np.where(silent_n, np.inf, _ratio(self.inner_n, self.sum_n))

    @property
    def best_share_n(self) -> np.ndarray:
        """The largest |D_l|^2 over |D_all|^2; above 1 where other layers oppose it, nan where all have no effect."""
        return _ratio(self.effect_nL.max(1), self.whole_n)

    def summary(self) -> dict[str, Value]:
        """Over draws, each of which counts alike; nan where no feature has an effect.

        `causal_layers` is the geometric mean of c. Shares are of features with an additivity: `conjunctive_share` of
        those below 1 / 1.2, `redundant_share` of those above 1.2.
        """
        additivity = np.repeat(self.additivity_n, self.draws_n)
        additivity = additivity[~np.isnan(additivity)]
        return {
            "causal_draws": int(self.draws_n.sum()),
            "causal_features": len(self.feature_n),
            "causal_tokens": int(self.tokens_n.sum()),
            "causal_layers": float(np.exp(self._mean(np.log(self.layers_n)))),
            "additivity": float(np.median(additivity)) if len(additivity) else float("nan"),
            "conjunctive_share": known_mean(additivity < 1 / BEYOND),
            "redundant_share": known_mean(additivity > BEYOND),
            "best_layer_effect": self._mean(self.best_share_n),
            "effect_elsewhere": self._mean(self.elsewhere_n),
            **{f"{key}_left": left_E.tolist() for key, left_E in self.left.items()},
        }

    def _mean(self, value_n: np.ndarray) -> float:
        return known_mean(np.repeat(value_n, self.draws_n))


@torch.no_grad()
def measure_causal_layers(
    dictionary: Dictionary,
    model: nn.Module,
    blocks: Sequence[nn.Module],
    ids_RS: Tensor,
    *,
    layers: Sequence[int],
    kind: Literal["residual", "write"],
    n_features: int = N_FEATURES,
    n_rows: int = N_ROWS,
    skip_positions: int | None = None,
    seed: int = 0,
    document_R: np.ndarray | None = None,
    quiet: bool = False,
) -> CausalLayers:
    """Effects on logits of taking features of a crosscoder off each layer, and off all, on held-out rows `ids_RS`.

    n_features: how many alive features are drawn, with probability proportional to energy `E[f^2] |W|^2` in units of
        the dictionary's inputs: with the subject's own, a layer that writes ten times the rest would decide the draw.
        Systematic sampling (Madow 1949): a feature is drawn as often as its share of the energy says, up to one, so
        that means over draws estimate means by energy, whatever the dictionary's size.
    n_rows: at most so many rows for each feature, drawn from those in which it is active.
    document_R: the document of each row; then what the summary says is known without each of them too.
    layers, skip_positions: as of `splice_losses`. Tokens that the dictionary was not made to read count as inactive.

    Costs `n_features * n_rows * (L + 2)` rows of the model; the logits of one feature's row, L + 2 times, are held at
    once, or where they are too large the hidden states before the output head.

    Raises:
        MismatchError: the dictionary reads other sites, or another model.
        ValueError: the dictionary is a bank, the model's weights are shorter than float32, `layers` does not name one
            block for each layer, or no feature is alive.
    """
    n_layers, d_model = dictionary.config.n_layers, dictionary.config.d_model
    if dictionary.grouped().encoder_GFN.shape[2] != n_layers * d_model:
        raise ValueError("the dictionary is a bank; causal layers need features that write all layers")
    require_float32(model)
    at = {"layers": layers, "kind": kind, "skip_positions": skip_positions}
    sites = Sites(dictionary, model, blocks, ids_RS, n_rows=n_layers + 2, **at)
    row_bytes = ids_RS.shape[1] * max(sites.subject.token_bytes, 4 * n_layers * d_model)
    code_TF = read_text(sites, ids_RS, max(1, splice.LOGIT_BYTES // row_bytes)).code_TF
    feature_n, draws_n = _draw(dictionary, code_TF, n_features, seed)
    code_Tn = code_TF[:, feature_n]
    jobs_J2 = choose_rows(code_Tn, feature_n, ids_RS.shape[1], n_rows, seed)
    share_nLD = splice.feature_shares(dictionary, feature_n.tolist(), kind)
    documents, of_R = np.unique(np.zeros(len(ids_RS)) if document_R is None else document_R, return_inverse=True)
    sums_EnQ = np.zeros((len(documents), len(feature_n), n_layers + 6))  # the last: tokens
    n_jobs = max(1, splice.LOGIT_BYTES // (row_bytes * (n_layers + 2)))
    with Progress("causal layers", len(jobs_J2), unit="rows", quiet=quiet) as progress:
        for start in safe_points(range(0, len(jobs_J2), n_jobs)):
            index_b, row_b = jobs_J2[start : start + n_jobs].T
            value_bS = values_of(code_Tn, index_b, row_b, ids_RS.shape[1])
            sums_bQ = _sum_effects(sites, ids_RS[row_b], value_bS, share_nLD[index_b])
            np.add.at(sums_EnQ, (of_R[row_b], index_b), sums_bQ)
            progress.advance(len(row_b))
    found = _assemble(feature_n, draws_n, sums_EnQ.sum(0))
    if len(documents) > 1:
        known = partial(_weighted, feature_n, draws_n, sums_EnQ)
        log_c_E, additivity_E, share_E = without_documents(known, len(documents)).T
        left = {"causal_layers": np.exp(log_c_E), "additivity": additivity_E, "conjunctive_share": share_E}
        found = replace(found, left={key: left_E for key, left_E in left.items() if np.isfinite(left_E).all()})
    return found


def _weighted(feature_n: np.ndarray, draws_n: np.ndarray, sums_EnQ: np.ndarray, weight_WE: np.ndarray) -> np.ndarray:
    """ln c, additivity and conjunctive share at weights of the documents, `[W, 3]`."""
    found = [_assemble(feature_n, draws_n, np.tensordot(one_E, sums_EnQ, 1)).summary() for one_E in weight_WE]
    keys = ("causal_layers", "additivity", "conjunctive_share")
    value_W3 = np.array([[one[key] for key in keys] for one in found], dtype=np.float64)
    return np.column_stack([np.log(value_W3[:, 0]), value_W3[:, 1:]])


def require_float32(model: nn.Module) -> None:
    """Refuse a model whose weights are shorter than float32; a ValueError that says so."""
    short = {one.dtype for one in model.parameters() if one.is_floating_point() and one.dtype.itemsize < 4}
    if short:
        raise ValueError(f"the model has weights of {short.pop()}, too coarse for small effects; load it in float32")


class TextRead(NamedTuple):
    """What a dictionary reads of T tokens: activations `[T, F]` (of a bank `[T, L * F]`), 0 where it was not made to
    read; where it was; and of N of these tokens, evenly spread, what sites hold in the subject's units."""

    code_TF: sparse.csc_array
    is_read_T: np.ndarray
    x_NLD: Tensor


def read_text(sites: Sites, ids_RS: Tensor, n_rows: int, progress: Progress | None = None, n_kept: int = 0) -> TextRead:
    """Activations on all tokens, and what sites hold at `n_kept` of them or a few more, of less text at fewer.

    n_rows: how many are given to the model at once.
    """
    parts, is_read, kept, n_read = [], [], [], 0
    stride = max(1, ids_RS.numel() // max(1, n_kept))
    for ids_BS in ids_RS.split(n_rows):
        if progress is not None:
            progress.advance(len(ids_BS))
        _, x_BSLD = sites.record(ids_BS)
        code = sites.dictionary.encode((x_BSLD * sites.scale_L1).flatten(0, 1))
        n_groups = math.prod(code.batch_shape[1:])
        rows = sparse_rows(code, ids_BS.numel(), n_groups, sites.dictionary.config.n_features)
        is_read_BS = sites.read(ids_BS, x_BSLD)
        kept.append(x_BSLD[is_read_BS][-n_read % stride :: stride][:n_kept])
        n_read += int(is_read_BS.sum())
        is_read.append(is_read_BS.flatten().cpu().numpy())
        parts.append(sparse.csr_array(sparse.diags_array(is_read[-1].astype(np.float32)) @ rows))
        parts[-1].eliminate_zeros()
    code_TF = sparse.csc_array(sparse.vstack(parts, format="csc"))
    return TextRead(code_TF, np.concatenate(is_read), torch.cat(kept))


def _draw(
    dictionary: Dictionary, code_TF: sparse.csc_array, n_features: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The drawn features and how often each was."""
    square_F = np.square(joint_rows(dictionary.decoder_FLD().double().cpu().numpy())).sum(1)
    is_alive_F = np.diff(code_TF.indptr) / code_TF.shape[0] > minimum_probability(code_TF.shape[0])
    energy_F = np.where(is_alive_F, mean_square(code_TF) * square_F, 0.0)
    if not energy_F.any():
        raise ValueError(f"no feature is active on more than 10 of {code_TF.shape[0]} tokens; give more text")
    ends_F = energy_F.cumsum() / energy_F.sum()
    places = (np.arange(n_features) + np.random.default_rng(seed).random()) / n_features
    return np.unique(ends_F.searchsorted(places, side="right"), return_counts=True)


def choose_rows(code_Tn: sparse.csc_array, feature_n: np.ndarray, length: int, n_rows: int, seed: int) -> np.ndarray:
    """For each feature, by its place among the drawn, the rows to measure, ascending `[J, 2]`."""
    jobs = []
    for index, feature in enumerate(feature_n):
        tokens = code_Tn.indices[code_Tn.indptr[index] : code_Tn.indptr[index + 1]]
        rows = np.unique(tokens // length)
        # Which rows a feature gets depends on it alone, not on what else was drawn.
        drawn = np.random.default_rng([seed, feature]).permutation(rows)[:n_rows]
        jobs += [(index, row) for row in np.sort(drawn)]
    return np.array(jobs)


def values_of(code_Tn: sparse.csc_array, index_b: np.ndarray, row_b: np.ndarray, length: int) -> Tensor:
    """The activation of one feature on one row for each job, `[b, S]`."""
    columns = [code_Tn[:, [index]].toarray().reshape(-1, length) for index in index_b]
    return torch.from_numpy(np.stack([column[row] for column, row in zip(columns, row_b, strict=True)]))


def _sum_effects(sites: Sites, ids_bS: Tensor, value_bS: Tensor, share_bLD: Tensor) -> np.ndarray:
    """Sums over tokens for each job, `[b, L + 6]`: of |D_l|^2 by layer, |D_all|^2, |sum D_l|^2, <D_all, sum D_l> and
    the squared clean logits where the feature is active, of |D_all|^2 everywhere, and of active tokens."""
    n_layers, n_jobs, length = share_bLD.shape[1], *ids_bS.shape
    # Each layer alone, all of them, none.
    gone_VL = torch.cat([torch.eye(n_layers), torch.ones(1, n_layers), torch.zeros(1, n_layers)])

    def take_off(number: int, given: Tensor, returned: Tensor) -> Tensor:
        part_bSD = value_bS[:, :, None].to(returned) * share_bLD[:, number, None].to(returned)
        return returned - (gone_VL[:, number, None, None, None].to(returned) * part_bSD).flatten(0, 1)

    with replacing([sites.blocks[layer - 1] for layer in sites.layers], take_off):
        logits = sites.subject.run(ids_bS.repeat(len(gone_VL), 1))
    sums_bQ = torch.zeros(n_jobs, n_layers + 6, dtype=torch.float64)
    sums_bQ[:, -1] = (value_bS > 0).sum(1)
    step = max(1, splice.BLOCK_BYTES // (sites.subject.token_bytes * n_jobs * len(gone_VL)))
    for start in range(sites.skip, length, step):
        stop = min(start + step, length)
        active_bP = (value_bS[:, start:stop] > 0).double()
        centred = logits(start, stop).float()
        centred = (centred - centred.mean(-1, keepdim=True)).unflatten(0, (len(gone_VL), n_jobs))
        off, clean = centred[:-1] - centred[-1], centred[-1]
        total, whole = off[:-1].sum(0), off[-1]
        squares = [*off, total]
        each = [one.square().sum(-1) for one in squares] + [(total * whole).sum(-1), clean.square().sum(-1)]
        sums_bQ[:, :-2] += torch.stack([(one.double().cpu() * active_bP).sum(1) for one in each], dim=1)
        sums_bQ[:, -2] += each[n_layers].double().cpu().sum(1)
    return sums_bQ.numpy()


def _assemble(feature_n: np.ndarray, draws_n: np.ndarray, sums_nQ: np.ndarray) -> CausalLayers:
    sums_nQ, tokens_n = sums_nQ[:, :-1], sums_nQ[:, -1]
    floor_n1 = ROUNDING * sums_nQ[:, [-2]]
    squares_nQ = np.where(sums_nQ > floor_n1, sums_nQ, 0.0) / tokens_n[:, None]
    whole_n, total_n, _, _, everywhere_n = squares_nQ[:, -5:].T
    return CausalLayers(
        feature_n=feature_n,
        draws_n=draws_n,
        tokens_n=tokens_n,
        effect_nL=squares_nQ[:, :-5],
        whole_n=whole_n,
        sum_n=total_n,
        inner_n=sums_nQ[:, -3] / tokens_n,
        elsewhere_n=1 - _ratio(whole_n, everywhere_n),
    )


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """nan where the bottom is 0."""
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)
