"""From which layers a crosscoder's features are read, and how well a single layer predicts when they are active.

Measured on a dictionary and a stream of held-out activations, in passes whose memory does not grow with the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from crosscoder.dictionary import Dictionary
from crosscoder.measure import probe_passes, profile
from crosscoder.measure.probe_passes import Batches, Moments, Scores
from crosscoder.measure.profile import known_mean
from crosscoder.measure.reading import minimum_probability
from crosscoder.results.table import Value

MIN_ACTIVE = 10  # active tokens in each half of the documents below which a feature's AUCs are nan
GAIN = 0.05  # a joint AUC this much above the best single layer's counts as gained by reading layers together
DECODABLE = 0.9  # single-layer AUC from which a feature is decodable from one layer
RECALL = 0.9  # recall at which the precision of probes is quoted


@dataclass(frozen=True)
class FunctionalSpread:
    """Functional spread and joint decodability of n features; nan for features that are active too rarely."""

    feature_n: np.ndarray  # their numbers in the dictionary, ascending
    n_alive: int
    n_dictionary: int
    n_tokens: int
    profile_nL: np.ndarray  # functional: share of the encoder's sum on active tokens
    functional_rho_n: np.ndarray
    drop_nL: np.ndarray
    auc_nL: np.ndarray
    auc_joint_n: np.ndarray
    precision_nL: np.ndarray  # at recall .9
    precision_joint_n: np.ndarray
    decoder_rho_n: np.ndarray
    nu_error_nL: np.ndarray
    corrected_rho_n: np.ndarray
    ridges: tuple[float, ...]  # penalty of each layer's probe, then of the joint one

    @property
    def gain_n(self) -> np.ndarray:
        """J, `[n]`."""
        return joint_gain(self.auc_joint_n, self.auc_nL)

    @property
    def genuine_n(self) -> np.ndarray:
        """True for genuinely cross-layer features, `[n]`; false for those active too rarely."""
        return genuine_features(self.auc_joint_n, self.auc_nL) == 1

    def genuine_F(self) -> np.ndarray:
        """`genuine_n` for every feature of the dictionary, `[F]`, false for the dead.

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
            "decoder_rho": known_mean(self.decoder_rho_n),
            "functional_rho": known_mean(self.functional_rho_n),
            "corrected_rho": known_mean(self.corrected_rho_n),
            "largest_drop": known_mean(self.drop_nL.max(1)),
            "joint_ridge": self.ridges[-1],
            "joint_auc": known_mean(self.auc_joint_n),
            "best_layer_auc": known_mean(self.auc_nL.max(1)),
            "joint_gain": known_mean(self.gain_n),
            "joint_precision": known_mean(self.precision_joint_n),
            "best_layer_precision": known_mean(self.precision_nL.max(1)),
            "genuine_share": genuine_share(self.auc_joint_n, self.auc_nL),
        }


def joint_gain(auc_joint_F: np.ndarray, auc_FL: np.ndarray) -> np.ndarray:
    """`J_i = AUC_joint - max_l AUC_l`, `[F]`; all AUCs must come from tokens on which no probe was fitted."""
    return np.asarray(auc_joint_F) - np.asarray(auc_FL).max(1)


def genuine_features(auc_joint_F: np.ndarray, auc_FL: np.ndarray) -> np.ndarray:
    """1 for features that are genuinely cross-layer, J > .05 and no one-layer AUC of .9, 0 for others, nan for nan."""
    known = np.isfinite(auc_joint_F) & np.isfinite(auc_FL).all(1)
    is_genuine = (joint_gain(auc_joint_F, auc_FL) > GAIN) & (np.asarray(auc_FL).max(1) < DECODABLE)
    return np.where(known, is_genuine, np.nan)


def genuine_share(auc_joint_F: np.ndarray, auc_FL: np.ndarray) -> float:
    """Share of genuinely cross-layer features among those with AUCs; nan where none has."""
    return known_mean(genuine_features(auc_joint_F, auc_FL))


@torch.no_grad()
def measure_functional_spread(
    dictionary: Dictionary,
    batches: Batches,
    *,
    document_T: np.ndarray | None = None,
    n_features: int | None = None,
    ridge: float | None = None,
    seed: int = 0,
) -> FunctionalSpread:
    """Functional profile, leave-one-out drop, probes' AUCs and latent scaling of a crosscoder's alive features.

    batches: gives the held-out stream `x_BLD` in the dictionary's own scale from its beginning, the same each time.
    document_T: each token's document, in the stream's order; without it every 256 tokens are one.
    n_features: how many alive features, drawn at random by `seed`; None measures all of them. Memory is
        `(L * D)^2 + F * L * D` numbers and 2,048 counts for each feature and layer.
    ridge: penalty of the probes, as a share of the mean variance of what they read; None chooses it for each layer's
        probe and for the joint one, in a further pass.

    Limits of J: the label is the feature's own activity. A feature is active where its sum over layers is large, so
    the joint probe is nearly perfect by construction, and J is in effect 1 minus the best one-layer AUC. It cannot show
    that the subject computes with several layers. J is also large for a persistent feature under noise, which a joint
    probe averages out, and where one latent holds unrelated features of two layers; only the latter remains when tokens
    are shuffled by layer. J is small for a rare combination of frequent parts: an AUC hardly reacts to false positives
    on 5 % of the tokens, even if they outnumber the feature's own tokens; `precision_nL` does.

    Raises:
        ValueError: the dictionary is a bank, no feature is alive, half of the documents are empty, or the labels are
            not one for each token.
    """
    n_layers, d_model = dictionary.config.n_layers, dictionary.config.d_model
    if dictionary.grouped().encoder_GFN.shape[2] != n_layers * d_model:
        raise ValueError("the dictionary is a bank; functional spread needs features that read all layers")
    was_training = dictionary.training
    dictionary.eval()
    try:
        moments = probe_passes.collect_moments(dictionary, batches, document_T)
        chosen_n, n_alive = _choose(moments, n_features, seed)
        device = dictionary.grouped().encoder_GFN.device
        ridges = [ridge] * (n_layers + 1) if ridge is not None else []
        ridges = ridges or probe_passes.choose_ridges(dictionary, batches, document_T, moments, chosen_n)
        probes = probe_passes.fit_probes(moments, chosen_n, n_layers, ridges, device)
        center_N = moments.shift_N + moments.mean_N
        scores = probe_passes.score_probes(dictionary, batches, document_T, probes, chosen_n, center_N)
    finally:
        dictionary.train(was_training)
    encoder_nLD, decoder_nLD = (
        parameter_FN.detach().double().cpu().numpy()[chosen_n].reshape(len(chosen_n), n_layers, d_model)
        for parameter_FN in (dictionary.grouped().encoder_GFN[0], dictionary.grouped().decoder_GFN[0])
    )
    return _assemble(moments, scores, chosen_n, n_alive, encoder_nLD, decoder_nLD, ridges)


def _choose(moments: Moments, n_features: int | None, seed: int) -> tuple[np.ndarray, int]:
    n_tokens = moments.tokens_H.sum()
    alive = np.flatnonzero(moments.active_HF.sum(0) / n_tokens > minimum_probability(n_tokens))
    if len(alive) == 0:
        raise ValueError(f"no feature is active on more than 10 of {n_tokens:.0f} tokens; nothing to measure")
    if n_features is None or n_features >= len(alive):
        return alive, len(alive)
    drawn = np.random.default_rng(seed).choice(alive, n_features, replace=False)
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
    auc_Sn = np.where(probed_n, probe_passes.binned_auc(scores.counts_2SnX), np.nan)
    precision_Sn = np.where(probed_n, probe_passes.precision_at_recall(scores.counts_2SnX, RECALL), np.nan)
    nu_error_nL = profile.latent_scaling(scores.error_nLD, scores.activation_square_n, decoder_nLD)
    return FunctionalSpread(
        feature_n=chosen_n,
        n_alive=n_alive,
        n_dictionary=moments.active_HF.shape[1],
        n_tokens=int(n_tokens),
        profile_nL=profile_nL,
        functional_rho_n=profile.participation_ratio(profile_nL),
        drop_nL=1 - scores.after_nL / scores.before_n[:, None],
        auc_nL=auc_Sn[:-1].T,
        auc_joint_n=auc_Sn[-1],
        precision_nL=precision_Sn[:-1].T,
        precision_joint_n=precision_Sn[-1],
        decoder_rho_n=profile.participation_ratio(profile.layer_profile(decoder_nLD)),
        nu_error_nL=nu_error_nL,
        corrected_rho_n=profile.participation_ratio(profile.corrected_profile(decoder_nLD, nu_error_nL)),
        ridges=tuple(ridges),
    )
