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
from crosscoder.report.planted import render_verdicts, verdict_lines
from crosscoder.studies.planted_readings import VerdictConfig
from crosscoder.studies.planted_verdict import DEFINITIONS, summarize_verdicts, verdict_jobs
from crosscoder.studies.workers import run_jobs


def write(folder: Path, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The rows, their table and their picture."""
    verdicts = {"rows": sorted(rows, key=lambda row: (row["seed"], row["plant"])), "summary": summarize_verdicts(rows)}
    write_json(folder / "verdicts.json", {"settings": settings, **verdicts, "provenance": describe_run()})
    head = [f"# Planted verdicts, {len({row['seed'] for row in rows})} worlds", "", *verdict_lines(verdicts), ""]
    words = [f"- **{name}**: {text}" for name, text in DEFINITIONS.items()]
    page = [*head, "![R and delta by world](verdicts.png)", "", *words]
    replace_file(folder / "verdicts.md", ("\n".join(page) + "\n").encode())
    replace_file(folder / "verdicts.png", render_verdicts(verdicts))


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
    rows = old["rows"] if old.get("settings") == settings else []
    known = {row["seed"] for row in rows}
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
