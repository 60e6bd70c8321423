"""The legs, gates and label of the decision rule from a study's numbers, written again from their definitions.

`recheck.py` says what for. A number of each training seed is a group, `{training: number}`, mostly of logs; None stands
for what cannot be read, whatever the reason. Trainings are the only replicates: an interval is Welch's, with
Satterthwaite's degrees of freedom. Nothing is imported from the library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from recheck_intervals import Group, Interval, Term, over, t_interval, total
from scipy import optimize, stats
from scipy.interpolate import PchipInterpolator

TARGETS = {"fvu": (0.10, 0.085), "loss": (0.04, 0.028)}
"""Where loads are read: share of variance unexplained, and share of ablation's harm that splicing does."""
CEILING = (3.52, 4.23, 2.94)
"""C of the ceiling of density: its value, and the ends that make headroom smallest and largest."""
FEWEST_K, HARM = 4, 1e-4
MAIN = {"site": "write", "arm": "crosscoder", "role": "main"}
ACTING = ("untrained", "frozen_encoder", "frozen_decoder", "soft_decoder")
NULLS = (*ACTING, "shuffled", "gaussian")
Place = dict[str, Any]
LN2, LN4 = math.log(2), math.log(4)


class Rows:
    """Rows of a study: by key, where each was measured and its value (None: there is a reason instead)."""

    def __init__(self, blocks: Sequence[Mapping[str, Any]]) -> None:
        self.by_key: dict[str, dict[frozenset[tuple[str, Any]], Any]] = {}
        for block in blocks:
            for key, value in block["values"].items():
                if isinstance(value, dict):
                    value = Interval(**value) if "value" in value else None
                self.by_key.setdefault(key, {})[frozenset(block["at"].items())] = value

    def find(self, key: str, **where: Any) -> list[tuple[Place, Any]]:
        """Places and values of a key, at places with these fields; a field that is None must not be there."""
        places = [(dict(at), value) for at, value in self.by_key.get(key, {}).items()]
        return [(at, value) for at, value in places if all(at.get(name) == one for name, one in where.items())]


class Trained(NamedTuple):
    """One dictionary: its place, what its reading says, and what it loses in each currency."""

    at: Place
    numbers: dict[str, Any]
    lost: dict[str, float | None]
    left: dict[str, np.ndarray | None]
    """Where the text has documents enough: load, and what is lost in each currency, without each of them."""


def joined(first: Group, second: Group, sign: float = -1.0) -> Group:
    """`first + sign * second` training by training."""
    if first is None or second is None or not first.keys() <= second.keys():
        return None
    return {t: value + sign * second[t] for t, value in first.items()}


def only(group: Group, of: Group) -> Group:
    """The trainings that another group has."""
    return None if group is None or of is None else {t: value for t, value in group.items() if t in of}


class Crossing(NamedTuple):
    """ln of what is read at a target, also without each document; its slope on ln fidelity, and what a cubic would give
    more or less."""

    log_value: np.ndarray
    slope: float
    bend: float


def read_at(points_K2E: np.ndarray, target: float) -> Crossing | None:
    """Of `(ln fidelity, ln quantity)` of each k, of the whole text and without each document, between the only
    neighbours in the order of k that enclose the target on the whole text.

    None where fewer than four k are known, none or several pairs enclose it, or fidelity rises there or next to it.
    """
    x, y = points_K2E[:, :, 0].T
    aim = math.log(target)
    at = np.flatnonzero((x[:-1] >= aim) != (x[1:] >= aim)) if len(x) > 1 else np.zeros(0, dtype=int)
    at = np.array([len(x) - 2]) if not len(at) and x[-1] == aim else at
    if len(x) < FEWEST_K or len(at) != 1:
        return None
    i, falls = int(at[0]), np.diff(x) < 0
    if not falls[max(0, i - 1) : i + 2].all():
        return None
    first = i - int(np.argmin(falls[i::-1])) + 1 if not falls[: i + 1].all() else 0
    last = i + int(np.argmin(falls[i:])) if not falls[i:].all() else len(x) - 1
    slope = (y[i + 1] - y[i]) / (x[i + 1] - x[i])
    value = y[i] + slope * (aim - x[i])
    cubic = PchipInterpolator(x[first : last + 1][::-1], y[first : last + 1][::-1])(aim)
    (x_E, y_E), (next_x_E, next_y_E) = points_K2E[i : i + 2]
    every_E = y_E + (next_y_E - y_E) / (next_x_E - x_E) * (aim - x_E)
    return Crossing(every_E, float(slope), abs(float(cubic) - float(value)))


@dataclass(frozen=True)
class Study:
    """What legs are made of. `points` are the trainings' numbers that take two dictionaries, by subject and key."""

    rows: Rows
    dictionaries: list[Trained]
    shapes: dict[str, tuple[int, int]]
    points: dict[tuple[str, str], Group]
    targets: Mapping[str, Sequence[float]]

    def of(self, **where: Any) -> list[Trained]:
        """Dictionaries of blocks' writes at a place; a tuple allows any of its values."""
        wanted = {"site": "write", **where}
        allowed = {name: one if isinstance(one, tuple) else (one,) for name, one in wanted.items()}
        return [one for one in self.dictionaries if all(one.at.get(name) in any_of for name, any_of in allowed.items())]

    def sweep(self, subject: str, state: str, arm: str, currency: str, key: str) -> dict[int, list[Crossing]] | None:
        """Each training's readings at the currency's targets; dictionaries of one k are averaged on logs first."""
        found: dict[int, dict[int, list[np.ndarray]]] = {}
        for one in self.of(subject=subject, state=state, arm=arm, role=("main", "k")):
            lost, value = one.lost[currency], one.numbers["entropy_load"]
            if key == "density":
                value = value / one.numbers["effective_dimension"]
            if lost is None or not lost > 0 or not value > 0:
                return None
            left_2E = np.ones((2, 0))
            if (left := one.left[currency]) is not None:
                left_2E = np.stack([left, one.left["load"] * value / one.numbers["entropy_load"]])
            logs = np.log(np.concatenate([[[lost], [value]], left_2E], axis=1))
            found.setdefault(one.at["training_seed"], {}).setdefault(one.at["k"], []).append(logs)
        read: dict[int, list[Crossing]] = {}
        for t, by_k in found.items():
            points = np.array([np.mean(logs, axis=0) for _, logs in sorted(by_k.items())])
            crossings = [read_at(points, target) for target in self.targets[currency]]
            read[t] = [one for one in crossings if one is not None]
            if len(read[t]) < len(crossings):
                return None
        return read or None

    def logs(self, subject: str, state: str, arm: str, currency: str, key: str) -> Group:
        """ln of a quantity of each training at common fidelity, the mean over targets."""
        read = self.sweep(subject, state, arm, currency, key)
        if read is None:
            return None
        return {t: np.mean([one.log_value for one in each], axis=0) for t, each in read.items()}

    def room(self, subject: str, state: str, units: str) -> Group:
        """ln room; nulls but the untrained have that of the subject that they were made from."""
        of = state if state == "untrained" else "trained"
        found = self.rows.find("room", subject=subject, state=of, site="write", estimator=units)
        if not found or any(value is None for _, value in found):
            return None
        return {at["training_seed"]: math.log(value) for at, value in found}

    def main(self, subject: str, key: str, state: str = "trained", *, log: bool = False) -> Group:
        """A number of each training's main crosscoder, the mean over its dictionaries; without each document too, where
        that is known."""
        where, by_training = {**MAIN, "subject": subject, "state": state}, dict[int, list[np.ndarray]]()
        own, left = (
            [(one.at, one.numbers[name]) for one in self.of(**where) if name in one.numbers]
            or self.rows.find(name, **where)
            for name in (key, f"{key}_left")
        )
        places = {frozenset(at.items()): value for at, value in left}
        for at, value in own:
            if value is None or not (math.isfinite(value) and (value > 0 or not log)):
                return None
            every = np.array([value, *places.get(frozenset(at.items()), [])])
            by_training.setdefault(at["training_seed"], []).append(np.log(every) if log else every)
        return {t: np.mean(each, axis=0) for t, each in by_training.items()} or None

    @property
    def depth(self) -> float:
        """ln of layers of A over B."""
        return math.log(self.shapes["A"][0] / self.shapes["B"][0])

    def statistics(self, state: str, currency: str) -> dict[str, Term]:
        """q, g, r and ln R by three rooms, of one state at one currency's common fidelity, B over A."""
        joint, dense, bank = ({name: self.logs(name, of, arm, currency, key) for name in "AB"} for of, arm, key in (
            (state, "crosscoder", "load"),
            (state, "crosscoder", "density"),
            ("trained" if state == "shuffled" else state, "layerwise", "load"),
        ))  # fmt: skip
        # A bank's load is of one layer: all its layers have L times as much.
        whole = {name: one and {t: x + math.log(self.shapes[name][0]) for t, x in one.items()}
                 for name, one in bank.items()}  # fmt: skip
        if state == "shuffled":  # the subject's own banks, of which only these trainings count, and r is no null's
            some = {name: only(whole[name], joint[name]) for name in "AB"}
            whole: dict[str, Group] = dict.fromkeys("AB")
        else:
            some = whole
        share = {name: joined(some[name], joint[name]) for name in "AB"}
        depth, (a, b) = self.depth or math.nan, (math.prod(self.shapes[name]) for name in "AB")
        by_room = {
            key: Term([(1, joined(joint["B"], self.room("B", state, units))),
                       (-1, joined(joint["A"], self.room("A", state, units)))])
            for key, units in (("room", "model"), ("room_scaled", "scaled"))
        }  # fmt: skip
        return {
            "q": Term([(1, joint["B"]), (-1, joint["A"])]),
            "g": Term([(1 / depth, share["A"]), (-1 / depth, share["B"])]),
            "r": Term([(1, whole["B"]), (-1, whole["A"])], math.log(a / b)),
            **by_room,
            "dimension": Term([(1, dense["B"]), (-1, dense["A"])]),
        }

    def states(self) -> list[str]:
        """States that crosscoders were trained on, the subject itself first."""
        known = dict.fromkeys(one.at["state"] for one in self.of(arm="crosscoder"))
        return sorted(known, key=lambda state: state != "trained")


def kappa(study: Study) -> Interval | None:
    """ln of causal layers, A over B, over ln of layers, A over B."""
    depth, groups = (
        study.depth,
        [(sign, study.main(name, "causal_layers", log=True)) for sign, name in ((1, "A"), (-1, "B"))],
    )
    return Term([(sign / depth, group) for sign, group in groups]).interval if depth else None


def excess(study: Study, key: str, states: Sequence[str]) -> Interval | None:
    """A's share less that of the null with the largest; None where one of those measured has no interval."""
    nulls, own = [study.main("A", key, state) for state in states], [(1.0, study.main("A", key))]
    found = [Term(own, nulls=[null], alike=True).interval for null in nulls if null is not None]
    known = [one for one in found if one is not None]
    return min(known, key=lambda one: one.low) if known and len(known) == len(found) else None


def removal(study: Study) -> Interval | None:
    """How far ln(load / d_eff), B over A, moves towards ln 2 without twins, as a share of the way there."""
    whole, rest = (
        {name: study.main(name, key, log=True) for name in "AB"} for key in ("raw_density", "raw_density_rest")
    )
    shift = Term([(1, joined(rest["B"], whole["B"])), (-1, joined(rest["A"], whole["A"]))]).interval
    left = Term([(-1, whole["B"]), (1, whole["A"])], LN2).interval
    return shift and left and over(shift, left)


def headroom(study: Study) -> Interval | None:
    """The lowest over B's dictionaries of p_max / p, with p_max below 1 / e and `C phi p_max ln(1 / p_max) = 1`."""
    found = []
    for one in study.of(**MAIN, subject="B", state="trained"):
        alive = one.numbers["alive"]
        phi, p = alive / one.numbers["effective_dimension"], one.numbers["l0_token"] / alive
        found.append(tuple(highest_probability(phi * constant) / p for constant in CEILING))
    return Interval(*min(found)) if found and math.isfinite(min(found)[0]) else None


def highest_probability(density: float) -> float:
    """The smaller solution of `density p ln(1 / p) = 1`; inf where there is none, so that every p is possible."""
    if density < math.e:
        return math.inf
    return float(optimize.brentq(lambda x: density * x * math.log(1 / x) - 1, 1e-12, 1 / math.e, xtol=1e-15))


@dataclass(frozen=True)
class Law:
    """`ln room = c + beta ln D + delta ln L` by least squares, and the probability of its misfit."""

    coefficient: np.ndarray
    covariance: np.ndarray
    freedom: int
    misfit: float | None

    def along(self, beta: float, delta: float, constant: float = 0.0) -> Interval:
        """A sum of both exponents with its t interval."""
        weight = np.array([0, beta, delta])
        variance = float(weight @ self.covariance @ weight)
        return t_interval(constant + float(weight @ self.coefficient), [(variance, self.freedom)])


def fit_law(study: Study, units: str) -> Law | None:
    """Over trainings; over the means of shapes where there are four shapes or more. None where widths fix depths.

    Its misfit is always that of trainings: the F test of shapes' deviations from the law against what trainings vary.
    """
    found: dict[tuple[int, int], list[float]] = {}
    for at, value in study.rows.find("room", state="trained", estimator=units):
        if value is not None:
            found.setdefault(study.shapes[at["subject"]], []).append(math.log(value))
    return power_law(found)


def load_law(study: Study, currency: str) -> Law | None:
    """The same of the loads of a layer's bank at common fidelity."""
    found: dict[tuple[int, int], list[float]] = {}
    for name, shape in study.shapes.items():
        if study.of(subject=name, arm="layerwise", state="trained"):
            logs = study.logs(name, "trained", "layerwise", currency, "load")
            if logs is None:
                return None
            found.setdefault(shape, []).extend(float(log[0]) for log in logs.values())
    return power_law(found)


def power_law(found: Mapping[tuple[int, int], Sequence[float]]) -> Law | None:
    """`ln y = c + beta ln D + delta ln L` of the logs of each shape `(L, D)`."""
    shapes = np.array(list(found), dtype=float).reshape(-1, 2)
    n_runs = sum(len(each) for each in found.values())
    if len(found) < 3 or n_runs < 4 or (np.ptp(shapes, axis=0) == 0).any():
        return None
    weights = np.array([1.0 if len(found) > 3 else len(each) for each in found.values()])
    spread = np.cov(np.log(shapes).T, aweights=weights)
    if 1 - spread[0, 1] ** 2 / (spread[0, 0] * spread[1, 1]) <= 0.01:
        return None
    many, runs = len(found) > 3, [(shape, value) for shape, each in found.items() for value in each]
    fit = least_squares([(shape, float(np.mean(each))) for shape, each in found.items()] if many else runs)
    pure = sum(float(((np.array(each) - np.mean(each)) ** 2).sum()) for each in found.values())
    if not many or n_runs == len(found) or pure == 0:
        return Law(*fit[:2], fit[3], None)
    lack, spare = len(found) - 3, n_runs - len(found)
    misfit = float(stats.f.sf((least_squares(runs)[2] - pure) / lack / (pure / spare), lack, spare))
    return Law(*fit[:2], fit[3], misfit)


def least_squares(points: Sequence[tuple[tuple[int, int], float]]) -> tuple[np.ndarray, np.ndarray, float, int]:
    """Of `((L, D), ln room)`: coefficients of 1, ln D and ln L, their covariance, squared residuals, freedom."""
    depth, width = np.log(np.array([shape for shape, _ in points], dtype=float)).T
    design, y = np.column_stack([np.ones(len(points)), width, depth]), np.array([value for _, value in points])
    inverse = np.linalg.inv(design.T @ design)
    coefficient = inverse @ design.T @ y
    residual, freedom = float(((y - design @ coefficient) ** 2).sum()), len(y) - 3
    return coefficient, residual / freedom * inverse, residual, freedom


def shares(study: Study, currency: str, law: Law | None) -> dict[str, Interval]:
    """Where the factor of two goes, as shares of ln 2; only for shapes of L and L / 4 layers and widths d and 2 d."""
    (deep, narrow), (shallow, wide) = (study.shapes[name] for name in "AB")
    found = study.statistics("trained", currency)
    q, g, r = (found[name].interval for name in "qgr")
    if (deep, wide) != (4 * shallow, 2 * narrow) or law is None or q is None or g is None or r is None:
        return {}
    return {
        "load": total([(-1 / LN2, q)]),
        "persistence": total([(LN4 / LN2, g)]),
        "left_layers": total([(1 / LN2, r)]),
        "geometry": law.along(2, -2),
        "width": law.along(-1, 0, 1.0),
        "left_joint": total([(1 / LN2, q), (1, law.along(-1, 2))]),
    }
