"""What the subject predicts otherwise when one feature of a dictionary is taken off, or added where it is not active.

A feature is taken off a row of tokens wherever it is active there, at all its layers or at one; activations stay those
of the clean run (`measure.causal`). It is added at all other tokens that the dictionary reads, at its mean activation.
The tokens that a feature promotes are told by its weights alone, so that they may or may not move.

Beside it, at the same tokens and by the same activations, directions of its norm on each layer are moved: isotropic
ones, and differences of what sites hold at two random tokens, which have the activations' own covariance (Heimersheim
and Mendel 2024; Lee and Heimersheim 2024).
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
from crosscoder.measure.causal import choose_rows, read_text, require_float32, values_of
from crosscoder.measure.logits import Readout
from crosscoder.measure.matching import layer_squares, mean_square
from crosscoder.measure.reading import minimum_probability
from crosscoder.measure.splice import ALL_LAYERS, Sites, added
from crosscoder.results.table import CONFIDENCE, Estimate

N_ROWS = 8  # of tokens, for each feature
N_DRAWS = 4  # of random directions, of each control
N_TOKENS = 5  # of the vocabulary, whose probability rises or falls most
N_PROMOTED = 10  # of the vocabulary, that a feature promotes most
N_KEPT = 512  # tokens, of whose activations differences are taken
FEWEST_DOCUMENTS = 10  # for an interval
CONTROLS = ("isotropic", "activations")
STEERED = "steered"
"""The place, beside `all` and layers, at which a feature is added instead of taken off."""
MEASURES = ("loss", "loss_active", "kl", "kl_active", "promoted")
By = Literal["use", "rate"]


@dataclass(frozen=True)
class Effect:
    """What moving one feature does at P places, on measured rows of E documents, beside R directions of each control.

    places: `all`, layers' numbers, and `steered`, where it is added on all layers.
    sums_EPVM: sums over predictions of `MEASURES`, V = 1 + 2 R: the feature, then the draws of each of `CONTROLS`. Loss
        in nats above the clean one; KL of the changed from the clean distribution; change of the log-probability of
        the promoted tokens, their mean.
    tokens_E, moved_EP: predictions measured in each document, and those at tokens where the feature is moved: taken off
        where it is active, added where it is not.
    rate, energy: of the whole text, the share of tokens on which it is active, and its share of the dictionary's energy
        `E[f^2] |W|^2`. usual: its mean activation where it is active.
    row_share: the share of the text's rows in which it is active; the others do not change.
    n_measured: rows that were run.
    promoted_m: the vocabulary's tokens that it promotes most, the first first; none where no readout is known.
    change_V: mean change of each token's probability where the feature is active, at the first place.
    """

    feature: int
    places: tuple[str, ...]
    sums_EPVM: np.ndarray
    tokens_E: np.ndarray
    moved_EP: np.ndarray
    rate: float
    energy: float
    usual: float
    row_share: float
    n_measured: int
    promoted_m: tuple[int, ...]
    change_V: np.ndarray

    @cached_property
    def means_PVM(self) -> np.ndarray:
        """Means over all tokens of the text, or over those where the feature is moved; nan where it is at none."""
        return self._means(np.ones(len(self.tokens_E), dtype=bool))

    def _means(self, kept_E: np.ndarray) -> np.ndarray:
        moved_P = self.moved_EP[kept_E].sum(0).astype(float)
        each_P = np.divide(1, moved_P, out=np.full_like(moved_P, np.nan), where=moved_P > 0)
        every_P = np.full_like(moved_P, self.row_share / self.tokens_E[kept_E].sum())
        return self.sums_EPVM[kept_E].sum(0) * np.stack([every_P, each_P, every_P, each_P, each_P], axis=1)[:, None]

    def interval(self, place: int, measure: str) -> Estimate | float:
        """The mean, with its 90 % interval by leaving out one document at a time where there are ten or more."""
        m, n = MEASURES.index(measure), len(self.tokens_E)
        value = float(self.means_PVM[place, 0, m])
        if n < FEWEST_DOCUMENTS or not math.isfinite(value):
            return value
        left = np.array([self._means(np.arange(n) != e)[place, 0, m] for e in range(n)])
        reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * math.sqrt((n - 1) * left.var())
        return Estimate(value, value - reach, value + reach)

    def control(self, place: int, measure: str, control: str) -> Estimate | None:
        """The mean over one control's directions, with their range; None where none were drawn."""
        draws = np.split(self.means_PVM[place, 1:, MEASURES.index(measure)], len(CONTROLS))[CONTROLS.index(control)]
        return Estimate.over(draws.tolist()) if len(draws) and np.isfinite(draws).all() else None

    def beyond(self, place: int, measure: str, control: str) -> bool | None:
        """Whether it does what it should, and more so than every direction of a control: change the distribution
        (`kl_active`), lower its promoted tokens where it is taken off and raise them where it is added."""
        draws = self.control(place, measure, control)
        if draws is None:
            return None
        value = float(self.means_PVM[place, 0, MEASURES.index(measure)])
        if measure == "promoted" and self.places[place] != STEERED:
            return value < min(0.0, draws.low)
        return value > max(0.0, draws.high)

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
    readout: Readout | None = None,
    n_text: int | None = None,
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
    readout: of the model, for promoted tokens; None: none are known. n_text: of the vocabulary, the first so many are
        text. None: all.
    n_rows: at most so many rows for each feature, drawn from those in which it is active. n_draws: directions of each
        control. each_layer: also at each layer alone; of a bank's features all layers are one.
    layers: as of `splice_losses`.

    Costs `n_rows (1 + (places + 1) (1 + 2 n_draws))` rows of the model for each feature.

    Raises:
        MismatchError: the dictionary reads other sites, or another model.
        ValueError: there is no such feature, none is alive, the model's weights are shorter than float32, or the text
            has too few tokens that differ for `n_draws` differences.
    """
    require_float32(model)
    n_layers, d_model = dictionary.config.n_layers, dictionary.config.d_model
    each_layer &= n_layers > 1 and not dictionary.is_bank
    places = (ALL_LAYERS, *(str(layer) for layer in layers if each_layer), STEERED)
    n_variants = 1 + len(places) * (1 + len(CONTROLS) * n_draws)
    sites = Sites(dictionary, model, blocks, ids_RS, layers=layers, kind=kind, n_rows=n_variants)
    row_bytes = ids_RS.shape[1] * max(sites.subject.token_bytes, 4 * n_layers * d_model)
    with Progress("reading the text", len(ids_RS), unit="row", quiet=quiet) as progress:
        code_TF, is_read_T, x_NLD = read_text(
            sites, ids_RS, max(1, splice.LOGIT_BYTES // row_bytes), progress, max(N_KEPT, 8 * n_draws)
        )
    feature_n, energy_F = _choose(dictionary, code_TF, features, by)
    code_Tn, length = code_TF[:, feature_n], ids_RS.shape[1]
    # The last token of a row predicts nothing that is known.
    predicts_T = np.tile(np.arange(length) < length - 1, len(ids_RS))
    code_Tn = sparse.csc_array(sparse.diags_array(predicts_T.astype(np.float32)) @ code_Tn)
    code_Tn.eliminate_zeros()
    shares_nLD, added_NLD = splice.feature_shares(dictionary, feature_n.tolist(), kind), added(x_NLD, dictionary, kind)
    is_read_RS = torch.from_numpy(is_read_T.reshape(-1, length))
    jobs_J2 = choose_rows(code_Tn, feature_n, length, n_rows, seed).reshape(-1, 2)
    found: dict[int, Effect | str] = {}
    with Progress("effects", len(jobs_J2), unit="row", quiet=quiet) as progress:
        for index, feature in enumerate(feature_n.tolist()):
            row_j = jobs_J2[jobs_J2[:, 0] == index, 1]
            if not len(row_j):
                found[feature] = f"not active on any of {code_TF.shape[0]:,} tokens"
                continue
            active_R = np.bincount(code_Tn[:, [index]].indices // length, minlength=len(ids_RS)) > 0
            directions_VLD = _directions(shares_nLD[index], added_NLD, n_draws, [seed, feature])
            promoted_m = _promoted(readout, shares_nLD[index], n_text)
            value_P = code_TF[:, [feature]].data
            sums = _Sums(places, sites, directions_VLD, float(value_P.mean()), promoted_m, document_R[row_j])
            for part in np.array_split(row_j, -(-len(row_j) // max(1, splice.LOGIT_BYTES // (row_bytes * n_variants)))):
                value_bS = values_of(code_Tn, np.full(len(part), index), part, length)
                sums.add(ids_RS[part], value_bS, is_read_RS[part], document_R[part])
                progress.advance(len(part))
            energy = float(energy_F[feature] / energy_F.sum())
            found[feature] = sums.effect(feature, len(value_P) / code_TF.shape[0], energy, float(active_R.mean()))
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


def _promoted(readout: Readout | None, share_LD: Tensor, n_text: int | None) -> tuple[int, ...]:
    """The tokens that all that a feature adds to the stream promotes most, by the model's final norm and head."""
    if readout is None:
        return ()
    effect_V = readout.effect(share_LD.sum(0, keepdim=True))[0, :n_text]
    return tuple(effect_V.topk(min(N_PROMOTED, len(effect_V))).indices.tolist())


def _directions(share_LD: Tensor, added_NLD: Tensor, n_draws: int, seed: list[int]) -> Tensor:
    """What is moved for an activation of 1, `[1 + 2 R, L, D]`: the feature's share, then isotropic directions and
    differences of what the layers add at two random tokens, of its norm on each layer."""
    random = np.random.default_rng(seed)
    differences_RLD = _differences(added_NLD, n_draws, random)
    isotropic = torch.from_numpy(random.standard_normal(differences_RLD.shape).astype(np.float32))
    drawn = torch.cat([isotropic.to(share_LD), differences_RLD.to(share_LD)])
    return torch.cat([share_LD[None], F.normalize(drawn, dim=-1) * share_LD.norm(dim=-1, keepdim=True)])


def _differences(added_NLD: Tensor, n_draws: int, random: np.random.Generator) -> Tensor:
    """What the layers add at one random token less at another, `[R, L, D]`, of pairs that differ: the same words at the
    same positions add the same but for rounding."""
    pairs_N2 = random.permutation(len(added_NLD))[: len(added_NLD) // 2 * 2].reshape(-1, 2)
    difference_NLD = added_NLD[pairs_N2[:, 0]] - added_NLD[pairs_N2[:, 1]]
    norm_NL = difference_NLD.norm(dim=-1)
    usable_NLD = difference_NLD[(norm_NL > 1e-3 * norm_NL.median(0).values).all(1)][:n_draws]
    if len(usable_NLD) < n_draws:
        raise ValueError(f"{len(added_NLD)} tokens give {len(usable_NLD)} differences of {n_draws}; give more text")
    return usable_NLD


class _Sums:
    """Sums over the predictions of one feature's rows, by document."""

    def __init__(
        self,
        places: tuple[str, ...],
        sites: Sites,
        directions_VLD: Tensor,
        usual: float,
        promoted_m: tuple[int, ...],
        document_j: np.ndarray,
    ) -> None:
        self.places, self.sites, self.documents = places, sites, np.unique(document_j)
        n_layers = directions_VLD.shape[1]
        whole, each = torch.ones(1, n_layers), torch.eye(n_layers)[: len(places) - 2]
        masks_PL = torch.cat([whole, each, whole]).to(directions_VLD)
        self.moves_PVLD = masks_PL[:, None, :, None] * directions_VLD
        self.usual, self.promoted_m, self.n_measured = usual, promoted_m, len(document_j)
        n, shape = len(self.documents), self.moves_PVLD.shape[:2]
        self.sums_EPVM = np.zeros((n, *shape, len(MEASURES)))
        self.tokens_E, self.moved_EP = np.zeros(n, dtype=np.int64), np.zeros((n, shape[0]), dtype=np.int64)
        self.change_V: Tensor | float = 0.0

    def add(self, ids_bS: Tensor, value_bS: Tensor, is_read_bS: Tensor, document_b: np.ndarray) -> None:
        """Run some rows as they are, and with each direction moved at each place."""
        sites, n, (n_places, n_directions) = self.sites, len(ids_bS), self.moves_PVLD.shape[:2]
        n_variants = n_places * n_directions
        amount_PbS = torch.stack([*[-value_bS] * (n_places - 1), self.usual * (is_read_bS & (value_bS == 0))])

        def move(number: int, given: Tensor, returned: Tensor) -> Tensor:
            amount, directions = amount_PbS.to(returned), self.moves_PVLD[:, :, number].to(returned)
            moved = torch.einsum("pbs,pvd->pvbsd", amount, directions).flatten(0, 2)
            return torch.cat([returned[:n], returned[n:] + moved])

        with replacing([sites.blocks[layer - 1] for layer in sites.layers], move):
            logits = sites.subject.run(ids_bS.repeat(1 + n_variants, 1))
        sums_VbM, last = np.zeros((n_variants, n, len(MEASURES))), ids_bS.shape[1] - 1
        step = max(1, splice.BLOCK_BYTES // (sites.subject.token_bytes * n * (1 + n_variants)))
        for start in range(sites.skip, last, step):
            stop = min(start + step, last)
            log_VbPW = logits(start, stop).float().log_softmax(-1).unflatten(0, (1 + n_variants, n))
            target_bP = ids_bS[:, start + 1 : stop + 1].to(log_VbPW.device)
            loss_VbP = -log_VbPW.gather(-1, target_bP.expand(1 + n_variants, -1, -1)[..., None]).squeeze(-1)
            clean_bPW, changed_VbPW = log_VbPW[0], log_VbPW[1:]
            kl_VbP = (clean_bPW.exp() * (clean_bPW - changed_VbPW)).sum(-1)
            moved_PbP = (amount_PbS[:, :, start:stop] != 0).to(log_VbPW.device)
            moved_VbP = moved_PbP.repeat_interleave(n_directions, dim=0)
            each = [loss_VbP[1:] - loss_VbP[0], kl_VbP]
            if self.promoted_m:
                of_m = log_VbPW[..., list(self.promoted_m)].mean(-1)
                each.append(of_m[1:] - of_m[0])
            for i, one_VbP in enumerate(each):
                sums_VbM[..., min(2 * i + 1, 4)] += (one_VbP * moved_VbP).double().sum(-1).cpu().numpy()
                if i < 2:
                    sums_VbM[..., 2 * i] += one_VbP.double().sum(-1).cpu().numpy()
            active_bP = moved_PbP[0]
            self.change_V += (changed_VbPW[0][active_bP].exp() - clean_bPW[active_bP].exp()).double().sum(0)
        self._count(sums_VbM.reshape(n_places, n_directions, n, -1), amount_PbS[:, :, sites.skip : last], document_b)

    def _count(self, sums_PVbM: np.ndarray, amount_PbS: Tensor, document_b: np.ndarray) -> None:
        place_b = np.searchsorted(self.documents, document_b)
        np.add.at(self.sums_EPVM, place_b, sums_PVbM.transpose(2, 0, 1, 3))
        np.add.at(self.tokens_E, place_b, amount_PbS.shape[2])
        np.add.at(self.moved_EP, place_b, (amount_PbS != 0).sum(2).T.numpy())

    def effect(self, feature: int, rate: float, energy: float, row_share: float) -> Effect:
        """What was summed."""
        assert isinstance(self.change_V, Tensor)
        return Effect(
            feature=feature,
            places=self.places,
            sums_EPVM=self.sums_EPVM,
            tokens_E=self.tokens_E,
            moved_EP=self.moved_EP,
            rate=rate,
            energy=energy,
            usual=self.usual,
            row_share=row_share,
            n_measured=self.n_measured,
            promoted_m=self.promoted_m,
            change_V=(self.change_V / self.moved_EP[:, 0].sum()).cpu().numpy(),
        )
