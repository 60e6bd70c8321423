"""What a penalty on activations costs in their size, and what the same features explain at their right size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

DEFINITIONS = {
    "refitted_variance": "Explained variance after every feature's activations are multiplied by one constant of its "
    "own, the constants chosen together by least squares on the held-out tokens. What it is above the plain one was "
    "lost to shrinkage, not to missing features.",
}


@dataclass(frozen=True)
class Refitted:
    """Explained variance with activations as they are and as they should be, and the constants between."""

    scale_F: np.ndarray  # above 1: the penalty made the feature too small; 0 for one that is never active
    explained_variance: float
    refitted_variance: float


def refit_sizes(code: sparse.csc_array, x_TN: np.ndarray, decoder_FN: np.ndarray, bias_N: np.ndarray) -> Refitted:
    """One constant for each feature that makes `sum_f scale_f code_f W_f + bias` fit x best (Wright and Sharkey 2024).

    Normal equations of the constants: `((f^T f) * (W W^T)) scale = diag(f^T (x - bias) W^T)`. Costs F^2 numbers. One
    constant a feature cannot mend a decoder whose layers shrank unevenly; `spread.corrected_profile` shows that.

    Raises:
        ValueError: shapes do not fit together, or x is constant.
    """
    if code.shape != (len(x_TN), len(decoder_FN)) or not x_TN.shape[1:] == decoder_FN.shape[1:] == bias_N.shape:
        raise ValueError(
            f"code {code.shape}, x {x_TN.shape}, decoder {decoder_FN.shape} and bias {bias_N.shape} do not fit; "
            "expected [T, F], [T, N], [F, N] and [N]"
        )
    if not np.ptp(x_TN, axis=0).max() > 0:
        raise ValueError(f"x is constant over {len(x_TN)} tokens; there is no variance to explain")
    x, decoder = np.asarray(x_TN, dtype=np.float64) - bias_N, np.asarray(decoder_FN, dtype=np.float64)
    variance = np.square(x - x.mean(0)).sum()
    code = sparse.csc_array(code, dtype=np.float64)
    gram_FF = (code.T @ code).toarray() * (decoder @ decoder.T)
    moment_F = ((code.T @ x) * decoder).sum(1)
    scale_F = np.linalg.lstsq(gram_FF, moment_F, rcond=None)[0]
    whole = np.square(x).sum()

    def explained(scale: np.ndarray) -> float:
        return float(1 - (whole - 2 * scale @ moment_F + scale @ gram_FF @ scale) / variance)

    return Refitted(scale_F, explained(np.ones(len(decoder))), explained(scale_F))
