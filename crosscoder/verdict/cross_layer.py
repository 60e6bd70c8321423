"""X with its interval, and what is left of a comparison without the features that make it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from crosscoder.measure import spread
from crosscoder.measure.probes import FunctionalSpread
from crosscoder.measure.statistics import CONFIDENCE, Bootstrap, two_level_bootstrap


def genuine_bootstrap(
    measured: Sequence[Sequence[FunctionalSpread]],
    *,
    seed: int,
    document_seed: int | None = None,
    n_draws: int = 2000,
    confidence: float = CONFIDENCE,
) -> Bootstrap:
    """The share of genuinely cross-layer features, resampled over training seeds, dictionary seeds and documents.

    `measured[t][d]` is dictionary seed d of training seed t. Probes stay as fitted: blocks of the scored documents are
    resampled. An AUC follows them to first order, by the sums of placements that `probe_passes.sum_placements` keeps.
    A share of features beyond a threshold is no smooth function of the text, so intervals are rough where many features
    lie near the threshold.

    Raises:
        ValueError: measured without blocks, or with different numbers of them.
    """
    groups = [[_block_sums(one) for one in group] for group in measured]
    n_layers = {one.auc_nL.shape[1] for group in measured for one in group}
    if len(n_layers) != 1:
        raise ValueError(f"dictionaries have {sorted(n_layers)} layers; bootstrap those of one shape together")
    share = _share_of_totals(n_layers.pop())
    return two_level_bootstrap(
        groups, seed=seed, statistic=share, document_seed=document_seed, n_draws=n_draws, confidence=confidence
    )


def _block_sums(one: FunctionalSpread) -> np.ndarray:
    if one.block_sums is None:
        raise ValueError("this was measured without blocks of documents; measure with n_blocks=32, say")
    return one.block_sums


def _share_of_totals(n_layers: int) -> Callable[[np.ndarray], np.ndarray]:
    """The statistic of `genuine_bootstrap`: totals of `block_sums`, `[R, Q]`, to shares, `[R]`."""
    n_probes = n_layers + 1

    def share(totals_RQ: np.ndarray) -> np.ndarray:
        n = totals_RQ.shape[1] // (2 * n_probes + 3)
        cuts = np.cumsum([n_probes * n, n_probes * n, n, n])
        placed, moved, with_Rn, without_Rn, probed_Rn = np.split(totals_RQ, cuts, axis=1)
        known_n = probed_Rn[0] > 0
        auc_RSn = sum(
            part.reshape(-1, n_probes, n) / np.where(number > 0, number, np.nan)[:, None]
            for part, number in ((placed, with_Rn), (moved, without_Rn))
        )[:, :, known_n]
        return np.array([spread.genuine_share(auc_Sn[-1], auc_Sn[:-1].T) for auc_Sn in auc_RSn])

    return share


def excess_bootstrap(trained: Bootstrap, shuffled: Bootstrap, untrained: Bootstrap) -> Bootstrap:
    """X = share - larger of both nulls, draw by draw, each share stretched by its own small-sample factor.

    The larger of two noisy nulls is too large on average, so X errs on the low side, and below 0 where nothing differs.

    Raises:
        ValueError: numbers of draws differ.
    """
    numbers = {len(side.draws) for side in (trained, shuffled, untrained)}
    if len(numbers) != 1:
        raise ValueError(f"the three shares have {sorted(numbers)} draws; resample all equally often")
    null = np.maximum(shuffled.stretched(), untrained.stretched())
    return Bootstrap(trained.value - max(shuffled.value, untrained.value), trained.stretched() - null)


def remove_genuine(
    probability_F: np.ndarray, decoder_FLD: np.ndarray, pairs_m2: np.ndarray, genuine_F: np.ndarray, *, side: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities, decoders and matched pairs without the features of a mask, for R without them.

    `pairs_m2` holds row numbers of two dictionaries; those of column `side` are this one's. Pairs of a removed feature
    go, and the others get this side's new row numbers; the other dictionary stays as it is.

    Raises:
        ValueError: lengths differ, or nothing is left.
    """
    keep = ~np.asarray(genuine_F, dtype=bool)
    if not len(keep) == len(probability_F) == len(decoder_FLD):
        raise ValueError(
            f"the mask has {len(keep)} entries for {len(probability_F)} probabilities and {len(decoder_FLD)} decoder "
            "rows; give one for each feature"
        )
    if not keep.any():
        raise ValueError(f"all {len(keep)} features are genuinely cross-layer; nothing is left to compare")
    new_F = np.cumsum(keep) - 1
    pairs = pairs_m2[keep[pairs_m2[:, side]]].copy()
    pairs[:, side] = new_F[pairs[:, side]]
    return np.asarray(probability_F)[keep], np.asarray(decoder_FLD)[keep], pairs
