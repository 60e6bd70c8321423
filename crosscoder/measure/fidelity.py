"""A quantity of one training at a fidelity that all trainings share, read from its dictionaries of several k.

Entropy load and L0 are set by k, so two subjects are compared where their dictionaries lose equally much: at a common
share of variance unexplained, and at a common share of the harm of ablation. Both currencies fall as k grows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator

from crosscoder.measure.splice import SMALLEST_HARM

Currency = Literal["fvu", "loss"]
TARGETS: dict[Currency, tuple[float, ...]] = {"fvu": (0.10, 0.085), "loss": (0.04, 0.028)}
"""Where quantities are read. fvu: 1 - explained variance; loss: `lost_share` with all sites spliced."""
FEWEST_POINTS = 4


class SweepPoint(NamedTuple):
    """One dictionary of a sweep over k: its currency's value, which falls as k grows, and the quantity read from it."""

    k: float
    fidelity: float
    quantity: float
    left_2E: np.ndarray | None = None
    """Fidelity and quantity without each document of the text, `[2, documents]`."""


class AtFidelity(NamedTuple):
    """A quantity at a common fidelity."""

    value: float
    elasticity: float
    """d ln quantity / d ln fidelity at the target: an error e of ln fidelity moves ln quantity by `elasticity * e`."""
    bend: float
    """|ln| of the value that a monotone cubic through the points would give, over the value: what the choice of a
    straight line is worth."""
    left_E: np.ndarray | None = None
    """The value without each document of the text, between the same two points; None where a point does not say."""


def lost_share(*, spliced_loss: float, clean_loss: float, ablated_loss: float) -> float | str:
    """The loss currency, `(spliced - clean) / (ablated - clean)`, or why there is none."""
    harm = ablated_loss - clean_loss
    if not harm > SMALLEST_HARM:
        return f"ablation costs {harm:.2g} nats a token, so that no share of it can be lost"
    return (spliced_loss - clean_loss) / harm


def read_at(points: Sequence[SweepPoint], target: float) -> AtFidelity | str:
    """The quantity where fidelity is `target`, from the dictionaries of one training, or why it cannot be read.

    Definition: with points in the order of k, the one pair of neighbours whose fidelities enclose the target, and
    between them ln quantity linear in ln fidelity. Never beyond the points. A target that a point has exactly is read
    there, with the slope on its side of larger k. The cubic of `bend` is Fritsch and Butland's (1984), in the same
    logarithms, through the points around the target whose fidelities fall.

    There is a reason instead where fewer than `FEWEST_POINTS` k were run, where the points do not enclose the target,
    or where they do so more than once or fidelity rises beside the pair: then which dictionary has the fidelity is not
    known.

    Raises:
        ValueError: the target is not positive, a k comes twice (average its dictionaries on logs first), or a number is
            not finite.
    """
    if not target > 0:
        raise ValueError(f"the target is {target:g}, expected a fidelity above 0")
    known = sorted(points, key=lambda point: point.k)
    if len({point.k for point in known}) < len(known):
        raise ValueError(f"k is {[point.k for point in known]}, expected each once; average dictionaries on logs first")
    if not np.isfinite(np.array([point[:3] for point in known])).all():
        raise ValueError(f"expected finite numbers, got {_listed(known)}")
    if len(known) < FEWEST_POINTS:
        return f"{len(known)} k were run, of which a fidelity needs {FEWEST_POINTS}"
    if bad := [point for point in known if not (point.fidelity > 0 and point.quantity > 0)]:
        return f"a logarithm needs all above 0, and there is {_listed(bad)}"
    fidelity_K = np.array([point.fidelity for point in known])
    found = _enclosing(known, fidelity_K, target)
    return found if isinstance(found, str) else _interpolate(known, *found, target)


def _enclosing(known: Sequence[SweepPoint], fidelity_K: np.ndarray, target: float) -> tuple[int, int, int] | str:
    """The first of the pair that encloses the target, and the ends (exclusive) of the falling run around it."""
    below_K = fidelity_K < target
    crossings = np.flatnonzero(np.diff(below_K))
    if len(crossings) == 0 and fidelity_K[-1] == target:
        crossings = np.array([len(known) - 2])
    if len(crossings) == 0 or (len(crossings) == 1 and below_K[0]):
        aim = "smaller" if below_K.all() else "larger"
        mend = f"; train one of {aim} k" if below_K.all() or not below_K.any() else ": fidelity rises with k"
        return f"{target:g} is not enclosed by {_listed(known)}{mend}"
    if len(crossings) > 1:
        return f"fidelity is not monotone in k: {target:g} is crossed {len(crossings)} times by {_listed(known)}"
    at, falls_K = int(crossings[0]), np.diff(fidelity_K) < 0
    beside = range(max(0, at - 1), min(len(falls_K), at + 2))
    if rises := [i for i in beside if not falls_K[i]]:
        pairs = " and ".join(f"from {_listed(known[i : i + 2], ' to ')}" for i in rises)
        return f"fidelity is not monotone in k beside {target:g}: it does not fall {pairs}"
    first, last = at, at + 1
    while first > 0 and falls_K[first - 1]:
        first -= 1
    while last < len(falls_K) and falls_K[last]:
        last += 1
    return at, first, last + 1


def _interpolate(known: Sequence[SweepPoint], at: int, first: int, last: int, target: float) -> AtFidelity:
    # Increasing, as the cubic wants it.
    x_K, y_K = (np.log([point[i] for point in reversed(known[first:last])]) for i in (1, 2))
    left = len(x_K) - 2 - (at - first)
    slope = (y_K[left + 1] - y_K[left]) / (x_K[left + 1] - x_K[left])
    log_value = y_K[left] + slope * (math.log(target) - x_K[left])
    around = [point.left_2E for point in known[at : at + 2]]
    both_22E = None if any(one is None for one in around) else np.log(np.array(around))
    bend = abs(float(PchipInterpolator(x_K, y_K)(math.log(target))) - log_value)
    left_E = None if both_22E is None else _between(both_22E, math.log(target))
    return AtFidelity(math.exp(log_value), float(slope), bend, left_E)


def _between(log_22E: np.ndarray, at: float) -> np.ndarray:
    """On the line through two points, by document; ln of fidelity and quantity of each, `[points, 2, documents]`."""
    (x0_E, y0_E), (x1_E, y1_E) = log_22E
    with np.errstate(divide="ignore", invalid="ignore"):  # points of one fidelity: nothing is read between them
        return np.exp(y0_E + (y1_E - y0_E) / (x1_E - x0_E) * (at - x0_E))


def _listed(points: Sequence[SweepPoint], between: str = ", ") -> str:
    return between.join(f"{point.fidelity:.4g} (k {point.k:g}, quantity {point.quantity:.4g})" for point in points)
