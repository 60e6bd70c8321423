"""What the checks against code that is not ours share: one row for each quantity, and the report of all rows."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from bench_common import UnavailableError, describe_machine, machine_line, markdown_table, write_report

TOLERANCE = 0.01
"""Largest relative difference between two measurements of the same thing."""


def peer(module: str) -> Any:
    """A module of SAELens.

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(f"{module} cannot be imported; see scripts/install_peers.sh: {error}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One quantity, measured by us and by them; None where a side has no such quantity.

    expect: `same` is judged; `different` is a control in which something was broken on purpose and must show; `shown`
        is not judged, because the definitions differ, and the note says how.
    """

    case: str
    quantity: str
    ours: float | None
    theirs: float | None
    expect: Literal["same", "different", "shown"] = "same"
    note: str = ""

    @property
    def difference(self) -> float | None:
        """`|ours - theirs| / |theirs|`; None if a side is missing, infinity if theirs alone is 0."""
        if self.ours is None or self.theirs is None:
            return None
        gap = abs(self.ours - self.theirs)
        return 0.0 if gap == 0 else gap / abs(self.theirs) if self.theirs else float("inf")

    @property
    def passed(self) -> bool | None:
        """Whether the row is as expected; None where it is only shown. A missing side of a judged row fails."""
        if self.expect == "shown":
            return None
        close = self.difference is not None and self.difference <= TOLERANCE
        return close if self.expect == "same" else not close

    def cells(self) -> list[str]:
        """The row as the report prints it."""
        shown = [self.quantity, *("–" if value is None else f"{value:.6g}" for value in (self.ours, self.theirs))]
        shown.append("–" if self.difference is None else f"{self.difference:.2g}")
        words = {None: "not judged", True: "yes", False: "NO"}
        verdict = f"differs, as it must: {words[self.passed]}" if self.expect == "different" else words[self.passed]
        return [*shown, verdict, self.note]


HEADER = ["quantity", "ours", "SAELens", "relative difference", "within 1 %", "note"]


def report(
    rows: Sequence[Row], notes: Sequence[str], settings: dict[str, Any], folder: Path, stem: str, threads: int
) -> int:
    """Print and write the rows; 0 if every judged row is as expected, else 1."""
    machine = describe_machine("cpu", threads)
    lines = ["# Against SAELens", "", *notes, ""]
    for case in dict.fromkeys(row.case for row in rows):
        lines += [f"## {case}", "", *markdown_table(HEADER, [row.cells() for row in rows if row.case == case]), ""]
    judged = [row for row in rows if row.passed is not None]
    failed = [row for row in judged if not row.passed]
    same = [row.difference for row in judged if row.expect == "same" and row.difference is not None]
    lines += [
        f"{len(judged) - len(failed)} of {len(judged)} judged rows are as expected; the largest difference of two "
        f"measurements of the same thing is {max(same, default=0.0):.2g} (relative).",
        "",
        machine_line(machine),
    ]
    plain = [{**dataclasses.asdict(row), "difference": row.difference, "passed": row.passed} for row in rows]
    for row in plain:
        row["difference"] = None if row["difference"] == float("inf") else row["difference"]
    record = {"tolerance": TOLERANCE, "rows": plain, "settings": settings, "machine": machine, "failed": len(failed)}
    write_report(folder, stem, lines, record)
    for row in failed:
        print(f"not as expected: {row.case}: {row.quantity}: {row.ours} and {row.theirs}")
    return int(bool(failed))
