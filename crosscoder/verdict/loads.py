"""Loads of A and B at common fidelity: q, the sharing g and the seed paper's row r, from a study's rows.

Every training has dictionaries of several k, joint and layer by layer. Each load is read where the dictionaries lose
equally much (`measure.fidelity`), in both currencies, and averaged on logs over a currency's targets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from crosscoder.measure.fidelity import TARGETS, Currency, SweepPoint, lost_share, read_at
from crosscoder.measure.splice import ALL_LAYERS
from crosscoder.measure.statistics import statistic_row
from crosscoder.measure.welch import Group, combine_within, contrast, difference, group_mean
from crosscoder.results.table import COMPARED, Estimate, LongTable, Place, Row, Site

Logs = np.ndarray | str
"""ln of a load for each training, or why it cannot be read for one of them."""


@dataclass(frozen=True)
class LoadLegs:
    """What the loads say in one currency; a text is the reason why there is no number.

    q: ln of B's joint load over A's. g: how the loads of layers exceed the joint load in A more than in B,
    `(G_A - G_B) / ln(L_A / L_B)` with `G = ln(sum of bank loads / joint load)`. r: ln of B's over A's bank load a
    neuron, `ln(neurons of A / neurons of B) + ln(bank load of B / bank load of A)`, which is `ln 2 + q - g ln 4` for
    shapes of L and L / 4 layers.
    """

    q: Estimate | str
    g: Estimate | str
    r: Estimate | str
    joint: Mapping[str, Logs]
    banks: Mapping[str, Logs]
    """ln loads by subject; a bank's is summed over layers."""


def load_legs(
    table: LongTable, shapes: Mapping[str, tuple[int, int]], *, site: Site = "write"
) -> dict[Currency, LoadLegs]:
    """The load legs of a study's trained subjects by currency.

    shapes: layers and width of A and B.
    """
    found = {}
    for currency in TARGETS:
        joint = {name: log_loads(table, name, "crosscoder", currency, site=site) for name in COMPARED}
        summed = {name: log_loads(table, name, "layerwise", currency, site=site) for name in COMPARED}
        banks = {
            name: logs if isinstance(logs, str) else logs + math.log(shapes[name][0]) for name, logs in summed.items()
        }
        found[currency] = _legs(joint, banks, shapes)
    return found


def load_rows(legs: Mapping[Currency, LoadLegs], *, site: Site = "write") -> list[Row]:
    """q, g and r as rows, the currency as their estimator."""
    return [
        statistic_row(Place(site=site, estimator=currency), key, value)
        for currency, found in legs.items()
        for key, value in (("load_log_ratio", found.q), ("sharing", found.g), ("bank_log_ratio", found.r))
    ]


def _legs(joint: Mapping[str, Logs], banks: Mapping[str, Logs], shapes: Mapping[str, tuple[int, int]]) -> LoadLegs:
    a, b = COMPARED
    joint_mean, bank_mean = ({name: _mean(logs) for name, logs in one.items()} for one in (joint, banks))
    excess = {name: _excess(banks[name], joint[name], name) for name in COMPARED}
    (deep, narrow), (shallow, wide) = shapes[a], shapes[b]
    neurons, depth = math.log(deep * narrow / (shallow * wide)), math.log(deep / shallow)
    sharing = "A and B have equally many layers, so that depth says nothing of sharing"
    return LoadLegs(
        q=difference(joint_mean[b], joint_mean[a]),
        g=contrast([(1 / depth, excess[a]), (-1 / depth, excess[b])]) if depth else sharing,
        r=contrast([(1.0, bank_mean[b]), (-1.0, bank_mean[a])], constant=neurons),
        joint=joint,
        banks=banks,
    )


def _mean(logs: Logs) -> Group:
    return logs if isinstance(logs, str) else group_mean(logs)


def _excess(bank: Logs, joint: Logs, name: str) -> Group:
    """ln of the banks' load over the joint one, training by training."""
    if isinstance(bank, str) or isinstance(joint, str):
        return bank if isinstance(bank, str) else str(joint)
    if len(bank) != len(joint):
        return f"{len(bank)} trainings of {name} have banks and {len(joint)} crosscoders"
    return group_mean(combine_within([(1.0, bank), (-1.0, joint)]))


def log_loads(table: LongTable, subject: str, arm: str, currency: Currency, *, site: Site = "write") -> Logs:
    """ln of the entropy load of each training at the currency's targets, the mean over these; a bank's is of one layer.

    Dictionary seeds of one k are averaged on logs first.
    """
    where = {"subject": subject, "state": "trained", "site": site, "arm": arm, "role": ("main", "k")}
    trainings = table.select("entropy_load", **where).groups("training_seed")
    if not trainings:
        return f"no {arm} of {subject} was trained"
    logs = []
    for at in trainings:
        points = _sweep(table, currency, {**where, "training_seed": at.training_seed})
        if isinstance(points, str):
            return f"{subject}{at.training_seed}, {arm}: {points}"
        read = [read_at(points, target) for target in TARGETS[currency]]
        if missing := [one for one in read if isinstance(one, str)]:
            return f"{subject}{at.training_seed}, {arm}: {missing[0]}"
        logs.append(float(np.mean([math.log(one.value) for one in read if not isinstance(one, str)])))
    return np.array(logs)


def _sweep(table: LongTable, currency: Currency, where: Mapping[str, object]) -> list[SweepPoint] | str:
    """One training's points in one currency, or why one of them is not known."""
    points = []
    for at, cell in table.cells("entropy_load", **where).items():
        fidelities = [_fidelity(cell.select(seed=seed), currency) for seed in cell.seeds()]
        if missing := [one for one in fidelities if isinstance(one, str)]:
            return f"k {at.k}: {missing[0]}"
        pairs = zip(fidelities, cell.values("entropy_load"), strict=True)
        known = [(one, load) for one, load in pairs if not isinstance(one, str)]
        if bad := [pair for pair in known if not min(pair) > 0]:
            return f"k {at.k}: a logarithm needs all above 0, and there is {bad[0][0]:.3g} (load {bad[0][1]:.3g})"
        fidelity, load = np.exp(np.log(known).mean(0)).tolist()
        points.append(SweepPoint(float(at.k or 0), fidelity, load))
    return points


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
