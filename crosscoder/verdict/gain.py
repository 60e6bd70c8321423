"""What is read at equal explained variance: the gain of joint counting, and what R owes to a difference of variance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DEFINITIONS = {
    "count_gain": "ln of the features of the bank active on a token, over all layers, per active feature of the "
    "crosscoder at equal explained variance. The bank's L0 at the crosscoder's explained variance is interpolated in "
    "ln L0 against explained variance between banks of several k, and never extrapolated.",
    "equal_variance": "What ln R would change by if both shapes' dictionaries explained exactly as much, the mean of "
    "what they do: entropy load over the effective dimension of single dictionaries, on logs, interpolated against "
    "explained variance between dictionaries of several k. Of the first training seed, so without an interval; the "
    "rule does not read it.",
}


@dataclass(frozen=True)
class Point:
    """One dictionary: active features of a token over the whole model, and explained variance."""

    l0: float
    explained_variance: float


def count_gain(crosscoder: Point, bank: Sequence[Point]) -> float | str:
    """ln(L0 of the bank / L0 of the crosscoder) at the crosscoder's explained variance, or why there is none.

    With planted features of one layer each it is 0; with features that last all L layers ln L. Below the true L0 each
    active feature that is left out costs its share of the variance, and above it nothing is left to explain: on a scale
    of ln(1 - explained variance) the bank that just has enough would be far to the right, and a chord to it would ask
    for too few features at every point before. Variances themselves bend little between neighbouring k.
    """
    points = sorted(bank, key=lambda point: point.explained_variance)
    if not crosscoder.l0 > 0 or any(not point.l0 > 0 for point in points):
        return "a dictionary without active features"
    target = crosscoder.explained_variance
    if not points or not points[0].explained_variance <= target <= points[-1].explained_variance:
        known = ", ".join(f"{point.explained_variance:.3f}" for point in points) or "no bank"
        return f"the crosscoder explains {target:.3f}, outside what the banks do ({known}); train banks of other k"
    logs = [math.log(point.l0) for point in points]
    at = float(np.interp(target, [point.explained_variance for point in points], logs))
    return at - math.log(crosscoder.l0)


@dataclass(frozen=True)
class Density:
    """One dictionary: explained variance, and ln of its entropy load over its effective dimension."""

    explained_variance: float
    log_density: float


def equal_variance_shift(b: Sequence[Density], a: Sequence[Density]) -> float | str:
    """ln R at equal explained variance less ln R as it was run, or why it cannot be said.

    The first of either sequence is the dictionary that R was read from, the others have other k.
    """
    if not a or not b:
        return "not run"
    target = (a[0].explained_variance + b[0].explained_variance) / 2
    moved = []
    for name, points in (("B", b), ("A", a)):
        known = sorted(points, key=lambda point: point.explained_variance)
        if not known[0].explained_variance <= target <= known[-1].explained_variance:
            reach = f"{known[0].explained_variance:.3f} to {known[-1].explained_variance:.3f}"
            return f"{name}'s dictionaries of several k explain {reach}, and {target:.3f} is asked"
        at = np.interp(target, [p.explained_variance for p in known], [p.log_density for p in known])
        moved.append(float(at) - points[0].log_density)
    return moved[0] - moved[1]
