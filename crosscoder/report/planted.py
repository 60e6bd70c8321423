"""The planted-truth study shown: a Markdown page and pictures, as pivots of its rows."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from crosscoder.foundation.artifact import replace_file
from crosscoder.report import panels
from crosscoder.report.page import render_markdown
from crosscoder.report.panels import FAINT, INK, PALETTE, describe
from crosscoder.report.table import shown
from crosscoder.results.file import Results
from crosscoder.results.quantities import definition
from crosscoder.results.table import Estimate, LongTable, Place

TARGETS = {"mcc": 0.93, "count_error": 0.08, "rho_error": 0.05, "d_eff_error": 0.10}
"""What a crosscoder is to reach in every world: at least this MCC, at most these errors either way."""
WORDS = (
    *("mcc", "recall", "precision", "count_error", "rho_error", "rho_error_matched", "d_eff_error", "l0_error"),
    "saturated",
)


def write_page(results: Results, folder: Path) -> None:
    rows, config = results.rows, results.provenance.config
    markdown = render_markdown(
        "planted.md.j2",
        {
            "world": config["world"],
            "kinds": list(config["world"]["kinds"]),
            "n_worlds": len(config["seeds"]),
            "preset": results.provenance.preset,
            "targets": check_targets(rows),
            "estimators": by_estimator(rows),
            "pairs": _pairs(rows),
            "definitions": {key: definition(key) for key in WORDS},
            "name_of": name_of,
            "shown": shown,
        },
    )
    replace_file(folder / "report.md", markdown.encode())
    replace_file(folder / "recovery.png", draw_recovery(rows))


def by_estimator(rows: LongTable) -> dict[Place, LongTable]:
    """The scores of each kind and size of dictionary, all worlds together."""
    scored = LongTable(tuple(row for row in rows.select(subject=None, role=None) if row.at.k is not None))
    return scored.groups("arm", "estimator", "n_features")


def name_of(at: Place) -> str:
    return "crosscoder" if at.estimator is None else f"bank, {at.estimator.replace('-', ' ')}"


def check_targets(rows: LongTable) -> list[dict[str, Any]]:
    """For each crosscoder size and target: the mean and the worst world, and whether every world met it."""
    checks = []
    for at, group in by_estimator(rows).items():
        for key, target in TARGETS.items() if at.estimator is None else ():
            known, least = [abs(value) for value in group.values(key)], key == "mcc"
            worst = (min if least else max)(known, default=None)
            met = worst is not None and len(known) == len(group.select(key))
            met = met and (worst >= target if least else worst <= target)
            mean = sum(known) / len(known) if known else None
            checks.append(
                {"size": at.n_features, "score": key, "target": target, "mean": mean, "worst": worst, "met": met}
            )
    return checks


def _pairs(rows: LongTable) -> list[dict[str, Any]]:
    """What is known of each planted pair, with the features counted in A and in B."""
    pairs = []
    for at in rows.select("r_slots").groups("kind"):
        pair = defaultdict(lambda: None, {row.key: row.value for row in rows.select(kind=at.kind, subject=None)})
        pairs.append(pair | {"counts": rows.values("count", kind=at.kind, subject=("A", "B"))})
    return pairs


def draw_recovery(rows: LongTable) -> bytes:
    """Count, MCC, rho and d_eff by dictionary size, recall by kind, and R beside the planted R, as PNG."""
    figure, axes = panels.make_panels(2, 3, (13.5, 7.6))
    groups = by_estimator(rows)
    color = dict(zip(dict.fromkeys(map(name_of, groups)), PALETTE * len(groups)))
    scores = (("count", "Distinct features"), ("mcc", "MCC"), ("rho", "Layers a feature occupies"), ("d_eff", "d_eff"))
    for ax, (key, title) in zip(axes.flat, scores):
        _draw_score(ax, groups, color, key)
        describe(ax, title, "dictionary size (features; a layer, for banks)")
    _draw_recall(axes[1][1], groups, color)
    _draw_pairs(axes[1][2], rows)
    panels.share_legend(figure)
    return panels.to_png(figure)


def _draw_score(ax: Any, groups: dict[Place, LongTable], color: dict[str, str], key: str) -> None:
    found = {at: value for at, group in groups.items() if (value := group.seed_range(key)) is not None}
    if not found:
        return
    for name in dict.fromkeys(map(name_of, found)):
        own = {at: value for at, value in found.items() if name_of(at) == name}
        points = [(Estimate.over([float(at.n_features or 0)]), value) for at, value in own.items()]
        panels.plot_points(ax, points, color=color[name], arm=str(next(iter(own)).arm), label=name)
    truth = [1.0] if key == "mcc" else [value for at in found for value in groups[at].values(f"{key}_true")]
    ax.axhline(sum(truth) / len(truth), color=INK, linewidth=1.2, linestyle=":", label="planted")
    sizes = sorted({int(at.n_features or 0) for at in found})
    panels.log_axis(ax.xaxis, [float(size) for size in sizes])
    ax.set_xticks(sizes, [str(size) for size in sizes])


def _draw_recall(ax: Any, groups: dict[Place, LongTable], color: dict[str, str]) -> None:
    describe(ax, "Recall by kind, largest dictionary of each")
    largest = {name_of(at): groups[at] for at in sorted(groups, key=lambda at: at.n_features or 0)}
    if not largest:
        return
    width = 0.8 / len(largest)
    for index, (name, group) in enumerate(largest.items()):
        kinds = [str(at.kind) for at in group.select("recall_by_kind").groups("kind")]
        place = [kind + (index - (len(largest) - 1) / 2) * width for kind in range(len(kinds))]
        found = [group.seed_range("recall_by_kind", kind=kind) for kind in kinds]
        ax.bar(place, [one.value if one else 0.0 for one in found], width=width, color=color[name])
        ax.set_xticks(range(len(kinds)), kinds)
    ax.set_ylim(0, 1.05)


def _draw_pairs(ax: Any, rows: LongTable) -> None:
    describe(ax, "R found beside R planted", "planted R", "R found")
    if not rows.select("r_slots"):
        return
    for key, label, color in (("r_slots", "R of slots", PALETTE[4]), ("r_density", "R of density", PALETTE[5])):
        planted, found = rows.values(f"{key}_true"), rows.values(key)
        ax.plot(planted, found, color=color, marker="D", linestyle="", label=label)
    ends = [0.0, 1.1 * max(rows.values("r_slots_true"))]
    ax.plot(ends, ends, color=FAINT, linewidth=1, linestyle=":")
