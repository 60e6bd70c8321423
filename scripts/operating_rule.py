"""The rule on simulated studies: legs are the truth of a plant, plus what trained dictionaries were measured to be off.

Three questions are kept apart. What the rule says of a plant's exact truth: whether its definitions fit what was
planted. What it says of studies whose every training scatters as trainings do, legs alone: whether intervals and bands
leave it power. And what it says once gates are asked too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from operating_plants import BY_NAME
from operating_record import QUANTITIES, nulls_aside, true_log
from operating_studies import InstrumentConfig, truths
from operating_worlds import Plant, Truth
from pydantic import PositiveInt

from crosscoder.data.world_pair import SIDES, Side
from crosscoder.foundation.config import config as settings
from crosscoder.measure.dimension import CEILING, headroom
from crosscoder.measure.welch import Group, contrast, group_mean
from crosscoder.results.table import Estimate
from crosscoder.verdict.rule import CURRENCIES, GATES, Decision, Evidence, Gate, decide

SIMULATED_GATES = (
    "loss over a trigram table's",
    "share that token lookup keeps",
    "loss, B over A",
    "features a dimension",
    "two rooms agree",
)
"""Gates that follow from what is simulated; the others are those of the study with trained dictionaries."""
Logs = dict[str, np.ndarray | str]
"""ln of each of `QUANTITIES` and of causal layers, by training."""


@settings
class RuleConfig:
    """How many studies of how many trainings, and how many draws of nuisance the truth is known from."""

    instruments: InstrumentConfig = field(default_factory=InstrumentConfig)
    studies: PositiveInt = 400
    trainings: PositiveInt = 6
    draws: PositiveInt = 24


@dataclass(frozen=True)
class Known:
    """What is known of a plant: truths of draws of its nuisance, and the record of a study with dictionaries."""

    plant: Plant
    true: Mapping[Side, list[Truth]]
    record: Mapping[str, Any]
    spread: Mapping[Side, list[dict[str, float]]]
    """Residuals less their mean, of trainings of plants with several, by side."""


def pooled_spread(records: Sequence[Mapping[str, Any]], *, fewest: int = 3) -> dict[Side, list[dict[str, float]]]:
    """How trained dictionaries scatter about what they are off: residuals of every training of plants with `fewest`
    or more that could be read, less the plant's mean, widened for that mean's being of these very trainings."""
    pool: dict[Side, list[dict[str, float]]] = {side: [] for side in SIDES}
    for side in SIDES:
        for record in records:
            off = record["residuals"][side]
            if any(isinstance(off[name], str) or len(off[name]) < fewest for name in QUANTITIES):
                continue
            n = len(off[QUANTITIES[0]])
            widened = {name: math.sqrt(n / (n - 1)) * (np.array(off[name]) - np.mean(off[name])) for name in QUANTITIES}
            pool[side] += [{name: float(widened[name][t]) for name in QUANTITIES} for t in range(n)]
    return pool


def ideal_record(plant: Plant) -> dict[str, Any]:
    """A record of instruments that are right: nothing is off, and legs that are no load or room have their truth."""

    def near(value: float, reach: float) -> list[float]:
        return [value, value - reach, value + reach]

    legs = {
        "universality": near(1.0 if plant.shared else 0.0, 0.05),
        "rate dispersion": near(1.0, 0.1),
        "median log rate": near(math.log(plant.rate_ratio), 0.04),
        "removal share": near(1.0, 0.2) if plant.code == "words" else "no twin is left out",
    }
    residuals = {side: {name: [0.0] for name in QUANTITIES} for side in SIDES}
    return {"residuals": residuals, "gates": {}, "legs": legs, "main": {side: {} for side in SIDES}}


def measure_rule(
    plant: Plant, record: Mapping[str, Any] | None, spread: Mapping[Side, list[dict[str, float]]], config: RuleConfig
) -> dict[str, Any]:
    """Labels, coverage and biases over simulated studies of one plant.

    record: of the study with dictionaries; without one only instruments that are right are simulated.
    spread: see `pooled_spread`; where it is empty trainings scatter by their truths alone.
    """
    true = truths(plant, config.instruments.sizes, world=1000, trainings=config.draws)
    known = Known(plant, true, ideal_record(plant), spread)
    expected = expected_legs(known, config)
    right = {
        "plant": plant.name,
        "right": list(plant.right),
        "safe": list(plant.safe),
        "label_of_truth": decide(exact_evidence(known, config)).label,
        "truth": expected,
        "ideal": count_labels(plant, [decide(replace(one, gates={})).label for one in _studies(known, config)]),
    }
    if record is None:
        return right
    found = _studies(Known(plant, true, record, spread), config)
    gated = [decide(one) for one in found]
    return right | {
        "instruments": plant.trained_as or plant.name,
        "legs": count_labels(plant, [decide(replace(one, gates={})).label for one in found]),
        "gated": count_labels(plant, [one.label for one in gated]),
        "coverage": coverage(found, expected),
        "means": mean_legs(found),
        "reasons": common_reasons(gated),
    }


def _studies(known: Known, config: RuleConfig) -> list[Evidence]:
    rng = np.random.default_rng([len(known.plant.name), *known.plant.name.encode()])
    return [simulate(known, config, rng) for _ in range(config.studies)]


def count_labels(plant: Plant, labels: list[str]) -> dict[str, Any]:
    """Shares of right, wrong and conclusive, undecided or not testable labels, and of each label."""
    n = len(labels)
    right = sum(label in plant.right for label in labels)
    wrong = sum(label not in (*plant.right, *plant.safe) for label in labels)
    each = {label: count / n for label, count in Counter(labels).most_common()}
    return {"right": right / n, "wrong": wrong / n, "open": 1 - (right + wrong) / n, "labels": each, "studies": n}


def common_reasons(found: list[Decision]) -> dict[str, float]:
    """Shares of studies without a conclusion by what is named first, three at most."""
    named = Counter(one.reasons[0].partition(":")[0] for one in found if not one.is_conclusive and one.reasons)
    return {name: count / len(found) for name, count in named.most_common(3)}


def coverage(found: list[Evidence], expected: Mapping[str, float]) -> dict[str, float]:
    """How often intervals cover the planted value, by leg, where there is an interval."""
    covered = {}
    for name, value in expected.items():
        held = [one.values.get(name) for one in found]
        known = [one for one in held if isinstance(one, Estimate)]
        if known:
            covered[name] = sum(one.covers(value) for one in known) / len(known)
    return covered


def mean_legs(found: list[Evidence]) -> dict[str, float]:
    """Means over studies of every leg that has a value."""
    means = {}
    for name in found[0].values:
        known = [one.values[name] for one in found]
        values = [one.value for one in known if isinstance(one, Estimate)]
        if values:
            means[name] = float(np.mean(values))
    return means


def expected_legs(known: Known, config: RuleConfig) -> dict[str, float]:
    """The legs of the plant's truth, means over draws of nuisance."""
    logs = {side: {name: np.array([np.mean(v)]) for name, v in _true_logs(known, side).items()} for side in SIDES}
    return _combine(logs, config, _sum)


def exact_evidence(known: Known, config: RuleConfig) -> Evidence:
    """Evidence whose intervals have no width: what the rule's definitions say of the plant."""
    values: dict[str, Estimate | str | None] = {
        name: Estimate(value, value, value) for name, value in expected_legs(known, config).items()
    }
    words = known.plant.code == "words"
    shared = 1.0 if known.plant.shared else 0.0
    for name, value in (
        ("conjunctive excess", float(words)),
        ("conjunctive or twin excess", float(words)),
        ("removal share", float(words)),
        ("universality", shared),
        ("rate dispersion", 1.0),
        ("median log rate", math.log(known.plant.rate_ratio)),
    ):
        values[name] = Estimate(value, value, value)
    values["headroom of B"] = true_headroom(known)
    n_trainings = {str(side): config.trainings for side in SIDES}
    return nulls_aside(Evidence(values=values, gates={}, nulls={}, n_trainings=n_trainings))


def true_headroom(known: Known) -> Estimate | str:
    """B's headroom by its planted features; the interval is that of the ceiling's constant."""
    d_eff = math.exp(float(np.mean([one.d_eff for one in known.true["B"]])))
    n, rate = known.true["B"][0].n_features, float(np.mean([one.rate for one in known.true["B"]]))
    value, low, high = (headroom(n / d_eff, rate, c) for c in (CEILING.value, CEILING.high, CEILING.low))
    return Estimate(value, low, high) if math.isfinite(value) else "no firing probability is too high at this density"


def simulate(known: Known, config: RuleConfig, rng: np.random.Generator) -> Evidence:
    """One study: trainings of both sides, each a draw of the truth plus what a trained dictionary was off."""
    planted, plant = config.instruments.planted, known.plant
    logs = {side: _draw_logs(known, side, config, rng) for side in SIDES}
    values: dict[str, Estimate | str | None] = dict(_combine(logs, config, contrast_of))
    words = plant.code == "words"
    share = {s: np.abs(planted.share_sd * rng.standard_normal(config.trainings)) for s in ("real", "null")}
    if words:
        share["real"] = 1 - share["real"]
    excess = contrast([(1.0, group_mean(share["real"])), (-1.0, group_mean(share["null"]))])
    values |= {"conjunctive excess": excess, "conjunctive or twin excess": excess}
    for name in ("universality", "rate dispersion", "median log rate", "removal share"):
        values[name] = scattered(known.record["legs"].get(name), rng)
    values["headroom of B"] = true_headroom(known)
    n_trainings = {str(side): config.trainings for side in SIDES}
    gates = simulated_gates(known, config, values, rng)
    return nulls_aside(Evidence(values=values, gates=gates, nulls={}, n_trainings=n_trainings))


def scattered(found: list[float] | str | None, rng: np.random.Generator) -> Estimate | str | None:
    """A measured estimate drawn again within its interval, whose width it keeps."""
    if not isinstance(found, list):
        return found
    value, low, high = found
    moved = (high - low) / 2 / 2.0 * float(rng.standard_normal())
    return Estimate(value + moved, low + moved, high + moved)


def simulated_gates(
    known: Known, config: RuleConfig, values: Mapping[str, Estimate | str | None], rng: np.random.Generator
) -> dict[str, Gate]:
    """Gates with what this study would show."""
    planted, n, plant = config.instruments.planted, config.trainings, known.plant
    loss = {side: planted.clean_sd * rng.standard_normal(n) for side in SIDES}
    kept = planted.share_sd * rng.standard_normal(n)
    over = math.log(1.05) if plant.bigram else math.log(planted.clean / planted.trigram)
    lookup = planted.lookup_of_bigrams if plant.bigram else planted.lookup
    per_dimension = plant.size * plant.density
    rooms = [(values[f"room/{c}"], values[f"dimension/{c}"]) for c in CURRENCIES]
    apart = [_difference(a, b) for a, b in rooms]
    found: dict[str, Estimate | str | None] = {
        "loss over a trigram table's": contrast([(1.0, group_mean(loss["A"]))], over),
        "share that token lookup keeps": contrast([(1.0, group_mean(kept))], lookup),
        "loss, B over A": contrast([(1.0, group_mean(loss["B"])), (-1.0, group_mean(loss["A"]))]),
        "features a dimension": Estimate(per_dimension, per_dimension, per_dimension),
        "two rooms agree": max(apart, key=lambda one: 0 if isinstance(one, str) else abs(one.value)),
    }
    agreement = {"same direction in another order": "self_cosine", "found in another order": "point_matched_share"}
    for name in GATES:
        if name in agreement:
            found[name] = _agreement(known.record["main"], agreement[name])
        elif name not in found:
            found[name] = _as_estimate(known.record["gates"].get(name))
    return {name: Gate(found[name], leg, labels) for name, (leg, labels) in GATES.items()}


def _difference(a: Estimate | str | None, b: Estimate | str | None) -> Estimate | str:
    """Of two ln ratios with one load; its scatter is taken from the wider of the two."""
    if not isinstance(a, Estimate) or not isinstance(b, Estimate):
        return str(a if not isinstance(a, Estimate) else b)
    reach = max(a.high - a.low, b.high - b.low) / 2
    value = a.value - b.value
    return Estimate(value, value - reach, value + reach)


def _agreement(main: Mapping[Side, Mapping[str, list[float]]], key: str) -> Estimate | str:
    """Over trainings of the side that agrees less; equal values of all trainings are exact."""
    found = []
    for side in SIDES:
        values = main[side].get(key, [])
        group = group_mean(values)
        exact = len(values) > 1 and min(values) == max(values)
        found.append(Estimate.over(values) if exact else contrast([(1.0, group)]))
    known = [one for one in found if isinstance(one, Estimate)]
    return (
        min(known, key=lambda one: one.low)
        if len(known) == len(SIDES)
        else next(o for o in found if isinstance(o, str))
    )


def _as_estimate(found: list[float] | str | None) -> Estimate | str | None:
    return Estimate(*found) if isinstance(found, list) else found


def _true_logs(known: Known, side: Side) -> dict[str, np.ndarray]:
    logs = {name: np.array([true_log(one, name) for one in known.true[side]]) for name in QUANTITIES}
    return logs | {"causal": np.array([one.causal for one in known.true[side]])}


def _draw_logs(known: Known, side: Side, config: RuleConfig, rng: np.random.Generator) -> Logs:
    """Trainings of one side: truths drawn at random, and residuals of trained dictionaries, those of one together."""
    n, true = config.trainings, _true_logs(known, side)
    drawn = rng.integers(len(known.true[side]), size=n)
    off, pool = known.record["residuals"][side], known.spread[side]
    chosen = rng.integers(max(1, len(pool)), size=n)
    logs: Logs = {}
    for name in QUANTITIES:
        if isinstance(off[name], str):
            logs[name] = off[name]
            continue
        scatter = np.array([pool[t][name] for t in chosen]) if pool else np.zeros(n)
        logs[name] = true[name][drawn] + np.mean(off[name]) + scatter
    causal_sd = config.instruments.planted.causal_sd
    logs["causal"] = true["causal"][drawn] + causal_sd * rng.standard_normal(n)
    return logs


def _combine(logs: Mapping[Side, Mapping[str, Any]], config: RuleConfig, combine: Any) -> dict[str, Any]:
    """Every leg that is a contrast of A and B, by `combine(terms, constant)` of `(coefficient, logs)`."""
    shapes = config.instruments.shapes()
    depth = math.log(shapes["A"][0] / shapes["B"][0])
    neurons = math.log(math.prod(shapes["A"]) / math.prod(shapes["B"]))
    a, b = logs["A"], logs["B"]
    values = {"kappa": combine([(1 / depth, a["causal"]), (-1 / depth, b["causal"])], 0.0)}
    for one in CURRENCIES:
        joint, bank, dense = f"joint/{one}", f"bank/{one}", f"dense/{one}"
        values[f"q/{one}"] = combine([(1.0, b[joint]), (-1.0, a[joint])], 0.0)
        values[f"r/{one}"] = combine([(1.0, b[bank]), (-1.0, a[bank])], neurons)
        excess = {side: _minus(logs[side][bank], logs[side][joint]) for side in SIDES}
        values[f"g/{one}"] = combine([(1 / depth, excess["A"]), (-1 / depth, excess["B"])], 0.0)
        dense_J = {side: _minus(logs[side][joint], logs[side]["room"]) for side in SIDES}
        values[f"room/{one}"] = combine([(1.0, dense_J["B"]), (-1.0, dense_J["A"])], 0.0)
        values[f"dimension/{one}"] = combine([(1.0, b[dense]), (-1.0, a[dense])], 0.0)
    return values


def _minus(first: Any, second: Any) -> Any:
    return first if isinstance(first, str) else second if isinstance(second, str) else first - second


def contrast_of(terms: list[tuple[float, Any]], constant: float) -> Estimate | str:
    """The estimate of a contrast of trainings' logs, or why there is none."""
    groups: list[tuple[float, Group]] = [(c, one if isinstance(one, str) else group_mean(one)) for c, one in terms]
    return contrast(groups, constant)


def _sum(terms: list[tuple[float, np.ndarray]], constant: float) -> float:
    return constant + sum(c * float(value.mean()) for c, value in terms)


def instruments_of(plant: Plant) -> str:
    """The plant whose trained dictionaries tell how far those of this one would be off."""
    return plant.name if plant.trained_as is None else BY_NAME[plant.trained_as].name
