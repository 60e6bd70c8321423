"""One record for each feature, and one for each example of it: plain values, for the data files and for the browser."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from crosscoder.browser.findings import Findings
from crosscoder.measure.examples import BINS_OF_OCTAVE, FIRST_OCTAVE, Kept, quantile_examples
from crosscoder.results.table import finite

N_LABELS = 3
"""Tokens by which a feature is known in lists: the most frequent at the peaks of its strongest examples."""


@dataclass(frozen=True)
class Example:
    """A token on which a feature is active, with those around it in its block.

    kind: "strongest", by rank, or "quantile", of the band from 0 (weakest quarter) to 3. activations: nan at tokens
    that the dictionary does not read. peak: the token's place among `ids`.
    """

    feature: int
    kind: str
    band: int
    rank: int
    activation: float
    block: int
    position: int
    document: int
    ids: np.ndarray
    activations: np.ndarray
    peak: int
    parts: np.ndarray | None = None
    """Each layer's part at each token, `[width, K]`, of the very strongest."""


class Records:
    """Examples, labels and lists of single features."""

    def __init__(self, findings: Findings) -> None:
        self.findings, self.activity = findings, findings.activity

    @cached_property
    def _place_of_effect(self) -> dict[int, int]:
        return {int(feature): place for place, feature in enumerate(self.findings.effect_n)}

    def strongest(self, feature: int) -> list[Example]:
        found, activity = [], self.activity
        for rank in range(int(activity.strongest.is_there_Fk[feature].sum())):
            parts = activity.layered.more["parts"][feature, rank] if rank < activity.layered.size else None
            found.append(self._example(feature, "strongest", 3, rank, activity.strongest, rank, parts))
        return found

    def quantiles(self, feature: int) -> list[list[Example]]:
        """Examples of each quarter by activation, the weakest quarter first, each from strong to weak."""
        kept = self.activity.sampled
        return [
            [self._example(feature, "quantile", band, rank, kept, int(at)) for rank, at in enumerate(places)]
            for band, places in enumerate(quantile_examples(kept, feature))
        ]

    def _example(
        self, feature: int, kind: str, band: int, rank: int, kept: Kept, at: int, parts: np.ndarray | None = None
    ) -> Example:
        tokens, wanted, context = self.findings.tokens, self.activity.wanted, self.activity.context
        block, position = divmod(int(kept.token_Fk[feature, at]), context)
        first, last = max(0, position - wanted.before), min(context, position + wanted.after + 1)
        inside = slice(first - (position - wanted.before), last - (position - wanted.before))
        return Example(
            feature,
            kind,
            band,
            rank,
            float(kept.value_Fk[feature, at]),
            block,
            position,
            int(tokens.documents[block]),
            tokens[block].numpy()[first:last],
            kept.more["window"][feature, at][inside],
            position - first,
            None if parts is None else parts[inside],
        )

    def peak_ids(self, feature: int) -> list[int]:
        """The tokens at the peaks of a feature's strongest examples, the most frequent first, then the stronger."""
        kept = self.activity.strongest
        numbers = kept.token_Fk[feature][kept.is_there_Fk[feature]]
        block, position = np.divmod(numbers, self.activity.context)
        ids = [int(self.findings.tokens[int(b)][int(p)]) for b, p in zip(block, position, strict=True)]
        return [one for one, _ in Counter(ids).most_common()]

    def histogram(self, feature: int) -> tuple[int, list[int]]:
        """The first bin that is not empty, counted in bins from 2^0, and the counts up to the last."""
        filled = np.flatnonzero(self.activity.bins_FH[feature])
        if not len(filled):
            return 0, []
        counts = self.activity.bins_FH[feature, filled[0] : filled[-1] + 1].tolist()
        return int(filled[0]) + BINS_OF_OCTAVE * FIRST_OCTAVE, counts

    def layer(self, feature: int) -> int | None:
        """The layer of a bank's feature, from 0."""
        return int(self.activity.rows.layer_FK[feature, 0]) if self.activity.rows.is_bank else None

    def effects(self, feature: int) -> list[tuple[list[int], list[float], list[int], list[float]]]:
        """Tokens promoted, by how much, suppressed, by how much: of each layer's row, then of their sum; none of a row
        that is zero."""
        effects, place = self.findings.effects, self._place_of_effect.get(feature)
        if effects is None or place is None:
            return []
        found = [tuple(one[place, row].tolist() for one in effects) for row in range(effects[0].shape[1])]
        return [one if any(one[1]) or any(one[3]) else ([], [], [], []) for one in found]

    def precision(self, feature: int, which: int = 0) -> list[float | None] | None:
        """Precision of each layer's reading and of all together; None for a feature that is too rare. which: 1 and 2
        for the ends of the interval."""
        found = self.findings.precision_FS3
        if found is None or np.isnan(found[feature]).all():
            return None
        values = finite(found[feature, :, which].tolist())
        return values[:1] if self.activity.rows.is_bank else values

    def direction(self, feature: int) -> list[float | None] | None:
        """Cosine of each layer's row with the strongest layer's."""
        found = self.findings.direction_FL
        return None if found is None else finite(found[feature].tolist())

    def nearest(self, feature: int) -> dict[str, list[tuple[int, int, float]]]:
        """By dictionary (its own is ""): features, the layer of each (-1: all together), cosines."""
        return {
            name: [
                (int(one.feature_Fm[feature, i]), int(one.layer_Fm[feature, i]), float(one.cosine_Fm[feature, i]))
                for i in range(one.feature_Fm.shape[1])
                if one.feature_Fm[feature, i] >= 0
            ]
            for name, one in self.findings.nearest.items()
        }

    def number(self, key: str, feature: int) -> Any:
        """A feature's number in a column; None where it has none."""
        return finite(float(self.findings.columns[key][feature]))
