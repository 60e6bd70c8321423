"""How many dimensions a subject's writes fill: of every training, and of a grid of shapes without dictionaries."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from crosscoder.data.sources import EVALUATION_BATCH
from crosscoder.foundation.signals import safe_points
from crosscoder.measure.room import ParticipationRatio, WriteMoments, participation_ratio
from crosscoder.results.table import Place, Row, State
from crosscoder.studies.stores import Stores


@dataclass(frozen=True, kw_only=True)
class Room:
    """The room of one training's writes, trained or not, on the tokens that dictionaries train on."""

    subject: str
    training_seed: int
    state: State = "trained"

    @property
    def n_dictionaries(self) -> int:
        return 0

    @property
    def read(self) -> tuple[str, int, State]:
        return self.subject, self.training_seed, self.state

    @property
    def name(self) -> str:
        """A file name that tells it from cells."""
        return f"{self.subject}{self.training_seed}-{self.state}-room"

    def measure(self, store: Stores, folder: Path, *, device: str = "cpu") -> list[Row]:
        """The participation ratio in the model's own units, and with each layer at its scale."""
        source = store.source("write", device)
        moments, n_tokens = WriteMoments(source.n_layers, source.d_model), source.train.n_tokens
        n_batches = -(-n_tokens // EVALUATION_BATCH)
        size = n_tokens // n_batches  # so that no token comes twice
        for index in safe_points(range(n_batches)):
            moments.add(source.batch(index, size, 0) / source.scale_L[:, None])
        at = Place(subject=self.subject, training_seed=self.training_seed, state=self.state, site="write")
        found = {
            "model": participation_ratio(moments),
            "scaled": participation_ratio(moments, source.scale_L.double().numpy()),
        }
        return [row for units, one in found.items() for row in _rows(replace(at, estimator=units), one)]


def _rows(at: Place, found: ParticipationRatio | str) -> list[Row]:
    if isinstance(found, str):
        return [Row(at, "room", None, found)]
    return [
        Row(at, "room", found.value),
        Row(at, "room_tokens", found.n_tokens),
        Row(at, "energy_per_layer", found.energy_L.tolist()),
    ]
