"""Whether two subjects have the same features: matches by activity on the same tokens, compared with chance.

Cosines are undefined across widths, so features are compared by activation correlation alone. A code is `[T, F]`, with
alive features only, and both codes cover the same T tokens in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from crosscoder.measure.matching import Nearest, Similarity, activation_correlation, nearest
from crosscoder.measure.statistics import linear_combination, signed_ratio_of
from crosscoder.measure.welch import document_jackknife, interval
from crosscoder.results.table import Estimate

EXCLUSIVE = 0.9  # share of decoder energy in one subject from which a joint feature is that subject's own


@dataclass(frozen=True)
class Agreement:
    """How well two pools of features match by activity: each feature's best correlation in the other pool."""

    forward_F: np.ndarray  # of A's features
    backward_F: np.ndarray

    @property
    def u(self) -> float:
        """Mean of both directions' means."""
        return (float(self.forward_F.mean()) + float(self.backward_F.mean())) / 2


def agreement(correlation: Similarity | np.ndarray) -> Agreement:
    """Best matches in both directions of correlations `[Fa, Fb]`."""
    if 0 in correlation.shape:
        raise ValueError(f"correlations have shape {correlation.shape}; both subjects need alive features")
    found = nearest(correlation)
    return Agreement(found.best_a, found.best_b)


def equal_pools(
    first: sparse.csc_array, second: sparse.csc_array, *, seed: int
) -> tuple[sparse.csc_array, sparse.csc_array]:
    """Both codes with the smaller one's number of columns; those of the larger are a random subset, in order."""
    n = min(first.shape[1], second.shape[1])
    rng = np.random.default_rng(seed)
    kept = [
        code if code.shape[1] == n else code[:, np.sort(rng.choice(code.shape[1], n, replace=False))]
        for code in (first, second)
    ]
    return sparse.csc_array(kept[0]), sparse.csc_array(kept[1])


def shift_tokens(code: sparse.csc_array, shift: int) -> sparse.csc_array:
    """The activity shifted circularly: row t becomes row `(t + shift) mod T`."""
    rows = (code.indices.astype(np.int64) + shift) % code.shape[0]
    # sorting permutes values in place, so they must not be the caller's
    moved = sparse.csc_array((code.data.copy(), rows, code.indptr.copy()), shape=code.shape)
    moved.sort_indices()
    return moved


def circular_shifts(document_T: np.ndarray, n_draws: int, *, seed: int) -> np.ndarray:
    """`n_draws` shifts, each at least the longest document and at most T less that, `[n_draws]`.

    `document_T` labels each token's document, documents in one piece.
    """
    edges = np.flatnonzero(np.diff(document_T) != 0) + 1
    longest = int(np.diff(np.concatenate([[0], edges, [len(document_T)]])).max())
    if 2 * longest > len(document_T):
        raise ValueError(f"the longest of the documents has {longest} of {len(document_T)} tokens; measure more text")
    return np.random.default_rng(seed).integers(longest, len(document_T) - longest + 1, size=n_draws)


def shifted_null(
    first: sparse.csc_array, second: sparse.csc_array, document_T: np.ndarray, *, seed: int, n_draws: int
) -> np.ndarray:
    """u of `first` against circularly shifted `second`, one value for each draw, `[n_draws]`."""
    shifted = (shift_tokens(second, int(shift)) for shift in circular_shifts(document_T, n_draws, seed=seed))
    return np.array([agreement(activation_correlation(first, other)).u for other in shifted])


def u_left(
    first: sparse.csc_array, second: sparse.csc_array, found: Nearest, group_T: np.ndarray, n: int
) -> np.ndarray:
    """u without each of n groups of tokens, `[n]`; which feature of the other side is nearest stays.

    group_T: of each token, from 0.
    """
    tokens_E = np.bincount(group_T, minlength=n)
    inside_ET = sparse.csr_array((np.ones(len(group_T)), (group_T, np.arange(len(group_T)))), shape=(n, len(group_T)))
    rest_E1 = (len(group_T) - tokens_E)[:, None]

    def left(code: sparse.sparray) -> np.ndarray:
        """Means over the other groups' tokens, `[n, columns]`."""
        sums_EF = (inside_ET @ code).toarray()
        return (sums_EF.sum(0) - sums_EF) / rest_E1

    means = [left(code) for code in (first, second)]
    variances = [left(code.multiply(code)) - mean_EF**2 for code, mean_EF in zip((first, second), means, strict=True)]
    u_E = np.zeros(n)
    for i, j in ((np.arange(len(found.index_a)), found.index_a), (found.index_b, np.arange(len(found.index_b)))):
        product_EF = left(sparse.csc_array(first[:, i]).multiply(sparse.csc_array(second[:, j])))
        square_EF = np.maximum(variances[0][:, i], 0) * np.maximum(variances[1][:, j], 0)
        covariance_EF = product_EF - means[0][:, i] * means[1][:, j]
        known_EF = np.divide(covariance_EF, np.sqrt(square_EF), out=np.zeros_like(square_EF), where=square_EF > 0)
        u_E += known_EF.mean(1) / 2
    return u_E


def universality_estimate(
    u: Estimate, *, null: float, ceiling: Estimate, left: tuple[np.ndarray, np.ndarray] | None = None
) -> Estimate | str:
    """U with its interval, from u of both subjects and of two trainings of one shape; the null is taken as exact.

    left: u and the ceiling without each of the text's documents, whose variance is then in the interval. A reason where
    that is not known.
    """
    value = signed_ratio_of(linear_combination([(1.0, u)], -null), linear_combination([(1.0, ceiling)], -null))
    if left is None:
        return value
    text = document_jackknife((left[0] - null) / (left[1] - null))
    if isinstance(text, str) or text.value == 0:
        return text if isinstance(text, str) else value
    reach = interval(0.0, [text])
    return reach if isinstance(reach, str) else linear_combination([(1.0, value), (1.0, reach)])


def exclusive_features(profile_FL: np.ndarray, n_first_layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Which features of a joint crosscoder are the first subject's own, and which the second's, `[F]` each.

    `profile_FL` are shares of decoder energy over [A's layers ; B's layers], layers in units of equal energy. Energies
    are averaged over each subject's layers before they are compared, so that the subject with more layers does not own
    everything; a row of zeros is nobody's. L1 penalties overstate both (Minder et al. 2025, arXiv 2504.02922).
    """
    first, second = profile_FL[:, :n_first_layers].mean(1), profile_FL[:, n_first_layers:].mean(1)
    total = first + second
    return first > EXCLUSIVE * total, second > EXCLUSIVE * total


def exclusive_shares(profile_FL: np.ndarray, n_first_layers: int) -> tuple[float, float]:
    """Share of a joint crosscoder's features that are the first subject's own, and the second's."""
    first_F, second_F = exclusive_features(profile_FL, n_first_layers)
    return float(first_F.mean()), float(second_F.mean())
