"""Every quantity of a study, once: its key, its unit, its heading, its definition.

The sentences are in `quantities.toml`, and those of terms that are no printed number in `terms.toml`. A row with
another key is refused, tables take their headings and links from here, and `docs/results.md` lists them all.
"""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Quantity:
    """What a number is."""

    unit: str
    """`share` is from 0 to 1."""
    words: str
    """The heading of its column or row."""
    definition: str
    value: Literal["number", "whole", "flag", "text", "list", "texts", "lists"] = "number"
    """What a row holds; a `number` may be an estimate, a `list` is of numbers or null, `lists` are of numbers."""
    length: int | None = None
    """Of a list."""


def read_once(path: Path) -> dict[str, dict[str, Any]]:
    """The groups of a TOML file, whose keys are all different."""
    groups = tomllib.loads(path.read_text(encoding="utf-8"))
    home: dict[str, str] = {}
    for group, entries in groups.items():
        for key in entries:
            if home.setdefault(key, group) != group:
                raise ValueError(f"{path.name}: {key!r} is defined in [{home[key]}] and in [{group}]; keep one")
    return groups


GROUPS: dict[str, dict[str, Quantity]] = {
    group: {key: Quantity(**entry) for key, entry in entries.items()}
    for group, entries in read_once(_HERE / "quantities.toml").items()
}
TERMS: dict[str, dict[str, str]] = read_once(_HERE / "terms.toml")

QUANTITIES: dict[str, Quantity] = {key: one for group in GROUPS.values() for key, one in group.items()}
NOTES: dict[str, str] = {key: sentence for group in TERMS.values() for key, sentence in group.items()}


def definition(key: str) -> str:
    """The sentences that define a quantity or a term."""
    return QUANTITIES[key].definition if key in QUANTITIES else NOTES[key]


def unknown_key(key: str) -> str:
    """What is said of a key that no quantity has."""
    return f"{key!r} is no quantity; the nearest is {difflib.get_close_matches(key, QUANTITIES, n=1, cutoff=0)[0]!r}"
