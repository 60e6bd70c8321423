"""How many features there would be with ever more seeds, or with an ever larger dictionary."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import optimize, stats

from crosscoder.measure import matching
from crosscoder.measure.counting import chapman
from crosscoder.measure.density import ShapeReadings
from crosscoder.measure.statistics import percentile_interval, statistic_row
from crosscoder.results.table import CONFIDENCE, Estimate, Place, Row, Site

NO_SATURATION = 0.1  # probability of unlimited growth above which a limit is not identified
EXTRAPOLATION = 10.0  # a limit whose interval ends beyond this many times the largest count is not identified
RESOLUTION = 1e-4  # relative error of a count below which a better fit means nothing
LARGEST_SCALE = 100.0  # n0 is sought up to this many times the largest dictionary
CURVATURE = (0.1, 5.0)  # range of kappa in the saturating curve


def _lognormal(seen: float, unseen: float, variance: float) -> Estimate:
    """`seen + unseen` with an interval that is log-normal in the unseen part, so that it starts at or above `seen`."""
    if not unseen > 0:
        return Estimate(seen, seen, seen)
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    factor = math.exp(z * math.sqrt(math.log1p(variance / unseen**2)))
    return Estimate(seen + unseen, seen + unseen / factor, seen + unseen * factor)


def chao2(incidence_FM: np.ndarray) -> Estimate:
    """Estimated number of features from which m >= 3 dictionary seeds sample, bias-corrected Chao2, with its interval.

    `incidence_FM[i, s]` is true where distinct feature i was found by seed s; rows found by none are ignored. Variance
    as for the bias-corrected form in Chao (1987) and Colwell (EstimateS, appendix B).
    """
    m, found = incidence_FM.shape[1], incidence_FM.sum(1)
    seen, once, twice = int((found > 0).sum()), int((found == 1).sum()), int((found == 2).sum())
    share, d = (m - 1) / m, twice + 1.0
    unseen = share * once * (once - 1) / (2 * d)
    variance = unseen + share**2 * (
        once * (2 * once - 1) ** 2 / (4 * d**2) + once**2 * twice * (once - 1) ** 2 / (4 * d**4)
    )
    return _lognormal(float(seen), unseen, variance)


def chapman_interval(n_first: int, n_second: int, n_matched: int) -> Estimate:
    """`counting.chapman` with a log-normal interval around what was seen, from Seber's (1970) variance."""
    value = chapman(n_first, n_second, n_matched)
    only = (n_first - n_matched) * (n_second - n_matched)
    variance = (n_first + 1) * (n_second + 1) * only / ((n_matched + 1) ** 2 * (n_matched + 2))
    seen = float(n_first + n_second - n_matched)
    return _lognormal(seen, value - seen, variance)


def incidence(sizes: Sequence[int], links: dict[tuple[int, int], np.ndarray]) -> np.ndarray:
    """Which seeds found which distinct feature, `[features, seeds]`: connected components of matches between seeds.

    `sizes[s]` features are alive in seed s; `links[s, t]` are matched pairs `[m, 2]` for every s < t.
    """
    starts = np.concatenate([[0], np.cumsum(sizes)])
    edges = [pairs + starts[[s, t]] for (s, t), pairs in links.items()]
    label = matching.joined(starts[-1], matching.joined_pairs(edges))
    found = np.zeros((label.max(initial=-1) + 1, len(sizes)), dtype=bool)
    found[label, np.repeat(np.arange(len(sizes)), sizes)] = True
    return found


def stable_features(n_features: int, links: Sequence[np.ndarray]) -> np.ndarray:
    """True for features of one seed that are matched in at least half of the other seeds, `[n_features]`.

    `links[s]` are pairs `[m, 2]` from this seed to another; give at least two others (three seeds in all).
    """
    matched = np.zeros(n_features)
    for pairs in links:
        matched[np.unique(pairs[:, 0])] += 1
    return matched >= len(links) / 2


@dataclass(frozen=True)
class Curve:
    """One fitted curve of counts against dictionary size."""

    name: str
    amplitude: float  # F_inf, or A of the power law
    parameters: tuple[float, ...]  # n0, then kappa, where the curve has them
    aicc: float

    @property
    def limit(self) -> float:
        """The count at infinite size: the amplitude, or infinity for the power law."""
        return float("inf") if self.name == "power law" else self.amplitude

    def at(self, n: np.ndarray) -> np.ndarray:
        """Fitted count at dictionary size `n`."""
        theta = np.log(self.parameters)
        return self.amplitude * np.exp(_SHAPES[self.name](np.asarray(n, dtype=np.float64), theta))


def _log_stretched(n: np.ndarray, theta: np.ndarray) -> np.ndarray:
    reach = np.exp(np.clip(math.exp(theta[1]) * (np.log(n) - theta[0]), -500, 500))
    return np.log(np.maximum(-np.expm1(-reach), 1e-300))


_SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "stretched exponential": _log_stretched,
    "hyperbola": lambda n, theta: -np.log1p(np.exp(theta[0]) / n),
    "power law": lambda n, theta: np.exp(theta[0]) * np.log(n),
}


def fit_curves(sizes: np.ndarray, counts: np.ndarray) -> list[Curve]:
    """The three curves fitted to positive counts by least squares on logs, best AICc first.

    On logs the amplitude is an additive constant, so only the shape is searched. AICc counts the error variance as a
    parameter and is infinite where a curve has too few points; ties go to the curve with fewer parameters.
    """
    n, y = np.asarray(sizes, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    middle, largest = math.log(np.median(n)), math.log(n.max() * LARGEST_SCALE)
    lowest = math.log(n.min() / LARGEST_SCALE)
    scale, curvature = (lowest, largest), tuple(math.log(k) for k in CURVATURE)
    searches = {
        "hyperbola": ([[middle], [largest - 2.0]], [scale]),
        "stretched exponential": ([[middle, 0.0], [middle + 1.0, -0.7]], [scale, curvature]),
        "power law": ([[-0.5]], [(math.log(1e-3), math.log(10.0))]),
    }
    curves = [_fit(name, n, y, starts, bounds) for name, (starts, bounds) in searches.items()]
    return sorted(curves, key=lambda curve: (curve.aicc, len(curve.parameters)))


def _fit(name: str, n: np.ndarray, y: np.ndarray, starts: list[list[float]], bounds: list[tuple]) -> Curve:
    target, shape = np.log(y), _SHAPES[name]

    def residuals(theta: np.ndarray) -> np.ndarray:
        left = target - shape(n, theta)
        return left - left.mean()

    low, high = np.array(bounds, dtype=np.float64).T
    fits = [optimize.least_squares(residuals, np.clip(s, low + 1e-6, high - 1e-6), bounds=(low, high)) for s in starts]
    best = min(fits, key=lambda fit: fit.cost)
    square = max(2 * best.cost, len(n) * RESOLUTION**2)
    k = len(bounds) + 2  # the shape's, the amplitude and the error variance
    spare = len(n) - k - 1
    aicc = len(n) * math.log(square / len(n)) + 2 * k + 2 * k * (k + 1) / spare if spare > 0 else math.inf
    amplitude = math.exp(float((target - shape(n, best.x)).mean()))
    return Curve(name, amplitude, tuple(math.exp(t) for t in best.x), aicc)


def akaike_weights(aicc: Sequence[float]) -> np.ndarray:
    """`exp(-(AICc - min) / 2)` normalised to sum to 1: the weight of evidence for each curve."""
    values = np.asarray(aicc, dtype=np.float64)
    weights = np.exp(-(values - values.min()) / 2)
    return weights / weights.sum()


def fit_limit(sizes: Sequence[float], counts: Sequence[float], *, seed: int, n_draws: int = 200) -> Estimate | str:
    """F_inf of counts against dictionary sizes with its interval, or the reason why it is not identified.

    One count for each size and seed. The interval resamples the residuals of the chosen curve (on logs, centred,
    multiplied by sqrt(n / (n - parameters))) and chooses a curve anew each time; a draw that chooses the power law has
    an infinite limit.
    """
    n, y = np.asarray(sizes, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    curves = fit_curves(n, y)
    if len(np.unique(n)) < 4 or not math.isfinite(max(curve.aicc for curve in curves)):
        seen = f"{len(n)} counts at {len(np.unique(n))} sizes"
        return f"not identified: {seen} cannot tell three curves apart; 6 at 4 sizes can"
    best = curves[0]
    weights = akaike_weights([curve.aicc for curve in curves])
    growth = float(sum(w for w, curve in zip(weights, curves, strict=True) if curve.name == "power law"))
    if growth > NO_SATURATION:
        return f"not identified: growth without limit has probability {growth:.2f}, above {NO_SATURATION}"
    fitted = np.log(best.at(n))
    spare = len(n) - 1 - len(best.parameters)
    residuals = (np.log(y) - fitted) * math.sqrt(len(n) / spare)
    rng = np.random.default_rng(seed)
    resampled = np.exp(fitted + rng.choice(residuals - residuals.mean(), size=(n_draws, len(n))))
    limits = np.array([fit_curves(n, draw)[0].limit for draw in resampled])
    # An interpolated percentile of infinities is not a number.
    limit = percentile_interval(best.limit, np.minimum(limits, 1e300))
    if limit.high > EXTRAPOLATION * y.max():
        reach = f"{EXTRAPOLATION:g} times the largest count, {y.max():g}"
        return f"not identified: the interval of F_inf ends beyond {reach}"
    return limit


def seed_counts(shape: ShapeReadings, site: Site) -> list[Row]:
    """Chapman over all training seeds of a shape, Chao2 and the stable count of its first.

    Chapman compares the first two dictionary seeds of each training: the mean, from the lowest to the highest end of
    their intervals. Chao2 and the stable count (mean over seeds, interval their range) need at least three.
    """
    at, group = Place(subject=shape.name, site=site), shape.seeds[0]
    if len(group) < 2:
        missing = "needs two dictionary seeds of one training"
        return [Row(at, key, None, missing) for key in ("chapman", "chao2", "stable_features")]
    first = [pairs[0] for pairs in shape.pairs]
    each = [chapman_interval(len(pair.first), len(pair.second), len(pair.pairs_m2)) for pair in first]
    ends = min(one.low for one in each), max(one.high for one in each)
    found = [Row(at, "chapman", Estimate(float(np.mean([one.value for one in each])), *ends))]
    if len(group) < 3:
        missing = "needs three dictionary seeds of one training; this study has fewer"
        return found + [Row(at, key, None, missing) for key in ("chao2", "stable_features")]
    places = combinations(range(len(group)), 2)
    links = {place: pair.pairs_m2 for place, pair in zip(places, shape.pairs[0], strict=True)}
    sizes = [len(reading) for reading in group]
    counts = []
    for seed, size in enumerate(sizes):
        mine = [pairs_m2 if key[0] == seed else pairs_m2[:, ::-1] for key, pairs_m2 in links.items() if seed in key]
        counts.append(float(stable_features(size, mine).sum()))
    found.append(Row(at, "chao2", chao2(incidence(sizes, links))))
    return [*found, Row(at, "stable_features", Estimate.over(counts))]


def size_limit(at: Place, sizes: Sequence[float], counts: Sequence[float]) -> Row:
    """F_inf: the number of features that growing dictionaries approach, or why that cannot be told."""
    if not counts or min(counts) <= 0:
        return Row(at, "F_inf", None, "no counts, or an empty dictionary")
    return statistic_row(at, "F_inf", fit_limit(sizes, counts, seed=0))
