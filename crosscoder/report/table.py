"""A table of the report: lines of formatted text under headings, the same for the page and for Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosscoder.foundation.artifact import read_json
from crosscoder.results.quantities import QUANTITIES
from crosscoder.results.table import Estimate

NOTHING = "–"
WORDS = read_json(Path(__file__).parent / "templates" / "words.json")
Phrase = list[tuple[str, str | None]]
"""A sentence in pieces, some of which link to a definition."""
_LINK = re.compile(r"\[([^\]]+)\]\((\w+)\)")
_POINTS = re.compile(r"enclosed by .*?\(k (\d+).*\(k (\d+)[^)]*\)")


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
    href: str | None = None
    """A page beside this one."""


@dataclass(frozen=True)
class Line:
    """The cells of one line; lines of a `group` share a heading. `below` are texts under it, some pieces marked."""

    cells: list[Value]
    group: str = ""
    below: Sequence[Sequence[tuple[str, bool]]] = ()


@dataclass(frozen=True)
class Table:
    """Lines under headings; one without lines is not shown."""

    columns: list[Head]
    rows: list[Line]
    note: str = ""
    wide: bool = True
    href: str | None = None
    """A page that the note is about."""
    terms: Sequence[str] = field(default=())
    """Definitions of what the note or the cells speak of."""

    def cited(self) -> set[str]:
        """Keys of the definitions that the table links to."""
        if not self.rows:
            return set()
        cells = [*self.columns, *(cell for row in self.rows for cell in row.cells)]
        return {cell.definition for cell in cells if cell.definition is not None} | set(self.terms)


def linked(text: str, **values: Any) -> Phrase:
    """A sentence of `words.json` in pieces: `[words](key)` links to a definition, then values are put in."""
    pieces, end = Phrase(), 0
    for found in _LINK.finditer(text):
        pieces += [(text[end : found.start()], None), (found[1], found[2])]
        end = found.end()
    return [(piece.format(**values), key) for piece, key in (*pieces, (text[end:], None)) if piece]


def heading(key: str, words: str | None = None, *, word: bool = False) -> Head:
    """The column of a quantity, which links to its definition; `word`: of words."""
    return Head(words or QUANTITIES[key].words, definition=key, word=word)


def word_heads(*names: str) -> list[Head]:
    return [Head(name, word=True) for name in names]


def state_term(state: str) -> str | None:
    """The definition of a null; None for the trained subject."""
    return {"trained": None, "untrained": "control"}.get(state, state)


def state_phrase(state: str) -> Phrase:
    """The words of a state, which link to its definition."""
    return [(WORDS["states"][state], state_term(state))]


def state_heads(states: Sequence[str]) -> list[Head]:
    """A column for the trained subjects and for each null, which links to what it is."""
    return [Head(text, key) for state in states for text, key in state_phrase(state)]


def words(text: str, detail: str = "", *, definition: str | None = None, mark: str = "") -> Value:
    return Value(text, detail, "word", mark, definition)


def prose(text: str | None) -> Value:
    """A cell of words that may take several lines."""
    return Value(text or "", style="word prose")


def named(key: str, said: str | None = None) -> Value:
    """The first cell of a line about one quantity, which links to its definition."""
    return words(said or QUANTITIES[key].words, definition=key)


def lines_of(found: Iterable[tuple[str, Sequence[Any]]], group: str = "") -> list[Line]:
    """A line a quantity with its values; none where there is no value."""
    known = [(key, values) for key, values in found if any(value is not None for value in values)]
    return [Line([named(key), *map(format_range, values)], group) for key, values in known]


def sign(met: str) -> Value:
    """How a leg or a gate stands, as a sign."""
    return {"met": Value("✓", mark="yes"), "missed": Value("✗", mark="no"), "open": Value("?")}.get(met, Value(NOTHING))


def asks(requirement: str) -> str:
    """A requirement without infinite ends."""
    text = re.sub(r" in \[-inf, (\S+)\]$", r" at most \1", requirement)
    return re.sub(r" in \[(\S+), inf\]$", r" at least \1", text)


def brief(reason: str) -> str:
    """Why there is no number, without the points that a reading at common fidelity had."""
    return _POINTS.sub(r"enclosed by dictionaries of k \1 to \2", reason)


def format_number(value: Any) -> str:
    """A number with three significant digits and thousands separators; a dash for None; strings pass."""
    if value is None:
        return NOTHING
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (abs(value) >= 1000 and abs(value) < 1e15):
        return f"{value:,.0f}" if isinstance(value, float) else f"{value:,}"
    return f"{value:.3g}"


def format_range(entry: Any, detail: str = "") -> Value:
    """An estimate with `[low, high]` under it, unless they read alike; a number or text with what is told under it."""
    if not isinstance(entry, Estimate):
        return Value(format_number(entry), detail)
    low, high = format_number(entry.low), format_number(entry.high)
    ends = "" if low == high else f"[{low}, {high}]"
    return Value(format_number(entry.value), f"{ends} {detail}".strip())


def shown(found: Estimate | float | None, form: str = ".3f") -> str:
    """A number as text of a page, with the ends of its interval where it has one."""
    if isinstance(found, Estimate) and f"{found.low:{form}}" == f"{found.high:{form}}":
        found = found.value
    return "undefined" if found is None else f"{found:{form}}"
