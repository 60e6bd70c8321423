"""What the decision rule's gates measure, and its label, from the constants that a study's results keep of it.

`recheck.py` says what for. Nothing is imported from the library.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from recheck_intervals import Group, Interval, Term
from recheck_legs import MAIN, Study, Trained, joined

BY_CURRENCY = ("q", "r", "room")
CURRENCIES = ("fvu", "loss")
AT = {"fvu": "equal variance unexplained", "loss": "equal loss of prediction"}
EXPLAINED = {"gaussian": "explained by covariance", "frozen_encoder": "explained by the dictionary"}


def worst(found: Iterable[Interval | None], *, highest: bool = True) -> Interval | None:
    """The one that reaches furthest; None where one is not known."""
    each = list(found)
    known = [one for one in each if one is not None]
    if not known or len(known) < len(each):
        return None
    return max(known, key=lambda one: one.high) if highest else min(known, key=lambda one: one.low)


def exact(values: Sequence[float], pick: Any = max) -> Interval | None:
    """One of some numbers that have no interval."""
    return Interval(*[float(pick(values))] * 3) if values else None


def of_subject(study: Study, name: str, key: str, *, log: bool = False) -> Group:
    """A number of each training of a subject itself."""
    found, left = (study.rows.find(one, subject=name, role=None, state=None) for one in (key, f"{key}_left"))
    without = {at["training_seed"]: value for at, value in left}
    known = {t: [value, *without.get(t, [])] for at, value in found if value is not None for t in [at["training_seed"]]}
    if len(without) < len(known):
        known = {t: each[:1] for t, each in known.items()}
    return {t: np.log(each) if log else np.array(each) for t, each in known.items()} or None


def mean(group: Group) -> Interval | None:
    """Over trainings, with its interval; what all trainings have alike is exact."""
    return Term([(1, group)], alike=True).interval


def gates(study: Study) -> dict[str, Interval | None]:
    """Every gate's number."""
    losses = {name: of_subject(study, name, "held_out_loss", log=True) for name in "AB"}
    trigrams = {name: of_subject(study, name, "trigram_loss", log=True) for name in "AB"}
    rates = [
        float(value)
        for name in "AB"
        for values in (of_subject(study, name, "rate_share") or {}).values()
        for value in values
    ]
    sizes = [one.numbers["dictionary_size"] / math.prod(study.shapes[one.at["subject"]]) for name in "AB"
             for one in study.of(**MAIN, subject=name, state="trained")]  # fmt: skip
    planted = {key: [value for _, value in study.rows.find(f"calibration_{key}")]
               for key in ("mcc", "q_error", "g_error", "room_error")}  # fmt: skip
    return {
        "loss over a trigram table's": worst(mean(joined(losses[name], trigrams[name])) for name in "AB"),
        "share that token lookup keeps": worst(mean(of_subject(study, name, "lookup_share")) for name in "AB"),
        "loss, B over A": Term([(1, losses["B"]), (-1, losses["A"])]).interval,
        "learning rate at the checkpoints": exact(rates),
        "what interpolation may move a load": bends(study),
        "features a dimension": exact(sizes, min),
        "load of another order of the text": worst(mean(orders(study, name)) for name in "AB"),
        "same direction in another order": worst(
            (mean(study.points[name, "self_cosine"]) for name in "AB"), highest=False
        ),
        "found in another order": worst(
            (mean(study.points[name, "point_matched_share"]) for name in "AB"), highest=False
        ),
        "two rooms agree": rooms_agree(study),
        "room at twice the size": at_twice(study),
        "features found, planted": over_worlds(planted["mcc"]),
        "error of q, planted": over_worlds(planted["q_error"]),
        "error of g, planted": over_worlds(planted["g_error"]),
        "error of ln R, planted": over_worlds(planted["room_error"]),
    }


def over_worlds(values: Sequence[float | None]) -> Interval | None:
    """The mean over planted pairs; of one its number, and none where one is not known."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return mean(dict(enumerate(known))) if len(known) > 1 else exact(known)


def bends(study: Study) -> Interval | None:
    """|d ln load| by a cubic in place of straight lines: the larger target's, means over trainings."""
    found = []
    for name in "AB":
        for arm in ("crosscoder", "layerwise"):
            read = study.sweep(name, "trained", arm, "fvu", "load")
            if read is None:
                return None
            found.append(mean({t: max(one.bend for one in each) for t, each in read.items()}))
    return worst(found)


def orders(study: Study, name: str) -> Group:
    """How far ln loads of a training's first two main crosscoders lie apart."""
    found: dict[int, list[np.ndarray]] = {}
    for one in study.of(**MAIN, subject=name, state="trained"):
        found.setdefault(one.at["training_seed"], []).append(log_loads(one))
    if min((len(each) for each in found.values()), default=0) < 2:
        return None
    apart = {t: each[0] - each[1] for t, each in found.items()}
    return {t: one * math.copysign(1, one[0]) for t, one in apart.items()}


def log_loads(one: Trained) -> np.ndarray:
    """ln load of a dictionary, then without each document where that is known."""
    return np.log([one.numbers["entropy_load"], *([] if one.left["load"] is None else one.left["load"])])


def rooms_agree(study: Study) -> Interval | None:
    """ln R by the covariance's room less that by the dictionaries' dimension, a number of each training, B over A."""
    found = []
    for currency in CURRENCIES:
        own: dict[str, Group] = {}
        for name in "AB":
            load, dense = (study.logs(name, "trained", "crosscoder", currency, key) for key in ("load", "density"))
            own[name] = joined(joined(load, study.room(name, "trained", "model")), dense)
        found.append(Term([(1, own["B"]), (-1, own["A"])]).interval)
    known = [one for one in found if one is not None]
    return max(known, key=lambda one: abs(one.value)) if len(known) == len(found) else None


def at_twice(study: Study) -> Interval | None:
    """Change of ln(load / d_eff), B over A, from the main size to twice as many features."""
    moved: dict[str, Group] = {}
    for name in "AB":
        shifts: dict[int, np.ndarray] = {}
        for twice in study.of(**(MAIN | {"role": "size"}), subject=name, state="trained"):
            same = {one: twice.at[one] for one in ("training_seed", "k", "seed")}
            for one in study.of(**MAIN, subject=name, state="trained", **same):
                if 2 * one.at["n_features"] == twice.at["n_features"]:
                    wider = math.log(twice.numbers["effective_dimension"] / one.numbers["effective_dimension"])
                    shifts[twice.at["training_seed"]] = log_loads(twice) - log_loads(one) - wider
        moved[name] = shifts or None
    return Term([(1, moved["B"]), (-1, moved["A"])]).interval


class Stand(NamedTuple):
    """How a leg or gate stands: met, missed, open or not measured."""

    name: str
    found: Interval | None
    met: str


def stand(name: str, found: Interval | None, low: float | None, high: float | None, outside: bool = False) -> Stand:
    """A leg asks for a whole interval in a range or, `outside`, beyond it on one side."""
    if found is None or not all(math.isfinite(one) for one in found):
        return Stand(name, found, "not measured")
    bottom, top = -math.inf if low is None else low, math.inf if high is None else high
    within, beyond = bottom <= found.low and found.high <= top, found.high < bottom or found.low > top
    good, bad = (beyond, within) if outside else (within, beyond)
    return Stand(name, found, "met" if good else "missed" if bad else "open")


class Judged(NamedTuple):
    """The label, what would give the same numbers, and how all that was asked stands."""

    label: str
    explained: list[str]
    gates: dict[str, Stand]
    legs: dict[str, list[Stand]]


def judge(
    rule: Mapping[str, Any],
    values: Mapping[str, Interval | None],
    gate_values: Mapping[str, Interval | None],
    nulls: Mapping[tuple[str, str], Interval | None],
    n_trainings: Mapping[str, int],
) -> Judged:
    """The rule's label: trainings first, then gates on everything, then the first label all of whose legs and gates
    are met. Of a premise that fails any one leg is enough; loads must differ the same way in both currencies."""
    asked = {name: stand(name, gate_values.get(name), low, high) for name, (low, high, _) in rule["gates"].items()}
    guards = {name: None if labels == "all" else labels for name, (_, _, labels) in rule["gates"].items()}
    legs: dict[str, list[Stand]] = {}
    for label, each in rule["legs"].items():
        legs[label] = [
            stand(name, values.get(name), low, high, side == "outside")
            for statistic, (low, high, side) in each.items()
            for name in ([f"{statistic}/{one}" for one in CURRENCIES] if statistic in BY_CURRENCY else [statistic])
        ]

    def stopped(names: Iterable[str]) -> str | None:
        states = {asked[name].met for name in names}
        return "not testable" if states & {"missed", "not measured"} else "undecided" if "open" in states else None

    if any(n_trainings.get(name, 0) < least for name, least in rule["trainings"].items()):
        return Judged("pilot", [], asked, legs)
    if stop := stopped(name for name, labels in guards.items() if labels is None):
        return Judged(stop, [], asked, legs)
    found = [label for label, each in legs.items() if holds(label, each)]
    stops = {label: stopped(name for name, only in guards.items() if only is None or label in only) for label in found}
    free = [label for label in found if stops[label] is None]
    if not free:
        return Judged(stops[found[0]] or "undecided" if found else "undecided", [], asked, legs)
    as_well, missing = {null: set[str]() for null in rule["nulls"]}, False
    for leg in legs[free[0]]:
        statistic, _, currency = leg.name.partition("/")
        for null, currencies in rule["nulls"].items():
            if leg.met == "met" and statistic in BY_CURRENCY and currency in currencies:
                left = nulls.get((leg.name, null))
                missing |= left is None
                as_well[null] |= {currency} if left is not None and left.low <= 0 <= left.high else set()
    if missing:
        return Judged("undecided", [], asked, legs)
    explained = []
    for null, found in as_well.items():
        where = [f"at {AT[one]}" for one in CURRENCIES if one in found] if found != set(rule["nulls"][null]) else []
        explained += [" ".join([EXPLAINED[null], " and ".join(where)]).strip()] if found else []
    return Judged(free[0], explained, asked, legs)


def holds(label: str, legs: Sequence[Stand]) -> bool:
    """Whether a label's legs say it."""
    met = [leg.met == "met" for leg in legs]
    if label == "premise fails: features":
        return any(met)
    signs = {leg.found.value > 0 for leg in legs if leg.found is not None}
    return all(met) and (label != "premise fails: load" or len(signs) == 1)
