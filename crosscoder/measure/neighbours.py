"""The features of the same or of another dictionary that write most alike, and whether two are each other's nearest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from crosscoder.foundation.console import Progress
from crosscoder.measure.counting import LINK
from crosscoder.measure.matching import Nearest, decoder_cosine
from crosscoder.measure.rows import FeatureRows


class Neighbours(NamedTuple):
    """The most alike features of each, `[F, m]`, the nearest first: their numbers (-1 for none), the layer on which
    they are alike (-1 for all together), and the cosine of what they write."""

    feature_Fm: np.ndarray
    layer_Fm: np.ndarray
    cosine_Fm: np.ndarray


Blocks = Iterator[tuple[np.ndarray, np.ndarray, int, np.ndarray]]
"""Rows and columns by the features they are of, the layer (-1: all), and cosines."""


def nearest_features(
    first: FeatureRows, second: FeatureRows | None = None, *, most: int = 5, quiet: bool = False
) -> Neighbours:
    """For every feature of `first` the `most` features of `second` whose decoder rows are most alike; None: of `first`
    itself, without the feature, and of a bank only those of other layers.

    Two crosscoders are compared by the cosine of what they write on all layers together, in the scale of their inputs,
    whose layers have equal norm. Where one of the two is a bank, by the cosine on the bank's layer; within a bank, by
    the cosine between features of two layers of one residual stream.
    """
    other = first if second is None else second
    if first.center_LD.shape != other.center_LD.shape:
        raise ValueError(
            f"dictionaries of {list(first.center_LD.shape)} and {list(other.center_LD.shape)} layers and width cannot "
            "be compared; give one of the same layers"
        )
    most, n = min(most, len(other)), len(first)
    feature, layer, cosine = (np.full((n, most), fill) for fill in (-1, -1, -np.inf))
    with Progress("nearest features", None, unit="blocks", quiet=quiet) as progress:
        for rows, columns, of_layer, block in _blocks(first, other, own=second is None):
            if second is None and of_layer < 0:
                block[np.arange(len(block)), rows] = -np.inf
            keep = min(most, block.shape[1])
            at = np.argpartition(-block, keep - 1, axis=1)[:, :keep]
            found = np.take_along_axis(block, at, axis=1)
            where = np.broadcast_to(of_layer, at.shape)
            joined = [
                np.concatenate(both, axis=1)
                for both in ((feature[rows], columns[at]), (layer[rows], where), (cosine[rows], found))
            ]
            order = np.argsort(-joined[2], axis=1, kind="stable")[:, :most]
            for held, one in zip((feature, layer, cosine), joined, strict=True):
                held[rows] = np.take_along_axis(one, order, axis=1)
            progress.advance()
    feature[~np.isfinite(cosine)] = -1
    return Neighbours(feature, layer, np.where(np.isfinite(cosine), cosine, np.nan))


def are_found(first: FeatureRows, second: FeatureRows) -> np.ndarray:
    """Which features of `first` are found in `second`, of the same form: the two are each other's nearest and have a
    cosine of at least .7, on all layers together or in a bank on their own layer, bool `[F]`."""
    found_F = np.zeros(len(first), dtype=bool)
    for (of_a, a), (_, b) in zip(_by_layer(first), _by_layer(second), strict=True):
        nearest = Nearest(len(b))
        for start, block in decoder_cosine(a, b).blocks():
            nearest.add(start, block)
        found_F[of_a[nearest.mutual_pairs(LINK)[:, 0]]] = True
    return found_F


def _by_layer(rows: FeatureRows) -> list[tuple[np.ndarray, np.ndarray]]:
    """Features and what they write; a bank's of each layer apart."""
    decoder_FKD = rows.decoder_FKD.float().cpu().numpy()
    if not rows.is_bank:
        return [(np.arange(len(rows)), decoder_FKD)]
    layer_F = rows.layer_FK[:, 0].cpu().numpy()
    return [(of := np.flatnonzero(layer_F == layer), decoder_FKD[of]) for layer in range(len(rows.center_LD))]


def _on_layers(rows: FeatureRows) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each layer the features that have a row on it, and that row, `[n, 1, D]`."""
    if rows.is_bank:
        return _by_layer(rows)
    (every, decoder_FLD), *_ = _by_layer(rows)
    return [(every, decoder_FLD[:, [layer]]) for layer in range(decoder_FLD.shape[1])]


def _blocks(first: FeatureRows, second: FeatureRows, *, own: bool) -> Blocks:
    def cosines(of_a: np.ndarray, a: np.ndarray, of_b: np.ndarray, b: np.ndarray, layer: int) -> Blocks:
        if len(a) and len(b):
            for start, block in decoder_cosine(a, b).blocks():
                yield of_a[start : start + len(block)], of_b, layer, np.array(block, dtype=np.float64)

    if not first.is_bank and not second.is_bank:
        yield from cosines(*_by_layer(first)[0], *_by_layer(second)[0], -1)
        return
    ours, theirs = _on_layers(first), _on_layers(second)
    for there, (of_b, b) in enumerate(theirs):
        for here, (of_a, a) in enumerate(ours):
            if (here != there) == own:
                yield from cosines(of_a, a, of_b, b, there)
