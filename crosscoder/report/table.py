"""A table of the report: lines of formatted text under headings, the same for the page and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from crosscoder.results.quantities import QUANTITIES
from crosscoder.results.table import Estimate

NOTHING = "–"


@dataclass(frozen=True)
class Head:
    """A column's heading, with the definition it links to or the subject it marks."""

    text: str
    definition: str | None = None
    mark: str = ""
    word: bool = False


@dataclass(frozen=True)
class Value:
    """One cell of a table: what it says, the small print under it, and how it looks."""

    text: str
    detail: str = ""
    style: str = ""
    mark: str = ""
    definition: str | None = None


@dataclass(frozen=True)
class Line:
    """The cells of one line; lines of a `sweep` stand back, those of a `group` share a heading."""

    cells: list[Value]
    sweep: bool = False
    group: str = ""


@dataclass(frozen=True)
class Table:
    """Lines under headings, and what to say without any."""

    columns: list[Head]
    rows: list[Line]
    absent: str
    note: str = ""
    wide: bool = True
    terms: Sequence[str] = field(default=())
    """Definitions of what the note or the cells speak of."""

    def cited(self) -> set[str]:
        """Keys of the definitions that the table links to."""
        if not self.rows:
            return set()
        cells = [*self.columns, *(cell for row in self.rows for cell in row.cells)]
        return {cell.definition for cell in cells if cell.definition is not None} | set(self.terms)


def heading(key: str, words: str | None = None) -> Head:
    """The column of a quantity, which links to its definition."""
    return Head(words or QUANTITIES[key].words, definition=key)


def word_heads(*names: str) -> list[Head]:
    """Columns of words."""
    return [Head(name, word=True) for name in names]


def words(text: str, detail: str = "", *, definition: str | None = None, mark: str = "") -> Value:
    """A cell of words."""
    return Value(text, detail, "word", mark, definition)


def named(key: str, said: str | None = None) -> Value:
    """The first cell of a line about one quantity, which links to its definition."""
    key = "d_model" if key == "neurons" else key  # L D, of which the definition speaks too
    return words(said or QUANTITIES[key].words, definition=key)


def sign(met: bool | None, unknown: str = NOTHING) -> Value:
    """A tick, a cross, or what stands for neither."""
    return {True: Value("✓", mark="yes"), False: Value("✗", mark="no"), None: Value(unknown)}[met]


def format_number(value: Any) -> str:
    """A number with four significant digits and thousands separators; a dash for None; strings pass."""
    if value is None:
        return NOTHING
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (abs(value) >= 1000 and abs(value) < 1e15):
        return f"{value:,.0f}" if isinstance(value, float) else f"{value:,}"
    return f"{value:.4g}"


def format_range(entry: Any, detail: str = "") -> Value:
    """An estimate with `[low, high]` under it, unless they are equal; a number or text with what is told under it."""
    if not isinstance(entry, Estimate):
        return Value(format_number(entry), detail)
    detail = "" if entry.low == entry.high else f"[{format_number(entry.low)}, {format_number(entry.high)}]"
    return Value(format_number(entry.value), detail)


def shown(found: Estimate | float | None, form: str = ".3f", unknown: str = "undefined") -> str:
    """A number as text of a page, with the ends of its interval where it has one."""
    if isinstance(found, Estimate):
        ends = f" [{found.low:{form}}, {found.high:{form}}]" if found.low < found.high else ""
        return f"{found.value:{form}}{ends}"
    return unknown if found is None else f"{found:{form}}"
