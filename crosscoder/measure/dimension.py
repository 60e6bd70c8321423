"""How features share their space: effective dimension, raw, weighted and debiased; its ceiling.

All take joint decoder rows, `[F, N]` with N = L * D.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import special

from crosscoder.measure.matching import joint_rows, row_spans, unit_rows
from crosscoder.results.table import Estimate

SELF_COSINE = 0.9  # matched-seed decoder cosine below which no debiased dimension is quoted
CEILING = Estimate(3.52, 2.94, 4.23)  # C of `highest_probability`; benchmarks/ceiling.md says at which sizes


def _weights(weight_F: np.ndarray | None, n: int) -> np.ndarray:
    weights = np.ones(n) if weight_F is None else np.asarray(weight_F, dtype=np.float64)
    return weights / max(weights.mean(), np.finfo(float).tiny)


def _dimension(interference: float) -> float:
    """1 / interference; infinite where it is not above 0, nan where undefined."""
    if math.isnan(interference):
        return math.nan
    return 1 / interference if interference > 0 else math.inf


def effective_dimension(decoder_FLD: np.ndarray) -> float:
    """d_eff of joint decoder rows: 1 over the mean squared cosine of distinct pairs; nan below two rows.

    F features on separate single layers give about L * D; one direction kept on every layer gives about D.
    """
    rows, n_features = unit_rows(joint_rows(decoder_FLD)), len(decoder_FLD)
    if n_features < 2:
        return float("nan")
    # sum of squared entries of the Gram matrix, from the smaller of the two products
    side = rows if n_features <= rows.shape[1] else rows.T
    spans = row_spans(len(side), len(side))
    total = sum(np.square(side[start:stop] @ side.T, dtype=np.float64).sum() for start, stop in spans)
    off_diagonal = total - np.square(np.square(rows).sum(1)).sum()
    return float(n_features * (n_features - 1) / off_diagonal) if off_diagonal > 0 else float("inf")


def weighted_dimension(decoder_FN: np.ndarray, weight_F: np.ndarray | None = None) -> float:
    """d_eff with pairs weighted by `w_i w_j`: `sum w_i w_j / sum w_i w_j G_ij^2` over i != j.

    Equal weights give `effective_dimension`. nan for fewer than two rows with weight, inf without any interference.
    """
    weights, rows_FN = _weights(weight_F, len(decoder_FN)), unit_rows(np.asarray(decoder_FN, dtype=np.float64))
    return _dimension(_cross_interference(rows_FN, rows_FN, weights))


def _cross_interference(first_FN: np.ndarray, second_FN: np.ndarray, weight_F: np.ndarray) -> float:
    """`sum w_i w_j G1_ij G2_ij / sum w_i w_j` over i != j, for unit rows; from the smaller of F x F and N x N."""
    if len(first_FN) <= first_FN.shape[1]:
        total = 0.0
        for start, stop in row_spans(len(first_FN), len(first_FN)):
            products = (first_FN[start:stop] @ first_FN.T) * (second_FN[start:stop] @ second_FN.T)
            total += float(weight_F[start:stop] @ products @ weight_F)
    else:
        first_NF = (first_FN * weight_F[:, None]).T
        spans = row_spans(len(first_NF), len(first_NF))
        total = float(sum(np.square(first_NF[start:stop] @ second_FN).sum() for start, stop in spans))
    own = np.square(first_FN).sum(1) * np.square(second_FN).sum(1)
    pairs = weight_F.sum() ** 2 - np.square(weight_F).sum()
    return float((total - (np.square(weight_F) * own).sum()) / pairs) if pairs > 0 else math.nan


@dataclass(frozen=True)
class DebiasedDimension:
    """The two-seed effective dimension, or the reason why there is none."""

    value: float | None
    self_cosine: float
    reason: str | None = None


def debiased_dimension(
    first_FN: np.ndarray, second_FN: np.ndarray, pairs_m2: np.ndarray, weight_m: np.ndarray | None = None
) -> DebiasedDimension:
    """d_eff free of the noise of single dictionaries: `sum w_i w_j / sum w_i w_j G1_ij G2_ij` over matched i != j.

    `pairs_m2` matches rows of two dictionary seeds; take it from activation correlation, since matching by the decoder
    cosine would choose the pairs whose cosine is then quoted. If errors of the two seeds are independent and isotropic,
    the expected product is G_ij^2 r_i r_j with r_i the cosine of a feature with its match: free of the additive bias
    1 / N of a square, but shrunk. There is none, but a reason, where the mean of r is below `SELF_COSINE` or fewer than
    two features match.
    """
    n = len(pairs_m2)
    if n < 2:
        return DebiasedDimension(None, float("nan"), f"{n} features match; a pair of features needs two")
    weights = _weights(weight_m, n)
    rows = first_FN[pairs_m2[:, 0]], second_FN[pairs_m2[:, 1]]
    first, second = (unit_rows(np.asarray(side, dtype=np.float64)) for side in rows)
    mean = float((first * second).sum(1).mean())
    if not mean >= SELF_COSINE:
        reason = (
            f"the {n} matched features of two seeds have a mean decoder cosine of {mean:.3f}, below "
            f"{SELF_COSINE}: their directions are too noisy to say how they interfere"
        )
        return DebiasedDimension(None, mean, reason)
    return DebiasedDimension(_dimension(_cross_interference(first, second, weights)), mean)


def highest_probability(density: float, constant: float) -> float:
    """p_max(phi): the firing probability up to which `density` = phi features per dimension can be told apart.

    The ceiling `phi = 1 / (C p ln(1 / p))` solved for p < 1 / e: `exp(W_-1(-1 / (C phi)))`, W_-1 the lower branch of
    Lambert's function. Below phi = e / C every p is possible, and the answer is 1.
    """
    if density * constant < math.e:
        return 1.0
    if density * constant <= math.e * (1 + 1e-9):  # at the branch point itself the function's series gives nan
        return 1 / math.e
    return float(np.exp(special.lambertw(-1 / (constant * density), k=-1).real))


def headroom(density: float, probability: float, constant: float) -> float:
    """`p_max(density) / probability`: above 1 the measured features lie below the ceiling; inf where none exists."""
    ceiling = highest_probability(density, constant)
    return float("inf") if density * constant < math.e else ceiling / probability
