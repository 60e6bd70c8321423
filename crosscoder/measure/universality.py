"""Whether two subjects have the same features: matches by activity on the same tokens, compared with chance.

Cosines are undefined across widths, so features are compared by activation correlation alone. A code is `[T, F]`, with
alive features only, and both codes cover the same T tokens in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from crosscoder.measure.matching import Similarity, activation_correlation, nearest
from crosscoder.measure.statistics import linear_combination, signed_ratio_of
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


def pooled_u(first: sparse.csc_array, second: sparse.csc_array, *, seed: int, n_pools: int) -> float:
    """Mean u over equalised pools; one pool where the sizes are equal already."""
    n = 1 if first.shape[1] == second.shape[1] else n_pools
    pools = (equal_pools(first, second, seed=seed + i) for i in range(n))
    return float(np.mean([agreement(activation_correlation(*pool)).u for pool in pools]))


def universality_estimate(u: Estimate, *, null: float, ceiling: Estimate) -> Estimate:
    """U with its interval, from u of both subjects and of two trainings of one shape; the null is taken as exact."""
    return signed_ratio_of(linear_combination([(1.0, u)], -null), linear_combination([(1.0, ceiling)], -null))


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
