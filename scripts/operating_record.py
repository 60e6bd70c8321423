"""What is kept of a planted study: its labels, legs and gates, and how far every quantity of every training is off."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from operating_studies import InstrumentConfig, measure_subject, truths
from operating_worlds import Plant, Subject, Truth, as_trained, known_loads, subjects, truth_of

from crosscoder.data.world_pair import SIDES, Side
from crosscoder.measure import recovery
from crosscoder.measure.fidelity import TARGETS
from crosscoder.measure.reading import Reading
from crosscoder.results.table import Estimate, LongTable, Place, Row, rows_at
from crosscoder.verdict import legs
from crosscoder.verdict.evidence import gather
from crosscoder.verdict.rule import CURRENCIES, N_TRAININGS, NULLS, Evidence, decide

QUANTITIES = ("joint/fvu", "joint/loss", "bank/fvu", "bank/loss", "dense/fvu", "dense/loss", "room")


def measured_logs(table: LongTable, config: InstrumentConfig, side: Side) -> dict[str, dict[int, float] | str]:
    """ln of every quantity of each training of a side, or why it cannot be read; a bank's load is of all layers."""
    layers = math.log(config.sizes.shape(side)[0])
    found: dict[str, dict[int, float] | str] = {"room": legs.log_room(table, side, "trained", "model")}
    for currency in CURRENCIES:
        found[f"joint/{currency}"] = legs.read_logs(table, side, "crosscoder", currency)
        found[f"dense/{currency}"] = legs.read_logs(table, side, "crosscoder", currency, quantity=legs.raw_density)
        bank = legs.read_logs(table, side, "layerwise", currency)
        found[f"bank/{currency}"] = bank if isinstance(bank, str) else {t: v + layers for t, v in bank.items()}
    return found


def true_log(truth: Truth, quantity: str) -> float:
    """ln of a quantity of `QUANTITIES` as planted."""
    by_name = {"joint": truth.load, "bank": truth.bank, "dense": truth.load - truth.d_eff, "room": truth.room}
    return by_name[quantity.partition("/")[0]]


def residuals(table: LongTable, plant: Plant, config: InstrumentConfig, *, world: int) -> dict[str, Any]:
    """Measured less planted, of every quantity of every training, by side; a text where it could not be read."""
    true = truths(plant, config.sizes, world=world, trainings=config.trainings)
    found: dict[str, Any] = {}
    for side in SIDES:
        logs = measured_logs(table, config, side)
        found[side] = {
            name: one if isinstance(one, str) else [one[t] - true_log(true[side][t], name) for t in sorted(one)]
            for name, one in logs.items()
        }
    return found


def known_residuals(plant: Plant, config: InstrumentConfig, *, world: int) -> dict[str, list[float]] | None:
    """ln loads, joint and of banks, less the planted ones, of codes that know the features, in each side's first
    training; means over the targets. None where there are no features."""
    if plant.data == "gaussian":
        return None
    found = {}
    for side, subject in subjects(plant, config.sizes, world=world, training=0).items():
        loads = np.mean([known_loads(subject, fvu) for fvu in TARGETS["fvu"]], axis=0)
        truth = truth_of(subject)
        found[side] = [float(loads[0] - truth.load), float(loads[1] - truth.bank)]
    return found


def mean_cosine(subject: Subject, reading: Reading) -> float:
    """MCC of a reading against the planted directions."""
    return recovery.mean_cosine(recovery.assign(reading.distinct.decoder_FLD, subject.decoder_FLD.numpy()))


def nulls_aside(evidence: Evidence) -> Evidence:
    """Evidence in which every null is 0, so that it explains nothing that differs from 0."""
    nulls = {(name, null): value for name, value in evidence.values.items() for null in NULLS}
    return replace(evidence, nulls=nulls)


def study_record(plant: Plant, config: InstrumentConfig, table: LongTable, *, world: int) -> dict[str, Any]:
    """A study of a plant: labels, legs, gates, and how far every quantity is off.

    table: the rows of `measure_study` of the plant `as_trained`, and its calibration's.
    """
    trained = as_trained(plant)
    evidence = nulls_aside(gather(table, config.shapes()))
    gated = decide(evidence)
    bare = decide(replace(evidence, gates={}, n_trainings=N_TRAININGS))  # however many trainings there are
    keys = ("self_cosine", "point_matched_share", "twin_share", "raw_density", "raw_density_rest", "matched_between")
    return {
        "plant": plant.name,
        "world": world,
        "targets": {name: list(values) for name, values in TARGETS.items()},
        "label": gated.label,
        "reasons": list(gated.reasons),
        "label_of_legs": bare.label,
        "reasons_of_legs": list(bare.reasons),
        "legs": {name: plain(value) for name, value in evidence.values.items()},
        "gates": {name: plain(gate.measured) for name, gate in evidence.gates.items()},
        "residuals": residuals(table, trained, config, world=world),
        "known": known_residuals(trained, config, world=world),
        "main": {
            side: {key: table.values(key, subject=side, state="trained", role="main", arm="crosscoder") for key in keys}
            for side in SIDES
        },
        "lost_at_main": {
            side: [1 - v for v in table.values("explained_variance", subject=side, role="main", arm="crosscoder")]
            for side in SIDES
        },
    }


def plain(value: Estimate | str | None) -> list[float] | str | None:
    """An estimate as a list of value and ends, for a file."""
    if not isinstance(value, Estimate):
        return value
    return [value.value, value.low, value.high] if value.finite else "not finite"


def calibration_rows(config: InstrumentConfig, gamma: float, *, world: int) -> list[Row]:
    """Errors on a pair without noise or scatter, as a study's calibration: at gamma .5 A and B are equally crowded."""
    sizes = replace(config.sizes, rate_sd=0.0, load_sd=0.0, room_sd=0.0)
    quiet = replace(config, sizes=sizes, trainings=1)
    plant = as_trained(Plant(name="calibration", right=(), gamma=gamma))
    logs, mcc = {}, []
    for side, subject in subjects(plant, sizes, world=world, training=0).items():
        found = measure_subject(plant, quiet, subject, 0)
        mcc.append(mean_cosine(subject, found.readings[0]))
        logs[side] = {
            name: math.nan if isinstance(one, str) else one[0] - true_log(found.truth, name)
            for name, one in measured_logs(LongTable(found.rows), quiet, side).items()
        }
    off = {name: logs["B"][name] - logs["A"][name] for name in QUANTITIES}
    sharing = (off["joint/fvu"] - off["bank/fvu"]) / math.log(config.sizes.n_layers / config.sizes.shape("B")[0])
    values = {
        "calibration_mcc": min(mcc),
        "calibration_q_error": abs(off["joint/fvu"]),
        "calibration_g_error": abs(sharing),
        "calibration_room_error": abs(off["dense/fvu"]),
    }
    return rows_at(Place(role="calibration", seed=world, kind=f"gamma-{gamma:g}"), values)
