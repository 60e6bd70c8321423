"""What was measured of one dictionary, as a file: every number by the key of its quantity, and which dictionary it is.

The numbers are the file's own keys; `about` says whose they are, so that nobody takes them for another dictionary's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from crosscoder.foundation.artifact import DamagedArtifactError, read_json, write_json
from crosscoder.foundation.config import config, from_mapping, to_mapping
from crosscoder.foundation.origin import Reads
from crosscoder.results.quantities import QUANTITIES, unknown_key
from crosscoder.results.table import value_type

SCHEMA = "crosscoder.evaluation/1"
ABOUT = "about"


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
