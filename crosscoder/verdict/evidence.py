"""From a study's rows to what the rule looks at: statistics with intervals, gates, and nulls taken off.

A pure function of rows: readings, models and files have no part in it, so that planted rows are judged as real ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import get_args

import numpy as np

from crosscoder.measure.dimension import CEILING, headroom
from crosscoder.measure.fidelity import Currency
from crosscoder.measure.statistics import signed_ratio_of
from crosscoder.measure.welch import Group, GroupMean, contrast, excess
from crosscoder.results.table import COMPARED, Estimate, LongTable, State
from crosscoder.verdict.legs import (
    SITE,
    Contrast,
    Shapes,
    TextLogs,
    fidelity_statistics,
    in_text,
    load,
    log_room,
    log_statistic,
    main_values,
    mean_of,
    minus,
    raw_density,
    read_text_logs,
    read_training,
)
from crosscoder.verdict.rule import CURRENCIES, GATES, Evidence, Gate

NULL_STATES: tuple[State, ...] = tuple(state for state in get_args(State) if state != "trained")
ACTING: tuple[State, ...] = ("untrained", "frozen_encoder", "frozen_decoder", "soft_decoder")
"""Nulls whose dictionaries can be ablated in a model."""

Statistics = Mapping[tuple[State, Currency], Mapping[str, Contrast]]


def statistics(table: LongTable, shapes: Shapes) -> Statistics:
    """What is read at common fidelity, of the trained subjects and of every null that has rows."""
    states = [s for s in get_args(State) if len(table.select("entropy_load", state=s, site=SITE, arm="crosscoder"))]
    return {(s, one): fidelity_statistics(table, shapes, s, one) for s in states for one in CURRENCIES}


def gather(table: LongTable, shapes: Shapes) -> Evidence:
    """Everything that the rule looks at; what was not measured is a text that says why."""
    found = statistics(table, shapes)
    values: dict[str, Estimate | str] = {}
    nulls: dict[tuple[str, str], Estimate | str] = {}
    for (state, currency), by_name in found.items():
        for name in ("q", "r", "room"):
            if state == "trained":
                values[f"{name}/{currency}"] = by_name[name].estimate
            else:
                nulls[f"{name}/{currency}", state] = found["trained", currency][name].less(by_name[name]).estimate
    depth = math.log(shapes["A"][0] / shapes["B"][0])
    values |= _layer_values(table, depth)
    for name in ("universality", "rate_dispersion", "median_log_rate"):
        values[name.replace("_", " ")] = _site_value(table, name)
    values["headroom of B"] = headroom_of(table, "B")
    values["removal share"] = removal_share(table)
    return Evidence(values=values, gates=gates(table, shapes, found), nulls=nulls, n_trainings=n_trainings(table))


def n_trainings(table: LongTable) -> dict[str, int]:
    """Trainings of A and of B whose crosscoders were read."""
    where = {"state": "trained", "site": SITE, "arm": "crosscoder", "role": "main"}
    return {name: len(table.select("entropy_load", subject=name, **where).groups("training_seed")) for name in COMPARED}


def _layer_values(table: LongTable, depth: float) -> dict[str, Estimate | str]:
    """kappa, and how far conjunctive and twin shares of A exceed the highest null."""
    causal = log_statistic(table, "causal_layers")
    kappa = Contrast(tuple((-c / depth, group) for c, group in causal.terms)) if depth else None
    conjunctive = _least_excess(table, "conjunctive_share", ACTING)
    twins = _least_excess(table, "twin_share", NULL_STATES)
    known = [one for one in (conjunctive, twins) if isinstance(one, Estimate)]
    return {
        "kappa": "A and B have equally many layers" if kappa is None else kappa.estimate,
        "conjunctive excess": conjunctive,
        "conjunctive or twin excess": max(known, key=lambda one: one.low) if known else conjunctive,
    }


def _least_excess(table: LongTable, key: str, states: Sequence[State]) -> Estimate | str:
    """A's share less each null's that was measured; the one that reaches lowest."""
    real, found = main_values(table, "A", key), []
    for state in states:
        null = main_values(table, "A", key, state)
        if not isinstance(null, str):
            found.append(_share_difference(real, null))
    if missing := [one for one in found if isinstance(one, str)]:
        return missing[0]
    known = [one for one in found if isinstance(one, Estimate)]
    return min(known, key=lambda one: one.low) if known else f"no null of {key} was measured"


def _share_difference(real: TextLogs, null: TextLogs) -> Estimate | str:
    """The difference of two means over trainings, those of a training that has both counted once."""
    return _of_group(excess(_mean_of(real), _mean_of(null)))


def _mean_of(values: TextLogs) -> Group:
    """`mean_of`, where trainings may all be alike, such as none of them having any: then they do not vary."""
    group = mean_of(values)
    if isinstance(values, str) or not isinstance(group, str):
        return group
    each = [np.atleast_1d(value) for value in values.values()]
    if len(each) < 2 or np.ptp([value[0] for value in each]) > 0:
        return group
    left = [value[1:] for value in each if len(value) > 1]
    return GroupMean(float(each[0][0]), (), np.mean(left, axis=0) if len(left) == len(each) else None)


def _of_group(group: Group) -> Estimate | str:
    """A mean with its interval; exact where nothing varies."""
    if isinstance(group, GroupMean) and not group.variances and (group.left_E is None or np.ptp(group.left_E) == 0):
        return _exact([group.value], max)
    return contrast([(1.0, group)])


def _site_value(table: LongTable, key: str) -> Estimate | str:
    rows = table.select(key, site=SITE, state=None)
    for row in rows:
        return row.value if isinstance(row.value, Estimate) else row.missing or f"{key} has no interval"
    return f"{key} was not measured"


def headroom_of(table: LongTable, subject: str) -> Estimate | str:
    """The lowest headroom of a subject's main dictionaries; the interval is that of the ceiling's constant alone."""
    where = {"subject": subject, "state": "trained", "site": SITE, "arm": "crosscoder", "role": "main"}
    found = []
    for cell in table.cells("entropy_load", **where).values():
        for seed in cell.seeds():
            one = cell.select(seed=seed)
            alive, room, active = one.one("alive"), one.one("effective_dimension"), one.one("l0_token")
            if alive and room:
                place = alive / room, active / alive
                found.append([headroom(*place, constant) for constant in (CEILING.value, CEILING.high, CEILING.low)])
    if not found:
        return f"no effective dimension of {subject} is known"
    lowest = min(found)
    return Estimate(*lowest) if math.isfinite(lowest[0]) else "no firing probability is too high at this density"


def removal_share(table: LongTable) -> Estimate | str:
    """How far ln R (load over raw dimension, at the main k) moves towards ln 2 once twins are left out."""
    moved, whole = [], []
    for name in COMPARED:
        logs = [main_values(table, name, key, log=True) for key in ("raw_density", "raw_density_rest")]
        moved.append(mean_of(minus(logs[1], logs[0])))
        whole.append(mean_of(logs[0]))
    shift = contrast([(1.0, moved[1]), (-1.0, moved[0])])
    left = contrast([(-1.0, whole[1]), (1.0, whole[0])], math.log(2))
    if isinstance(shift, str) or isinstance(left, str):
        return shift if isinstance(shift, str) else str(left)
    try:
        return signed_ratio_of(shift, left)
    except ValueError as error:
        return str(error)


def gates(table: LongTable, shapes: Shapes, found: Statistics) -> dict[str, Gate]:
    """Every gate of `rule.GATES` with what was measured."""
    measured = {
        "loss over a trigram table's": _worst(_loss_over(table, "trigram_loss"), highest=True),
        "share that token lookup keeps": _worst(
            [over_trainings(_of_subject(table, name, "lookup_share")) for name in COMPARED], highest=True
        ),
        "loss, B over A": _loss_log_ratio(table),
        "learning rate at the checkpoints": _exact_row(table, "rate_share", max, subject=COMPARED),
        "what interpolation may move a load": interpolation_error(table),
        "features a dimension": _features_a_dimension(table, shapes),
        "load of another order of the text": _spread_of_load(table),
        "same direction in another order": _worst(_cell_means(table, "self_cosine"), highest=False),
        "found in another order": _worst(_cell_means(table, "point_matched_share"), highest=False),
        "two rooms agree": _rooms_agree(table),
        "room at twice the size": _room_at_twice(table),
        **{f"{name}, planted": _over_worlds(table, key) for name, key in CALIBRATION.items()},
    }
    return {name: Gate(measured[name], leg, labels) for name, (leg, labels) in GATES.items()}


CALIBRATION = {
    "features found": "calibration_mcc",
    "error of q": "calibration_q_error",
    "error of g": "calibration_g_error",
    "error of ln R": "calibration_room_error",
}


def _over_worlds(table: LongTable, key: str) -> Estimate | str:
    """The mean over planted pairs with its interval; of one pair its number."""
    found = _exact_row(table, key, max)
    values = table.values(key)
    return found if isinstance(found, str) or len(values) == 1 else over_trainings(values)


def _loss_log_ratio(table: LongTable) -> Estimate | str:
    """ln of B's loss over A's."""
    logs = [mean_of(_of_subject(table, name, "held_out_loss", log=True)) for name in COMPARED]
    return contrast(list(zip((-1.0, 1.0), logs, strict=True)))


def _loss_over(table: LongTable, key: str) -> list[Estimate | str]:
    """ln of each subject's loss over its own table's."""
    return [
        over_trainings(minus(*(_of_subject(table, name, one, log=True) for one in ("held_out_loss", key))))
        for name in COMPARED
    ]


def _of_subject(table: LongTable, name: str, key: str, *, log: bool = False) -> TextLogs:
    """A number of each training of a subject itself, also without each document where it says so."""
    rows = [row for row in table.select(key, subject=name, role=None) if row.value is not None]
    if not rows:
        return f"{key} of {name} was not measured"
    found = in_text(table, rows)
    return {row.at.training_seed or 0: value for row, value in zip(rows, np.log(found) if log else found, strict=True)}


def _cell_means(table: LongTable, key: str) -> list[Estimate | str]:
    """Over trainings, of each subject's main crosscoders."""
    return [over_trainings(main_values(table, name, key)) for name in COMPARED]


def over_trainings(values: TextLogs | Sequence[float]) -> Estimate | str:
    """The mean with its interval; what all trainings have alike, such as full agreement, is exact."""
    return _of_group(_mean_of(values if isinstance(values, (str, dict)) else dict(enumerate(values))))


def _worst(found: Sequence[Estimate | str], *, highest: bool) -> Estimate | str:
    if missing := [one for one in found if isinstance(one, str)]:
        return missing[0]
    known = [one for one in found if isinstance(one, Estimate)]
    return max(known, key=lambda one: one.high) if highest else min(known, key=lambda one: one.low)


def _exact(values: Sequence[float], pick: Callable[[Sequence[float]], float]) -> Estimate | str:
    """One of several numbers that have no interval."""
    if not values:
        return "not run"
    value = float(pick(values))
    return Estimate(value, value, value)


def _exact_row(table: LongTable, key: str, pick: Callable[[Sequence[float]], float], **where: object) -> Estimate | str:
    """`_exact` of a quantity's values, or the reason why one of them is missing."""
    rows = table.select(key, **where)
    missing = next((row.missing or f"{key} is not known" for row in rows if row.value is None), None)
    return missing or _exact(table.values(key, **where), pick)


def interpolation_error(table: LongTable) -> Estimate | str:
    """|d ln load| by a cubic in place of straight lines, in the currency that every subject has: of each training the
    larger target's, means over trainings, the largest of arms."""
    found: list[Estimate | str] = []
    for name in COMPARED:
        for arm in ("crosscoder", "layerwise"):
            where = {"subject": name, "state": "trained", "site": SITE, "arm": arm, "role": ("main", "k")}
            errors = []
            for at in table.select("entropy_load", **where).groups("training_seed"):
                read = read_training(table, {**where, "training_seed": at.training_seed}, "fvu")
                if isinstance(read, str):
                    return f"{name}{at.training_seed}, {arm}: {read}"
                errors.append(max(one.bend for one in read))
            found.append(over_trainings(errors) if errors else f"no {arm} of {name} was trained (trained)")
    return _worst(found, highest=True)


def _features_a_dimension(table: LongTable, shapes: Shapes) -> Estimate | str:
    found = []
    for name in COMPARED:
        sizes = table.values("dictionary_size", subject=name, state="trained", site=SITE, arm="crosscoder", role="main")
        if not sizes:
            return f"no crosscoder of {name}"
        found.append(min(sizes) / math.prod(shapes[name]))
    return _exact(found, min)


def _spread_of_load(table: LongTable) -> Estimate | str:
    """How far |ln| loads of two dictionaries of one training lie apart: means over trainings, the larger of A and B."""
    found: list[Estimate | str] = []
    for name in COMPARED:
        where = {"subject": name, "state": "trained", "site": SITE, "arm": "crosscoder", "role": "main"}
        groups = table.select("entropy_load", **where).groups("training_seed").values()
        if not all(len(group) > 1 for group in groups):
            return f"one dictionary of {name}"
        # Of the first two: a training with more dictionaries would seem to spread further.
        apart = [np.diff(np.log(in_text(table, group.rows[:2])), axis=0)[0] for group in groups]
        found.append(over_trainings({t: np.sign(one[0]) * one for t, one in enumerate(apart)}))
    return _worst(found, highest=True)


def _rooms_agree(table: LongTable) -> Estimate | str:
    """ln R by the covariance's room less ln R by the dictionaries' dimension, the larger of both currencies.

    Both are of the same trainings and the load cancels within each, so this is the ratio of the two rooms, B over A.
    """
    known: list[Estimate] = []
    for currency in CURRENCIES:
        logs = {}
        for name in COMPARED:
            joint, dense = (
                read_text_logs(table, name, "crosscoder", currency, "trained", one) for one in (load, raw_density)
            )
            logs[name] = minus(minus(joint, log_room(table, name, "trained", "model")), dense)
        one = contrast([(1.0, mean_of(logs["B"])), (-1.0, mean_of(logs["A"]))])
        if isinstance(one, str):
            return one
        known.append(one)
    return max(known, key=lambda one: abs(one.value))


def _room_at_twice(table: LongTable) -> Estimate | str:
    """Change of ln R, by the dictionaries' dimension, from n to 2 n features at the main k."""
    moved: dict[str, TextLogs] = {}
    for name in COMPARED:
        where = {"subject": name, "state": "trained", "site": SITE, "arm": "crosscoder"}
        twice = table.cells("entropy_load", **where, role="size")
        shifts: dict[int, np.ndarray] = {}
        for at, cell in twice.items():
            mains = table.cells("entropy_load", **where, role="main", training_seed=at.training_seed)
            for main, known in mains.items():
                if at.n_features == 2 * (main.n_features or 0) and at.k == main.k:
                    pair = [one.select(seed=cell.seeds()[0]) for one in (known, cell)]
                    loads = [row for one in pair for row in one.select("entropy_load")]
                    rooms = [one.one("effective_dimension") for one in pair]
                    if all(rooms) and len(loads) == len(pair):
                        grown_1E = np.diff(np.log(in_text(table, loads)), axis=0)[0]
                        shifts[at.training_seed or 0] = grown_1E - math.log(rooms[1] / rooms[0])
        moved[name] = shifts or f"no dictionary of {name} of twice the size"
    return contrast([(1.0, mean_of(moved["B"])), (-1.0, mean_of(moved["A"]))])
