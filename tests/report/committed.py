"""The committed studies, and what a test makes of studies: rows changed, rows left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from crosscoder.results.file import Results, load_results
from crosscoder.results.table import LongTable, Row

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PAIR = load_results(BENCHMARKS / "default-study")
SINGLE = load_results(BENCHMARKS / "smollm2-135m")


def with_rows(results: Results, rows: list[Row]) -> Results:
    """The study with other rows."""
    return replace(results, rows=LongTable(tuple(rows)))


def keep(results: Results, wanted: Callable[[Row], bool]) -> Results:
    """The study without the rows that are not wanted."""
    return with_rows(results, [row for row in results.rows if wanted(row)])


def change(results: Results, key: str, value: Any, **where: Any) -> Results:
    """The study with another value of a key at a place; a function makes it of the row."""
    chosen = set(map(id, results.rows.select(key, **where)))
    assert chosen, (key, where)

    def changed(row: Row) -> Row:
        return replace(row, value=value(row) if callable(value) else value, missing=None)

    return with_rows(results, [changed(row) if id(row) in chosen else row for row in results.rows])


def first_seeds(results: Results) -> Results:
    """The study with one dictionary seed of one training."""
    return keep(results, lambda row: row.at.seed in (None, 0) and row.at.training_seed in (None, 0))
