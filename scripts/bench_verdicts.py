"""Planted pairs of worlds through the whole chain: how often the rule returns what was planted, world by world.

Every world has features and directions of its own; three answers are planted in each (R of 2, 1 and 1/2). Worlds that
the JSON already holds are not run again, so it may be stopped. About five minutes of a core a world.

    python scripts/bench_verdicts.py --worlds 20 --workers 2
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from crosscoder.foundation.artifact import read_json, replace_file, write_json
from crosscoder.foundation.config import to_mapping
from crosscoder.foundation.provenance import describe_run
from crosscoder.report.planted import VERDICT_WORDS, draw_verdicts, verdict_lines
from crosscoder.results.quantities import definition
from crosscoder.results.rows import from_blocks, to_blocks
from crosscoder.results.table import LongTable, Row
from crosscoder.studies.planted_verdict import VerdictConfig, verdict_jobs
from crosscoder.studies.workers import run_jobs


def write(folder: Path, settings: dict[str, Any], rows: list[Row]) -> None:
    """The rows, their table and their picture."""
    rows.sort(key=lambda row: row.at.seed or 0)
    table = LongTable(tuple(rows))
    write_json(folder / "verdicts.json", {"settings": settings, "rows": to_blocks(rows), "provenance": describe_run()})
    head = [f"# Planted verdicts, {len(table.seeds())} worlds", "", *verdict_lines(table), ""]
    words = [f"- **{key}**: {definition(key)}" for key in VERDICT_WORDS]
    page = [*head, "![R and delta by world](verdicts.png)", "", *words]
    replace_file(folder / "verdicts.md", ("\n".join(page) + "\n").encode())
    replace_file(folder / "verdicts.png", draw_verdicts(table))


def main() -> None:
    """Run the worlds that are not there yet, a few at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/planted-verdicts"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    config = VerdictConfig()
    settings = to_mapping(config)
    path = given.out / "verdicts.json"
    old = read_json(path) if path.exists() else {}
    rows = from_blocks(old["rows"]) if old.get("settings") == settings else []
    known = LongTable(tuple(rows)).seeds()
    jobs = list(verdict_jobs(config, given.worlds, given.device).items())
    left = [job for seed, job in enumerate(jobs) if seed not in known]
    for start in range(0, len(left), given.workers):
        batch = dict(left[start : start + given.workers])
        done = run_jobs(batch, workers=given.workers, device=given.device, label="planted worlds")
        rows += [row for found in done.values() for row in found]
        write(given.out, settings, rows)
    print((given.out / "verdicts.md").read_text())


if __name__ == "__main__":
    main()
