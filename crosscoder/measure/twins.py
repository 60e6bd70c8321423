"""Twins: features that share what they write on every layer with others, and are only together unlike any."""

from __future__ import annotations

import numpy as np

from crosscoder.measure.matching import decoder_cosine
from crosscoder.measure.profile import layer_profile, occupied_layers

ALIKE = 0.9  # cosine on one layer from which two features share a direction there
JOINT = 0.5  # joint cosine from which they are alike as a whole
JOINT_OF_TWO = 0.7  # the same for a feature of two layers, where .5 is what product codes have


def find_twins(decoder_FLD: np.ndarray) -> np.ndarray:
    """True for twins, `[F]`: at each layer that they occupy another feature writes in their direction, none in all.

    A layer counts as occupied where it holds at least half the feature's largest share (`profile.occupied_layers`), and
    a neighbour on a layer must occupy it too: the direction of a row that is next to nothing is noise. Neighbours of
    different layers may be different features. A feature that is alike to another as a whole is no twin: from a joint
    cosine of .5 on, or .7 where it occupies two layers, or in a dictionary of two. Two words of two layers, of equal
    norms, that share one of them have .5 to rounding in a dictionary of any depth, so that .5 would call none a twin.
    """
    rows_FLD = np.asarray(decoder_FLD, dtype=np.float64)
    occupied_FL = occupied_layers(layer_profile(rows_FLD))
    of_two_F = (occupied_FL.sum(1) == 2) | (rows_FLD.shape[1] <= 2)
    limit_F = np.where(of_two_F, JOINT_OF_TWO, JOINT)
    near_FL, alone_F = ~occupied_FL, np.zeros(len(rows_FLD), dtype=bool)
    for start, block in decoder_cosine(rows_FLD, rows_FLD).blocks():
        here = slice(start, start + len(block))
        alone_F[here] = ~(_others(start, block) >= limit_F[here, None]).any(1)
    for layer in range(rows_FLD.shape[1]):
        rows_F1D, occupied_F = rows_FLD[:, [layer]], occupied_FL[:, layer]
        for start, block in decoder_cosine(rows_F1D, rows_F1D).blocks():
            near_FL[start : start + len(block), layer] |= (_others(start, block) >= ALIKE)[:, occupied_F].any(1)
    return np.asarray(alone_F & near_FL.all(1) & occupied_FL.any(1))


def _others(start: int, block: np.ndarray) -> np.ndarray:
    """Cosines with each feature but itself, for features from `start` on."""
    rows = np.arange(len(block))
    block[rows, start + rows] = -np.inf
    return block
