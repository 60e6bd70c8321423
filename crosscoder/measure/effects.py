"""What the subject predicts worse, and otherwise, when one feature of a dictionary is taken off.

A feature is taken off a row of tokens wherever it is active there, at all its layers or at one; activations stay those
of the clean run (`measure.causal`). Beside it, at the same tokens and by the same activations, random directions are
taken off whose norm on each layer is that of what the feature adds there: what any push of that size does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from scipy import sparse, stats
from torch import Tensor, nn
from torch.nn import functional as F

from crosscoder.data.hooks import replacing
from crosscoder.dictionary import Dictionary
from crosscoder.foundation.console import Progress
from crosscoder.measure import splice
from crosscoder.measure.causal import choose_rows, read_code, require_float32, values_of
from crosscoder.measure.matching import layer_squares, mean_square
from crosscoder.measure.reading import minimum_probability
from crosscoder.measure.splice import ALL_LAYERS, Sites
from crosscoder.results.table import CONFIDENCE, Estimate

N_ROWS = 8  # of tokens, for each feature
N_DRAWS = 4  # of random directions
N_TOKENS = 5  # of the vocabulary, whose probability rises or falls most
FEWEST_DOCUMENTS = 30  # for an interval
MEASURES = ("loss", "loss_active", "kl", "kl_active")
By = Literal["use", "rate"]


@dataclass(frozen=True)
class Effect:
    """What taking one feature off does at P places, on measured rows of E documents, beside R random directions.

    places: `all`, or one layer's number.
    sums_EPVM: sums over predictions of `MEASURES`, V = 1 + R: the feature, then the draws. Loss in nats above the clean
        one; KL of the changed from the clean distribution.
    tokens_E, active_E: predictions measured in each document, and those at tokens where the feature is active.
    rate, energy: of the whole text, the share of tokens on which it is active, and its share of the dictionary's energy
        `E[f^2] |W|^2`.
    row_share: the share of the text's rows in which it is active; the others do not change.
    n_measured: rows that were run.
    change_V: mean change of each token's probability where the feature is active, at the first place.
    """

    feature: int
    places: tuple[str, ...]
    sums_EPVM: np.ndarray
    tokens_E: np.ndarray
    active_E: np.ndarray
    rate: float
    energy: float
    row_share: float
    n_measured: int
    change_V: np.ndarray

    @cached_property
    def means_PVM(self) -> np.ndarray:
        """Means over all tokens of the text, or over those where the feature is active."""
        return self._means(np.ones(len(self.tokens_E), dtype=bool))

    def _means(self, kept_E: np.ndarray) -> np.ndarray:
        every, active = self.row_share / self.tokens_E[kept_E].sum(), 1 / self.active_E[kept_E].sum()
        return self.sums_EPVM[kept_E].sum(0) * np.array([every, active, every, active])

    def interval(self, place: int, measure: str) -> Estimate | float:
        """The mean, with its 90 % interval by leaving out one document at a time where there are thirty or more."""
        m, n = MEASURES.index(measure), len(self.tokens_E)
        value = float(self.means_PVM[place, 0, m])
        if n < FEWEST_DOCUMENTS:
            return value
        left = np.array([self._means(np.arange(n) != e)[place, 0, m] for e in range(n)])
        error = math.sqrt((n - 1) * left.var())
        reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
        return Estimate(value, value - reach, value + reach)

    def control(self, place: int, measure: str) -> Estimate | None:
        """The mean over random directions, with their range; None where none were drawn."""
        draws = self.means_PVM[place, 1:, MEASURES.index(measure)]
        return Estimate.over(draws.tolist()) if len(draws) else None

    def beyond(self, place: int) -> bool | None:
        """Whether it changes the distribution where it is active more than every random direction."""
        control = self.control(place, "kl_active")
        return None if control is None else bool(self.means_PVM[place, 0, MEASURES.index("kl_active")] > control.high)

    def changed(self, n_tokens: int = N_TOKENS) -> tuple[list[int], list[int]]:
        """The vocabulary's tokens whose probability rises most, and falls most, with the feature gone."""
        order = np.argsort(-self.change_V, kind="stable")
        up = [int(i) for i in order[:n_tokens] if self.change_V[i] > 0]
        return up, [int(i) for i in order[::-1][:n_tokens] if self.change_V[i] < 0]


@torch.no_grad()
def measure_effects(
    dictionary: Dictionary,
    model: nn.Module,
    blocks: Sequence[nn.Module],
    ids_RS: Tensor,
    document_R: np.ndarray,
    features: Sequence[int] | int,
    *,
    layers: Sequence[int],
    kind: Literal["residual", "write"],
    by: By = "use",
    n_rows: int = N_ROWS,
    n_draws: int = N_DRAWS,
    each_layer: bool = False,
    seed: int = 0,
    quiet: bool = False,
) -> dict[int, Effect | str]:
    """The effect of each of some features on held-out rows `ids_RS`; a reason for one that is never active there.

    document_R: each row's document. features: numbers (of a bank `layer * F + feature`), or how many of the alive ones,
        by energy `E[f^2] |W|^2` (`use`) or by firing rate.
    n_rows: at most so many rows for each feature, drawn from those in which it is active. each_layer: also at each
        layer alone; of a bank's features all layers are one.
    layers: as of `splice_losses`.

    Costs `n_rows (1 + places (1 + n_draws))` rows of the model for each feature.

    Raises:
        MismatchError: the dictionary reads other sites, or another model.
        ValueError: there is no such feature, none is alive, or the model's weights are shorter than float32.
    """
    require_float32(model)
    n_layers, d_model = dictionary.config.n_layers, dictionary.config.d_model
    each_layer &= n_layers > 1 and dictionary.grouped().encoder_GFN.shape[2] == n_layers * d_model
    places = (ALL_LAYERS, *(str(layer) for layer in layers if each_layer))
    n_variants = 1 + len(places) * (1 + n_draws)
    sites = Sites(dictionary, model, blocks, ids_RS, layers=layers, kind=kind, n_rows=n_variants)
    row_bytes = ids_RS.shape[1] * max(sites.subject.token_bytes, 4 * n_layers * d_model)
    with Progress("reading the text", len(ids_RS), unit="row", quiet=quiet) as progress:
        code_TF = read_code(sites, ids_RS, max(1, splice.LOGIT_BYTES // row_bytes), progress)
    feature_n, energy_F = _choose(dictionary, code_TF, features, by)
    code_Tn, length = code_TF[:, feature_n], ids_RS.shape[1]
    # The last token of a row predicts nothing that is known.
    predicts_T = np.tile(np.arange(length) < length - 1, len(ids_RS))
    code_Tn = sparse.csc_array(sparse.diags_array(predicts_T.astype(np.float32)) @ code_Tn)
    code_Tn.eliminate_zeros()
    shares_nLD = splice.feature_shares(dictionary, feature_n.tolist(), kind)
    jobs_J2 = choose_rows(code_Tn, feature_n, length, n_rows, seed).reshape(-1, 2)
    found: dict[int, Effect | str] = {}
    with Progress("effects", len(jobs_J2), unit="row", quiet=quiet) as progress:
        for index, feature in enumerate(feature_n.tolist()):
            row_j = jobs_J2[jobs_J2[:, 0] == index, 1]
            if not len(row_j):
                found[feature] = f"not active on any of {code_TF.shape[0]:,} tokens"
                continue
            active_R = np.bincount(code_Tn[:, [index]].indices // length, minlength=len(ids_RS)) > 0
            sums = _Sums(places, sites, document_R[row_j])
            directions_VLD = _directions(shares_nLD[index], len(places), n_draws, [seed, feature])
            for part in np.array_split(row_j, -(-len(row_j) // max(1, splice.LOGIT_BYTES // (row_bytes * n_variants)))):
                value_bS = values_of(code_Tn, np.full(len(part), index), part, length)
                sums.add(ids_RS[part], value_bS, directions_VLD, document_R[part])
                progress.advance(len(part))
            rate = np.diff(code_TF.indptr)[feature] / code_TF.shape[0]
            found[feature] = sums.effect(
                feature, float(rate), float(energy_F[feature] / energy_F.sum()), float(active_R.mean())
            )
    return found


def _choose(
    dictionary: Dictionary, code_TF: sparse.csc_array, features: Sequence[int] | int, by: By
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of features, in the order asked for, and the energy of all."""
    n_features, rate_F = code_TF.shape[1], np.diff(code_TF.indptr) / code_TF.shape[0]
    energy_F = mean_square(code_TF) * layer_squares(dictionary.decoder_FLD().float().cpu().numpy()).sum(1)
    if not isinstance(features, int):
        wrong = [one for one in features if not 0 <= one < n_features]
        if wrong or not len(features):
            raise ValueError(f"features {wrong or 'none'}; expected numbers from 0 to {n_features - 1}")
        return np.array(list(dict.fromkeys(features))), energy_F
    worth_F = np.where(rate_F > minimum_probability(code_TF.shape[0]), energy_F if by == "use" else rate_F, 0.0)
    order = np.argsort(-worth_F, kind="stable")[: max(0, features)]
    if not len(order) or not worth_F[order[0]] > 0:
        raise ValueError(f"no feature is active on more than 10 of {code_TF.shape[0]:,} tokens; give more text")
    return order[worth_F[order] > 0], energy_F


def _directions(share_LD: Tensor, n_places: int, n_draws: int, seed: list[int]) -> Tensor:
    """What is taken off for an activation of 1 in each variant, `[1 + P (1 + R), L, D]`: nothing; at every place the
    feature's share, then random directions of its norm on each layer."""
    n_layers = len(share_LD)
    random = np.random.default_rng(seed).standard_normal((n_draws, *share_LD.shape)).astype(np.float32)
    random_RLD = F.normalize(torch.from_numpy(random).to(share_LD), dim=-1) * share_LD.norm(dim=-1, keepdim=True)
    own_VLD = torch.cat([share_LD[None], random_RLD])
    masks_PL = torch.cat([torch.ones(1, n_layers), torch.eye(n_layers)])[:n_places].to(share_LD)
    places_PVLD = masks_PL[:, None, :, None] * own_VLD
    return torch.cat([torch.zeros_like(share_LD)[None], places_PVLD.flatten(0, 1)])


class _Sums:
    """Sums over the predictions of one feature's rows, by document."""

    def __init__(self, places: tuple[str, ...], sites: Sites, document_j: np.ndarray) -> None:
        self.places, self.sites, self.documents = places, sites, np.unique(document_j)
        self.n_measured = len(document_j)
        self.sums_EVM: np.ndarray | None = None
        self.tokens_E, self.active_E = (np.zeros(len(self.documents), dtype=np.int64) for _ in range(2))
        self.change_V: Tensor | float = 0.0

    def add(self, ids_bS: Tensor, value_bS: Tensor, directions_VLD: Tensor, document_b: np.ndarray) -> None:
        """Run some rows in every variant, the first of which is clean."""
        sites, shape = self.sites, (len(directions_VLD), len(ids_bS))

        def take_off(number: int, given: Tensor, returned: Tensor) -> Tensor:
            part_VbSD = directions_VLD[:, None, None, number].to(returned) * value_bS[None, :, :, None].to(returned)
            return returned - part_VbSD.flatten(0, 1)

        with replacing([sites.blocks[layer - 1] for layer in sites.layers], take_off):
            logits = sites.subject.run(ids_bS.repeat(shape[0], 1))
        sums_VbM, last = np.zeros((shape[0] - 1, shape[1], len(MEASURES))), ids_bS.shape[1] - 1
        step = max(1, splice.BLOCK_BYTES // (sites.subject.token_bytes * math.prod(shape)))
        for start in range(sites.skip, last, step):
            stop = min(start + step, last)
            log_VbPW = logits(start, stop).float().log_softmax(-1).unflatten(0, shape)
            target_bP = ids_bS[:, start + 1 : stop + 1].to(log_VbPW.device)
            target_VbP1 = target_bP.expand(shape[0], -1, -1)[..., None]
            loss_VbP = -log_VbPW.gather(-1, target_VbP1).squeeze(-1)
            clean_bPW, changed_VbPW = log_VbPW[0], log_VbPW[1:]
            kl_VbP = (clean_bPW.exp() * (clean_bPW - changed_VbPW)).sum(-1)
            active_bP = (value_bS[:, start:stop] > 0).to(log_VbPW.device)
            for i, one_VbP in enumerate((loss_VbP[1:] - loss_VbP[0], kl_VbP)):
                sums_VbM[..., 2 * i] += one_VbP.double().sum(-1).cpu().numpy()
                sums_VbM[..., 2 * i + 1] += (one_VbP * active_bP).double().sum(-1).cpu().numpy()
            self.change_V += (changed_VbPW[0][active_bP].exp() - clean_bPW[active_bP].exp()).double().sum(0)
        place_b = np.searchsorted(self.documents, document_b)
        if self.sums_EVM is None:
            self.sums_EVM = np.zeros((len(self.documents), shape[0] - 1, len(MEASURES)))
        np.add.at(self.sums_EVM, place_b, sums_VbM.transpose(1, 0, 2))
        np.add.at(self.tokens_E, place_b, last - sites.skip)
        np.add.at(self.active_E, place_b, (value_bS[:, sites.skip : last] > 0).sum(1).numpy())

    def effect(self, feature: int, rate: float, energy: float, row_share: float) -> Effect:
        """What was summed."""
        assert self.sums_EVM is not None
        assert isinstance(self.change_V, Tensor)
        return Effect(
            feature=feature,
            places=self.places,
            sums_EPVM=self.sums_EVM.reshape(len(self.documents), len(self.places), -1, len(MEASURES)),
            tokens_E=self.tokens_E,
            active_E=self.active_E,
            rate=rate,
            energy=energy,
            row_share=row_share,
            n_measured=self.n_measured,
            change_V=(self.change_V / self.active_E.sum()).cpu().numpy(),
        )
