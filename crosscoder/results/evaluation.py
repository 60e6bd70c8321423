"""What was measured of one dictionary, as a file: every number by the key of its quantity, and which dictionary it is.

The numbers are the file's own keys; `about` says whose they are, so that nobody takes them for another dictionary's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from crosscoder.foundation.artifact import DamagedArtifactError, read_json, write_json
from crosscoder.foundation.config import config, from_mapping, to_mapping
from crosscoder.foundation.console import aligned
from crosscoder.foundation.origin import MismatchError, Reads
from crosscoder.results.quantities import QUANTITIES, unknown_key
from crosscoder.results.table import value_type

SCHEMA = "crosscoder.evaluation/1"
LAYERS = "explained_variance_per_layer"
SHOWN = (
    "dictionary_size", "explained_variance", LAYERS, "l0_token", "alive", "dead_share", "mean_rho", "loss_recovered",
    "clean_loss", "spliced_loss", "ablated_loss", "splice_tokens", "tokens_held_out",
)  # fmt: skip
"""The quantities that people are shown, in their order."""
WORDS = {
    "spliced_loss": "loss with reconstructions in place",
    "ablated_loss": "loss with the sites ablated",
    "mean_rho": "spread of a feature, mean",
}
"""Headings that say more than those of a study's tables, which stand under another."""
ABOUT = "about"
_MISSING: Any = object()


@config
class About:
    """Whose numbers they are.

    weights: sha256 of the dictionary's tensors (`Dictionary.facts`). form: the name of its class. reads: the record of
    what it reads, the null in its place included. frozen: what of it was not trained. command: what measured it.
    """

    schema: str = SCHEMA
    weights: str
    form: str
    reads: Reads | None = None
    frozen: str = "none"
    command: tuple[str, ...] = ()
    versions: dict[str, str] | None = None

    @property
    def null(self) -> str | None:
        """What a null is called, of activations or of a dictionary that is not all learnt; None for no null."""
        if self.reads is not None and self.reads.null is not None:
            return self.reads.null
        return None if self.frozen == "none" else f"{self.frozen} not learnt"


@config
class Evaluation:
    """Numbers by the key of their quantity (`QUANTITIES`), None where one is undefined, and whose they are."""

    about: About
    values: dict[str, Any]

    def __post_init__(self) -> None:
        for key, value in self.values.items():
            if key not in QUANTITIES:
                raise ValueError(unknown_key(key))
            try:
                TypeAdapter(value_type(key)).validate_python(value)
            except ValidationError as error:
                raise ValueError(f"{key} is {value!r:.60}; {error.errors()[0]['msg'].lower()}") from None

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_json(path, {ABOUT: to_mapping(self.about), **self.values})

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """What `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            DamagedArtifactError: it is no evaluation, or holds what no quantity can be.
        """
        found = read_json(path)
        if not isinstance(found, Mapping) or not isinstance(found.get(ABOUT), Mapping):
            raise DamagedArtifactError(f"{path} does not say of which dictionary it is; write it by evaluate --out")
        if (schema := found[ABOUT].get("schema")) != SCHEMA:
            raise DamagedArtifactError(f"{path} is {schema!r:.60}, expected {SCHEMA!r}")
        values = {key: value for key, value in found.items() if key != ABOUT}
        try:
            return cls(about=from_mapping(About, found[ABOUT], where=f"{path}.{ABOUT}"), values=values)
        except ValueError as error:
            raise DamagedArtifactError(f"{path} is no evaluation: {error}") from None


def require_nulls(nulls: Sequence[Evaluation], reads: Reads | None) -> None:
    """Refuse what is no null, or one of another model or other sites than a dictionary that `reads`.

    Raises:
        MismatchError: as said.
    """
    for null in nulls:
        if null.about.null is None:
            raise MismatchError(f"weights {null.about.weights[:12]} are of no null; name it as the evaluation")
        if (theirs := null.about.reads) is not None and reads is not None:
            mine, other = ((one.model.weights[:8], one.site, one.sites) for one in (reads, theirs))
            if mine != other:
                raise MismatchError(
                    f"the null {null.about.null} reads {other}, the dictionary {mine}: they do not compare"
                )


def measured_rows(measured: Sequence[Evaluation]) -> list[tuple[str, str, list[str]]]:
    """Key, words and a cell for each evaluation, of every quantity of `SHOWN` that one of them holds; of explained
    variance by layer a row for each."""
    rows = []
    for key in SHOWN:
        values = [one.values.get(key, _MISSING) for one in measured]
        if key == LAYERS:
            for i, site in enumerate(_layers(measured)):
                each = [one[i] if isinstance(one, list | tuple) and i < len(one) else _MISSING for one in values]
                rows.append((key, f"explained variance, layer {site}", [_shown(one) for one in each]))
        elif any(value is not _MISSING for value in values):
            rows.append((key, words_of(key), [_shown(value) for value in values]))
    return rows


def terminal_table(measured: Sequence[Evaluation]) -> str:
    """What was measured, for people at a terminal: the first evaluation, and nulls beside it; units at the end."""
    names = ["this dictionary", *(f"null: {one.about.null}" for one in measured[1:])]
    rows = measured_rows(measured)
    return aligned([("", *names, "unit"), *((words, *cells, QUANTITIES[key].unit) for key, words, cells in rows)])


def words_of(key: str) -> str:
    """What a quantity is called beside no other table."""
    return WORDS.get(key, QUANTITIES[key].words)


def _layers(measured: Sequence[Evaluation]) -> Sequence[int]:
    """Numbers of the layers, as the dictionary's record has them."""
    n_layers, reads = max(len(one.values.get(LAYERS) or ()) for one in measured), measured[0].about.reads
    return reads.sites if reads is not None and len(reads.sites) == n_layers else range(n_layers)


def _shown(value: Any) -> str:
    if value is None or value is _MISSING:
        return "undefined" if value is None else "not measured"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
