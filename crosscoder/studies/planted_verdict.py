"""From a planted answer to a verdict: pairs of worlds through every instrument, to see whether the rule returns it.

For each shape, training seed (the same features in newly drawn directions) and dictionary seed a crosscoder is trained
and read; banks on A give the count gain; the rule then says what it says of a study. Which gamma and delta were
planted is used only to say afterwards whether it was right.

Two things differ from a study. There is no loss, so the loss gap is 0. The calibration is not another world's: planted
features are known here, so the errors of these very readings are taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from crosscoder.data.world_pair import DEPTH_RATIO, Side, WorldPair
from crosscoder.measure import comparison, dimension, probes, recovery
from crosscoder.measure.comparison import SiteReadings, Statistic
from crosscoder.measure.density import PRIMARY, Subject
from crosscoder.measure.reading import Reading
from crosscoder.studies.planted_readings import Plant, Planted, VerdictConfig
from crosscoder.verdict import decide as verdict
from crosscoder.verdict import evidence, gain

DOCUMENT = 64  # tokens; planted tokens are independent, so any division is a fair one
PROBED = 2048  # held-out tokens on which X is measured

DEFINITIONS = {
    "planted_verdict": "A pair of worlds with planted gamma and delta through the whole chain: right if the label and "
    "the kind of H2 are those that the planted values stand for.",
    "planted_control": "The untrained control of a planted pair is planted too: the same features on the same tokens, "
    "each in one layer, their directions in D L^-0.9 dimensions, so that R is 0.57.",
    "coverage": "Share of verdicts whose 90 % interval holds the planted value, and, apart, that of the directions "
    "that were drawn, which scatter about it because features are few. Planted are R = 4^delta / 2 and delta as "
    "expected of so many features: laid evenly over the layers, few share one a little less often than many would. "
    "Where all features live in one layer, or in all, what leaks into or out of a decoder moves rho one way only, by a "
    "share of 1e-6 to 1e-3 that is the same for all seeds: there gamma's interval may be narrower than its bias, and "
    "how far it misses says more than how often.",
}


def measure_gain(planted: Planted, subject: Subject) -> Statistic:
    """Count gain of A: banks of rising or falling k until their explained variances enclose the crosscoder's.

    The first k gives a bank one active feature for each layer that the crosscoder's active features occupy.
    """
    rho = np.mean([reading.rho_F.mean() for reading in subject.readings])
    k = max(1, math.ceil(planted.config.active * rho / subject.n_layers))
    groups = []
    for pair, readings in zip(planted.pairs, subject.seeds, strict=True):
        wanted = [reading.explained_variance for reading in readings]
        points = {k: planted.bank(pair, k)}
        while max(p.explained_variance for p in points.values()) < max(wanted) and max(points) < planted.config.size:
            further = min(planted.config.size, max(max(points) + 1, round(1.5 * max(points))))
            points[further] = planted.bank(pair, further)
        while min(p.explained_variance for p in points.values()) > min(wanted) and min(points) > 1:
            points[min(points) - 1] = planted.bank(pair, min(points) - 1)
        k = sorted(points)[-2:][0]
        groups.append(
            [gain.count_gain(gain.Point(r.l0, r.explained_variance), list(points.values())) for r in readings]
        )
    return evidence.seeds_statistic("count_gain", groups)


def measure_cross_layer(planted: Planted, subject: Subject, control: Planted, untrained: Subject) -> Statistic:
    """X of A, with a feature's own decoder rows as the probes of one layer and of all."""
    groups = []
    for t, (pair, other) in enumerate(zip(planted.pairs, control.pairs, strict=True)):
        x_TLD = planted.held_out(pair, "A")[0][:PROBED].cpu().numpy()
        initial_TLD = control.held_out(other, "A")[0][:PROBED].cpu().numpy()
        rng = np.random.default_rng([planted.seed, t])
        shuffled_TLD = np.stack([x_TLD[rng.permutation(len(x_TLD)), layer] for layer in range(x_TLD.shape[1])], axis=1)
        rows: list[float | str] = []
        for reading, initial in zip(subject.seeds[t], untrained.seeds[t], strict=True):
            nulls = (_decodability(reading, shuffled_TLD), _decodability(initial, initial_TLD))
            x = probes.cross_layer_excess(_decodability(reading, x_TLD), *nulls)
            rows.append(x if math.isfinite(x) else "no feature could be probed")
        groups.append(rows)
    return evidence.seeds_statistic("cross_layer", groups)


def _decodability(reading: Reading, x_TLD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUC of each feature from all layers, `[F]`, and from each one, `[F, L]`; nan where it is not active."""
    active_TF = (reading.code[: len(x_TLD)] > 0).toarray()
    score_TFL = np.einsum("tld,fld->tfl", x_TLD, reading.decoder_FLD)
    both = np.concatenate([score_TFL, score_TFL.sum(2, keepdims=True)], axis=2)
    auc = [probes.area_under_curve(both[:, f], active_TF[:, f]) for f in range(len(reading))]
    auc_FQ = np.array(auc).reshape(len(reading), both.shape[2])
    return auc_FQ[:, -1], auc_FQ[:, :-1]


def measure_errors(planted: Planted, subjects: Mapping[str, Subject]) -> evidence.Calibration:
    """The largest count and rho errors of any reading against the planted features."""
    count, rho = [], []
    for side in planted.config.sides:
        for pair, readings in zip(planted.pairs, subjects[side].seeds, strict=True):
            truth_FLD = pair.decoder_FLD[side].numpy()
            count += [abs(recovery.relative_error(len(r), len(truth_FLD))) for r in readings]
            true_rho = recovery.mean_rho(truth_FLD)
            rho += [abs(recovery.relative_error(recovery.mean_rho(r.decoder_FLD), true_rho)) for r in readings]
    return evidence.Calibration(count_error=max(count), rho_error=max(rho), same_sizes=True)


def planted_truth(planted: Planted) -> dict[str, float]:
    """R, gamma and delta expected of the planted features over all directions that could be drawn."""
    pair = planted.pairs[0]
    return _truth({side: np.array([pair.expected_dimension(side)]) for side in ("A", "B")}, planted)


def drawn_truth(planted: Planted) -> dict[str, float]:
    """R, gamma and delta of the directions that were drawn, energy-weighted, over training seeds as they are over
    readings: densities are averaged for R, dimensions for delta."""
    return _truth({s: np.array([_drawn_dimension(pair, s) for pair in planted.pairs]) for s in ("A", "B")}, planted)


def _truth(dimension: Mapping[str, np.ndarray], planted: Planted) -> dict[str, float]:
    pair = planted.pairs[0]
    rho = {side: recovery.mean_rho(pair.decoder_FLD[side].numpy()) for side in ("A", "B")}
    relative = {side: dimension[side].mean() / pair.config.shape(side)[1] for side in ("A", "B")}
    return {
        "R": float((1 / dimension["B"]).mean() / (1 / dimension["A"]).mean()),
        "gamma": math.log(rho["A"] / rho["B"]) / math.log(DEPTH_RATIO),
        "delta": float(math.log(relative["A"] / relative["B"]) / math.log(DEPTH_RATIO)),
    }


def _drawn_dimension(pair: WorldPair, side: Side) -> float:
    rows_FN = pair.decoder_FLD[side].flatten(1).double().numpy()
    return dimension.weighted_dimension(rows_FN, pair.probability_F.double().numpy())


@dataclass(frozen=True)
class Case:
    """Everything a verdict is made of."""

    readings: SiteReadings
    conditions: evidence.Conditions


def measure_case(planted: Planted, control: Planted, untrained: Mapping[str, Subject]) -> Case:
    """Train, read and measure one plant beside its control."""
    trained = planted.subjects()
    n_tokens = trained["A"].readings[0].n_tokens
    readings = SiteReadings(
        site=evidence.PRIMARY_SITE,
        trained=trained,
        untrained=untrained,
        document_T=np.arange(n_tokens) // DOCUMENT,
    )
    conditions = evidence.Conditions(
        loss_gap=0.0,
        loss_matched=False,
        calibration=measure_errors(planted, trained),
        cross_layer=measure_cross_layer(planted, trained["A"], control, untrained["A"]),
        count_gain=measure_gain(planted, trained["A"]),
    )
    return Case(readings, conditions)


def judge(case: Case) -> tuple[comparison.SiteStatistics, verdict.Evidence, verdict.Verdict]:
    """The statistics of a case, the evidence made of them, and what the rule says."""
    site = comparison.measure_site(case.readings)
    found = evidence.gather({evidence.PRIMARY_SITE: site}, case.readings, case.conditions)
    return site, found, verdict.decide(found)


def describe_verdict(plant: Plant, planted: Planted, case: Case) -> dict[str, Any]:
    """The verdict on one plant beside the truth, as plain values."""
    site, found, decided = judge(case)
    truth, drawn = planted_truth(planted), drawn_truth(planted)
    statistics: dict[str, Any] = {}
    for name, key in (("R", f"R, {PRIMARY}"), ("gamma", "gamma"), ("delta", "delta")):
        estimate = site.estimate(key)
        statistics[name] = {
            "found": evidence.plain(estimate),
            "planted": truth[name],
            "drawn": drawn[name],
            "covers": None if estimate is None else estimate.covers(truth[name]),
            "covers_drawn": None if estimate is None else estimate.covers(drawn[name]),
        }
    beside = ("alpha", "gamma_excess", "trained_difference", "cross_layer", "count_gain", "universality")
    return {
        "plant": plant.name,
        "seed": planted.seed,
        "expected": [plant.label, *plant.kinds],
        "label": decided.label,
        "kinds": list(decided.kinds),
        "right": decided.label == plant.label and set(plant.kinds) <= set(decided.kinds),
        "reasons": list(decided.reasons),
        "sentence": decided.sentence,
        "gates": {gate.name: _plain_value(gate.value) for gate in decided.gates},
        "statistics": statistics,
        "beside": {name: evidence.plain(getattr(found, name)) for name in beside},
    }


def _plain_value(value: float | str | None) -> float | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def measure_seed(config: VerdictConfig, seed: int, device: str = "cpu") -> list[dict[str, Any]]:
    """One row for each plant, on the features of one seed; all share the control."""
    control = Planted(config, 0.0, None, seed, device, config.control_crowding)
    untrained = control.subjects()
    rows = []
    for plant in config.plants:
        planted = Planted(config, plant.gamma, plant.delta, seed, device)
        rows.append(describe_verdict(plant, planted, measure_case(planted, control, untrained)))
    return rows


def verdict_jobs(config: VerdictConfig, n_seeds: int, device: str = "cpu") -> dict[str, partial]:
    """A job for each seed, by name."""
    return {f"verdicts, seed {seed}": partial(measure_seed, config, seed, device) for seed in range(n_seeds)}


def _miss(statistic: dict[str, Any]) -> float:
    """How far the planted value lies outside the interval; 0 inside."""
    found, planted = statistic["found"], statistic["planted"]
    return max(0.0, found["low"] - planted, planted - found["high"])


def summarize_verdicts(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each plant: how often each label was given, how often the right one, and the coverage of the intervals."""
    every = list(rows)
    summary = []
    for name in dict.fromkeys(row["plant"] for row in every):
        group = [row for row in every if row["plant"] == name]
        labels = [" ".join((row["label"], *row["kinds"])) for row in group]
        entry: dict[str, Any] = {
            "plant": name,
            "expected": " ".join(group[0]["expected"]),
            "n": len(group),
            "right": sum(row["right"] for row in group),
            "labels": {label: labels.count(label) for label in dict.fromkeys(labels)},
        }
        for key, value in group[0]["statistics"].items():
            known = [row["statistics"][key] for row in group if row["statistics"][key]["found"] is not None]
            found = [one["found"]["mean"] for one in known]
            entry[key] = {
                "planted": value["planted"],
                "mean": float(np.mean(found)) if found else None,
                "n": len(known),
                "covered": sum(one["covers"] for one in known),
                "covered_drawn": sum(one["covers_drawn"] for one in known),
                "largest_miss": max((_miss(one) for one in known), default=None),
            }
        summary.append(entry)
    return summary
