"""Every quantity of a study, once: its key, its unit, its words, its definition.

`docs/results.md` is printed from here, tables take their headings from here, and a row with another key is refused.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Quantity:
    """What a number is."""

    unit: str
    """`share` is from 0 to 1, `features`, `tokens` and `layers` count whole things where `whole`."""
    words: str
    definition: str
    whole: bool = False


QUANTITIES: dict[str, Quantity] = {}


def nearest_key(key: str) -> str | None:
    """The quantity whose key is most like `key`."""
    return next(iter(difflib.get_close_matches(key, QUANTITIES, n=1, cutoff=0)), None)
