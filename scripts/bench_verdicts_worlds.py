"""From a planted answer to a verdict: pairs of worlds through every instrument, to see whether the rule returns it.

For each shape, training seed (the same features in newly drawn directions) and dictionary seed a crosscoder is trained
and read; banks on A give the count gain; the rule then says what it says of a study. Which gamma and delta were
planted is used only to say afterwards whether it was right.

Two things differ from a study. There is no loss, so the loss gap is 0. The calibration is not another world's: planted
features are known here, so the errors of these very readings are taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from scipy import stats

from crosscoder.data.sources import PlantedSource
from crosscoder.data.world_pair import DEPTH_RATIO, SIDES, PairConfig, Side, WorldPair
from crosscoder.foundation.config import config as settings
from crosscoder.measure import dimension, probes, recovery
from crosscoder.measure.comparison import SiteReadings, measure_site
from crosscoder.measure.density import ShapeReadings
from crosscoder.measure.reading import Reading
from crosscoder.measure.statistics import seeds_row
from crosscoder.results.table import LongTable, Place, Row, finite, rows_at
from crosscoder.results.verdict import Label, Verdict
from crosscoder.studies.budget import Arm
from crosscoder.studies.calibration import FitConfig, log_uniform_bounds
from crosscoder.verdict import evidence
from crosscoder.verdict.decide import decide
from crosscoder.verdict.evidence import PRIMARY_SITE, GateInputs, Point
from crosscoder.verdict.rule import Evidence

DOCUMENT = 64  # tokens; planted tokens are independent, so any division is a fair one
PROBED = 2048  # held-out tokens on which X is measured


@settings
class Plant:
    """A planted answer and what the rule should say of it."""

    name: str
    gamma: float
    delta: float
    label: Label
    kinds: tuple[str, ...] = ()


PLANTS = (
    Plant(name="complete", gamma=0.0, delta=1.0, label="H0"),
    Plant(name="persistent", gamma=0.5, delta=0.5, label="H1a"),
    Plant(name="over-reconciled", gamma=1.0, delta=0.0, label="H2", kinds=("over-reconciled",)),
)


@settings
class VerdictConfig:
    """The pair, its dictionaries, and the control.

    size_factor: features of every dictionary over planted ones. The gate on dead features refuses a dictionary with
        more than a tenth to spare, so this is how large one may be, as a sweep of sizes would find.
    control_crowding: the untrained control holds the same features, the text's own, each in one layer and in
        D L^-crowding dimensions, since without training deep representations lose rank (Dong et al. 2021, arXiv
        2103.03404). A Gaussian of the same second moments would be another control, but two dictionary seeds agree on
        no direction in it; it has no debiased dimension, hence no R to differ from.
    """

    n_features: PositiveInt = 120
    n_layers: PositiveInt = 4
    d_model: PositiveInt = 96
    active: PositiveFloat = 6.0
    """Features active on a token, and k of the crosscoders."""
    probability_range: Annotated[float, Field(gt=1)] = 3.5
    noise: float = 0.0
    size_factor: PositiveFloat = 1.03
    training_seeds: PositiveInt = 3
    dictionary_seeds: PositiveInt = 2
    sides: tuple[Side, ...] = ("A", "B")
    control_crowding: float = 0.9
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=300, batch=512, held_out=8192))
    plants: tuple[Plant, ...] = PLANTS

    @property
    def size(self) -> int:
        """Features of every dictionary."""
        return round(self.size_factor * self.n_features)


@dataclass(frozen=True)
class Planted:
    """One plant drawn with every training seed, read through one side after another."""

    config: VerdictConfig
    gamma: float
    delta: float | None
    seed: int
    device: str = "cpu"
    crowding: float = 0.0

    @cached_property
    def pairs(self) -> tuple[WorldPair, ...]:
        """One pair for each training seed; firing probabilities sum to `active`."""
        config = self.config
        low, high = log_uniform_bounds(config.active / config.n_features, config.probability_range)
        shared = PairConfig(
            n_features=config.n_features,
            n_layers=config.n_layers,
            d_model=config.d_model,
            gamma=self.gamma,
            delta=self.delta,
            p_min=low,
            p_max=high,
            noise=config.noise,
            seed=self.seed,
            sides=config.sides,
            crowding=self.crowding,
        )
        pairs = tuple(WorldPair(replace(shared, training_seed=t)) for t in range(config.training_seeds))
        for pair in pairs:
            pair.probability_F = pair.probability_F * (config.active / pair.probability_F.sum())
        return pairs

    def source(self, pair: WorldPair, side: Side) -> PlantedSource:
        """The tokens of one side, scaled; the same held-out ones for every shape and seed."""
        scale, (n_layers, d_model) = usual_scale(pair, side), pair.config.shape(side)
        return PlantedSource(
            lambda n, stream, index: pair.draw(side, n, stream, index) * scale,
            scale_L=torch.full((n_layers,), scale),
            d_model=d_model,
            held_out_stream=2 * self.seed + 1,
            held_out_tokens=self.config.fit.held_out,
        )

    def train(self, arm: Arm, pair: WorldPair, side: Side, *, k: int, seed: int) -> Reading:
        """The reading of a dictionary after training on one side."""
        given = {"n_features": self.config.size, "k": k, "seed": 1000 * self.seed + seed}
        source = self.source(pair, side)
        return self.config.fit.run(arm, source, **given, stream=2 * self.seed, device=self.device)

    def read(self, pair: WorldPair, side: Side, dictionary_seed: int) -> Reading:
        """The reading of one crosscoder on one side."""
        seed = 10 * pair.config.training_seed + dictionary_seed
        return self.train("crosscoder", pair, side, k=round(self.config.active), seed=seed).distinct

    def bank(self, pair: WorldPair, k: int) -> Point:
        """A bank on A with k active features a layer."""
        reading = self.train("layerwise", pair, "A", k=k, seed=pair.config.training_seed)
        return Point(reading.l0, reading.explained_variance)

    def subjects(self) -> dict[str, ShapeReadings]:
        """All readings of every side."""
        seeds, found = range(self.config.dictionary_seeds), {}
        for side in self.config.sides:
            readings = tuple(tuple(self.read(pair, side, d) for d in seeds) for pair in self.pairs)
            found[side] = ShapeReadings(side, *self.pairs[0].config.shape(side), readings)
        return found


def usual_scale(pair: WorldPair, side: Side) -> float:
    """One factor for all layers that makes the mean squared activation 1, from the truth."""
    square_F = pair.probability_F * (1 + 0.6**2 / 12)  # E[a^2] of a uniform on [0.7, 1.3]
    mean_F = pair.probability_F
    decoder_FN = pair.decoder_FLD[side].flatten(1)
    gram_FF = decoder_FN @ decoder_FN.T
    joint_FF = (mean_F[:, None] * mean_F[None, :]).fill_diagonal_(0) + square_F.diag()
    total = float((gram_FF * joint_FF).sum()) + pair.config.noise**2 * decoder_FN.shape[1]
    return math.sqrt(decoder_FN.shape[1] / total)


def measure_gain(planted: Planted, subject: ShapeReadings) -> Row:
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
        own = [evidence.point_of_l0(r.explained_variance, r.l0) for r in readings]
        groups.append([evidence.count_gain(point, list(points.values())) for point in own])
    return seeds_row(Place(site=PRIMARY_SITE), "count_gain", groups)


def measure_cross_layer(planted: Planted, subject: ShapeReadings, control: Planted, untrained: ShapeReadings) -> Row:
    """X of A, with a feature's own decoder rows as the probes of one layer and of all."""
    groups = []
    for t, (pair, other) in enumerate(zip(planted.pairs, control.pairs, strict=True)):
        x_TLD = next(planted.source(pair, "A").held_out())[:PROBED].numpy()
        initial_TLD = next(control.source(other, "A").held_out())[:PROBED].numpy()
        rng = np.random.default_rng([planted.seed, t])
        shuffled_TLD = np.stack([x_TLD[rng.permutation(len(x_TLD)), layer] for layer in range(x_TLD.shape[1])], axis=1)
        rows: list[float | str] = []
        for reading, initial in zip(subject.seeds[t], untrained.seeds[t], strict=True):
            nulls = _genuine_share(reading, shuffled_TLD), _genuine_share(initial, initial_TLD)
            x = float(_genuine_share(reading, x_TLD) - np.maximum(*nulls))
            rows.append(x if math.isfinite(x) else "no feature could be probed")
        groups.append(rows)
    return seeds_row(Place(site=PRIMARY_SITE), "cross_layer", groups)


def _genuine_share(reading: Reading, x_TLD: np.ndarray) -> float:
    """Share of genuinely cross-layer features among those that are active."""
    active_TF = (reading.code[: len(x_TLD)] > 0).toarray()
    score_TFL = np.einsum("tld,fld->tfl", x_TLD, reading.decoder_FLD)
    both = np.concatenate([score_TFL, score_TFL.sum(2, keepdims=True)], axis=2)
    auc = [area_under_curve(both[:, f], active_TF[:, f]) for f in range(len(reading))]
    auc_FQ = np.array(auc).reshape(len(reading), both.shape[2])
    return probes.genuine_share(auc_FQ[:, -1], auc_FQ[:, :-1])


def area_under_curve(score_TQ: np.ndarray, label_T: np.ndarray) -> np.ndarray:
    """AUC of each of Q scores for a label, `[Q]`: P(score with > score without) + P(equal) / 2; nan for one class.

    The Mann-Whitney statistic over the product of class sizes, with mean ranks for ties.
    """
    label = np.asarray(label_T, dtype=bool)
    n_with, n_without = int(label.sum()), int((~label).sum())
    if n_with == 0 or n_without == 0:
        return np.full(score_TQ.shape[1], np.nan)
    ranks = stats.rankdata(score_TQ, axis=0)
    return (ranks[label].sum(0) - n_with * (n_with + 1) / 2) / (n_with * n_without)


def measure_errors(planted: Planted, subjects: Mapping[str, ShapeReadings]) -> evidence.Calibration:
    """The largest count and rho errors of any reading against the planted features."""
    count, rho = [], []
    for side in planted.config.sides:
        for pair, readings in zip(planted.pairs, subjects[side].seeds, strict=True):
            truth_FLD = pair.decoder_FLD[side].numpy()
            count += [abs(recovery.relative_error(len(r), len(truth_FLD))) for r in readings]
            true_rho = recovery.mean_rho(truth_FLD)
            rho += [abs(recovery.relative_error(recovery.mean_rho(r.decoder_FLD), true_rho)) for r in readings]
    return evidence.Calibration(count_error=max(count), rho_error=max(rho), same_sizes=True)


def truth(pairs: Sequence[WorldPair], dimension_of: Callable[[WorldPair, Side], float]) -> dict[str, float]:
    """R, gamma and delta of planted features over training seeds as they are over readings: densities are averaged for
    R, dimensions for delta."""
    d_eff = {side: np.array([dimension_of(pair, side) for pair in pairs]) for side in SIDES}
    relative = {side: d_eff[side].mean() / pairs[0].config.shape(side)[1] for side in SIDES}
    rho = {side: recovery.mean_rho(pairs[0].decoder_FLD[side].numpy()) for side in SIDES}
    return {
        "R": float((1 / d_eff["B"]).mean() / (1 / d_eff["A"]).mean()),
        "gamma": math.log(rho["A"] / rho["B"]) / math.log(DEPTH_RATIO),
        "delta": float(math.log(relative["A"] / relative["B"]) / math.log(DEPTH_RATIO)),
    }


def drawn_dimension(pair: WorldPair, side: Side) -> float:
    """d_eff of the directions that were drawn, energy-weighted; `expected_dimension` is over all that could be."""
    rows_FN = pair.decoder_FLD[side].flatten(1).double().numpy()
    return dimension.weighted_dimension(rows_FN, pair.probability_F.double().numpy())


@dataclass(frozen=True)
class Case:
    """Everything a verdict is made of."""

    readings: SiteReadings
    measured: tuple[Row, ...]
    """X and the count gain."""
    inputs: GateInputs


def measure_case(planted: Planted, control: Planted, untrained: Mapping[str, ShapeReadings]) -> Case:
    """Train, read and measure one plant beside its control."""
    trained = planted.subjects()
    n_tokens = trained["A"].readings[0].n_tokens
    readings = SiteReadings(
        site=PRIMARY_SITE, trained=trained, untrained=untrained, document_T=np.arange(n_tokens) // DOCUMENT
    )
    measured = (
        measure_cross_layer(planted, trained["A"], control, untrained["A"]),
        measure_gain(planted, trained["A"]),
    )
    inputs = GateInputs(loss_gap=0.0, loss_matched=False, calibration=measure_errors(planted, trained))
    return Case(readings, measured, inputs)


def judge(case: Case) -> tuple[Evidence, Verdict]:
    """The evidence of a case, and what the rule says of it."""
    table = LongTable((*measure_site(case.readings), *case.measured))
    found = evidence.gather(table, case.readings, case.inputs)
    return found, decide(found)


def verdict_rows(plant: Plant, planted: Planted, case: Case) -> list[Row]:
    """The verdict on one plant beside the truth."""
    found, decided = judge(case)
    at = Place(kind=plant.name, seed=planted.seed)
    beside = ("alpha", "gamma_excess", "trained_difference", "cross_layer", "count_gain", "universality")
    rows = rows_at(
        at,
        {
            "expected_verdict": " ".join((plant.label, *plant.kinds)),
            "found_verdict": " ".join((decided.label, *decided.kinds)),
            "right_verdict": decided.label == plant.label and set(plant.kinds) <= set(decided.kinds),
            "verdict_reasons": list(decided.reasons),
            "verdict_sentence": decided.sentence,
            "gate_values": [f"{gate.name}: {finite(gate.value)}" for gate in decided.gates],
            **{name: getattr(found, name) for name in beside},
        },
    )
    expected, drawn = truth(planted.pairs[:1], WorldPair.expected_dimension), truth(planted.pairs, drawn_dimension)
    for name, estimate in (("R", found.ratio), ("gamma", found.gamma), ("delta", found.delta)):
        values = {"found": estimate, "planted": expected[name], "drawn": drawn[name]}
        rows += rows_at(replace(at, estimator=name), values)
    return rows


def measure_seed(config: VerdictConfig, seed: int, device: str = "cpu") -> list[Row]:
    """The verdicts on every plant, on the features of one seed; all share the control."""
    control = Planted(config, 0.0, None, seed, device, config.control_crowding)
    untrained = control.subjects()
    rows: list[Row] = []
    for plant in config.plants:
        planted = Planted(config, plant.gamma, plant.delta, seed, device)
        rows += verdict_rows(plant, planted, measure_case(planted, control, untrained))
    return rows


def verdict_jobs(config: VerdictConfig, n_seeds: int, device: str = "cpu") -> dict[str, partial]:
    """A job for each seed, by name."""
    return {f"verdicts, seed {seed}": partial(measure_seed, config, seed, device) for seed in range(n_seeds)}
