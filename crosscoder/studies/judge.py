"""From a study's rows and readings to its verdict: shapes compared feature by feature, legs, nulls, and the rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from crosscoder.measure import room
from crosscoder.measure.comparison import ShapeReadings, compare_shapes
from crosscoder.measure.reading import common_tokens, load_reading
from crosscoder.results.table import COMPARED, Estimate, LongTable, Place, Row, finite
from crosscoder.results.verdict import Verdict
from crosscoder.studies.cells import reading_path
from crosscoder.studies.presets import StudyConfig
from crosscoder.verdict import evidence, rule, words
from crosscoder.verdict.legs import SITE, Shapes, read_logs
from crosscoder.verdict.rows import evidence_rows, statistic_rows

PRIMARY = Place(site=SITE)


def judge(config: StudyConfig, table: LongTable, folder: Path, *, documents: np.ndarray) -> tuple[list[Row], Verdict]:
    """The rows that compare A and B, and the verdict.

    table: the rows of subjects, cells and calibration. Readings are those that cells left in `folder`.
    documents: the document of each held-out block.
    """
    shapes = {name: (one.n_layers, one.d_model) for name, one in config.subjects.shapes().items()}
    measured = [*compare_readings(table, folder, documents, config.subjects.context), *law_rows(table, shapes)]
    measured += alpha_rows(table, shapes)
    whole = LongTable((*table, *measured))
    found = evidence.gather(whole, shapes)
    by_state = evidence.statistics(whole, shapes)
    measured += statistic_rows(by_state) + evidence_rows(found) + share_rows(by_state, whole, shapes)
    decision = rule.decide(found)
    verdict = words.tell(decision, found, LongTable((*table, *measured)), shapes)
    return [_finite_row(row) for row in measured], verdict


def _finite_row(row: Row) -> Row:
    """The row as files hold it: a number that is not finite is missing."""
    value = finite(row.value)
    if value is not None:
        return replace(row, value=value, missing=None)
    return replace(row, value=None, missing=row.missing if row.value is None else row.missing or "not measured")


def compare_readings(table: LongTable, folder: Path, documents: np.ndarray, context: int) -> list[Row]:
    """A's and B's main crosscoders compared, on the tokens that all of them have."""
    shapes = []
    for name in COMPARED:
        where = {"subject": name, "state": "trained", "site": SITE, "arm": "crosscoder", "role": "main"}
        cells = {at.training_seed or 0: (at, cell.seeds()) for at, cell in table.cells("entropy_load", **where).items()}
        groups = tuple(
            tuple(load_reading(reading_path(folder, replace(at, seed=seed))).distinct for seed in seeds)
            for _, (at, seeds) in sorted(cells.items())
        )
        shapes.append(ShapeReadings(name, groups))
    empty = [shape.name for shape in shapes if not all(len(reading) for reading in shape.readings)]
    if empty:
        return [Row(PRIMARY, "universality", None, f"a dictionary of {empty[0]} has no alive feature; train longer")]
    token_T = common_tokens([reading for shape in shapes for reading in shape.readings])
    a, b = (shape.on_tokens(token_T) for shape in shapes)
    return compare_shapes(a, b, documents[token_T // context])


def law_rows(table: LongTable, shapes: Shapes) -> list[Row]:
    """How room grows with depth and width, by all trained shapes, in both units."""
    rows = []
    for units in ("model", "scaled"):
        at, law = Place(site=SITE, estimator=units), fit_law(table, shapes, units)
        if isinstance(law, str):
            rows.append(Row(at, "room_beta", None, law))
            continue
        values = {"room_beta": law.beta, "room_delta": law.delta, "room_excess_depth": law.excess_depth}
        by_training = room.fit_room(_shape_rooms(table, shapes, units))  # only trainings tell scatter from misfit
        values["room_misfit"] = None if isinstance(by_training, str) else by_training.misfit
        rows += [Row(at, key, value) for key, value in values.items()]
    return rows


def alpha_rows(table: LongTable, shapes: Shapes) -> list[Row]:
    """How the load of a layer's bank grows with width, by all trained shapes; nothing where the grid has no banks."""
    names = [name for name in shapes if table.select("entropy_load", subject=name, arm="layerwise", site=SITE)]
    rows = []
    for currency in rule.CURRENCIES if len(names) > len(COMPARED) else ():
        logs = {name: read_logs(table, name, "layerwise", currency) for name in names}
        reason = next((one for one in logs.values() if isinstance(one, str)), None)
        known = {name: one for name, one in logs.items() if not isinstance(one, str)}
        runs = [room.ShapeRoom(*shapes[name], math.exp(log)) for name, one in known.items() for log in one.values()]
        law = reason or _fit(runs)
        at = Place(state="trained", site=SITE, estimator=currency)
        rows.append(Row(at, "load_alpha", None, law) if isinstance(law, str) else Row(at, "load_alpha", law.beta))
    return rows


def fit_law(table: LongTable, shapes: Shapes, units: str) -> room.RoomLaw | str:
    """The law of rooms over all trainings, or over shapes where there are four or more."""
    return _fit(_shape_rooms(table, shapes, units))


def _fit(runs: list[room.ShapeRoom]) -> room.RoomLaw | str:
    many = len({run[:2] for run in runs}) > 3
    return room.fit_room(runs, unit="shape" if many else "training")


def _shape_rooms(table: LongTable, shapes: Shapes, units: str) -> list[room.ShapeRoom]:
    known = [row for row in table.select("room", state="trained", estimator=units) if isinstance(row.value, float)]
    return [room.ShapeRoom(*shapes[str(row.at.subject)], float(str(row.value))) for row in known]


def share_rows(found: evidence.Statistics, table: LongTable, shapes: Mapping[str, tuple[int, int]]) -> list[Row]:
    """Shares of ln 2, in both currencies; only for shapes of L and L / 4 layers and widths d and 2 d."""
    (deep, narrow), (shallow, wide) = (shapes[name] for name in COMPARED)
    law, rows = fit_law(table, shapes, "model"), list[Row]()
    if (deep, wide) != (4 * shallow, 2 * narrow):
        return rows
    for currency in rule.CURRENCIES:
        by_name = found.get(("trained", currency), {})
        q, g, r, ratio = (by_name[one].estimate if by_name else "not run" for one in ("q", "g", "r", "room"))
        known = [one for one in (q, g, r) if isinstance(one, Estimate)]
        if len(known) < 3 or isinstance(law, str):
            continue
        shares = room.shares_of_ln2(
            q=known[0], g=known[1], r=known[2], law=law, log_ratio=ratio if isinstance(ratio, Estimate) else None
        )
        for name in ("load", "persistence", "left_layers", "geometry", "width", "left_joint"):
            rows.append(Row(Place(site=SITE, estimator=currency, kind=name), "share_of_ln2", getattr(shares, name)))
    return rows
