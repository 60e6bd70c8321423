"""Instruments on planted pairs: dictionaries trained on subjects whose every leg is known, and how far each leg is off.

A subject's training has joint dictionaries of several k and a bank, as a study's cell. Each is also read at higher
thresholds, as dictionaries of fractional k: a layer of a planted pair has less than one active feature a token, and no
k is smaller than 1. Losses, ablations and tables of tokens need a language model, which planted tokens have not: these
rows are set to what was planted, with scatter over trainings.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from operating_worlds import Plant, Subject, Truth, WorldSizes, subjects, truth_of
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from crosscoder.data.nulls import GaussianSource
from crosscoder.data.order import seeded_generator
from crosscoder.data.sources import Source
from crosscoder.data.world_pair import SIDES, Side
from crosscoder.dictionary import Dictionary
from crosscoder.foundation.config import config as settings
from crosscoder.measure import counting
from crosscoder.measure.comparison import ShapeReadings, compare_shapes
from crosscoder.measure.reading import Reading, read_dictionary
from crosscoder.measure.room import WriteMoments, participation_ratio
from crosscoder.results.table import Arm, Place, Row, State, rows_at
from crosscoder.studies.budget import DictionaryBudget
from crosscoder.studies.cells import dictionary_rows, fit_many, marked
from crosscoder.training import Frozen
from crosscoder.verdict import legs

SITE = legs.SITE
TWICE = 2
"""Trainings that have a dictionary of twice the size, too: an interval needs two."""
K_UNIT = 100
"""Rows count k in hundredths, so that fractional k have a place."""
DOCUMENT = 64  # tokens; planted tokens are independent, so any division is a fair one
GAUSSIAN_TOKENS = 20_480
FROZEN: dict[State, Frozen] = {"frozen_encoder": "encoder", "frozen_decoder": "decoder", "soft_decoder": "soft_decoder"}


@settings
class Planted:
    """Scatter over trainings of what is planted as a number.

    lost_share: the share of the harm of ablation that a share of variance unexplained costs; .24 to .36 in dictionaries
        of the standard study near the targets. clean, harm: nats a token.
    trigram: a trigram table's loss. lookup: the share of the loss kept when writes are looked up by token.
    """

    lost_share: PositiveFloat = 0.3
    lost_sd: NonNegativeFloat = 0.05
    clean: PositiveFloat = 2.57
    clean_sd: NonNegativeFloat = 0.003
    harm: PositiveFloat = 2.8
    trigram: PositiveFloat = 2.75
    lookup: PositiveFloat = 0.6
    lookup_of_bigrams: PositiveFloat = 0.9
    share_sd: NonNegativeFloat = 0.03
    causal_sd: NonNegativeFloat = 0.05
    rate_share: PositiveFloat = 0.15


@settings
class InstrumentConfig:
    """Sizes of worlds and dictionaries.

    k_joint, k_bank: of crosscoders and banks; k_wide: of crosscoders and banks on data that no few features explain.
    fractions: of the active features of the dictionary of the smallest k, at which it is read again.
    """

    sizes: WorldSizes = field(default_factory=WorldSizes)
    planted: Planted = field(default_factory=Planted)
    trainings: PositiveInt = 5
    k_joint: tuple[PositiveInt, ...] = (2, 3, 5)
    k_bank: tuple[PositiveInt, ...] = (1, 2, 3)
    k_wide: tuple[PositiveInt, ...] = (12, 40, 90, 150)
    fractions: tuple[PositiveFloat, ...] = (0.78, 0.6, 0.45, 0.33, 0.24)
    steps: PositiveInt = 800
    batch: PositiveInt = 512
    learning_rate: PositiveFloat = 7e-3
    held_out: PositiveInt = 12_288
    room_tokens: PositiveInt = 20_480

    def shapes(self) -> dict[str, tuple[int, int]]:
        """`(layers, width)` of A and B."""
        return {side: self.sizes.shape(side) for side in SIDES}

    def ks(self, plant: Plant, arm: Arm) -> list[int]:
        """The k of one arm's dictionaries; the second of a crosscoder's, or the only one, is the main one."""
        if plant.data == "gaussian":
            return list(self.k_wide)
        usual = self.k_bank if arm == "layerwise" else self.k_joint
        return sorted({max(1, round(plant.k_factor * k)) for k in usual} | set(plant.k_more))


@dataclass(frozen=True)
class MeasuredSubject:
    """One training of one side: its rows, its truth, and the readings of its main dictionaries."""

    rows: tuple[Row, ...]
    truth: Truth
    readings: tuple[Reading, ...]


def measure_study(plant: Plant, config: InstrumentConfig, *, world: int) -> list[Row]:
    """The rows of a study of one plant, at the density that the plant says."""
    rows: list[Row] = []
    readings: dict[Side, list[tuple[Reading, ...]]] = {side: [] for side in SIDES}
    for training in range(config.trainings):
        for side, subject in subjects(plant, config.sizes, world=world, training=training).items():
            found = measure_subject(plant, config, subject, training, twice=training < TWICE)
            rows += found.rows
            readings[side].append(found.readings)
    a, b = (ShapeReadings(side, tuple(readings[side])) for side in SIDES)
    if all(len(reading) for shape in (a, b) for reading in shape.readings):
        rows += compare_shapes(a, b, np.arange(config.held_out) // DOCUMENT)
    return rows


def truths(plant: Plant, sizes: WorldSizes, *, world: int, trainings: int) -> dict[Side, list[Truth]]:
    """The truth of every training, which costs no dictionary."""
    drawn = [subjects(plant, sizes, world=world, training=t) for t in range(trainings)]
    return {side: [truth_of(one[side]) for one in drawn] for side in SIDES}


def measure_subject(
    plant: Plant, config: InstrumentConfig, subject: Subject, training: int, *, twice: bool = False
) -> MeasuredSubject:
    """Train, read and count one training of one side; `twice`: also a dictionary of twice the size."""
    source = input_source(plant, config, subject)
    size = round(plant.size * config.sizes.n_features(plant))
    ks = config.ks(plant, "crosscoder")
    main = ks[min(1, len(ks) - 1)]
    run = DictionaryRun(config, source, subject.side, training, "trained", 1000 * subject.seed[0] + 10 * training)
    rows, found = joint_rows(run, size, ks, main)
    if source.n_layers == 1:  # a crosscoder of one layer is its bank
        rows += [replace(row, at=replace(row.at, arm="layerwise")) for row in rows if row.at.role != "size"]
    else:
        rows += bank_rows(run, size, config.ks(plant, "layerwise"))
    if twice:
        (large,) = run.train("crosscoder", 2 * size, [main])
        rows += run.rows(large, read_dictionary(large, marked(source, "cpu")), k=main, role="size")
    truth = truth_of(subject)
    rows += room_rows(source, subject, config, training) + planted_rows(plant, config, subject, training, main, truth)
    return MeasuredSubject(tuple(rows), truth, tuple(reading.distinct for reading in found))


def joint_rows(run: DictionaryRun, size: int, ks: Sequence[int], main: int) -> tuple[list[Row], list[Reading]]:
    """Rows of the crosscoders of one training, and the readings of its two main ones."""
    rows, readings = list[Row](), list[Reading]()
    for k, dictionary in zip(ks, run.train("crosscoder", size, ks), strict=True):
        reading = read_dictionary(dictionary, marked(run.source, "cpu"))
        rows += run.rows(dictionary, reading, k=k, main=k == main)
        rows += run.raised_rows(dictionary, reading, k, run.config.fractions[: None if k == ks[0] else 1])
        if k == main:
            readings.append(reading)
    (again,) = run.train("crosscoder", size, [main], other=1)
    readings.append(read_dictionary(again, marked(run.source, "cpu")))
    return rows + run.rows(again, readings[1], k=main, main=True, seed=1), readings


def bank_rows(run: DictionaryRun, size: int, ks: Sequence[int]) -> list[Row]:
    """Rows of the banks of one training."""
    rows: list[Row] = []
    for k, bank in zip(ks, run.train("layerwise", size, ks), strict=True):
        reading = read_dictionary(bank, marked(run.source, "cpu"))
        rows += run.rows(bank, reading, k=k, main=k == ks[0], arm="layerwise")
        rows += run.raised_rows(bank, reading, k, run.config.fractions[: None if k == ks[0] else 1], arm="layerwise")
    return rows


def input_source(plant: Plant, config: InstrumentConfig, subject: Subject) -> Source:
    """What dictionaries read: the subject's tokens, or those of a Gaussian of their covariance."""
    source = subject.source(config.held_out)
    if plant.data == "features":
        return source
    return GaussianSource(source, subject.seed[0], n_tokens=GAUSSIAN_TOKENS, held_out_tokens=config.held_out)


@dataclass(frozen=True)
class DictionaryRun:
    """Dictionaries of one training of one side in one state."""

    config: InstrumentConfig
    source: Source
    side: Side
    training: int
    state: State
    seed: int

    def train(self, arm: Arm, size: int, ks: Sequence[int], *, other: int = 0) -> list[Dictionary]:
        """One of each k, side by side; another `other` is another start and another order of the text."""
        config = self.config
        plans = [
            DictionaryBudget(
                n_features=size,
                k_crosscoder=k,
                k_layerwise=k,
                steps=config.steps,
                batch=config.batch,
                learning_rate=config.learning_rate,
                frozen=FROZEN.get(self.state, "none"),
                data_seed=self.seed + other,
            )
            for k in ks
        ]
        return fit_many(arm, self.source, [(plan, self.seed + other) for plan in plans])

    def place(self, arm: Arm, k: float, size: int, role: str, seed: int) -> Place:
        """Where numbers of one dictionary are measured."""
        return Place(
            subject=self.side,
            training_seed=self.training,
            state=self.state,
            site=SITE,
            arm=arm,
            role=role,  # ty: ignore[invalid-argument-type]
            n_features=size,
            k=round(K_UNIT * k),
            seed=seed,
        )

    def rows(
        self,
        dictionary: Dictionary,
        reading: Reading,
        *,
        k: float,
        main: bool = False,
        arm: Arm = "crosscoder",
        role: str | None = None,
        seed: int = 0,
    ) -> list[Row]:
        """What a dictionary counts, and what its reconstructions would lose; of main ones, directions too."""
        at = self.place(arm, k, dictionary.config.n_features, role or ("main" if main else "k"), seed)
        lost = self._loss_rows(at, 1 - reading.explained_variance)
        if main:
            return dictionary_rows(at, dictionary, reading) + lost
        counts = counting.count_features(reading, alike=False)
        values = {key: counts[key] for key in ("entropy_load", "effective_dimension", "alive") if key in counts}
        values |= {"explained_variance": reading.explained_variance, "l0_token": reading.l0}
        return rows_at(at, values) + lost

    def raised_rows(
        self,
        dictionary: Dictionary,
        reading: Reading,
        k: int,
        fractions: Sequence[float],
        *,
        arm: Arm = "crosscoder",
    ) -> list[Row]:
        """A dictionary with thresholds so high that fractions of its active features are left."""
        rows: list[Row] = []
        value_P = np.abs(reading.code.data)
        for fraction in fractions:
            raised = copy.deepcopy(dictionary)
            raised.threshold.fill_(float(np.quantile(value_P, 1 - fraction)))
            found = read_dictionary(raised, marked(self.source, "cpu"))
            if len(found) > 1:
                rows += self.rows(raised, found, k=fraction * k, arm=arm)
        return rows

    def _loss_rows(self, at: Place, fvu: float) -> list[Row]:
        """Losses planted from what the dictionary leaves unexplained; none on tokens that are nobody's."""
        if self.state == "gaussian":
            return []
        planted = self.config.planted
        draw = scatter("lost", self.side, self.seed)
        lost = planted.harm * planted.lost_share * fvu * math.exp(planted.lost_sd * draw)
        losses = {"spliced_loss": planted.clean + lost, "ablated_loss": planted.clean + planted.harm}
        return [*rows_at(at, {"clean_loss": planted.clean}), *rows_at(replace(at, layer="all"), losses)]


def scatter(*parts: object) -> float:
    """A standard normal number that depends on the parts only."""
    seed = seeded_generator("operating scatter", *(str(part) for part in parts)).initial_seed()
    return float(np.random.default_rng(seed % 2**63).standard_normal())


def room_rows(source: Source, subject: Subject, config: InstrumentConfig, training: int) -> list[Row]:
    """The room of the subject's tokens, in its own units and at its scale, which all layers share."""
    moments = WriteMoments(source.n_layers, source.d_model)
    moments.add(source.batch(0, config.room_tokens, subject.seed[0]) / subject.scale)
    at = Place(subject=subject.side, training_seed=training, state="trained", site=SITE)
    found = {"model": participation_ratio(moments), "scaled": participation_ratio(moments, source.scale_L.numpy())}
    return [
        Row(replace(at, estimator=units), "room", None, one)
        if isinstance(one, str)
        else Row(replace(at, estimator=units), "room", one.value)
        for units, one in found.items()
    ]


def planted_rows(
    plant: Plant, config: InstrumentConfig, subject: Subject, training: int, main: int, truth: Truth
) -> list[Row]:
    """What a language model would have to be there for: ablations, tables of tokens, schedules."""
    planted, rows = config.planted, list[Row]()
    size = round(plant.size * config.sizes.n_features(plant))
    words = plant.code == "words" and subject.side == "A"
    for state in ("trained", "frozen_encoder", "untrained"):
        where = (plant.name, subject.side, *subject.seed, state)
        run = DictionaryRun(config, subject.source(1), subject.side, training, state, 0)
        off = planted.share_sd * abs(scatter("share", *where))
        share = 1 - off if words and state == "trained" else off
        layers = truth.causal + planted.causal_sd * scatter("causal", *where)
        values = {"causal_layers": math.exp(layers), "conjunctive_share": share}
        rows += rows_at(run.place("crosscoder", main, size, "main", 0), values)
    at = Place(subject=subject.side, training_seed=training)
    loss = planted.clean * math.exp(planted.clean_sd * scatter("loss", subject.side, *subject.seed))
    values = {
        "held_out_loss": loss * (planted.trigram / planted.clean * 1.05 if plant.bigram else 1.0),
        "trigram_loss": planted.trigram * math.exp(planted.clean_sd * scatter("table", subject.side, *subject.seed)),
        "lookup_share": (planted.lookup_of_bigrams if plant.bigram else planted.lookup)
        + planted.share_sd * scatter("lookup", subject.side, *subject.seed),
        "rate_share": planted.rate_share,
    }
    return rows + rows_at(at, values)
