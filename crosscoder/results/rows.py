"""Rows on disk: consecutive rows of one place share a block, and every value is checked when it is read.

`{"at": {known fields of Place}, "values": {key: value}}`; a value is a number, a text, a flag, a list, null, an
estimate `{"value", "low", "high"}`, or `{"missing": "why there is none"}`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError

from crosscoder.foundation.artifact import read_json, write_json
from crosscoder.results.quantities import QUANTITIES, nearest_key
from crosscoder.results.table import Estimate, Place, Row, Value

CELL_SCHEMA = "crosscoder.cell/3"
MAX_DEPTH = 32
_LARGEST = 1e30  # beyond this, infinite or nonsense
_SHARE = (-1e-9, 1 + 1e-9)
_PLACE = TypeAdapter(Place)


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Write the rows of one cell of a study."""
    write_json(path, {"schema": CELL_SCHEMA, "rows": to_blocks(rows)})


def read_rows(path: str | Path) -> list[Row]:
    """The rows that `write_rows` wrote.

    Raises:
        ValueError: the file is damaged, of another schema, or holds a value that its key does not allow.
        FileNotFoundError: there is none.
    """
    found = read_json(path)
    if not isinstance(found, dict) or found.get("schema") != CELL_SCHEMA:
        seen = found.get("schema") if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{path}: expected {CELL_SCHEMA}, got {seen!r}; delete the file to run the cell again")
    try:
        return from_blocks(found.get("rows"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def to_blocks(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Plain values of rows, in their order.

    Raises:
        ValueError: a key stands twice at one place.
    """
    blocks = []
    for at, group in groupby(rows, key=lambda row: row.at):
        values: dict[str, Any] = {}
        for row in group:
            if row.key in values:
                raise ValueError(f"{row.key} stands twice at {at.known()}")
            values[row.key] = _plain(row)
        blocks.append({"at": at.known(), "values": values})
    return blocks


def _plain(row: Row) -> Any:
    if row.value is None and row.missing is not None:
        return {"missing": row.missing}
    if isinstance(row.value, Estimate):
        return {"value": row.value.value, "low": row.value.low, "high": row.value.high}
    return row.value


def from_blocks(blocks: Any, path: str = "rows") -> list[Row]:
    """The rows of blocks that someone else may have written.

    Raises:
        ValueError: a place, a key or a value is not what it should be; its path, what was seen and what was expected
            are named.
    """
    if not isinstance(blocks, list):
        fail(path, "a list of blocks", blocks)
    rows, seen = [], set()
    for i, block in enumerate(blocks):
        here = f"{path}[{i}]"
        if not isinstance(block, dict) or block.keys() != {"at", "values"}:
            fail(here, "a table of 'at' and 'values'", block)
        at = read_as(_PLACE, block["at"], f"{here}.at")
        if not isinstance(block["values"], dict):
            fail(f"{here}.values", "a table from key to value", block["values"])
        for key, value in block["values"].items():
            row = _read(at, key, value, f"{here}.values.{key}")
            if (at, key) in seen:
                raise ValueError(f"{here}.values: {key} stands twice at {at.known()}; keep one")
            seen.add((at, key))
            rows.append(row)
    return rows


def read_as(adapter: TypeAdapter[Any], value: Any, path: str) -> Any:
    """`value` as the adapter's type; a `ValueError` names the first place that does not fit."""
    check_plain(value, path)
    try:
        return adapter.validate_json(json.dumps(value))  # strict, and yet a list may be a tuple
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
        message = first["msg"]
        raise ValueError(f"{path}{where}: {message}, got {_shown(first['input'])}") from error


def check_plain(value: Any, path: str, depth: int = 0) -> None:
    """Nothing, if `value` holds no infinite number, no text that UTF-8 cannot hold and no absurd nesting."""
    if depth > MAX_DEPTH:
        fail(path, f"at most {MAX_DEPTH} levels", value)
    if isinstance(value, dict):
        for key, item in value.items():
            check_plain(key, f"{path} (key)", depth + 1)
            check_plain(item, f"{path}.{key}", depth + 1)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            check_plain(item, f"{path}[{i}]", depth + 1)
    elif isinstance(value, str):
        if any("\ud800" <= c <= "\udfff" for c in value):
            fail(path, "a text that UTF-8 can hold", value)
    elif isinstance(value, int | float) and not abs(value) < _LARGEST:
        fail(path, "a finite number", value)


def fail(path: str, expected: str, seen: Any) -> NoReturn:
    """Raise what every refusal says: where, what was expected, what was seen."""
    raise ValueError(f"{path}: expected {expected}, got {_shown(seen)}")


def _shown(seen: Any) -> str:
    text = repr(seen)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _read(at: Place, key: str, value: Any, path: str) -> Row:
    if key not in QUANTITIES:
        raise ValueError(f"{path}: {key!r} is no quantity; the nearest is {nearest_key(key)!r}")
    check_plain(value, path)
    if isinstance(value, dict) and value.keys() == {"missing"} and isinstance(value["missing"], str):
        return Row(at, key, None, value["missing"])
    return Row(at, key, None if value is None else _checked(key, value, path))


def _checked(key: str, value: Any, path: str) -> Value:
    """A value of the kind that the key's quantity has."""
    one = QUANTITIES[key]
    if one.value in _EXPECTED:
        fits, expected = _EXPECTED[one.value]
        if not fits(value) or (one.length is not None and len(value) != one.length):
            fail(path, expected if one.length is None else f"{expected}, {one.length} of them", value)
        return value
    if isinstance(value, dict):
        return _estimate(value, path)
    if not _is_number(value):
        fail(path, f"a number ({one.unit}), null, an estimate or a reason why it is missing", value)
    if one.unit == "share" and not _SHARE[0] <= value <= _SHARE[1]:
        fail(path, "a share between 0 and 1", value)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(item is None or _is_number(item) for item in value)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and all(
        _is_list(row) and None not in row and len(row) == len(value[0]) for row in value
    )


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "text": (lambda value: isinstance(value, str), "a text"),
    "flag": (lambda value: isinstance(value, bool), "true or false"),
    "whole": (lambda value: _is_number(value) and isinstance(value, int) and value >= 0, "a whole number of 0 or more"),
    "list": (_is_list, "a list of numbers or null"),
    "texts": (_is_texts, "a list of texts"),
    "lists": (_is_table, "lists of equally many numbers"),
}


def _estimate(value: dict[str, Any], path: str) -> Estimate:
    known = value.keys() == {"value", "low", "high"}
    if not known or not all(_is_number(x) for x in value.values()):
        fail(path, "an estimate of three numbers 'value', 'low' and 'high'", value)
    if value["low"] > value["high"]:
        fail(path, "an interval with low <= high", value)
    return Estimate(*(float(value[name]) for name in ("value", "low", "high")))
