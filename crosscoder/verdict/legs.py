"""Statistics of A and B over trainings, each as a contrast of independent groups, so that nulls subtract from it.

Every training has dictionaries of several k, joint and layer by layer. What is read of them at common fidelity
(`measure.fidelity`) is read where they lose equally much, in both currencies, and averaged on logs over a currency's
targets. What is measured of one training is combined within it; only trainings are independent (`measure.welch`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosscoder.measure.fidelity import TARGETS, AtFidelity, Currency, SweepPoint, lost_share, read_at
from crosscoder.measure.splice import ALL_LAYERS
from crosscoder.measure.welch import Group, GroupMean, contrast, excess, group_mean
from crosscoder.results.quantities import QUANTITIES
from crosscoder.results.table import COMPARED, Estimate, LongTable, Row, State

Logs = dict[int, float] | str
"""A number of each training by its position, or why one of them has none."""
TextLogs = dict[int, Any] | str
"""The same of what was read on the text: of all of it, then without each of its documents where these are known,
`[1 + documents]`."""
Shapes = Mapping[str, tuple[int, int]]
"""Layers and width of A and B."""
SITE = "write"
NO_BANK: dict[State, State] = {"shuffled": "trained"}
"""Nulls whose banks are another state's: a layer alone has the same tokens in another order."""


@dataclass(frozen=True)
class Contrast:
    """`constant + sum of coefficient * mean of a group`; a group may be a text, why it has none."""

    terms: tuple[tuple[float, Group], ...]
    constant: float = 0.0

    @property
    def estimate(self) -> Estimate | str:
        """Value and interval, or the first reason why there is none."""
        return contrast(self.terms, self.constant)

    @property
    def of_one(self) -> float | None:
        """The value where a group is of one training, so that there is no interval; None elsewhere."""
        known = [(c, group) for c, group in self.terms if isinstance(group, GroupMean)]
        is_one = any(math.isnan(one.value) for _, group in known for one in group.variances)
        if not is_one or len(known) < len(self.terms):
            return None
        return self.constant + math.fsum(c * group.value for c, group in known)

    def less(self, other: Contrast) -> Contrast:
        """This less the same of a null, term by term: a training that both have counts once (`welch.excess`)."""
        pairs = zip(self.terms, other.terms, strict=True)
        return Contrast(tuple((c, excess(own, null)) for (c, own), (_, null) in pairs), self.constant - other.constant)


def fidelity_statistics(table: LongTable, shapes: Shapes, state: State, currency: Currency) -> dict[str, Contrast]:
    """What is read at common fidelity in one state, B over A.

    q: ln of joint loads. g: sharing, `(G_A - G_B) / ln(L_A / L_B)` with `G = ln(sum of bank loads / joint load)`. r: ln
    of bank loads a neuron, `ln 2 + q - g ln 4` for shapes of L and L / 4 layers. room: ln of joint loads over the
    participation ratio of the covariance in model units; room_scaled: of layers at their scales; dimension: over the
    raw effective dimension of the same dictionaries.
    """
    a, b = COMPARED
    of_bank = NO_BANK.get(state, state)
    joint = {name: read_text_logs(table, name, "crosscoder", currency, state, load) for name in COMPARED}
    dense = {name: read_text_logs(table, name, "crosscoder", currency, state, raw_density) for name in COMPARED}
    bank = {
        name: _plus(read_text_logs(table, name, "layerwise", currency, of_bank, load), math.log(shapes[name][0]))
        for name in COMPARED
    }
    rooms = {by: {name: log_room(table, name, state, by) for name in COMPARED} for by in ("model", "scaled")}
    neurons = math.log(math.prod(shapes[a]) / math.prod(shapes[b]))
    depth = math.log(shapes[a][0] / shapes[b][0])

    def over(logs: Mapping[str, TextLogs]) -> tuple[tuple[float, Group], ...]:
        return (1.0, mean_of(logs[b])), (-1.0, mean_of(logs[a]))

    def less(first: Mapping[str, TextLogs], second: Mapping[str, TextLogs]) -> dict[str, TextLogs]:
        return {name: minus(first[name], second[name]) for name in COMPARED}

    own_banks = state not in NO_BANK  # those of another state may be of more trainings
    shared_banks = bank if own_banks else {name: _of_trainings(bank[name], joint[name]) for name in COMPARED}
    excess = less(shared_banks, joint)
    sharing = "A and B have equally many layers, so that depth says nothing of sharing"
    shared = [(1 / depth, mean_of(excess[a])), (-1 / depth, mean_of(excess[b]))] if depth else [(1.0, sharing)]
    return {
        "q": Contrast(over(joint)),
        "g": Contrast(tuple(shared)),
        "r": Contrast(over(bank), neurons) if own_banks else Contrast(((1.0, "its banks are the subject's own"),) * 2),
        "room": Contrast(over(less(joint, rooms["model"]))),
        "room_scaled": Contrast(over(less(joint, rooms["scaled"]))),
        "dimension": Contrast(over(dense)),
    }


def log_statistic(table: LongTable, key: str, state: State = "trained") -> Contrast:
    """ln of a positive quantity of the main crosscoders, B over A, trainings averaged over their dictionaries' logs."""
    a, b = COMPARED
    return Contrast(((1.0, mean_of(main_values(table, b, key, state, log=True))),
                     (-1.0, mean_of(main_values(table, a, key, state, log=True)))))  # fmt: skip


def main_values(
    table: LongTable, subject: str, key: str, state: State = "trained", *, log: bool = False, **where: object
) -> TextLogs:
    """A quantity of each training's main crosscoder, the mean over its dictionaries; also without each document of the
    text, where that is known of every dictionary."""
    where = {"subject": subject, "state": state, "site": SITE, "arm": "crosscoder", "role": "main", **where}
    rows = table.select(key, **where)
    if not len(rows):
        return f"{key} of {subject} was not measured ({state})"
    found: dict[int, np.ndarray] = {}
    for at, group in rows.groups("training_seed").items():
        values: list[Any] = [row.value for row in group]
        if None in values or (log and not all(value > 0 for value in values)):
            reason = next((row.missing for row in group if row.missing), None)
            return f"{subject}{at.training_seed}: {reason or f'{key} is not known for every dictionary'}"
        known = in_text(table, group.rows)
        found[at.training_seed or 0] = np.mean(np.log(known) if log else known, axis=0)
    return found


def in_text(table: LongTable, rows: Sequence[Row]) -> np.ndarray:
    """Values of a quantity, and without each of the text's documents where all say so, `[rows, 1 + documents]`."""
    key = f"{rows[0].key}_left"
    places = {row.at: row.value for row in table.select(key)} if key in QUANTITIES else {}
    left: list[Any] = [places.get(row.at) for row in rows]
    return np.array([[row.value, *(one if None not in left else ())] for row, one in zip(rows, left, strict=True)])


def log_room(table: LongTable, subject: str, state: State, units: str) -> Logs:
    """ln of the participation ratio of each training's writes; a null keeps the covariance that it was made from."""
    of = state if state == "untrained" else "trained"
    rows = table.select("room", subject=subject, state=of, site=SITE, estimator=units)
    values: list[Any] = [row.value for row in rows]
    if not values or None in values:
        return next((row.missing for row in rows if row.missing), f"the room of {subject} was not measured ({of})")
    return {row.at.training_seed or 0: math.log(value) for row, value in zip(rows, values, strict=True)}


def load(cell: LongTable) -> float | None:
    """The entropy load of one dictionary; of a bank, of one layer."""
    return cell.one("entropy_load")


def raw_density(cell: LongTable) -> float | None:
    """Entropy load over the effective dimension of the same dictionary."""
    value, room = cell.one("entropy_load"), cell.one("effective_dimension")
    return None if value is None or room is None else value / room


def read_logs(
    table: LongTable,
    subject: str,
    arm: str,
    currency: Currency,
    state: State = "trained",
    quantity: Callable[[LongTable], float | None] = load,
) -> Logs:
    """ln of a quantity of each training at the currency's targets, the mean over these.

    Dictionary seeds of one k are averaged on logs first.
    """
    found = read_text_logs(table, subject, arm, currency, state, quantity)
    return found if isinstance(found, str) else {t: float(log[0]) for t, log in found.items()}


def read_text_logs(
    table: LongTable,
    subject: str,
    arm: str,
    currency: Currency,
    state: State,
    quantity: Callable[[LongTable], float | None],
) -> TextLogs:
    """`read_logs`, with what would be read without each of the text's documents; `quantity` is proportional to load."""
    where = {"subject": subject, "state": state, "site": SITE, "arm": arm, "role": ("main", "k")}
    trainings = table.select("entropy_load", **where).groups("training_seed")
    if not trainings:
        return f"no {arm} of {subject} was trained ({state})"
    logs: dict[int, np.ndarray] = {}
    for at in trainings:
        read = read_training(table, {**where, "training_seed": at.training_seed}, currency, quantity)
        if isinstance(read, str):
            return f"{subject}{at.training_seed}, {arm}: {read}"
        known = [[one.value, *([] if one.left_E is None else one.left_E)] for one in read]
        logs[at.training_seed or 0] = np.log(known).mean(0)
    return logs


def read_training(
    table: LongTable,
    where: Mapping[str, object],
    currency: Currency,
    quantity: Callable[[LongTable], float | None] = load,
) -> list[AtFidelity] | str:
    """A quantity of one training at each target of a currency, or why one of them cannot be read."""
    points = _sweep(table, currency, where, quantity)
    if isinstance(points, str):
        return points
    read = [read_at(points, target) for target in TARGETS[currency]]
    missing = [one for one in read if isinstance(one, str)]
    return missing[0] if missing else [one for one in read if not isinstance(one, str)]


def _sweep(
    table: LongTable, currency: Currency, where: Mapping[str, object], quantity: Callable[[LongTable], float | None]
) -> list[SweepPoint] | str:
    """One training's points in one currency, or why one of them is not known."""
    points = []
    for at, cell in table.cells("entropy_load", **where).items():
        known = []
        for seed in cell.seeds():
            one = cell.select(seed=seed)
            fidelity, value = _fidelity(one, currency), quantity(one)
            if isinstance(fidelity, str) or value is None:
                return f"k {at.k}: {fidelity if isinstance(fidelity, str) else 'what is read there is not known'}"
            if not min(fidelity, value) > 0:
                return f"k {at.k}: a logarithm needs all above 0, and there is {fidelity:.3g} (quantity {value:.3g})"
            known.append((fidelity, value, _left(one, currency, value)))
        fidelity, value = np.exp(np.log([pair[:2] for pair in known]).mean(0)).tolist()
        left = [one for *_, one in known if one is not None]
        left_2E = np.exp(np.mean(np.log(left), axis=0)) if len(left) == len(known) else None
        points.append(SweepPoint(float(at.k or 0), fidelity, value, left_2E))
    return points


def _left(rows: LongTable, currency: Currency, value: float) -> np.ndarray | None:
    """What one dictionary loses and a quantity proportional to its load, without each document of the text,
    `[2, documents]`; None where documents are too few to tell."""
    load_E, whole = rows.one("entropy_load_left"), rows.one("entropy_load")
    if currency == "fvu":
        explained_E = rows.one("explained_variance_left")
        lost_E = None if explained_E is None else 1 - np.array(explained_E)
    else:
        sums = [rows.select(f"{key}_left") for key in ("spliced_loss", "clean_loss", "ablated_loss")]
        if not all(len(one) for one in sums):
            return None
        spliced_E, clean_E, ablated_E = (np.array(one.rows[0].value) for one in sums)
        lost_E = (spliced_E - clean_E) / (ablated_E - clean_E)
    return None if load_E is None or lost_E is None else np.stack([lost_E, np.array(load_E) * value / whole])


def _fidelity(rows: LongTable, currency: Currency) -> float | str:
    """What one dictionary loses."""
    if currency == "fvu":
        explained = rows.one("explained_variance", layer=None)
        return "explained variance is not known" if explained is None else 1 - explained
    layers = {row.at.layer for row in rows.select("spliced_loss")}
    (spliced,) = layers if len(layers) == 1 else (ALL_LAYERS,)  # a dictionary of one layer has no other
    keys = {"spliced_loss": spliced, "ablated_loss": spliced, "clean_loss": None}
    losses = {key: rows.one(key, layer=layer) for key, layer in keys.items()}
    if None in losses.values():
        return "its reconstructions were not spliced into the subject"
    return lost_share(**losses)


def mean_of(values: TextLogs) -> Group:
    """The mean over trainings."""
    if isinstance(values, str):
        return values
    each = [np.atleast_1d(value) for value in values.values()]
    left = [value[1:] for value in each if len(value) > 1]
    left_TE = np.array(left) if left and len(left) == len(each) else None
    return group_mean([value[0] for value in each], left_TE, trainings=list(values))


def _plus(logs: TextLogs, constant: float) -> TextLogs:
    return logs if isinstance(logs, str) else {t: value + constant for t, value in logs.items()}


def minus(first: TextLogs, second: TextLogs) -> TextLogs:
    """The difference training by training, of those of the first."""
    if isinstance(first, str) or isinstance(second, str):
        return first if isinstance(first, str) else second
    if not set(first) <= set(second):
        return f"trainings {sorted(set(first) - set(second))} have one of two quantities"
    return {t: value - second[t] for t, value in first.items()}


def _of_trainings(logs: TextLogs, those: TextLogs) -> TextLogs:
    """Only the trainings that another quantity has."""
    if isinstance(logs, str) or isinstance(those, str):
        return logs
    return {t: value for t, value in logs.items() if t in those}
