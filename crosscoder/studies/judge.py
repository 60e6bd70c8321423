"""From a study's cells to its verdict: readings are gathered by site, controls subtracted, the rule applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from crosscoder.measure import comparison, density, seeds
from crosscoder.measure.comparison import SiteReadings, Statistic
from crosscoder.measure.density import ShapeReadings
from crosscoder.measure.dimension import CEILING as C
from crosscoder.measure.reading import load_reading
from crosscoder.measure.statistics import Bootstrap, two_level_bootstrap
from crosscoder.results.table import Estimate, Place
from crosscoder.studies.calibration import CalibrationConfig, calibrate, worst_calibration
from crosscoder.studies.cells import reading_path
from crosscoder.studies.folder import READINGS
from crosscoder.studies.presets import StudyConfig
from crosscoder.studies.workers import run_jobs
from crosscoder.verdict import cross_layer, evidence, gain

COMPARED = ("A", "B")
Results = dict[str, Any]


def calibrate_study(config: StudyConfig, folder: Path, *, device: str, workers: int) -> list[Results]:
    """Scores of planted worlds of the compared shapes' own sizes, kept beside the studies so that others reuse them."""
    wanted = {
        f"{name}-world{seed}": CalibrationConfig(
            n_layers=shape.n_layers,
            d_model=shape.d_model,
            budget=shape.budget(config.dictionaries),
            tokens_train=config.tokens_train,
            tokens_held_out=config.tokens_held_out,
            seed=seed,
        )
        for name, shape in config.subjects.shapes().items()
        if name in COMPARED
        for seed in range(config.calibration_worlds)
    }
    root = folder.parent / "calibration"
    jobs = {name: partial(calibrate, one, root=root, device=device) for name, one in wanted.items()}
    if not jobs:
        return []
    rows = run_jobs(jobs, workers=workers, device=device, label="calibration")
    return [{"subject": name.split("-")[0], **row} for name, row in rows.items()]


def judge(
    config: StudyConfig,
    results: Sequence[Results],
    folder: Path,
    calibration: Sequence[Results],
    *,
    joint: Sequence[Results] = (),
    loss_gap: float,
    loss_matched: bool,
) -> Results:
    """The verdict section of the results, from the readings that the study's cells left in its folder.

    `joint` are the rows of crosscoders over two subjects.
    """
    sites = {site: _read_site(config, folder, site) for site in (evidence.PRIMARY_SITE, evidence.SECONDARY_SITE)}
    measured = {site: comparison.measure_site(found) for site, found in sites.items()}
    primary = sites[evidence.PRIMARY_SITE]
    conditions = evidence.Conditions(
        loss_gap=loss_gap,
        loss_matched=loss_matched,
        calibration=worst_calibration(calibration),
        cross_layer=_cross_layer(results, len(config.subjects.seeds)),
        count_gain=_count_gain(results, len(config.subjects.seeds)),
        removal_shift=evidence.removal_shift(primary),
        headroom=_headroom(primary),
        further=(
            _equal_variance(results),
            *(row for name in COMPARED for row in _counts(results, primary, name)),
            *_exclusive(joint),
        ),
    )
    found = evidence.gather(measured, primary, conditions)
    described = evidence.describe(measured, found, conditions)
    return {**described, "joint": list(joint), "calibration": list(calibration)}


def _equal_variance(results: Sequence[Results]) -> Statistic:
    """What R owes to A's and B's unequal explained variances, from their dictionaries of several k."""
    points: dict[str, list[gain.Density]] = {name: [] for name in COMPARED}
    for cell in sorted(results, key=lambda cell: cell["counts"]["role"] != "main"):
        found = cell["counts"]
        where = (found["state"], found["site"], found["arm"], found["training_seed"])
        wanted = found["subject"] in COMPARED and found["role"] in ("main", "k")
        if not wanted or where != ("trained", evidence.PRIMARY_SITE, "crosscoder", 0):
            continue
        rows = list(zip(found["per_seed"], cell["quality"]["per_seed"], strict=True))
        known = [(count["entropy_load"], count["effective_dimension"], row) for count, row in rows]
        if all(load and room for load, room, _ in known):
            explained = float(np.mean([row["explained_variance"] for _, _, row in known]))
            log_density = float(np.mean([np.log(load / room) for load, room, _ in known]))
            points[found["subject"]].append(gain.Density(explained, log_density))
    shift = gain.equal_variance_shift(points["B"], points["A"])
    if isinstance(shift, str):
        return Statistic("equal_variance", None, "equal_variance", shift)
    return Statistic("equal_variance", Estimate(shift, shift, shift), "equal_variance")


def _exclusive(joint: Sequence[Results]) -> list[Statistic]:
    """How much of a joint crosscoder is A's alone and B's alone, over training seeds."""
    rows = [row for row in joint if (row["first"], row["second"], row["state"]) == ("A", "B", "trained")]
    return [
        evidence.seeds_statistic(
            f"exclusive {name}",
            [[seed[f"exclusive_{side}"] for seed in row["per_seed"]] for row in rows],
            definition="exclusive_share",
        )
        for name, side in (("A", "first"), ("B", "second"))
        if rows
    ]


def _counts(results: Sequence[Results], primary: SiteReadings, name: str) -> list[Statistic]:
    """How many features a subject has, from its dictionary seeds and from growing dictionaries."""
    sizes, counts = [], []
    for cell in results:
        found = cell["counts"]
        where = (found["subject"], found["state"], found["site"], found["arm"])
        if where == (name, "trained", evidence.PRIMARY_SITE, "crosscoder") and found["role"] in ("main", "size"):
            rows = found["per_seed"]
            sizes += [row["dictionary_size"] for row in rows]
            counts += [row["distinct"] for row in rows]
    return [*seeds.seed_counts(primary.trained[name]), seeds.size_limit(name, sizes, counts)]


def _headroom(primary: SiteReadings) -> Estimate | None:
    """The lowest headroom of A's and B's dictionaries; the interval is that of the ceiling's constant alone."""
    lowest: tuple[float, float, float] | None = None
    for name in COMPARED:
        for pairs in primary.trained[name].pairs:
            for pair in pairs:
                dimension, reading = pair.debiased.value, pair.first
                if dimension is None or not len(reading):
                    continue
                phi, p = len(reading) / dimension, float(reading.probability_F.mean())
                value, low, high = (dimension.headroom(phi, p, c) for c in (C.value, C.high, C.low))
                if lowest is None or value < lowest[0]:
                    lowest = value, low, high
    return None if lowest is None else Estimate(*lowest)


def _read_site(config: StudyConfig, folder: Path, site: Any) -> SiteReadings:
    def subject(name: str, state: Any) -> ShapeReadings:
        shape = config.subjects.shapes()[name]
        groups = []
        for t in range(len(config.subjects.seeds)):
            budget = shape.budget(config.dictionaries)
            at = Place(
                subject=name,
                training_seed=t,
                state=state,
                site=site,
                arm="crosscoder",
                n_features=budget.n_features,
                k=budget.k_crosscoder,
            )
            paths = [reading_path(folder / READINGS, replace(at, seed=s)) for s in config.seeds]
            groups.append(tuple(load_reading(path) for path in paths))
        return ShapeReadings(name, shape.n_layers, shape.d_model, tuple(groups))

    trained = {name: subject(name, "trained") for name in config.subjects.shapes()}
    untrained = {name: subject(name, "untrained") for name in COMPARED}
    n_tokens = trained["A"].readings[0].n_tokens
    # One token of every block, the first, is not harvested.
    return SiteReadings(
        site=site,
        trained=trained,
        untrained=untrained,
        document_T=np.arange(n_tokens) // (config.subjects.context - 1),
    )


def _shares(results: Sequence[Results], state: str, n_seeds: int) -> list[list[float]]:
    """Genuinely cross-layer shares of A's crosscoders on the primary site, by training and dictionary seed."""
    groups: list[list[float]] = [[] for _ in range(n_seeds)]
    for cell in results:
        spread = cell["spread"]
        if not spread or spread["role"] != "main" or spread["subject"] != "A" or spread["state"] != state:
            continue
        for row in spread["per_seed"]:
            if row["functional"] is not None and row["functional"]["genuine_share"] is not None:
                groups[spread["training_seed"]].append(row["functional"]["genuine_share"])
    return groups


def _cross_layer(results: Sequence[Results], n_seeds: int) -> Statistic:
    """X of A: its share of genuinely cross-layer features less the larger of both nulls'."""
    sides: list[Bootstrap] = []
    for seed, state in enumerate(("trained", "shuffled", "untrained")):
        groups = _shares(results, state, n_seeds)
        if not all(groups):
            return Statistic("cross_layer", None, "cross_layer_excess", f"no {state} crosscoder of A was probed")
        sides.append(two_level_bootstrap(groups, seed=seed, n_draws=density.N_DRAWS))
    found = cross_layer.excess_bootstrap(sides[0], sides[1], sides[2])
    return Statistic("cross_layer", found.estimate(), "cross_layer_excess")


def _count_gain(results: Sequence[Results], n_seeds: int) -> Statistic:
    """ln(L0 of A's bank / L0 of A's crosscoder) at the crosscoder's explained variance, on the primary site."""
    groups: list[list[float | str]] = []
    for t in range(n_seeds):
        banks, crosscoders = [], []
        for cell in results:
            quality = cell["quality"]
            where = (quality["subject"], quality["state"], quality["site"], quality["training_seed"])
            if where != ("A", "trained", evidence.PRIMARY_SITE, t):
                continue
            points = [gain.Point(row["l0_token"], row["explained_variance"]) for row in quality["per_seed"]]
            if quality["arm"] == "layerwise":
                banks.append(points[0])
            elif quality["role"] == "main":
                crosscoders = points
        groups.append([gain.count_gain(point, banks) for point in crosscoders])
    return evidence.seeds_statistic("count_gain", groups)
