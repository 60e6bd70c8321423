"""Over how many layers a feature extends: by its decoder, by what it reads, and by where it can be read.

`features` holds the layer profile and its single statistics; here they are put together and set beside the functional
measures, because a decoder's norm on a layer does not show that the layer is used (arXiv 2605.09438).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

GAIN = 0.05  # a joint AUC this much above the best single layer's counts as gained by reading layers together
DECODABLE = 0.9  # single-layer AUC from which a feature is readable in one layer

DEFINITIONS = {
    "functional_rho": "Functional spread: participation ratio 1 / sum of s_l^2, with s_l the share of layer l in what "
    "the encoder adds up on the tokens where the feature is active; layers that lower the sum count as 0.",
    "layer_drop": "Leave-one-layer-out drop: share of a feature's summed activation that is lost when layer l is "
    "replaced by its mean; activations that fall to the threshold or below are lost whole.",
    "layer_auc": "One-layer AUC: probability that a token with the feature scores above one without it when only layer "
    "l is read.",
    "joint_gain": "Joint decodability gain J = AUC reading all layers - largest one-layer AUC.",
    "cross_layer_excess": f"X: share of features with J > {GAIN} and every one-layer AUC below {DECODABLE}, less the "
    "larger of the same share in two nulls: tokens shuffled layer by layer, and the untrained model.",
    "latent_scaling": "nu_l = beta_l / beta_peak, beta_l the least-squares multiple of the feature's activation times "
    "its peak layer's decoder row that fits, at layer l, the error with the feature's own part put back (nu_err), or "
    "the reconstruction (nu_rec). nu_err near 0: the layer truly lacks the direction; near 1 with a small decoder "
    "norm: shrunk away; nu_rec near 1 with a small norm: other features carry it (arXiv 2504.02922).",
    "corrected_rho": "Spread after correction: participation ratio of squared amplitudes, each the larger of the "
    "decoder norm over the peak's and nu_err, from 0 to 1.",
}


def profile_of_totals(total_FL: np.ndarray) -> np.ndarray:
    """Share of each layer in the encoder's sum on active tokens, `[F, L]`; rows sum to 1, zero if never active.

    `total_FL` are contributions summed over each feature's active tokens, of centred activations. Negative sums become
    0: a layer that lowers the pre-activation on average is not one that the feature is read from.
    """
    total = np.maximum(total_FL, 0.0)
    whole = total.sum(1, keepdims=True)
    return np.divide(total, whole, out=np.zeros_like(total), where=whole > 0)


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


@dataclass(frozen=True)
class CrossLayerExcess:
    """Genuinely cross-layer features beyond what two nulls have."""

    x: float  # share less the larger of both nulls
    share: float
    shuffled: float  # the same share with tokens shuffled layer by layer
    untrained: float


def cross_layer_excess(
    trained: tuple[np.ndarray, np.ndarray],
    shuffled: tuple[np.ndarray, np.ndarray],
    untrained: tuple[np.ndarray, np.ndarray],
) -> CrossLayerExcess:
    """X of one dictionary from `(auc_joint_F, auc_FL)` of the trained subject and of both nulls; nan if one is."""
    share, shuffle, initial = (genuine_share(*aucs) for aucs in (trained, shuffled, untrained))
    return CrossLayerExcess(float(share - np.maximum(shuffle, initial)), share, shuffle, initial)


@dataclass(frozen=True)
class LatentScaling:
    """Multiples of a feature's peak direction found at each layer, relative to its peak layer; nan if never active."""

    nu_error_FL: np.ndarray
    nu_recon_FL: np.ndarray


def scaling_of_moments(
    error_FLD: np.ndarray, recon_FLD: np.ndarray, square_F: np.ndarray, decoder_FLD: np.ndarray
) -> LatentScaling:
    """nu_err and nu_rec of each feature and layer (Minder et al. 2025, arXiv 2504.02922, with layers for models).

    Given are sums over tokens: `f_t (x_t - recon_t)`, `f_t recon_t` and `f_t^2`. With d the decoder row at the peak
    layer, `beta_l = sum_t f_t d . y_tl / (|d|^2 sum_t f_t^2)` minimises `sum_t |y_tl - beta f_t d|^2`. The target y is
    the error with the feature's own part put back, `x_l - recon_l + f W_l`, or `recon_l`; nu = beta_l / beta_peak. A
    feature that turns as it passes through the blocks has low nu wherever it has turned away: nu says where the peak's
    direction is, not where the feature is.
    """
    decoder = np.asarray(decoder_FLD, dtype=np.float64)
    rows = np.arange(len(decoder))
    peak_F = np.square(decoder).sum(2).argmax(1)
    direction_FD = decoder[rows, peak_F]
    scale_F = (square_F * np.square(direction_FD).sum(1))[:, None]
    scaled = []
    for moment_FLD in (error_FLD + square_F[:, None, None] * decoder, recon_FLD):
        along = np.einsum("fd,fld->fl", direction_FD, moment_FLD)
        beta_FL = np.divide(along, scale_F, out=np.full_like(along, np.nan), where=scale_F > 0)
        at_peak = beta_FL[rows, peak_F][:, None]
        scaled.append(np.divide(beta_FL, at_peak, out=np.full_like(beta_FL, np.nan), where=at_peak > 0))
    return LatentScaling(*scaled)


def corrected_profile(decoder_FLD: np.ndarray, nu_error_FL: np.ndarray) -> np.ndarray:
    """Layer profile with what a penalty shrank away put back, `[F, L]`; give it to `features.participation_ratio`.

    A layer's amplitude is the larger of its decoder norm over the peak's and nu_err (clipped to 0..1, nan as 0);
    shares are of squared amplitudes. It can only raise a layer relative to the peak.
    """
    norm_FL = np.linalg.norm(np.asarray(decoder_FLD, dtype=np.float64), axis=2)
    peak = norm_FL.max(1, keepdims=True)
    relative = np.divide(norm_FL, peak, out=np.zeros_like(norm_FL), where=peak > 0)
    amplitude = np.maximum(relative, np.clip(np.nan_to_num(nu_error_FL, nan=0.0), 0.0, 1.0))
    energy = np.square(np.where(peak > 0, amplitude, 0.0))
    total = energy.sum(1, keepdims=True)
    return np.divide(energy, total, out=np.zeros_like(energy), where=total > 0)
