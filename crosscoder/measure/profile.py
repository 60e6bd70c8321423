"""Layer profiles of features by their decoder's norms, and twins.

Twins are features that share what they write on every layer with others, and are only together unlike any.
"""

from __future__ import annotations

import numpy as np

from crosscoder.measure.matching import decoder_cosine, layer_squares
from crosscoder.results.table import Value

HISTOGRAM_BINS = 20
HEATMAP_ROWS = 200
ALIKE = 0.9  # cosine on one layer from which two features share a direction there
JOINT = 0.5  # joint cosine from which they are alike as a whole
JOINT_OF_TWO = 0.7  # the same for a feature of two layers, where .5 is what product codes have


def layer_profile(decoder_FLD: np.ndarray) -> np.ndarray:
    """Share of each feature's squared decoder norm on each layer, `e[i, l] = |W_il|^2 / sum_l |W_il|^2`, `[F, L]`.

    A feature whose decoder is zero has no profile; its row is zero.
    """
    return shares(layer_squares(decoder_FLD))


def shares(values_FL: np.ndarray) -> np.ndarray:
    """Rows divided by their sums; zero rows stay zero."""
    total_F1 = values_FL.sum(1, keepdims=True)
    return np.divide(values_FL, total_F1, out=np.zeros_like(values_FL), where=total_F1 > 0)


def participation_ratio(profile_FL: np.ndarray) -> np.ndarray:
    """How many layers a feature occupies, `rho_i = 1 / sum_l e_il^2`, from 1 (one layer) to L (evenly spread)."""
    square_F = np.square(profile_FL).sum(1)
    return np.divide(1.0, square_F, out=np.zeros_like(square_F), where=square_F > 0)


def lifespan(profile_FL: np.ndarray) -> np.ndarray:
    """Number of layers whose share is at least half the feature's largest share."""
    return occupied_layers(profile_FL).sum(1)


def occupied_layers(profile_FL: np.ndarray) -> np.ndarray:
    """True where a layer holds at least half the feature's largest share, `[F, L]`."""
    peak_F1 = profile_FL.max(1, keepdims=True)
    return (profile_FL >= 0.5 * peak_F1) & (peak_F1 > 0)


def adjacent_cosine(decoder_FLD: np.ndarray, profile_FL: np.ndarray) -> np.ndarray:
    """Mean cosine between a feature's decoder rows at neighbouring layers that it both occupies; nan if none.

    1: the feature keeps its direction. Lower: it drifts as it passes through the blocks.
    """
    rows = decoder_FLD.astype(np.float64)
    norm_FL = np.linalg.norm(rows, axis=2)
    dot = np.einsum("fld,fld->fl", rows[:, :-1], rows[:, 1:])
    both = occupied_layers(profile_FL)
    both = both[:, :-1] & both[:, 1:]
    scale = np.where(both, norm_FL[:, :-1] * norm_FL[:, 1:], 1.0)
    count_F = both.sum(1)
    total_F = np.where(both, dot / scale, 0.0).sum(1)
    return np.divide(total_F, count_F, out=np.full(len(total_F), np.nan), where=count_F > 0)


def strongest_layer_cosine(decoder_FLD: np.ndarray, profile_FL: np.ndarray) -> np.ndarray:
    """Cosine of each layer's decoder row with that of the feature's strongest layer, `[F, L]`; nan for a zero row."""
    rows = decoder_FLD.astype(np.float64)
    norm_FL = np.linalg.norm(rows, axis=2)
    at = np.arange(len(rows)), profile_FL.argmax(1)
    scale_FL = norm_FL * norm_FL[at][:, None]
    dot_FL = np.einsum("fld,fd->fl", rows, rows[at])
    return np.divide(dot_FL, scale_FL, out=np.full_like(dot_FL, np.nan), where=scale_FL > 0)


def describe_profiles(decoder_FLD: np.ndarray) -> dict[str, Value]:
    """How features lie over the layers, by the names of quantities; nan where there is no feature."""
    profile_FL = layer_profile(decoder_FLD)
    n_layers = profile_FL.shape[1]
    rho_F, lifespan_F = participation_ratio(profile_FL), lifespan(profile_FL)
    cosine_F = adjacent_cosine(decoder_FLD, profile_FL)
    return {
        "mean_rho": known_mean(rho_F),
        "mean_rho_share": known_mean(rho_F / n_layers),
        "mean_lifespan": known_mean(lifespan_F),
        "single_layer_share": known_mean(lifespan_F == 1),
        "mean_adjacent_cosine": known_mean(cosine_F),
        "rho_histogram": np.histogram(rho_F / n_layers, bins=HISTOGRAM_BINS, range=(0, 1))[0].tolist(),
        "lifespan_counts": np.bincount(lifespan_F, minlength=n_layers + 1)[1:].tolist(),
    }


def known_mean(values: np.ndarray) -> float:
    """The mean of the finite values; nan where there is none."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def heatmap(profile_FL: np.ndarray) -> list[list[float]]:
    """Layer profiles of up to 200 features, evenly drawn from all sorted by their mean layer."""
    order = np.argsort(profile_FL @ np.arange(profile_FL.shape[1]), kind="stable")
    rows = order[np.linspace(0, len(order) - 1, min(HEATMAP_ROWS, len(order))).round().astype(int)]
    return np.round(profile_FL[rows], 4).tolist()


def find_twins(decoder_FLD: np.ndarray) -> np.ndarray:
    """True for twins, `[F]`: at each layer that they occupy another feature writes in their direction, none in all.

    A layer counts as occupied where it holds at least half the feature's largest share (`occupied_layers`), and
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
