"""Planted pairs of worlds through the whole chain: how often the rule returns what was planted, world by world.

Every world has features and directions of its own; three answers are planted in each (R of 2, 1 and 1/2). Worlds that
the JSON already holds are not run again, so it may be stopped. About five minutes of a core a world.

    python scripts/bench_verdicts.py --worlds 20 --workers 2
"""

from __future__ import annotations

import argparse
from pathlib import Path

from crosscoder.foundation.artifact import replace_file
from crosscoder.foundation.config import to_mapping
from crosscoder.report.planted import VERDICT_WORDS, draw_verdicts, verdict_lines
from crosscoder.results.file import RESULTS, load_results, save_results
from crosscoder.results.quantities import definition
from crosscoder.results.table import Row
from crosscoder.studies.folder import StudyFolder
from crosscoder.studies.planted_verdict import VerdictConfig, verdict_jobs


def write(study: StudyFolder, config: VerdictConfig, rows: list[Row]) -> None:
    """The rows, their table and their picture."""
    rows.sort(key=lambda row: row.at.seed or 0)
    results = study.results(rows, config=config, kind="synthetic", preset="verdicts", text="planted worlds")
    save_results(results, study.root)
    head = [f"# Planted verdicts, {len(results.rows.seeds())} worlds", "", *verdict_lines(results.rows), ""]
    words = [f"- **{key}**: {definition(key)}" for key in VERDICT_WORDS]
    page = [*head, "![R and delta by world](verdicts.png)", "", *words]
    replace_file(study.root / "verdicts.md", ("\n".join(page) + "\n").encode())
    replace_file(study.root / "verdicts.png", draw_verdicts(results.rows))


def main() -> None:
    """Run the worlds that are not there yet, a few at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/planted-verdicts"))
    given = parser.parse_args()
    study, config = StudyFolder(given.out, device=given.device, workers=given.workers), VerdictConfig()
    old = load_results(given.out) if (given.out / RESULTS).is_file() else None
    rows = list(old.rows) if old is not None and old.provenance.config == to_mapping(config) else []
    known = {row.at.seed for row in rows}
    jobs = list(verdict_jobs(config, given.worlds, given.device).items())
    left = [job for seed, job in enumerate(jobs) if seed not in known]
    for start in range(0, len(left), given.workers):
        done = study.run(dict(left[start : start + given.workers]), "planted worlds")
        rows += [row for found in done.values() for row in found]
        write(study, config, rows)
    print((given.out / "verdicts.md").read_text())


if __name__ == "__main__":
    main()
