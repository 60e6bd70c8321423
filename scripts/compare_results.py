"""Every number that differs between two results files: `python scripts/compare_results.py OLD NEW [--moved KEY ...]`.

Both are of version 3 or 4 of the schema; quantities that are not measured any more are left out. Each place and key
that one side lacks, or whose values differ, is listed; null and nothing are the same. `--moved` names keys that may
differ. Exit status 1 if any other does.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from crosscoder.results.file import Results, read_results
from crosscoder.results.table import Estimate, Place


def values(results: Results) -> dict[tuple[Place, str], Any]:
    """What was measured, by place and key."""
    return {(row.at, row.key): row.value for row in results.rows if row.value is not None}


def differs(old: Any, new: Any, tolerance: float) -> bool:
    """Whether two values are not the same, numbers to within a relative tolerance."""
    if isinstance(old, Estimate) and isinstance(new, Estimate):
        return any(differs(getattr(old, end), getattr(new, end), tolerance) for end in ("value", "low", "high"))
    if isinstance(old, list) and isinstance(new, list):
        return len(old) != len(new) or any(differs(a, b, tolerance) for a, b in zip(old, new, strict=True))
    if isinstance(old, int | float) and isinstance(new, int | float):
        return not math.isclose(old, new, rel_tol=tolerance, abs_tol=0)
    return old != new


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--moved", nargs="*", default=[], help="keys that may differ")
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative, 0 asks for equality")
    chosen = parser.parse_args(arguments)
    studies = [read_results(path) for path in (chosen.old, chosen.new)]
    old, new = map(values, studies)
    unexpected = 0
    for place, key in dict.fromkeys((*old, *new)):
        before, after = old.get((place, key)), new.get((place, key))
        if differs(before, after, chosen.tolerance):
            moved = key in chosen.moved
            unexpected += not moved
            print(f"{'moved' if moved else 'DIFFERS'} {key} at {place.known()}: {_shown(before)} -> {_shown(after)}")
    before, after = (study.verdict for study in studies)
    if before != after:
        unexpected += 1
        print(f"DIFFERS verdict: {before} -> {after}")
    print(f"{len(old):,} old and {len(new):,} new values; {unexpected} unexpected differences")
    return 1 if unexpected else 0


def _shown(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


if __name__ == "__main__":
    sys.exit(main())
