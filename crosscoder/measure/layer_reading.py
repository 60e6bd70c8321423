"""How well one layer alone tells that a feature is active: the precision of its reading, at a recall of nine tenths."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import stats

from crosscoder.foundation.console import Progress
from crosscoder.measure.examples import Activity
from crosscoder.measure.labels import RECALL, SCORE_BYTES
from crosscoder.results.table import CONFIDENCE

FEWEST = 5
"""Tokens on which a feature is active below which there is no precision."""


@torch.no_grad()
def layer_precision(activity: Activity, *, quiet: bool = False) -> np.ndarray:
    """Precision of each layer's reading of each feature, and of all layers' together, with the ends of its 90 %
    interval, `[F, K + 1, 3]`; nan for a feature that is active on fewer than five tokens, and for a row that is zero.

    The reading of layer l is `<W_l, x_l>` with the decoder's row, as in `measure.labels`. A token counts as told by a
    reading that is as high as a threshold, which a share .9 of the feature's sampled tokens reach. Then precision is
    `r p / (r p + f (1 - p))`: p the feature's rate, r the share of its sampled tokens that reach the threshold, f the
    share of the tokens kept in `Activity.sample` on which it is not active that reach it too.

    The interval is that of the threshold and of f, each at 90 %, as if tokens were independent: the true threshold
    lies between two of the sampled tokens' readings, whatever their distribution, and f has a binomial's exact bounds.
    With fewer than 29 sampled tokens no reading is low enough, and the lower end is the feature's rate or nearly so.
    """
    assert activity.sample is not None
    rows, sample = activity.rows, activity.sample
    n_features, n_rows = rows.layer_FK.shape
    precision_FS3 = np.full((n_features, n_rows + 1, 3), np.nan)
    chosen_n = np.flatnonzero((activity.fired_F >= FEWEST) & activity.sampled.is_there_Fk.any(1))
    n_each = max(1, SCORE_BYTES // (4 * len(sample.x_NLD) * (n_rows + 1)))
    of_features = sample.code.tocsc()
    with Progress("layer readings", len(chosen_n), unit="features", quiet=quiet) as progress:
        # A bank's features of one layer read the same numbers, so that none is copied.
        by_layer = [chosen_n] if n_rows > 1 else _by_layer(chosen_n, rows.layer_FK[:, 0].cpu().numpy())
        for group_n in by_layer:
            for part_n in np.array_split(group_n, max(1, math.ceil(len(group_n) / n_each))):
                if len(part_n):
                    precision_FS3[part_n] = _of_features(activity, part_n, of_features)
                    progress.advance(len(part_n))
    is_zero_FK = (rows.decoder_FKD.abs().amax(2) == 0).cpu().numpy()
    precision_FS3[:, :-1][is_zero_FK] = np.nan
    return precision_FS3


def _by_layer(feature_n: np.ndarray, layer_F: np.ndarray) -> list[np.ndarray]:
    return [feature_n[layer_F[feature_n] == layer] for layer in np.unique(layer_F)]


def _of_features(activity: Activity, feature_n: np.ndarray, of_features: object) -> np.ndarray:
    rows, sample = activity.rows, activity.sample
    assert sample is not None
    row_nKD = rows.decoder_FKD[torch.from_numpy(feature_n)]
    x_NLD = sample.x_NLD.to(row_nKD)
    x_NKD = x_NLD if row_nKD.shape[1] > 1 else x_NLD[:, rows.layer_FK[int(feature_n[0])]]
    each_NnK = torch.einsum("tkd,nkd->tnk", x_NKD, row_nKD)
    score_NnS = torch.cat([each_NnK, each_NnK.sum(2, keepdim=True)], dim=2).cpu().numpy()
    is_active_Nn = (of_features[:, feature_n] > 0).toarray()[:, :, None]  # ty: ignore[not-subscriptable]
    found_nkS = activity.sampled.more["reading"][feature_n]
    there_nk1 = activity.sampled.is_there_Fk[feature_n][:, :, None]
    threshold_n3S = _thresholds(found_nkS, there_nk1[:, :, 0])
    recall_nS = ((found_nkS >= threshold_n3S[:, :1]) & there_nk1).sum(1) / there_nk1.sum(1)
    idle_nS, told_nS = (~is_active_Nn).sum(0), recall_nS * activity.rate_F[feature_n][:, None]
    alarms_3nS = np.stack([((score_NnS >= one) & ~is_active_Nn).sum(0) for one in threshold_n3S.swapaxes(0, 1)])
    shares = [alarms_3nS[0] / np.maximum(1, idle_nS), *_bounds(alarms_3nS[1], alarms_3nS[2], idle_nS)]
    false_nS3 = np.stack(shares, axis=2) * (1 - activity.rate_F[feature_n])[:, None, None]
    return told_nS[..., None] / (told_nS[..., None] + false_nS3)


def _thresholds(found_nkS: np.ndarray, there_nk: np.ndarray) -> np.ndarray:
    """The reading that a share .9 of each feature's tokens reach, and the sampled readings between which the true one
    lies by 90 %, `[n, 3, S]`; minus infinity where none is low enough."""
    ordered_nkS = np.sort(np.where(there_nk[:, :, None], found_nkS, np.inf), axis=1)
    ordered_nkS = np.concatenate([np.full_like(ordered_nkS[:, :1], -np.inf), ordered_nkS], axis=1)
    count_n = there_nk.sum(1)
    ends = [stats.binom.ppf(one, count_n, 1 - RECALL) for one in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)]
    rank_n3 = np.stack([count_n - np.ceil(RECALL * count_n - 1e-9) + 1, ends[0], np.minimum(ends[1] + 1, count_n)], 1)
    return np.take_along_axis(ordered_nkS, rank_n3.astype(int)[:, :, None], axis=1)


def _bounds(most_nS: np.ndarray, least_nS: np.ndarray, idle_nS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The upper bound of a share of which so many tokens were counted at the lower threshold, and the lower bound at
    the upper one (Clopper and Pearson)."""
    upper_nS = stats.beta.ppf((1 + CONFIDENCE) / 2, most_nS + 1, np.maximum(idle_nS - most_nS, 1e-9))
    lower_nS = stats.beta.ppf((1 - CONFIDENCE) / 2, np.maximum(least_nS, 1e-9), idle_nS - least_nS + 1)
    return np.where(most_nS < idle_nS, upper_nS, 1.0), np.where(least_nS > 0, lower_nS, 0.0)
