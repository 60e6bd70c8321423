"""How much room the features have: neurons, slots, and the effective dimension that interference leaves."""

from __future__ import annotations

import numpy as np

DEFINITIONS = {
    "per_neuron_layer": "Features per neuron, per layer: features of one layer over its width D.",
    "per_neuron_joint": "Features per neuron, joint: distinct crosscoder features over the total neurons L * D.",
    "per_slot": "Occupied slots per neuron: distinct features times the layers each occupies (mean rho), over L * D; "
    "the same as crosscoder features per layer over D.",
    "effective_dimension": "d_eff = 1 / mean over pairs of G_ij^2, with G the cosines of the joint decoder rows: the "
    "number of orthogonal-equivalent dimensions that random features with the same interference would fill. Raw, so "
    "dictionary noise inflates it.",
}


def effective_dimension(decoder_FN: np.ndarray) -> float:
    """d_eff of joint decoder rows `[F, N]`: 1 over the mean squared cosine of distinct pairs; nan below two rows.

    F features on separate single layers give about L * D; one direction kept on every layer gives about D.
    """
    n_features = len(decoder_FN)
    if n_features < 2:
        return float("nan")
    norm = np.linalg.norm(decoder_FN, axis=1, keepdims=True)
    rows = np.divide(decoder_FN, norm, out=np.zeros_like(decoder_FN), where=norm > 0)
    # sum of squared entries of the Gram matrix, from the smaller of the two products
    product = rows @ rows.T if n_features <= rows.shape[1] else rows.T @ rows
    off_diagonal = np.square(product, dtype=np.float64).sum() - np.square(np.square(rows).sum(1)).sum()
    return float(n_features * (n_features - 1) / off_diagonal) if off_diagonal > 0 else float("inf")
