"""From which layers a crosscoder's features are read, and how well a single layer predicts when they are active.

Measured on a dictionary and a stream of held-out activations, in two passes whose memory does not grow with the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

from crosscoder.dictionary import Dictionary
from crosscoder.measure import probe_passes, profile
from crosscoder.measure.probe_passes import Batches, Documents, Moments, Scores
from crosscoder.measure.reading import minimum_probability
from crosscoder.results.table import Value

MIN_ACTIVE = 10  # active tokens in each half of the documents below which a feature's AUCs are nan
GAIN = 0.05  # a joint AUC this much above the best single layer's counts as gained by reading layers together
DECODABLE = 0.9  # single-layer AUC from which a feature is readable in one layer
RECALL = 0.9  # at which the precision of probes is quoted


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What is measured. Memory is `(L * D)^2 + F * L * D` numbers and 2,048 counts for each feature and layer.

    n_features: how many alive features, drawn at random; None measures all of them.
    ridge: penalty of the probes, as a share of the mean variance of what they read; None chooses it for each layer's
        probe and for the joint one (`probe_passes.choose_ridges`), in a further pass.
    """

    n_features: int | None = 256
    ridge: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_features is not None and self.n_features < 1:
            raise ValueError(f"n_features is {self.n_features}; expected at least 1, or None for all")
        if self.ridge is not None and not (math.isfinite(self.ridge) and self.ridge > 0):
            raise ValueError(f"ridge is {self.ridge}; expected a positive share of the variance, such as .1, or None")


@dataclass(frozen=True)
class FunctionalSpread:
    """Functional spread and joint decodability of n features; nan for those active too rarely."""

    feature_n: np.ndarray  # their numbers in the dictionary, ascending
    n_alive: int
    n_dictionary: int
    n_tokens: int
    probability_n: np.ndarray
    profile_nL: np.ndarray  # functional: share of the encoder's sum on active tokens
    functional_rho_n: np.ndarray
    drop_nL: np.ndarray
    auc_nL: np.ndarray
    auc_joint_n: np.ndarray
    precision_nL: np.ndarray  # at recall .9
    precision_joint_n: np.ndarray
    decoder_rho_n: np.ndarray
    nu_error_nL: np.ndarray
    nu_recon_nL: np.ndarray
    corrected_rho_n: np.ndarray
    ridges: tuple[float, ...]  # penalty of each layer's probe, then of the joint one

    @property
    def gain_n(self) -> np.ndarray:
        """J, `[n]`."""
        return joint_gain(self.auc_joint_n, self.auc_nL)

    @property
    def genuine_n(self) -> np.ndarray:
        """True for genuinely cross-layer features, `[n]`; false for those active too rarely."""
        return genuine_features(self.auc_joint_n, self.auc_nL)

    @property
    def aucs(self) -> tuple[np.ndarray, np.ndarray]:
        """Arguments of `cross_layer_excess`."""
        return self.auc_joint_n, self.auc_nL

    def genuine_F(self) -> np.ndarray:
        """The same for every feature of the dictionary, `[F]`, false for the dead.

        Raises:
            ValueError: only some of the alive features were measured.
        """
        if len(self.feature_n) < self.n_alive:
            raise ValueError(
                f"{len(self.feature_n)} of {self.n_alive} alive features were measured, so the rest is unknown; "
                "measure with n_features=None"
            )
        mask = np.zeros(self.n_dictionary, dtype=bool)
        mask[self.feature_n] = self.genuine_n
        return mask

    def summary(self) -> dict[str, Value]:
        """Means over the features for which each is defined, by the names of quantities; nan where there is none."""
        return {
            "probe_features": float(len(self.feature_n)),
            "probe_alive": float(self.n_alive),
            "probe_tokens": float(self.n_tokens),
            "probed": float(np.isfinite(self.auc_joint_n).sum()),
            "decoder_rho": _mean(self.decoder_rho_n),
            "functional_rho": _mean(self.functional_rho_n),
            "corrected_rho": _mean(self.corrected_rho_n),
            "largest_drop": _mean(self.drop_nL.max(1)),
            "joint_ridge": self.ridges[-1],
            "joint_auc": _mean(self.auc_joint_n),
            "best_layer_auc": _mean(self.auc_nL.max(1)),
            "joint_gain": _mean(self.gain_n),
            "joint_precision": _mean(self.precision_joint_n),
            "best_layer_precision": _mean(self.precision_nL.max(1)),
            "genuine_share": genuine_share(*self.aucs),
        }


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def area_under_curve(score_TQ: np.ndarray, label_T: np.ndarray) -> np.ndarray:
    """AUC of each of Q scores for a label, `[Q]`: P(score with > score without) + P(equal) / 2; nan for one class.

    The Mann-Whitney statistic over the product of class sizes, with mean ranks for ties.
    """
    label = np.asarray(label_T, dtype=bool)
    n_with, n_without = int(label.sum()), int((~label).sum())
    if n_with == 0 or n_without == 0:
        return np.full(score_TQ.shape[1], np.nan)
    ranks = stats.rankdata(score_TQ, axis=0)
    return (ranks[label].sum(0) - n_with * (n_with + 1) / 2) / (n_with * n_without)


def joint_gain(auc_joint_F: np.ndarray, auc_FL: np.ndarray) -> np.ndarray:
    """`J_i = AUC_joint - max_l AUC_l`, `[F]`; all AUCs must come from tokens on which no probe was fitted."""
    return np.asarray(auc_joint_F) - np.asarray(auc_FL).max(1)


def genuine_features(auc_joint_F: np.ndarray, auc_FL: np.ndarray) -> np.ndarray:
    """True for features that are genuinely cross-layer, J > .05 and no one-layer AUC of .9, `[F]`; false for nan."""
    known = np.isfinite(auc_joint_F) & np.isfinite(auc_FL).all(1)
    return known & (joint_gain(auc_joint_F, auc_FL) > GAIN) & (np.asarray(auc_FL).max(1) < DECODABLE)


def genuine_share(auc_joint_F: np.ndarray, auc_FL: np.ndarray) -> float:
    """Share of features that are genuinely cross-layer: J > .05 and no one-layer AUC of .9; nan AUCs are left out."""
    known = np.isfinite(auc_joint_F) & np.isfinite(auc_FL).all(1)
    if not known.any():
        return float("nan")
    return float(genuine_features(auc_joint_F, auc_FL)[known].mean())


def cross_layer_excess(
    trained: tuple[np.ndarray, np.ndarray],
    shuffled: tuple[np.ndarray, np.ndarray],
    untrained: tuple[np.ndarray, np.ndarray],
) -> float:
    """X of one dictionary from `(auc_joint_F, auc_FL)` of the trained subject and of both nulls; nan if one is."""
    share, shuffle, initial = (genuine_share(*aucs) for aucs in (trained, shuffled, untrained))
    return float(share - np.maximum(shuffle, initial))


@torch.no_grad()
def measure_functional_spread(
    dictionary: Dictionary,
    batches: Batches,
    *,
    document_T: np.ndarray | None = None,
    config: ProbeConfig | None = None,
) -> FunctionalSpread:
    """Functional profile, leave-one-out drop, probes' AUCs and latent scaling of a crosscoder's alive features.

    batches: gives the held-out stream `x_BLD` in the dictionary's own scale from its beginning, the same each time.
    document_T: each token's document, in the stream's order; without it every 256 tokens are one.

    What J can say: the label is the feature's own activity. A feature is active where its sum over layers is large, so
    the joint probe is nearly perfect by construction, and J is in effect 1 less the best one-layer AUC. It cannot show
    that the subject computes with several layers. J is also large for a persistent feature under noise, which a joint
    probe averages, and where one latent holds unrelated features of two layers; only the second remains when tokens
    are shuffled by layer. J is small for a rare combination of frequent parts: an AUC hardly sees false alarms on 5 %
    of the tokens, even if they outnumber the feature's own tokens; `precision_nL` does.

    Raises:
        ValueError: the dictionary is a bank, no feature is alive, half of the documents are empty, or the labels are
            not one for each token.
    """
    config = config or ProbeConfig()
    n_layers, d_model = dictionary.config.n_layers, dictionary.config.d_model
    if dictionary.grouped().encoder_GFN.shape[2] != n_layers * d_model:
        raise ValueError("the dictionary is a bank; functional spread needs features that read all layers")
    documents = Documents(document_T)
    was_training = dictionary.training
    dictionary.eval()
    try:
        moments = probe_passes.collect_moments(dictionary, batches, documents)
        chosen_n, n_alive = _choose(moments, config)
        device = dictionary.grouped().encoder_GFN.device
        ridges = (
            [config.ridge] * (n_layers + 1)
            if config.ridge is not None
            else probe_passes.choose_ridges(dictionary, batches, documents, moments, chosen_n)
        )
        probes = probe_passes.fit_probes(moments, chosen_n, n_layers, ridges, device)
        center_N = moments.shift_N + moments.mean_N
        scores = probe_passes.score_probes(dictionary, batches, documents, probes, chosen_n, center_N)
    finally:
        dictionary.train(was_training)
    encoder_nLD, decoder_nLD = (
        parameter_FN.detach().double().cpu().numpy()[chosen_n].reshape(len(chosen_n), n_layers, d_model)
        for parameter_FN in (dictionary.grouped().encoder_GFN[0], dictionary.grouped().decoder_GFN[0])
    )
    return _assemble(moments, scores, chosen_n, n_alive, encoder_nLD, decoder_nLD, ridges)


def _choose(moments: Moments, config: ProbeConfig) -> tuple[np.ndarray, int]:
    n_tokens = moments.tokens_H.sum()
    alive = np.flatnonzero(moments.active_HF.sum(0) / n_tokens > minimum_probability(n_tokens))
    if len(alive) == 0:
        raise ValueError(f"no feature is active on more than 10 of {n_tokens:.0f} tokens; nothing to measure")
    if config.n_features is None or config.n_features >= len(alive):
        return alive, len(alive)
    drawn = np.random.default_rng(config.seed).choice(alive, config.n_features, replace=False)
    return np.sort(drawn), len(alive)


def _assemble(
    moments: Moments,
    scores: Scores,
    chosen_n: np.ndarray,
    n_alive: int,
    encoder_nLD: np.ndarray,
    decoder_nLD: np.ndarray,
    ridges: Sequence[float],
) -> FunctionalSpread:
    active_Hn = moments.active_HF[:, chosen_n]
    n_tokens = moments.tokens_H.sum()
    above_nLD = moments.active_sum_HFN[:, chosen_n].sum(0) - active_Hn.sum(0)[:, None] * moments.mean_N
    profile_nL = profile.profile_of_totals(np.einsum("fld,fld->fl", encoder_nLD, above_nLD.reshape(encoder_nLD.shape)))
    probed_n = (active_Hn >= MIN_ACTIVE).all(0)
    auc_Sn = np.where(probed_n, probe_passes.areas_under_curve(scores.counts_2SnX), np.nan)
    precision_Sn = np.where(probed_n, probe_passes.precision_at_recall(scores.counts_2SnX, RECALL), np.nan)
    scaling = profile.scaling_of_moments(scores.error_nLD, scores.recon_nLD, scores.activation_square_n, decoder_nLD)
    return FunctionalSpread(
        feature_n=chosen_n,
        n_alive=n_alive,
        n_dictionary=moments.active_HF.shape[1],
        n_tokens=int(n_tokens),
        probability_n=active_Hn.sum(0) / n_tokens,
        profile_nL=profile_nL,
        functional_rho_n=profile.participation_ratio(profile_nL),
        drop_nL=1 - scores.after_nL / scores.before_n[:, None],
        auc_nL=auc_Sn[:-1].T,
        auc_joint_n=auc_Sn[-1],
        precision_nL=precision_Sn[:-1].T,
        precision_joint_n=precision_Sn[-1],
        decoder_rho_n=profile.participation_ratio(profile.layer_profile(decoder_nLD)),
        nu_error_nL=scaling.nu_error_FL,
        nu_recon_nL=scaling.nu_recon_FL,
        corrected_rho_n=profile.participation_ratio(profile.corrected_profile(decoder_nLD, scaling.nu_error_FL)),
        ridges=tuple(ridges),
    )
