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
from crosscoder.measure.welch import GroupMean, contrast, group_mean, interval
from crosscoder.results.table import COMPARED, Estimate, LongTable, State
from crosscoder.verdict.legs import (
    SITE,
    Contrast,
    Logs,
    Shapes,
    fidelity_statistics,
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


def _share_difference(real: Logs, null: Logs) -> Estimate | str:
    """The difference of two means over trainings; a share that all trainings have alike, such as none, is exact."""
    terms, constant = [], 0.0
    for sign, values in ((1.0, real), (-1.0, null)):
        if isinstance(values, str):
            return values
        if len(values) > 1 and np.ptp(list(values.values())) == 0:
            constant += sign * next(iter(values.values()))
        else:
            terms.append((sign, mean_of(values)))
    return contrast(terms, constant) if terms else Estimate(constant, constant, constant)


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
        "share that token lookup keeps": _worst(_subject_means(table, "lookup_share"), highest=True),
        "loss, B over A": _loss_log_ratio(table),
        "learning rate at the checkpoints": _exact_row(table, "rate_share", max, subject=COMPARED),
        "what interpolation may move a load": interpolation_error(table),
        "features a dimension": _features_a_dimension(table, shapes),
        "load of another order of the text": _spread_of_load(table),
        "same direction in another order": _worst(_cell_means(table, "self_cosine"), highest=False),
        "found in another order": _worst(_cell_means(table, "point_matched_share"), highest=False),
        "two rooms agree": _rooms_agree(table),
        "room at twice the size": _room_at_twice(table),
        **{f"{name}, planted": _exact_row(table, key, pick) for name, key, pick in CALIBRATION},
    }
    return {name: Gate(measured[name], leg, labels) for name, (leg, labels) in GATES.items()}


CALIBRATION = (
    ("features found", "calibration_mcc", min),
    ("error of q", "calibration_q_error", max),
    ("error of g", "calibration_g_error", max),
    ("error of ln R", "calibration_room_error", max),
)


def _loss_log_ratio(table: LongTable) -> Estimate | str:
    """ln of B's loss over A's."""
    logs = {name: np.log(table.values("held_out_loss", subject=name, role=None)) for name in COMPARED}
    if not all(len(one) for one in logs.values()):
        return "losses were not measured"
    return contrast([(c, group_mean(logs[name])) for c, name in zip((-1.0, 1.0), COMPARED, strict=True)])


def _loss_over(table: LongTable, key: str) -> list[Estimate | str]:
    """ln of each subject's loss over its own table's."""
    found: list[Estimate | str] = []
    for name in COMPARED:
        losses, tables = (table.values(one, subject=name, role=None) for one in ("held_out_loss", key))
        if not losses or len(losses) != len(tables):
            return [f"{key} of {name} was not measured for every training"]
        found.append(_mean((np.log(losses) - np.log(tables)).tolist()))
    return found


def _subject_means(table: LongTable, key: str) -> list[Estimate | str]:
    found: list[Estimate | str] = []
    for name in COMPARED:
        values = table.values(key, subject=name, role=None)
        found.append(_mean(values) if values else f"{key} of {name} was not measured")
    return found


def _cell_means(table: LongTable, key: str) -> list[Estimate | str]:
    """Over trainings, of each subject's main crosscoders."""
    return [_mean(main_values(table, name, key)) for name in COMPARED]


def _mean(values: Logs | Sequence[float]) -> Estimate | str:
    """The mean over trainings with its interval; what all trainings have alike, such as full agreement, is exact."""
    if isinstance(values, str):
        return values
    each = list(values.values()) if isinstance(values, dict) else list(values)
    if len(each) > 1 and np.ptp(each) == 0:
        return _exact(each, max)
    group = group_mean(each)
    return interval(group.value, group.variances) if isinstance(group, GroupMean) else group


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
            found.append(_mean(errors) if errors else f"no {arm} of {name} was trained (trained)")
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
        spreads = [float(np.ptp(np.log([row.value for row in group.rows[:2]]))) for group in groups]
        found.append(_mean(spreads))
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
    moved: dict[str, Logs] = {}
    for name in COMPARED:
        where = {"subject": name, "state": "trained", "site": SITE, "arm": "crosscoder"}
        twice = table.cells("entropy_load", **where, role="size")
        shifts: dict[int, float] = {}
        for at, cell in twice.items():
            mains = table.cells("entropy_load", **where, role="main", training_seed=at.training_seed)
            for main, known in mains.items():
                if at.n_features == 2 * (main.n_features or 0) and at.k == main.k:
                    seeds = cell.seeds()
                    first, second = (raw_density(one.select(seed=seeds[0])) for one in (known, cell))
                    shifts |= {at.training_seed or 0: math.log(second / first)} if first and second else {}
        moved[name] = shifts or f"no dictionary of {name} of twice the size"
    return contrast([(1.0, mean_of(moved["B"])), (-1.0, mean_of(moved["A"]))])
