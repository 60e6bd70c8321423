"""Planted pairs of worlds through the whole chain: how often the rule returns what was planted, world by world.

Every world has features and directions of its own; three answers are planted in each (R of 2, 1 and 1/2). Worlds that
the JSON already holds are not run again, so it may be stopped. About five minutes of a core a world.

    python scripts/bench_verdicts.py --worlds 20 --workers 2
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from bench_verdicts_worlds import VerdictConfig, verdict_jobs

from crosscoder.foundation.artifact import replace_file
from crosscoder.foundation.config import to_mapping
from crosscoder.report.panels import (
    INK,
    PALETTE,
    describe,
    make_panels,
    plain_ticks,
    share_legend,
    to_png,
)
from crosscoder.report.table import shown
from crosscoder.results.file import RESULTS, load_results, save_results
from crosscoder.results.quantities import definition
from crosscoder.results.table import Estimate, LongTable, Row
from crosscoder.studies.folder import StudyFolder
from crosscoder.verdict.decide import RULE

VERDICT_WORDS = ("planted_verdict", "planted_control", "coverage")
STATISTICS = ("R", "gamma", "delta")


VERDICTS_NOTE = (
    "Each planted answer through the whole chain: crosscoders of every training and dictionary seed, banks, control, "
    "statistics, rule. Coverage is of 90 % intervals: of the planted value, and of that of the directions drawn."
)


def markdown_table(title: list[str], rows: list[list[Any]]) -> list[str]:
    """A Markdown table; nothing without rows."""
    lines = [title, ["---"] * len(title), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines] if rows else []


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


def by_seed(rows: LongTable, key: str, **where: Any) -> dict[int | None, Any]:
    """What is known of a key by the seed of its world."""
    return {row.at.seed: row.value for row in rows.select(key, **where) if row.value is not None}


def verdict_lines(rows: LongTable) -> list[str]:
    """The table of planted verdicts, how often intervals cover, and what was wrong, in Markdown."""
    lines, wrong = [], []
    for at in rows.select("found_verdict").groups("kind"):
        group = rows.select(kind=at.kind)
        right, labels = group.values("right_verdict"), Counter(group.values("found_verdict"))
        cells = [at.kind, group.values("expected_verdict")[0], f"{sum(right)} of {len(right)}"]
        cells.append(", ".join(f"{label} {count}" for label, count in labels.items()))
        lines.append([*cells, *(cell for name in STATISTICS for cell in _coverage(group.select(estimator=name)))])
        for row in group.select("right_verdict"):
            if not row.value:
                label, reasons = (group.one(key, seed=row.at.seed) for key in ("found_verdict", "verdict_reasons"))
                wrong.append(f"- {at.kind}, seed {row.at.seed}: {label}: {'; '.join(reasons)}")
    title = ["planted", "right verdict", "found", "verdicts"]
    for name in STATISTICS:
        title += [f"{name}, mean (planted)", f"{name}'s interval covers planted, drawn"]
    said = ["Verdicts that were not right:", "", *wrong, ""] if wrong else []
    return [VERDICTS_NOTE, "", *markdown_table(title, lines), "", *said]


def _coverage(rows: LongTable) -> tuple[str, str]:
    """One statistic of one plant: its mean beside what was planted, and how often its interval covers that."""
    found, drawn = by_seed(rows, "found"), by_seed(rows, "drawn")
    planted = rows.values("planted")[0]
    held = sum(one.covers(planted) for one in found.values())
    held_drawn = sum(one.covers(drawn[seed]) for seed, one in found.items())
    miss = max((max(0.0, one.low - planted, planted - one.high) for one in found.values()), default=0.0)
    mean = sum(one.value for one in found.values()) / len(found) if found else None
    by_at_most = f"; by at most {miss:.1g}" if miss else ""
    return f"{shown(mean)} ({planted:.3g})", f"{held}, {held_drawn} of {len(found)}{by_at_most}"


def draw_verdicts(rows: LongTable) -> bytes:
    """R and delta of every planted world with their 90 % intervals beside what was planted, as PNG."""
    plants = [at.kind for at in rows.select("found_verdict").groups("kind")]
    figure, axes = make_panels(2, len(plants), (4.3 * len(plants), 7.0))
    bands = {"R": {"H0": (RULE.complete, 4), "H1": (RULE.equal, 2)}, "delta": {"H1": (RULE.delta, 2)}}
    for column, plant in enumerate(plants):
        group = rows.select(kind=plant)
        right = by_seed(group, "right_verdict")
        for ax, name in zip(axes[:, column], bands, strict=True):
            for hypothesis, (band, color) in bands[name].items():
                ax.axvspan(*band, color=PALETTE[color], alpha=0.18, linewidth=0, label=f"band of {hypothesis}")
            _draw_intervals(ax, group.select(estimator=name), right)
        ratio, delta = axes[:, column]
        describe(ratio, f"{plant}: {sum(right.values())} of {len(right)} verdicts right")
        ratio.set(xscale="log", xlim=(0.25, 4))
        plain_ticks(ratio.xaxis, (0.25, 0.5, 1, 2, 4))
        delta.set(xlim=(-0.4, 1.4))
        describe(ratio, None, "R, density of B over A", "world" if column == 0 else None)
        describe(delta, None, "delta, growth of d_eff / D with depth", "world" if column == 0 else None)
    share_legend(figure)
    return to_png(figure)


def _draw_intervals(ax: Any, rows: LongTable, right: dict[int | None, Any]) -> None:
    planted = rows.values("planted")[0]
    for row in rows.select("found"):
        if isinstance(row.value, Estimate):
            held = row.value.covers(planted)
            color, label = PALETTE[not held], f"90 % interval that {'holds' if held else 'misses'} it"
            ax.plot([row.value.low, row.value.high], [row.at.seed] * 2, color=color, linewidth=1.6, label=label)
            ax.plot(row.value.value, row.at.seed, "o" if right[row.at.seed] else "X", color=color, markersize=5)
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.axvline(planted, color=INK, linewidth=1.2, linestyle=":", label="planted")


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
