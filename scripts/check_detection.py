"""Found features as detectors of planted ones, by the definitions of SAELens' synthetic scores (version 6.54).

`crosscoder.measure.recovery` is about directions. Here every found feature, dead ones included, is held against the
planted feature whose direction it resembles most, whichever sign it has, and asked whether it fires when that one
does. Two found features may answer to the same planted one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import optimize, sparse

from crosscoder.measure import matching


class Detection(NamedTuple):
    """Means over found features; a precision, recall or F1 without a denominator counts as 0."""

    precision: float
    recall: float
    f1: float
    accuracy: float


def nearest_planted(found_FN: np.ndarray, truth_PN: np.ndarray) -> np.ndarray:
    """The planted feature with the largest absolute cosine to each found one, `[F]`; the first of equals."""
    return _absolute_cosine(found_FN, truth_PN).argmax(1)


def score_detection(code_TF: sparse.csr_array, truth_TP: sparse.csr_array, nearest_F: np.ndarray) -> Detection:
    """How well "found feature i is active" predicts "its nearest planted feature is active", over T tokens.

    Raises:
        ValueError: the two do not hold the same tokens, or `nearest_F` does not name a planted feature for each found.
    """
    if code_TF.shape[0] != truth_TP.shape[0] or nearest_F.shape != (code_TF.shape[1],):
        raise ValueError(
            f"codes are {code_TF.shape}, the truth {truth_TP.shape} and the partners {nearest_F.shape}; expected "
            "[T, F], [T, P] and [F]"
        )
    fires_TF = sparse.csc_array(code_TF > 0).astype(np.float64)
    true_TF = sparse.csc_array(truth_TP > 0).astype(np.float64)[:, nearest_F]
    both_F = np.asarray(fires_TF.multiply(true_TF).sum(0)).ravel()
    fires_F, true_F = (np.asarray(matrix.sum(0)).ravel() for matrix in (fires_TF, true_TF))
    precision_F, recall_F = _ratio(both_F, fires_F), _ratio(both_F, true_F)
    f1_F = _ratio(2 * precision_F * recall_F, precision_F + recall_F)
    wrong_F = fires_F + true_F - 2 * both_F
    accuracy_F = 1 - wrong_F / max(1, code_TF.shape[0])
    return Detection(*(float(value_F.mean()) for value_F in (precision_F, recall_F, f1_F, accuracy_F)))


def absolute_mcc(found_FN: np.ndarray, truth_PN: np.ndarray) -> float:
    """Mean absolute cosine of the pairs in the best one-to-one assignment, over min(F, P) pairs.

    `recovery.mean_cosine` takes the sign into account and divides by P, so that too few found features cost.
    """
    similarity_FP = _absolute_cosine(found_FN, truth_PN)
    rows, columns = optimize.linear_sum_assignment(similarity_FP, maximize=True)
    return float(similarity_FP[rows, columns].mean())


def uniqueness(nearest_F: np.ndarray) -> float:
    """Different planted features among the nearest ones, over found features; 0 if none was found."""
    return len(np.unique(nearest_F)) / len(nearest_F) if len(nearest_F) else 0.0


def _absolute_cosine(found_FN: np.ndarray, truth_PN: np.ndarray) -> np.ndarray:
    return np.abs(matching.decoder_cosine(found_FN.astype(np.float64), truth_PN.astype(np.float64)).whole())


def _ratio(above_F: np.ndarray, below_F: np.ndarray) -> np.ndarray:
    return np.divide(above_F, below_F, out=np.zeros_like(above_F), where=below_F > 0)
