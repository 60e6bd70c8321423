"""One dictionary trained on a source and read on its held-out tokens; against a planted world, scored."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from crosscoder.data.sources import Source
from crosscoder.data.world import World
from crosscoder.dictionary import Dictionary
from crosscoder.measure import recovery
from crosscoder.measure.reading import Reading, read_dictionary
from crosscoder.results.table import Place, Row, rows_at
from crosscoder.training import TrainConfig, train

BY_KIND = ("recall_by_kind", "precision_by_kind", "kind_confusion")


def fit_dictionary(
    dictionary: Dictionary, source: Source, config: TrainConfig, *, batch: int, seed: int, device: str = "cpu"
) -> Reading:
    """The reading of `dictionary` on the held-out tokens of a source, trained on the others in the order of `seed`."""
    batches = source.batches(batch, seed=seed, steps=config.steps or 0)
    train(dictionary, batches, config=config, device=device, quiet=True)
    return read_dictionary(dictionary, (x_BLD.to(device) for x_BLD in source.held_out()))


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
        "l0": reading.l0,
        "l0_true": l0_true,
        "l0_error": recovery.relative_error(reading.l0, l0_true),
    }
    rows = rows_at(at, {**scores, **dictionary})
    for kind in kinds:
        rows += rows_at(replace(at, kind=kind), {key: by_kind[key][kind] for key in BY_KIND})
    return rows
