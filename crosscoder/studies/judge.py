"""From a study's rows and readings to its verdict: statistics over training runs, nulls subtracted, the rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from crosscoder.measure import dimension, saturation
from crosscoder.measure.comparison import SiteReadings, measure_site
from crosscoder.measure.density import ShapeReadings
from crosscoder.measure.dimension import CEILING
from crosscoder.measure.reading import common_tokens, load_reading
from crosscoder.measure.statistics import Bootstrap, seeds_row, statistic_row, two_level_bootstrap
from crosscoder.results.table import COMPARED, SITES, Estimate, LongTable, Place, Row, Site, State, finite
from crosscoder.results.verdict import Verdict
from crosscoder.studies.calibration import worst_calibration
from crosscoder.studies.cells import reading_path
from crosscoder.studies.presets import StudyConfig
from crosscoder.verdict import evidence, third
from crosscoder.verdict.decide import decide
from crosscoder.verdict.evidence import PRIMARY_SITE, GateInputs
from crosscoder.verdict.loads import load_legs, load_rows

PRIMARY = Place(site=PRIMARY_SITE)


def judge(
    config: StudyConfig, table: LongTable, folder: Path, *, loss_gap: float, loss_matched: bool
) -> tuple[list[Row], Verdict]:
    """The rows that compare A and B, and the verdict.

    `table` holds the rows of the study's cells, of its crosscoders over two subjects and of its calibration; readings
    are those that the cells left in `folder`.
    """
    sites = {site: read_site(config, table, folder, site) for site in SITES}
    shapes = config.subjects.shapes()
    legs = load_legs(table, {name: (shapes[name].n_layers, shapes[name].d_model) for name in COMPARED})
    measured = [row for readings in sites.values() for row in measure_site(readings)]
    primary, n_seeds = sites[PRIMARY_SITE], len(config.subjects.seeds)
    measured += [
        cross_layer(table, n_seeds),
        count_gain(table, n_seeds),
        evidence.removal_shift(primary),
        headroom(primary),
        equal_variance(table),
        *load_rows(legs),
        *(row for name in COMPARED for row in feature_counts(table, primary.trained[name])),
        *exclusive_shares(table),
    ]
    inputs = GateInputs(loss_gap=loss_gap, loss_matched=loss_matched, calibration=worst_calibration(table))
    found = evidence.gather(LongTable(tuple(measured)), primary, inputs)
    residual = evidence.identity_residual(found.alpha, found.gamma)
    measured.append(Row(PRIMARY, "identity_residual", residual, "alpha or gamma was not measured"))
    verdict = decide(found)
    notes = evidence.reading_notes(LongTable(tuple(measured)), inputs)
    notes += third.notes(legs, {name: len(primary.trained[name].seeds) for name in COMPARED})
    return [_finite_row(row) for row in measured], replace(verdict, notes=(*verdict.notes, *notes))


def _finite_row(row: Row) -> Row:
    """The row as files hold it: a number that is not finite is missing."""
    value = finite(row.value)
    if value is not None:
        return replace(row, value=value, missing=None)
    return replace(row, value=None, missing=row.missing if row.value is None else row.missing or "not measured")


def read_site(config: StudyConfig, table: LongTable, folder: Path, site: Site) -> SiteReadings:
    """The readings of one site: every shape trained, A and B untrained."""
    shapes = config.subjects.shapes()

    def read(name: str, state: State) -> ShapeReadings:
        where = {"subject": name, "state": state, "site": site, "arm": "crosscoder", "role": "main"}
        cells = {at.training_seed: (at, cell.seeds()) for at, cell in table.cells("dictionary_size", **where).items()}
        groups = tuple(
            tuple(load_reading(reading_path(folder, replace(at, seed=seed))) for seed in seeds)
            for _, (at, seeds) in sorted(cells.items())
        )
        return ShapeReadings(name, shapes[name].n_layers, shapes[name].d_model, groups)

    trained = {name: read(name, "trained") for name in shapes}
    untrained = {name: read(name, "untrained") for name in COMPARED}
    every = [*trained.values(), *untrained.values()]
    token_T = common_tokens([reading for shape in every for reading in shape.readings])
    return SiteReadings(
        site=site,
        trained={name: shape.on_tokens(token_T) for name, shape in trained.items()},
        untrained={name: shape.on_tokens(token_T) for name, shape in untrained.items()},
        document_T=token_T // config.subjects.context,
    )


def cross_layer(table: LongTable, n_training_seeds: int) -> Row:
    """X of A: its share of genuinely cross-layer features less the larger of both nulls'."""
    shares: list[Bootstrap] = []
    for seed, state in enumerate(("trained", "shuffled", "untrained")):
        where = {"subject": "A", "state": state, "site": PRIMARY_SITE, "arm": "crosscoder", "role": "main"}
        groups = [table.values("genuine_share", **where, training_seed=t) for t in range(n_training_seeds)]
        if not all(groups):
            return Row(PRIMARY, "cross_layer", None, f"no {state} crosscoder of A was probed")
        shares.append(two_level_bootstrap(groups, seed=seed))
    return statistic_row(PRIMARY, "cross_layer", evidence.cross_layer_excess(*shares))


def count_gain(table: LongTable, n_training_seeds: int) -> Row:
    """ln(L0 of A's bank / L0 of A's crosscoder) at the crosscoder's explained variance, on the primary site."""
    groups: list[list[float | str]] = []
    for t in range(n_training_seeds):
        where = {"subject": "A", "training_seed": t, "state": "trained", "site": PRIMARY_SITE}
        banks = [next(_points(cell)) for cell in table.cells("l0_token", **where, arm="layerwise").values()]
        (crosscoder,) = table.cells("l0_token", **where, arm="crosscoder", role="main").values()
        groups.append([evidence.count_gain(point, banks) for point in _points(crosscoder)])
    return seeds_row(PRIMARY, "count_gain", groups)


def _points(cell: LongTable) -> Iterator[evidence.Point]:
    """L0 and explained variance of a dictionary's seeds."""
    return map(evidence.point_of_l0, cell.values("explained_variance"), cell.values("l0_token"))


def headroom(primary: SiteReadings) -> Row:
    """The lowest headroom of A's and B's dictionaries; the interval is that of the ceiling's constant alone."""
    pairs = [pair for name in COMPARED for pairs in primary.trained[name].pairs for pair in pairs if len(pair.first)]
    known = [(pair.first, pair.debiased.value) for pair in pairs if pair.debiased.value is not None]
    places = [(len(reading) / d_eff, float(reading.probability_F.mean())) for reading, d_eff in known]
    ends = (CEILING.value, CEILING.high, CEILING.low)  # a higher constant leaves less room
    found = [tuple(dimension.headroom(*place, constant) for constant in ends) for place in places]
    if not found:
        return Row(PRIMARY, "headroom", None, "no d_eff")
    lowest = Estimate(*min(found, key=lambda one: one[0]))
    return Row(PRIMARY, "headroom", lowest, "no firing probability is too high at this density")


def equal_variance(table: LongTable) -> Row:
    """What R owes to A's and B's unequal explained variances, from their dictionaries of several k."""
    points: dict[str, list[evidence.Point]] = {name: [] for name in COMPARED}
    where = {"training_seed": 0, "state": "trained", "site": PRIMARY_SITE, "arm": "crosscoder"}
    for name, role in ((name, role) for name in COMPARED for role in ("main", "k")):
        for cell in table.cells("entropy_load", **where, subject=name, role=role).values():
            loads, rooms = cell.values("entropy_load"), cell.values("effective_dimension")
            if len(rooms) == len(loads) and all([*loads, *rooms]):
                explained = float(np.mean(cell.values("explained_variance")))
                log_density = float(np.mean([np.log(load / room) for load, room in zip(loads, rooms, strict=True)]))
                points[name].append(evidence.Point(explained, log_density))
    shift = evidence.equal_variance_shift(points["B"], points["A"])
    return statistic_row(PRIMARY, "equal_variance", shift if isinstance(shift, str) else Estimate.over([shift]))


def feature_counts(table: LongTable, shape: ShapeReadings) -> list[Row]:
    """How many features a shape has, from its dictionary seeds and from growing dictionaries."""
    where = {"subject": shape.name, "state": "trained", "site": PRIMARY_SITE, "arm": "crosscoder"}
    sizes, counts = (table.values(key, **where, role=("main", "size")) for key in ("dictionary_size", "distinct"))
    limit = saturation.size_limit(Place(subject=shape.name, site=PRIMARY_SITE), sizes, counts)
    return [*saturation.seed_counts(shape, PRIMARY_SITE), limit]


def exclusive_shares(table: LongTable) -> list[Row]:
    """How much of the crosscoders over A and B is A's alone and B's alone, over training seeds."""
    rows = []
    for name, key in zip(COMPARED, ("exclusive_first", "exclusive_second"), strict=True):
        found = table.select(key, subject="A", state="trained", arm="joint")
        of_both = LongTable(tuple(row for row in found if str(row.at.other).startswith("B")))
        groups = [group.values(key) for group in of_both.groups("training_seed").values()]
        if groups:
            rows.append(seeds_row(Place(subject=name, site=PRIMARY_SITE, arm="joint"), "exclusive_share", groups))
    return rows
