"""Passes over held-out activations for `probes`: moments, then probes scored on other documents.

Nothing here grows with the number of tokens: moments are sums, and scores are counted in bins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crosscoder.dictionary import Dictionary, SparseCode, TopK
from crosscoder.dictionary.codec import selection_scale, thresholds
from crosscoder.measure.reading import sparse_rows

BINS = 1024
REACH = 6.0  # asinh of the largest standardised score with a bin of its own, 200 standard deviations
STRETCH_OF_TOKENS = 256  # length of a document where none are given
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # candidates for a probe's penalty
CHOOSING = 64  # features on which the penalty is chosen

Batches = Callable[[], Iterable[Tensor]]


def split_documents(batches: Batches, document_T: np.ndarray | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Each batch, and which of its tokens `[B]` probes are scored on: those of odd documents; even ones fit probes.

    Raises:
        ValueError: the labels are not one for each token.
    """
    number_T = None if document_T is None else np.unique(document_T, return_inverse=True)[1].ravel()
    stop = 0
    for x_BLD in batches():
        start, stop = stop, stop + len(x_BLD)
        number_B = np.arange(start, stop) // STRETCH_OF_TOKENS if number_T is None else number_T[start:stop]
        if len(number_B) < len(x_BLD):
            raise ValueError(f"{start + len(number_B)} document labels for at least {stop} tokens; give one for each")
        yield x_BLD, torch.from_numpy(number_B % 2 == 1).to(x_BLD.device)
    if number_T is not None and len(number_T) > stop:
        raise ValueError(f"{len(number_T)} document labels for {stop} tokens; give one for each")


@dataclass(frozen=True)
class Moments:
    """Sums of the first pass; index 0 of a leading axis is the half that probes are fitted on, 1 the scored half.

    x is taken less `shift_N` throughout, which keeps a large mean from drowning the covariance.
    """

    shift_N: np.ndarray
    tokens_H: np.ndarray
    sum_HN: np.ndarray
    gram_NN: np.ndarray  # of the fitting half
    active_HF: np.ndarray
    active_sum_HFN: np.ndarray  # x summed over tokens on which each feature is active

    @property
    def mean_N(self) -> np.ndarray:
        """Mean of the shifted x over all tokens."""
        return self.sum_HN.sum(0) / self.tokens_H.sum()


def collect_moments(dictionary: Dictionary, batches: Batches, document_T: np.ndarray | None) -> Moments:
    """First pass: moments of x, and of x on each feature's active tokens, for both halves of the documents.

    Raises:
        ValueError: no tokens, a half without tokens, or labels that are not one per token.
    """
    n_features, width = dictionary.config.n_features, dictionary.config.n_layers * dictionary.config.d_model
    tokens_H, sum_HN = np.zeros(2), np.zeros((2, width))
    active_HF, active_sum_HFN = np.zeros((2, n_features)), np.zeros((2, n_features, width))
    gram_NN = torch.zeros(width, width, dtype=torch.float64)
    shift_N: Tensor | None = None
    for x_BLD, is_scored_B in split_documents(batches, document_T):
        rows = sparse_rows(dictionary.encode(x_BLD), len(x_BLD), 1, n_features)
        rows.data[:] = 1
        x_BN = x_BLD.flatten(1).float()
        shift_N = x_BN.mean(0) if shift_N is None else shift_N
        x_BN = x_BN - shift_N
        fitted_BN = x_BN[~is_scored_B]
        gram_NN += (fitted_BN.T @ fitted_BN).double().cpu()
        x, scored_B = x_BN.cpu().numpy(), is_scored_B.cpu().numpy()
        for half, mask_B in enumerate((~scored_B, scored_B)):
            tokens_H[half] += mask_B.sum()
            sum_HN[half] += x[mask_B].sum(0, dtype=np.float64)
            active_HF[half] += np.asarray(rows[mask_B].sum(0)).ravel()
            active_sum_HFN[half] += rows[mask_B].T @ x[mask_B]
    if shift_N is None or not (tokens_H > 0).all():
        seen = f"{tokens_H.sum():.0f} tokens"
        raise ValueError(f"{seen} leave a half of the documents empty; give at least two documents")
    shift = shift_N.double().cpu().numpy()
    return Moments(shift, tokens_H, sum_HN, gram_NN.numpy(), active_HF, active_sum_HFN)


@dataclass(frozen=True)
class Probes:
    """Linear probes of n features: one for each layer, and a joint one; scores have mean 0 and variance 1."""

    weight_nLD: list[Tensor]  # one [n, D] a layer
    joint_nN: Tensor
    mean_N: Tensor  # taken off x first

    def scores(self, x_BLD: Tensor) -> Iterator[Tensor]:
        """Scores `[B, n]` of each layer, then of all layers together."""
        x_BLD = x_BLD.float() - self.mean_N.view(x_BLD.shape[1:])
        for layer, weight_nD in enumerate(self.weight_nLD):
            yield x_BLD[:, layer] @ weight_nD.T
        yield x_BLD.flatten(1) @ self.joint_nN.T


def fit_probes(
    moments: Moments, chosen_n: np.ndarray, n_layers: int, ridges: Sequence[float], device: torch.device
) -> Probes:
    """Ridge regressions of each chosen feature's label on x, by one Cholesky factor a layer and one for all.

    The penalty is the probe's value in `ridges` (each layer's, then the joint one's) times the mean variance of its
    inputs. Regression on a label and linear discriminant analysis with one covariance have the same direction, and only
    the direction matters to an AUC.

    Raises:
        ValueError: a layer is constant on the documents that probes are fitted on.
    """
    n_tokens, width = moments.tokens_H[0], len(moments.shift_N)
    mean_N = moments.sum_HN[0] / n_tokens
    covariance_NN = moments.gram_NN / n_tokens - np.outer(mean_N, mean_N)
    active_n1 = np.maximum(moments.active_HF[0][chosen_n], 1)[:, None]
    delta_nN = moments.active_sum_HFN[0][chosen_n] / active_n1 - mean_N
    d_model = width // n_layers

    def solve(part: slice, ridge: float) -> Tensor:
        own = torch.from_numpy(covariance_NN[part, part])
        level = float(own.diagonal().mean())
        if not level > 0:
            raise ValueError("a layer is constant on half of the held-out documents; no probe can read it")
        factor = torch.linalg.cholesky(own + ridge * level * torch.eye(len(own), dtype=own.dtype))
        weight_Nn = torch.cholesky_solve(torch.from_numpy(delta_nN[:, part].T.copy()), factor)
        deviation_n = torch.einsum("in,ij,jn->n", weight_Nn, own, weight_Nn).clamp_min(1e-60).sqrt()
        return (weight_Nn / deviation_n).T.float().to(device)

    layers = [solve(slice(layer * d_model, (layer + 1) * d_model), ridges[layer]) for layer in range(n_layers)]
    offset_N = torch.from_numpy(moments.shift_N + mean_N).float().to(device)
    return Probes(layers, solve(slice(0, width), ridges[-1]), offset_N)


def choose_ridges(
    dictionary: Dictionary, batches: Batches, document_T: np.ndarray | None, moments: Moments, chosen_n: np.ndarray
) -> list[float]:
    """The penalty of each layer's probe and of the one that reads all: of `RIDGES`, the best mean AUC, `[L + 1]`.

    With one penalty for all, the joint probe would overfit where there are few tokens for L * D inputs, and a joint AUC
    below a layer's would say nothing about the features. The mean is over at most `CHOOSING` features on the scored
    documents; one choice among five for all features gains next to nothing by chance.
    """
    some_n = chosen_n[:: max(1, len(chosen_n) // CHOOSING)][:CHOOSING]
    n, n_layers = len(some_n), dictionary.config.n_layers
    device = dictionary.grouped().encoder_GFN.device
    tried = [fit_probes(moments, some_n, n_layers, [ridge] * (n_layers + 1), device) for ridge in RIDGES]
    counts = torch.zeros(len(RIDGES), 2, n_layers + 1, n * BINS, dtype=torch.int32)
    for x_BLD, scored_B in split_documents(batches, document_T):
        label_Bn = _chosen_code(dictionary, dictionary.encode(x_BLD), some_n).to(device)[scored_B] > 0
        for probes, count in zip(tried, counts, strict=True):
            _count_scores(count, probes, x_BLD[scored_B], label_Bn)
    auc_RSn = np.stack([binned_auc(one.view(2, n_layers + 1, n, BINS).numpy()) for one in counts])
    known_n = np.isfinite(auc_RSn).all((0, 1))
    if not known_n.any():
        return [RIDGES[0]] * (n_layers + 1)
    return [RIDGES[best] for best in auc_RSn[:, :, known_n].mean(2).argmax(0)]


def _count_scores(counts: Tensor, probes: Probes, x_BLD: Tensor, label_Bn: Tensor) -> None:
    """Add scored tokens to `counts` `[2, S, n * BINS]`, by label, probe, feature and bin."""
    n = label_Bn.shape[1]
    first_bin_n = torch.arange(n, device=x_BLD.device) * BINS
    for probe, score_Bn in enumerate(probes.scores(x_BLD)):
        place_Bn = bins_of(score_Bn) + first_bin_n
        for value in (0, 1):
            counts[value, probe] += torch.bincount(place_Bn[label_Bn == value], minlength=n * BINS).int().cpu()


@dataclass(frozen=True)
class Scores:
    """Sums of the second pass. S counts probes: the layers, then all together."""

    counts_2SnX: np.ndarray  # scored tokens by label, probe, feature and bin
    before_n: np.ndarray  # summed activation, both halves
    after_nL: np.ndarray  # and what is left of it without each layer
    activation_square_n: np.ndarray
    error_nLD: np.ndarray  # activation times error


def bins_of(score_Bn: Tensor) -> Tensor:
    """Bin of each score: even in asinh, so that bins are narrow in the middle and wide far out."""
    position = (score_Bn.asinh() / REACH + 1) * (BINS / 2)
    return position.long().clamp_(0, BINS - 1)


def activation_limits(dictionary: Dictionary) -> Tensor:
    """Activation at or below which each feature counts as inactive, `[F]`; 0 for TopK, which has no fixed threshold."""
    grouped, config = dictionary.grouped(), dictionary.config
    if isinstance(config.sparsity, TopK):
        return torch.zeros_like(grouped.encoder_bias_GF[0])
    limit_F = thresholds(grouped, config, dictionary.threshold)[0].clamp_min(0)
    scale_GF = selection_scale(grouped, config)
    return limit_F if scale_GF is None else limit_F / scale_GF[0]


def score_probes(
    dictionary: Dictionary,
    batches: Batches,
    document_T: np.ndarray | None,
    probes: Probes,
    chosen_n: np.ndarray,
    center_N: np.ndarray,
) -> Scores:
    """Last pass: scores in bins, activation without each layer, and moments for latent scaling.

    `center_N` is the mean of x, which replaces a layer that is left out.
    """
    n, n_layers, d_model = len(chosen_n), dictionary.config.n_layers, dictionary.config.d_model
    encoder_FN = dictionary.grouped().encoder_GFN[0].float()
    device = encoder_FN.device
    index_n = torch.from_numpy(chosen_n).to(device)
    encoder_nLD = encoder_FN[index_n].view(n, n_layers, d_model)
    center_LD = torch.from_numpy(center_N).float().to(device).view(n_layers, d_model)
    limit_n = activation_limits(dictionary).float()[index_n]
    counts = torch.zeros(2, n_layers + 1, n * BINS, dtype=torch.int32)
    before_n, square_n = torch.zeros(2, n, dtype=torch.float64)
    after_nL = torch.zeros(n, n_layers, dtype=torch.float64)
    error_nN = torch.zeros(n, n_layers * d_model, dtype=torch.float64)
    for x_BLD, scored_B in split_documents(batches, document_T):
        x_BLD = x_BLD.float()
        out = dictionary(x_BLD)
        f_Bn = _chosen_code(dictionary, out.code, chosen_n).to(device)
        before_n += f_Bn.double().sum(0).cpu()
        square_n += f_Bn.double().square().sum(0).cpu()
        for layer in range(n_layers):
            left_Bn = f_Bn - (x_BLD[:, layer] - center_LD[layer]) @ encoder_nLD[:, layer].T
            after_nL[:, layer] += torch.where((f_Bn > 0) & (left_Bn > limit_n), left_Bn, 0).double().sum(0).cpu()
        error_nN += (f_Bn.T @ (x_BLD - out.recon).flatten(1)).double().cpu()
        _count_scores(counts, probes, x_BLD[scored_B], f_Bn[scored_B] > 0)
    numbers, error_nLD = counts.view(2, n_layers + 1, n, BINS), error_nN.view(n, n_layers, d_model)
    return Scores(*(sums.numpy() for sums in (numbers, before_n, after_nL, square_n, error_nLD)))


def _chosen_code(dictionary: Dictionary, code: SparseCode, chosen_n: np.ndarray) -> Tensor:
    """Activations of the chosen features, dense `[B, n]`."""
    rows = sparse_rows(code, code.n_rows, 1, dictionary.config.n_features)
    return torch.from_numpy(rows[:, chosen_n].toarray())


def binned_auc(counts_2SnX: np.ndarray) -> np.ndarray:
    """AUC of each probe and feature from counts of scores by label and bin, ties half, `[S, n]`; nan for one class."""
    without, present = counts_2SnX.astype(np.float64)
    with np.errstate(invalid="ignore"):
        below = (without.cumsum(2) - without / 2) / without.sum(2, keepdims=True)
        return (below * present).sum(2) / present.sum(2)


def precision_at_recall(counts_2SnX: np.ndarray, recall: float) -> np.ndarray:
    """Share of tokens with the label among those that score as high as a share `recall` of those with it, `[S, n]`.

    Whole bins are taken, so at least `recall` is recalled. nan where no token has the label.
    """
    without, present = (counts[:, :, ::-1].cumsum(2)[:, :, ::-1].astype(np.float64) for counts in counts_2SnX)
    last = (present >= recall * present[:, :, :1]).sum(2, keepdims=True) - 1
    found, wrong = (np.take_along_axis(side, last, 2)[:, :, 0] for side in (present, without))
    return np.divide(found, found + wrong, out=np.full_like(found, np.nan), where=found > 0)
