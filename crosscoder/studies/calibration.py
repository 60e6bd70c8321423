"""Planted truth through a study's own dictionaries and readings: what is off there may be off on a model.

A pair of worlds with the shapes of A and B is planted with half as many features as the crosscoders have, equally many
of them active on a token of both (the geometric mean of what the main crosscoders of A and B may use), in windows of
L^.5 layers, and noise beside them. Both arms are trained as the study's cells are: size, steps, batch, learning rate,
the number of distinct tokens that they see over and over, the tokens held out. Their k are multiples of the truth:
loads are equal here, so that they need others for a fidelity than the dictionaries of real activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from crosscoder.data.residuals import estimate_scales
from crosscoder.data.world import PlantedSource, World
from crosscoder.data.world_pair import SIDES, PairConfig, Side, WorldPair
from crosscoder.foundation.config import config as settings
from crosscoder.measure import counting, recovery
from crosscoder.measure.reading import Reading, read_dictionary
from crosscoder.results.table import Arm, LongTable, Place, Row, rows_at
from crosscoder.studies.budget import CLASSES, DictionaryBudget, of_other_k
from crosscoder.studies.cells import fit_many, held_out
from crosscoder.studies.folder import StudyFolder, study_folder
from crosscoder.studies.presets import Shape, StudyConfig
from crosscoder.training import TrainConfig
from crosscoder.verdict import legs

SCALE_TOKENS = 4096
PROBABILITY_RANGE = 7.0  # the most frequent planted feature over the rarest
MOST_FREQUENT = 0.9
PLANTED_SHARE = 0.5  # planted features over the dictionary's
GAMMA = 0.5  # planted windows last L^GAMMA layers
DELTA = 0.8  # planted d_eff is D L^DELTA: 2 layers can have .77 to 1, 8 layers .56 to .97
NOISE_SHARE = 0.05  # of the planted variance
K_FACTORS: dict[Arm, tuple[float, ...]] = {
    "crosscoder": (1.0, 0.5, 0.75, 0.87),
    "layerwise": (2.0, 0.6, 1.0, 3.5, 9.0),
}
"""k of the dictionaries over the features that are active, the main one first. With more than the truth a crosscoder
loses no less; a layer alone, which sees its features through more interference, needs several times as many."""
BY_KIND = ("recall_by_kind", "precision_by_kind", "kind_confusion")
TRAIN_STREAM, HELD_OUT_STREAM = 1, 2
READ: tuple[tuple[Arm, str, Callable[[LongTable], float | None]], ...] = (
    ("crosscoder", "load", legs.load),
    ("layerwise", "load", legs.load),
    ("crosscoder", "density", legs.raw_density),
)
Draw = Callable[[int, int | str, int], Tensor]
"""`(n, stream, index) -> x_BLD`: batch number `index` of a stream of planted tokens."""


@settings
class FitConfig:
    """How every dictionary of a planted study is trained, on tokens that never repeat."""

    steps: PositiveInt = 800
    batch: PositiveInt = 1024
    learning_rate: PositiveFloat = 1e-2
    k_factor: PositiveFloat = 1.0
    """Active features per token, as a multiple of the truth; anything but 1 mixes or splits features."""
    held_out: PositiveInt = 20_480

    def k(self, l0_true: float, n_features: int) -> int:
        """Active features of a dictionary in a world where `l0_true` are active."""
        return min(max(1, round(self.k_factor * l0_true)), n_features)

    def source(self, draw: Draw, shape: tuple[int, int]) -> PlantedSource:
        """The tokens of a world of `(layers, width)`, as they are drawn."""
        return PlantedSource(
            draw,
            scale_L=torch.ones(shape[0]),
            d_model=shape[1],
            held_out_stream=HELD_OUT_STREAM,
            held_out_tokens=self.held_out,
        )

    def run(
        self,
        arm: Arm,
        source: PlantedSource,
        *,
        n_features: int,
        k: int,
        seed: int,
        stream: int = TRAIN_STREAM,
        device: str = "cpu",
        folder: Path | None = None,
    ) -> Reading:
        """The reading of a dictionary after training on one stream of a source, which goes on in `folder`."""
        given: dict[str, Any] = {"steps": self.steps, "learning_rate": self.learning_rate, "dead_after_tokens": 10_000}
        budget = DictionaryBudget(
            n_features=n_features, k_crosscoder=k, k_layerwise=k, batch=self.batch, data_seed=stream, **given
        )
        training = TrainConfig(**given, log_every=self.steps)
        where: dict[str, Any] = {"device": device, "folder": folder}
        (dictionary,) = fit_many(arm, source, [(budget, seed)], training=training, **where)
        return read_dictionary(dictionary, held_out(source, device))


def log_uniform_bounds(mean: float, ratio: float) -> tuple[float, float]:
    """The least and the greatest of log-uniform probabilities with this mean, `ratio` apart."""
    low = mean * math.log(ratio) / (ratio - 1)
    return low, low * ratio


def score(at: Place, found_FLD: np.ndarray, world: World, reading: Reading, *, l0_true: float) -> list[Row]:
    """What an estimate that calls `found_FLD` the features of a world got right, and what its dictionary did."""
    kinds, truth_FLD = world.config.kinds, world.decoder_FLD.cpu().numpy()
    scores = recovery.score_features(found_FLD, truth_FLD, world.kind_F.numpy(), kinds, count=len(found_FLD))
    by_kind = {key: scores.pop(key) for key in BY_KIND}
    dictionary = {
        "alive": len(reading),
        "dead_share": reading.dead_share,
        "saturated": recovery.is_saturated(len(reading), reading.size),
        "explained_variance": reading.explained_variance,
        **recovery.beside_truth("l0", reading.l0, l0_true),
    }
    rows = rows_at(at, {**scores, **dictionary})
    for kind in kinds:
        rows += rows_at(replace(at, kind=kind), {key: by_kind[key][kind] for key in BY_KIND})
    return rows


@settings
class CalibrationConfig:
    """A planted pair of a study's two shapes, and what its dictionaries are given."""

    a: Shape
    b: Shape
    budget: DictionaryBudget
    tokens_train: PositiveInt = 240_000
    """Distinct tokens, read over and over."""
    tokens_held_out: PositiveInt = 30_000
    seed: int = 0
    """Of the worlds."""

    @property
    def n_planted(self) -> int:
        return max(2, round(PLANTED_SHARE * self.budget.n_features))

    @property
    def n_active(self) -> float:
        """Planted features that are active on a token."""
        return math.sqrt(math.prod(shape.budget(self.budget).k_crosscoder for shape in (self.a, self.b)))

    def budgets(self, side: Side, arm: Arm) -> tuple[DictionaryBudget, ...]:
        """One for each k, the main one first; a layer alone has the share of features that write it."""
        shape = self.a if side == "A" else self.b
        active = self.n_active * (1.0 if arm == "crosscoder" else shape.n_layers ** (GAMMA - 1))
        ks = [active * factor for factor in K_FACTORS[arm]]
        main = replace(shape.budget(self.budget), **{f"k_{arm}": max(1, round(ks[0]))})
        return (main, *of_other_k(main, arm, ks[1:]))

    def pair(self) -> PairConfig:
        k = self.n_active
        low, high = log_uniform_bounds(k / self.n_planted, PROBABILITY_RANGE)
        if high > MOST_FREQUENT:
            raise ValueError(
                f"{k:.3g} of {self.n_planted} planted features would have some active on {high:.0%} of the tokens; "
                f"expected at most {MOST_FREQUENT:.0%}: raise n_features or lower k"
            )
        sizes: dict[str, Any] = {"n_features": self.n_planted, "n_layers": self.a.n_layers, "d_model": self.a.d_model}
        quiet = PairConfig(**sizes, gamma=GAMMA, delta=DELTA, p_min=low, p_max=high, seed=self.seed)
        energy = float(WorldPair(quiet).draw("A", SCALE_TOKENS, "energy", 0).square().sum(2).mean())
        return replace(quiet, noise=math.sqrt(NOISE_SHARE / (1 - NOISE_SHARE) * energy / self.a.d_model))


def measure_calibration(config: CalibrationConfig, device: str = "cpu", folder: Path | None = None) -> list[Row]:
    """How far q, g and ln R of a planted pair are off, read at common variance unexplained as a study reads them.

    folder: what its trainings go on from.
    """
    pair = WorldPair(config.pair())
    sides = {side: _calibrate_side(pair, side, config, device, folder) for side in SIDES}
    table, shapes = (
        LongTable(tuple(r for rows, _, _ in sides.values() for r in rows)),
        {s: pair.config.shape(s) for s in SIDES},
    )
    logs: dict[tuple[Arm, str], dict[Side, legs.Logs]] = {
        (arm, name): {s: legs.read_logs(table, s, arm, "fvu", "trained", quantity) for s in SIDES}
        for arm, name, quantity in READ
    }
    at = Place(role="calibration", seed=config.seed)
    errors = {
        "calibration_q_error": _error(logs["crosscoder", "load"], 0.0),
        "calibration_g_error": _sharing_error(logs, pair, shapes),
        "calibration_room_error": _error(
            logs["crosscoder", "density"], math.log(pair.drawn_dimension("A") / pair.drawn_dimension("B"))
        ),
    }
    rows = [
        Row(at, key, None, value) if isinstance(value, str) else Row(at, key, value) for key, value in errors.items()
    ]
    values = {
        "calibration_mcc": min(mcc for _, mcc, _ in sides.values()),
        "calibration_fvu": float(np.mean([fvu for _, _, fvu in sides.values()])),
    }
    return rows + rows_at(at, values)


def _error(logs: dict[Side, legs.Logs], truth: float) -> float | str:
    known = {side: one if isinstance(one, str) else one[0] for side, one in logs.items()}
    a, b = known["A"], known["B"]
    return a if isinstance(a, str) else b if isinstance(b, str) else abs(b - a - truth)


def _sharing_error(
    logs: dict[tuple[Arm, str], dict[Side, legs.Logs]], pair: WorldPair, shapes: dict[Side, tuple[int, int]]
) -> float | str:
    """|error| of g: what windows of so many layers add up to in banks is known."""
    load_F = counting.binary_entropy(pair.probability_F.numpy())
    found, truth = {}, {}
    for side in SIDES:
        written_F = (pair.decoder_FLD[side].square().sum(2) > 0).sum(1).numpy()
        truth[side] = math.log(float(load_F @ written_F) / float(load_F.sum()))
        bank, joint = (logs[arm, "load"][side] for arm in ("layerwise", "crosscoder"))
        if isinstance(bank, str) or isinstance(joint, str):
            return bank if isinstance(bank, str) else str(joint)
        found[side] = bank[0] + math.log(shapes[side][0]) - joint[0]
    depth = math.log(shapes["A"][0] / shapes["B"][0])
    return abs((found["A"] - found["B"] - truth["A"] + truth["B"]) / depth)


def _calibrate_side(
    pair: WorldPair, side: Side, config: CalibrationConfig, device: str, folder: Path | None
) -> tuple[list[Row], float, float]:
    """Rows of the dictionaries of one side, the mean cosine of what its main crosscoder found, and what it loses."""
    scale_L = estimate_scales(pair.draw(side, SCALE_TOKENS, "scale", 0))

    def draw(n: int, stream: int | str, index: int) -> Tensor:
        return pair.draw(side, n, f"{stream}" if isinstance(stream, str) else "train", index)

    source = PlantedSource(
        draw,
        scale_L=scale_L,
        d_model=pair.config.shape(side)[1],
        held_out_stream="held out",
        held_out_tokens=config.tokens_held_out,
        distinct_tokens=config.tokens_train,
    )
    rows, mcc, fvu = list[Row](), math.nan, math.nan
    for arm in CLASSES:
        budgets = config.budgets(side, arm)
        kept = None if folder is None else folder / f"{side}-{arm}"
        trained = fit_many(arm, source, [(budget, 0) for budget in budgets], device=device, folder=kept)
        for index, (budget, dictionary) in enumerate(zip(budgets, trained, strict=True)):
            reading = read_dictionary(dictionary, held_out(source, device))
            if arm == "crosscoder" and index == 0:
                truth_FLD = (pair.decoder_FLD[side] * scale_L[:, None, None].view(1, -1, 1)).numpy()
                mcc = recovery.mean_cosine(recovery.assign(reading.distinct.decoder_FLD, truth_FLD))
                fvu = 1 - reading.explained_variance
            at = Place(subject=side, training_seed=0, state="trained", site="write", role="main" if index == 0 else "k",
                       arm=arm, n_features=budget.n(arm), k=budget.k(arm), seed=0)  # fmt: skip
            counts = counting.count_features(reading)
            keys = ("entropy_load", "effective_dimension")
            values = {key: counts[key] for key in keys} | {"explained_variance": reading.explained_variance}
            rows += rows_at(at, values)
    return rows, mcc, fvu


def calibrate_study(config: StudyConfig, study: StudyFolder) -> list[Row]:
    """Errors on planted pairs of the study's own sizes, kept beside the studies so that others reuse them.

    Nothing for shapes that are not of L and L / 4 layers and widths D and 2 D, which no pair has.
    """
    a, b = config.subjects.a, config.subjects.b
    if (a.n_layers, b.d_model) != (4 * b.n_layers, 2 * a.d_model):
        return []
    jobs: dict[Path, Callable[[], list[Row]]] = {}
    for seed in range(config.calibration_worlds):
        wanted = CalibrationConfig(
            a=a,
            b=b,
            budget=config.dictionaries,
            tokens_train=config.tokens_train,
            tokens_held_out=config.tokens_held_out,
            seed=seed,
        )
        path = study_folder(wanted, f"pair{seed}", study.root.parent / "calibration").with_suffix(".json")
        jobs[path] = partial(measure_calibration, wanted, study.device, study.unfinished(path.stem))
    return [row for rows in study.measure(jobs, "calibration").values() for row in rows]
