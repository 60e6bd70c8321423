"""A study's results as one value and as one file, `results.json`, and the rows of one cell as a file of their own.

Consecutive rows of one place share a block, `{"at": {known fields of Place}, "values": {key: value}}`. A value is a
number, a text, a flag, a list, null, an estimate `{"value", "low", "high"}`, or `{"missing": "why there is none"}`.
What is read is checked by pydantic: a refusal names the path, what was expected and what was seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import cache, cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic refuses that of `typing` before Python 3.12

from crosscoder.foundation.artifact import SEAL, other_version, read_json, unsealed, write_sealed
from crosscoder.foundation.console import say
from crosscoder.foundation.damage import reading
from crosscoder.results.quantities import QUANTITIES, unknown_key
from crosscoder.results.table import (
    COMPARED,
    Estimate,
    LongTable,
    Name,
    Number,
    Place,
    Plain,
    Row,
    Text,
    closed,
    value_type,
)
from crosscoder.results.verdict import KeptVerdict

SCHEMA = "crosscoder.results/4"
OLD_SCHEMA = "crosscoder.results/3"
"""Read too, without what is not measured any more: see `_without_old_rows`."""
CELL_SCHEMA = "crosscoder.cell/4"
RESULTS = "results.json"
OF_SUBJECTS = ("aspect_ratio", "subject_study")
"""Kinds whose rows are about models that are described."""
OF_EVERY_SUBJECT = ("n_layers", "d_model", "parameters_non_embedding", "parameters_embedding", "parameters_norms")


@closed
@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What is needed to run the study again."""

    schema: Literal["crosscoder.results/4"] = SCHEMA
    kind: Literal["aspect_ratio", "subject_study", "synthetic", "dictionaries", "effects"]
    """Two shapes that are compared, and C between them; one model; planted worlds; dictionaries of one model compared,
    or what their features do to what it predicts."""
    preset: Text
    seconds: dict[Name, Number]
    """Of each stage."""
    tokens_fingerprint: Text
    text: Text
    command: list[Text]
    config: Plain
    device: dict[Text, Plain]
    git_commit: Text | None
    python: Text
    started: Text
    versions: dict[Text, Plain] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """Everything that a study measured, what the rule says of it, and where it came from."""

    rows: LongTable
    verdict: KeptVerdict | None
    """None for a single model: there is no pair to compare."""
    provenance: Provenance

    @cached_property
    def subjects(self) -> tuple[str, ...]:
        """The models, in alphabetical order."""
        return tuple(sorted({str(row.at.subject) for row in self.rows.select("n_layers", role=None)}))

    def of(self, subject: str, key: str) -> Any:
        """What is known of a model itself, whatever its training seed; None if it is not."""
        return self.rows.one(key, subject=subject, training_seed=None, role=None)


@closed
class Block(TypedDict):
    """Rows of one place, as a file has them; each value is checked by what its key allows."""

    at: Place
    values: dict[str, Any]


@closed
class Cell(TypedDict):
    """What the file of one cell holds; `from_blocks` reads the rows."""

    schema: Literal["crosscoder.cell/4"]
    rows: Any


@closed
class Document(TypedDict):
    """What `results.json` holds; `from_blocks` reads the rows."""

    schema: Literal["crosscoder.results/4"]
    rows: Any
    verdict: KeptVerdict | None
    provenance: Provenance


def document(results: Results) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "rows": to_blocks(results.rows),
        "verdict": None if results.verdict is None else asdict(results.verdict),
        "provenance": asdict(results.provenance),
    }


def from_document(value: Any) -> Results:
    """The results of a plain value that someone else may have written."""
    value = _without_old_rows(value) if isinstance(value, dict) and value.get("schema") == OLD_SCHEMA else value
    holders = (value, value.get("provenance")) if isinstance(value, dict) else ()
    for holder in holders:  # version 2 kept its schema in the provenance
        seen = holder.get("schema") if isinstance(holder, dict) else None
        if isinstance(seen, str) and seen != SCHEMA:
            raise ValueError(f"results.schema: expected {SCHEMA!r}, got {seen!r}; {other_version(seen, SCHEMA)}")
    found = _read_as(Document, value, "results")
    rows = LongTable(tuple(from_blocks(found["rows"], "results.rows")))
    results = Results(rows, found["verdict"], found["provenance"])
    if results.provenance.kind in OF_SUBJECTS:
        _check_subjects(results)
    return results


def _without_old_rows(value: dict[str, Any]) -> dict[str, Any]:
    """Results of version 3 as of version 4: rows of quantities and places that are gone are left out, and it is said.

    Their verdict stays, as the rule of that time said it.
    """
    places, blocks, left = {one.name for one in fields(Place)}, [], set[str]()
    for block in value["rows"]:
        if set(block["at"]) <= places and block["at"].get("arm") != "joint":
            blocks.append({**block, "values": {k: v for k, v in block["values"].items() if k in QUANTITIES}})
            left |= set(block["values"]) - set(QUANTITIES)
        else:
            left |= set(block["values"])
    if left:
        say(f"results of version 3: {len(left)} quantities that are not measured any more are left out")
    return {**value, "schema": SCHEMA, "rows": blocks, "provenance": {**value["provenance"], "schema": SCHEMA}}


def _check_subjects(results: Results) -> None:
    """Nothing, if what is said of every subject is enough to show a row about it."""
    names = results.subjects
    for name in names:
        for key in OF_EVERY_SUBJECT:
            if results.of(name, key) is None:
                raise ValueError(f"results.rows: {key} of {name} is missing; expected a whole number")
    unknown = {row.at.subject for row in results.rows} - {None, *names}
    if unknown:
        raise ValueError(f"results.rows: rows of {unknown}; expected subjects whose layers are known: {list(names)}")
    if not names or (results.verdict is not None and not set(COMPARED) <= set(names)):
        raise ValueError(f"results.rows: the subjects are {names}; expected {COMPARED} where there is a verdict")


def save_results(results: Results, folder: str | Path) -> None:
    """Write `results.json` into a folder, sealed; rows stay in their order."""
    write_sealed(Path(folder) / RESULTS, document(results))


def load_results(folder: str | Path) -> Results:
    """The results that a study left in its folder, equal to what was saved; `read_results` of the file in it."""
    path = Path(folder) / RESULTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {RESULTS}; give the folder of a finished study")
    return read_results(path)


def read_results(path: str | Path) -> Results:
    """The results that a file holds.

    Of a file without a seal, as version 0.2 wrote them, it is said that nobody can tell whether it is as it was.

    Raises:
        ValueError: the file is damaged, changed since it was written, or of another schema.
    """
    value = read_json(path)
    if isinstance(value, dict) and SEAL in value:
        value = unsealed(value, path, mend="restore it from a copy, or run the study again: its cells are kept")
    else:
        say(f"note: {path} carries no {SEAL}, so nobody can tell whether its numbers are as they were written")
    with reading(path):
        return from_document(value)


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Write the rows of one cell of a study, in their order, sealed."""
    write_sealed(path, {"schema": CELL_SCHEMA, "rows": to_blocks(rows)})


def read_rows(path: str | Path) -> list[Row]:
    """The rows that `write_rows` wrote."""
    mend = "delete the file to run the cell again"
    value = read_json(path)
    if isinstance(value, dict) and value.get("schema") == CELL_SCHEMA:
        value = unsealed(value, path, mend=mend)
    with reading(path, mend=mend):
        return from_blocks(_read_as(Cell, value, "cell")["rows"], "cell.rows")


def to_blocks(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Plain values of rows, in their order."""
    blocks = []
    for at, group in groupby(rows, key=lambda row: row.at):
        values: dict[str, Any] = {}
        for row in group:
            if row.key in values:
                raise ValueError(f"{row.key} stands twice at {at.known()}")
            value = asdict(row.value) if isinstance(row.value, Estimate) else row.value
            values[row.key] = {"missing": row.missing} if value is None and row.missing is not None else value
        blocks.append({"at": at.known(), "values": values})
    return blocks


def from_blocks(blocks: Any, path: str = "rows") -> list[Row]:
    """The rows of blocks that someone else may have written."""
    rows: dict[tuple[Place, str], Row] = {}
    for i, block in enumerate(_read_as(list[Block], blocks, path)):
        at, here = block["at"], f"{path}[{i}].values"
        for key, written in block["values"].items():
            if (at, key) in rows:
                raise ValueError(f"{here}: {key} stands twice at {at.known()}; keep one")
            if key not in QUANTITIES:
                raise ValueError(f"{here}: {unknown_key(key)}")
            if isinstance(written, dict) and written.keys() == {"missing"}:
                value, missing = None, _read_as(Text, written["missing"], f"{here}.{key}.missing")
            else:
                value, missing = _read_as(value_type(key), written, f"{here}.{key}"), None
            rows[at, key] = Row(at, key, value, missing)
    return list(rows.values())


_adapter = cache(TypeAdapter)


def _read_as(kind: Any, value: Any, path: str) -> Any:
    """`value` as a type; a `ValueError` names the innermost place that does not fit, what was expected and seen."""
    adapter = _adapter(kind)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        found = [(_place(value, one["loc"], one["type"] == "missing"), one) for one in error.errors()]
    inner = max((place for place, _ in found), key=len)
    said = [one for place, one in found if place == inner]
    said = [one for one in said if not one["type"].endswith("_type")] or said  # of the right type, and yet refused
    expected = " or ".join(one["msg"].removeprefix("Value error, ").removeprefix("Input should be ") for one in said)
    expected = f"expected {expected}" if said[0]["msg"].startswith("Input should be ") else expected
    seen = repr(said[0]["input"])
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in inner)
    raise ValueError(f"{path}{where}: {expected}, got {seen if len(seen) <= 80 else f'{seen[:77]}...'}")


def _place(value: Any, location: tuple[Any, ...], missing: bool) -> tuple[Any, ...]:
    """The part of pydantic's location that leads into `value`; the rest names types."""
    place = []
    for part in location:
        inside = part in value if isinstance(value, dict) else isinstance(value, list | tuple) and isinstance(part, int)
        if inside:
            place.append(part)
            value = value[part]
    return (*place, location[-1]) if missing else tuple(place)
