"""The logged numbers of a run: lines of JSON in `metrics.jsonl`, and in every checkpoint those up to its step."""

from __future__ import annotations

import json
from pathlib import Path

from crosscoder.foundation.artifact import MANIFEST, read_json
from crosscoder.foundation.console import say
from crosscoder.foundation.damage import reading

METRICS = "metrics.jsonl"
Entry = dict[str, float | None]


def line_of(entry: Entry) -> str:
    """An entry as a line."""
    return json.dumps(entry) + "\n"


def read_history(checkpoint: Path, live: Path, step: int) -> list[Entry]:
    """What was logged up to `step`: as the checkpoint holds it; one of version 0.2 holds none, and the run's own file
    is read, as far as its lines are whole. What is lost is said.

    Raises:
        DamagedArtifactError: the checkpoint's file is none.
    """
    with reading(checkpoint / MANIFEST):
        is_kept = METRICS in read_json(checkpoint / MANIFEST)["files"]
    path = checkpoint / METRICS if is_kept else live
    if not path.is_file():
        say(f"{path} is missing, so what was logged before step {step} is lost; training goes on")
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [_entry(line) for line in lines]
    if is_kept:
        with reading(path):
            return [dict[str, float | None](entry) for entry in found]  # ty: ignore[no-matching-overload]
    if lost := sum(entry is None for entry in found):
        say(f"{path}: {lost} of {len(found)} lines are not whole and left out")
    return [entry for entry in found if entry is not None and (entry["step"] or 0) <= step]


def _entry(line: str) -> Entry | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_entry = isinstance(entry, dict) and isinstance(entry.get("step"), int) and not isinstance(entry["step"], bool)
    return entry if is_entry and all(isinstance(one, int | float | None) for one in entry.values()) else None
