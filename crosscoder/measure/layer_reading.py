"""How well one layer alone tells that a feature is active: the precision of its reading, at a recall of nine tenths."""

from __future__ import annotations

import math

import numpy as np
import torch

from crosscoder.foundation.console import Progress
from crosscoder.measure.examples import Activity
from crosscoder.measure.labels import RECALL, SCORE_BYTES

FEWEST = 5
"""Tokens on which a feature is active below which there is no precision."""


@torch.no_grad()
def layer_precision(activity: Activity, *, quiet: bool = False) -> np.ndarray:
    """Precision of each layer's reading of each feature, and of all layers' together, `[F, K + 1]`; nan for a feature
    that is active on fewer than five tokens, and for a row that is zero.

    The reading of layer l is `<W_l, x_l>` with the decoder's row, as in `measure.labels`. A token counts as told by a
    reading that is as high as a threshold, which a share .9 of the feature's sampled tokens reach. Then precision is
    `r p / (r p + f (1 - p))`: p the feature's rate, r the share of its sampled tokens that reach the threshold, f the
    share of the tokens kept in `Activity.sample` on which it is not active that reach it too. Where f is 0 the
    precision is 1 to the resolution of that sample, of N tokens: false alarms rarer than one in N are not seen.
    """
    assert activity.sample is not None
    rows, sample = activity.rows, activity.sample
    n_features, n_rows = rows.layer_FK.shape
    precision_FS = np.full((n_features, n_rows + 1), np.nan)
    chosen_n = np.flatnonzero((activity.fired_F >= FEWEST) & activity.sampled.is_there_Fk.any(1))
    n_each = max(1, SCORE_BYTES // (4 * len(sample.x_NLD) * (n_rows + 1)))
    of_features = sample.code.tocsc()
    with Progress("layer readings", len(chosen_n), unit="features", quiet=quiet) as progress:
        # A bank's features of one layer read the same numbers, so that none is copied.
        by_layer = [chosen_n] if n_rows > 1 else _by_layer(chosen_n, rows.layer_FK[:, 0].cpu().numpy())
        for group_n in by_layer:
            for part_n in np.array_split(group_n, max(1, math.ceil(len(group_n) / n_each))):
                if len(part_n):
                    precision_FS[part_n] = _of_features(activity, part_n, of_features)
                    progress.advance(len(part_n))
    is_zero_FK = (rows.decoder_FKD.abs().amax(2) == 0).cpu().numpy()
    precision_FS[:, :-1][is_zero_FK] = np.nan
    return precision_FS


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
    threshold_nS = _lowest_of_most(found_nkS, there_nk1[:, :, 0])
    recall_nS = ((found_nkS >= threshold_nS[:, None]) & there_nk1).sum(1) / there_nk1.sum(1)
    is_false_NnS = (score_NnS >= threshold_nS) & ~is_active_Nn
    alarms_nS = is_false_NnS.sum(0) / np.maximum(1, (~is_active_Nn).sum(0))
    rate_n1 = activity.rate_F[feature_n][:, None]
    told_nS = recall_nS * rate_n1
    return told_nS / (told_nS + alarms_nS * (1 - rate_n1))


def _lowest_of_most(found_nkS: np.ndarray, there_nk: np.ndarray) -> np.ndarray:
    """The reading that a share .9 of each feature's tokens reach, `[n, S]`."""
    ordered_nkS = np.sort(np.where(there_nk[:, :, None], found_nkS, np.inf), axis=1)
    count_n = there_nk.sum(1)
    first_n = count_n - np.ceil(RECALL * count_n - 1e-9).astype(int)
    return ordered_nkS[np.arange(len(found_nkS)), first_n]
