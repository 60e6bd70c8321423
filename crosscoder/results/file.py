"""A study's results as one value and as one file, `results.json`, which is checked by its path when it is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import TypeAdapter

from crosscoder.foundation.artifact import read_json, write_json
from crosscoder.results.rows import fail, from_blocks, read_as, to_blocks
from crosscoder.results.table import CLOSED, COMPARED, LongTable, Name
from crosscoder.results.verdict import Verdict

SCHEMA = "crosscoder.results/3"
READERS = {SCHEMA: "crosscoder 0.2", "crosscoder.results/2": "crosscoder 0.1"}
RESULTS = "results.json"
OF_EVERY_SUBJECT = ("n_layers", "d_model", "parameters_non_embedding", "parameters_embedding", "parameters_norms")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What is needed to run the study again."""

    __pydantic_config__: ClassVar = CLOSED

    schema: Literal["crosscoder.results/3"] = SCHEMA
    kind: Literal["aspect_ratio", "subject_study", "synthetic"]
    """Two shapes that are compared, and C between them; one model; planted worlds."""
    preset: str
    seconds: dict[Name, float]
    """Of each stage."""
    tokens_fingerprint: str
    text: str
    command: list[str]
    config: Any
    device: dict[str, Any]
    git_commit: str | None
    python: str
    started: str
    versions: dict[str, Any] = field(default_factory=dict)


_VERDICT = TypeAdapter(Verdict)
_PROVENANCE = TypeAdapter(Provenance)


@dataclass(frozen=True)
class Results:
    """Everything that a study measured, what the rule says of it, and where it came from."""

    rows: LongTable
    verdict: Verdict | None
    """None for a single model: there is no pair to compare."""
    provenance: Provenance

    @cached_property
    def subjects(self) -> tuple[str, ...]:
        """The models, in alphabetical order."""
        return tuple(sorted({str(row.at.subject) for row in self.rows.select("n_layers", role=None)}))

    def of(self, subject: str, key: str) -> Any:
        """What is known of a model itself, whatever its training seed; None if it is not."""
        return self.rows.one(key, subject=subject, training_seed=None, role=None)


def document(results: Results) -> dict[str, Any]:
    """The plain value that `results.json` holds."""
    return {
        "schema": SCHEMA,
        "rows": to_blocks(results.rows),
        "verdict": None if results.verdict is None else asdict(results.verdict),
        "provenance": asdict(results.provenance),
    }


def from_document(value: Any) -> Results:
    """The results of a plain value that someone else may have written.

    Raises:
        ValueError: it is of another schema, or something in it is not what it should be; the path, what was seen and
            what was expected are named.
    """
    if not isinstance(value, dict):
        fail("results", "a table", value)
    old = value.get("provenance")
    seen = value.get("schema", old.get("schema") if isinstance(old, dict) else None)
    if seen != SCHEMA:
        reader = READERS.get(seen) if isinstance(seen, str) else None
        mend = f"{reader} reads it" if reader else "no version of this package is known to read it"
        raise ValueError(f"results.schema: expected {SCHEMA!r}, got {seen!r}; {mend}")
    keys = {"schema", "rows", "verdict", "provenance"}
    if value.keys() != keys:
        fail("results", f"the keys {sorted(keys)}", sorted(map(str, value)))
    rows = LongTable(tuple(from_blocks(value["rows"], "results.rows")))
    verdict = None if value["verdict"] is None else read_as(_VERDICT, value["verdict"], "results.verdict")
    results = Results(rows, verdict, read_as(_PROVENANCE, value["provenance"], "results.provenance"))
    if results.provenance.kind != "synthetic":
        _check_subjects(results)
    return results


def _check_subjects(results: Results) -> None:
    """Nothing, if what is said of every subject is enough to show a row about it."""
    for name in results.subjects:
        for key in OF_EVERY_SUBJECT:
            if results.of(name, key) is None:
                fail(f"results.rows ({key} of {name})", "a whole number", None)
    unknown = {row.at.subject for row in results.rows} - {None, *results.subjects}
    if unknown:
        fail("results.rows", f"rows of {list(results.subjects)}, the subjects whose layers are known", unknown)
    if not results.subjects or (results.verdict is not None and not set(COMPARED) <= set(results.subjects)):
        fail("results.rows", f"subjects, and {COMPARED} where there is a verdict", results.subjects)


def save_results(results: Results, folder: str | Path) -> None:
    """Write `results.json` into a folder."""
    write_json(Path(folder) / RESULTS, document(results))


def load_results(folder: str | Path) -> Results:
    """The results that a study left in its folder.

    Raises:
        ValueError: the file is damaged or of another schema.
        FileNotFoundError: there is none.
    """
    return from_document(read_json(Path(folder) / RESULTS))
