"""How much of a planted truth an estimate found: pure functions of two sets of decoders and a few counts.

`found` are the features that the estimate calls real (alive, duplicates joined); `truth` are all planted ones. Errors
are signed and relative, `estimate / truth - 1`: positive is too many, too wide, too roomy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize

from crosscoder.measure import dimension, matching, profile

MATCH = 0.9  # joint decoder cosine from which a planted feature counts as found
SATURATED = 0.95  # share of a dictionary in use from which its count is a lower bound
PERSISTENT, DRIFTING = 0.9, 0.4  # least mean cosine of neighbouring layers
SHAPES = ("local", "persistent", "drifting", "composite")


@dataclass(frozen=True)
class Assignment:
    """The partner of each planted feature among the found, -1 for none, and their cosine, 0 for none."""

    partner_F: np.ndarray
    cosine_F: np.ndarray

    @property
    def recalled_F(self) -> np.ndarray:
        """True where the partner is good enough."""
        return self.cosine_F >= MATCH


def assign(found_FLD: np.ndarray, truth_FLD: np.ndarray) -> Assignment:
    """The one-to-one assignment with the largest summed cosine of joint decoders; negative cosines count as 0."""
    similarity = np.maximum(matching.decoder_cosine(_flat(truth_FLD), _flat(found_FLD)).whole(), 0.0)
    rows, columns = optimize.linear_sum_assignment(similarity, maximize=True)
    partner, cosine = np.full(len(truth_FLD), -1), np.zeros(len(truth_FLD))
    positive = similarity[rows, columns] > 0
    partner[rows[positive]] = columns[positive]
    cosine[rows] = similarity[rows, columns]
    return Assignment(partner, cosine)


def _flat(decoder_FLD: np.ndarray) -> np.ndarray:
    return matching.joint_rows(decoder_FLD).astype(np.float64)


def mean_cosine(assignment: Assignment) -> float:
    """MCC: the mean over planted features of their partner's cosine."""
    return float(assignment.cosine_F.mean())


def recall_by_kind(assignment: Assignment, kind_F: np.ndarray, n_kinds: int) -> np.ndarray:
    """Share of each kind's planted features that were recalled, `[n_kinds]`; nan for a kind that is not there."""
    planted = np.bincount(kind_F, minlength=n_kinds)
    recalled = np.bincount(kind_F[assignment.recalled_F], minlength=n_kinds)
    return np.divide(recalled, planted, out=np.full(n_kinds, np.nan), where=planted > 0)


def precision(assignment: Assignment, n_found: int) -> float:
    """Share of found features that are the partner of a recalled one; nan if none was found."""
    return float(assignment.recalled_F.sum() / n_found) if n_found else float("nan")


def precision_by_kind(
    found_FLD: np.ndarray, truth_FLD: np.ndarray, kind_F: np.ndarray, n_kinds: int, assignment: Assignment
) -> np.ndarray:
    """`precision` among the found features whose nearest planted one is of each kind, `[n_kinds]`; nan for none."""
    if len(found_FLD) == 0:
        return np.full(n_kinds, np.nan)
    nearest = kind_F[matching.nearest(matching.decoder_cosine(_flat(found_FLD), _flat(truth_FLD))).index_a]
    good = np.zeros(len(found_FLD), dtype=bool)
    good[assignment.partner_F[assignment.recalled_F]] = True
    claimed = np.bincount(nearest, minlength=n_kinds)
    right = np.bincount(nearest[good], minlength=n_kinds)
    return np.divide(right, claimed, out=np.full(n_kinds, np.nan), where=claimed > 0)


def relative_error(estimate: float, truth: float) -> float:
    """`estimate / truth - 1`; nan if the truth is 0."""
    return estimate / truth - 1 if truth else float("nan")


def beside_truth(key: str, estimate: float, truth: float) -> dict[str, float]:
    """A quantity as it was estimated, the truth and the error, by the names of quantities."""
    return {key: estimate, f"{key}_true": truth, f"{key}_error": relative_error(estimate, truth)}


def mean_rho(decoder_FLD: np.ndarray) -> float:
    """Mean participation ratio: how many layers a feature occupies on average; nan without features."""
    return profile.known_mean(profile.participation_ratio(profile.layer_profile(decoder_FLD)))


def matched_rho_error(found_FLD: np.ndarray, truth_FLD: np.ndarray, assignment: Assignment) -> float:
    """Mean over recalled features of `|rho found / rho planted - 1|`; nan if none was.

    The means of all found and all planted features can agree although no single spread is right; this cannot.
    """
    kept = assignment.recalled_F
    pairs = found_FLD[assignment.partner_F[kept]], truth_FLD[kept]
    found, truth = (profile.participation_ratio(profile.layer_profile(side)) for side in pairs)
    return profile.known_mean(np.abs(found / truth - 1))


def classify_shapes(decoder_FLD: np.ndarray) -> np.ndarray:
    """What a decoder looks like by itself, as an index into `SHAPES`, `[F]`.

    local: one layer holds more than twice any other's share. Otherwise by the mean cosine of neighbouring occupied
    layers: persistent from 0.9, drifting from 0.4, composite (unrelated directions, or layers apart) below.
    """
    profile_FL = profile.layer_profile(decoder_FLD)
    cosine_F = profile.adjacent_cosine(decoder_FLD, profile_FL)
    shape_F = np.full(len(decoder_FLD), SHAPES.index("composite"))
    shape_F[cosine_F >= DRIFTING] = SHAPES.index("drifting")
    shape_F[cosine_F >= PERSISTENT] = SHAPES.index("persistent")
    shape_F[profile.lifespan(profile_FL) == 1] = SHAPES.index("local")
    return shape_F


def kind_confusion(found_FLD: np.ndarray, kind_F: np.ndarray, n_kinds: int, assignment: Assignment) -> np.ndarray:
    """Planted features of each kind by the shape of their partner, `[n_kinds, 5]`: `SHAPES`, and last not recalled."""
    column_F = np.full(len(kind_F), len(SHAPES))
    kept = assignment.recalled_F
    if kept.any():
        column_F[kept] = classify_shapes(found_FLD[assignment.partner_F[kept]])
    table = np.zeros((n_kinds, len(SHAPES) + 1), dtype=np.int64)
    np.add.at(table, (kind_F, column_F), 1)
    return table


def is_saturated(count: int, size: int) -> bool:
    """Whether a dictionary of `size` features is so full that its count is only a lower bound."""
    return count >= SATURATED * size


def score_features(
    found_FLD: np.ndarray, truth_FLD: np.ndarray, kind_F: np.ndarray, kinds: tuple[str, ...], *, count: int
) -> dict[str, Any]:
    """Every score of one estimate by the names of quantities; nan where one is undefined.

    count: how many features the estimate says there are, which need not be how many decoders it gives.
    """
    n_kinds = len(kinds)
    assignment = assign(found_FLD, truth_FLD)
    d_effs = (dimension.effective_dimension(_flat(decoder)) for decoder in (found_FLD, truth_FLD))
    confusion = kind_confusion(found_FLD, kind_F, n_kinds, assignment)
    per_kind = recall_by_kind(assignment, kind_F, n_kinds)
    per_kind_precision = precision_by_kind(found_FLD, truth_FLD, kind_F, n_kinds, assignment)
    return {
        **beside_truth("count", count, len(truth_FLD)),
        "mcc": mean_cosine(assignment),
        "recall": float(assignment.recalled_F.mean()),
        "precision": precision(assignment, len(found_FLD)),
        "recall_by_kind": dict(zip(kinds, per_kind.tolist(), strict=True)),
        "precision_by_kind": dict(zip(kinds, per_kind_precision.tolist(), strict=True)),
        **beside_truth("rho", mean_rho(found_FLD), mean_rho(truth_FLD)),
        "rho_error_matched": matched_rho_error(found_FLD, truth_FLD, assignment),
        **beside_truth("d_eff", *d_effs),
        "kind_confusion": dict(zip(kinds, confusion.tolist(), strict=True)),
    }
