"""The planted-truth study shown: a Markdown page and pictures, as pivots of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crosscoder.foundation.artifact import replace_file
from crosscoder.report.panels import (
    FAINT,
    INK,
    PALETTE,
    axis_labels,
    axis_title,
    log_axis,
    make_panels,
    mark_empty,
    plot_points,
    share_legend,
    to_png,
)
from crosscoder.results.file import Results
from crosscoder.results.quantities import definition
from crosscoder.results.table import Estimate, LongTable, Place

TARGETS = {"mcc": 0.93, "count_error": 0.08, "rho_error": 0.05, "d_eff_error": 0.10}
"""What a crosscoder is to reach in every world: at least this MCC, at most these errors either way."""
WORDS = ("mcc", "recall", "precision", "count_error", "rho_error", "rho_error_matched", "d_eff_error", "l0_error")
ESTIMATES = (
    ("count", "count", ".0f"),
    ("error", "count_error", "+.1%"),
    ("MCC", "mcc", ".3f"),
    ("precision", "precision", ".2f"),
    ("rho (true)", "rho", ".2f"),
    ("error", "rho_error", "+.1%"),
    ("d_eff (true)", "d_eff", ".1f"),
    ("error", "d_eff_error", "+.1%"),
    ("L0 error", "l0_error", "+.1%"),
    ("explained variance", "explained_variance", ".3f"),
)
"""Heading, quantity and form of what is shown of every estimator; `(true)` asks for the planted value beside it."""
PAIRS = (
    ("gamma", "{planted_gamma:g}"),
    ("delta", "{planted_delta:g}"),
    ("R of slots (planted)", "{r_slots:.2f} ({r_slots_true:.2f})"),
    ("error", "{r_slots_error:+.1%}"),
    ("R of density (drawn, planted)", "{r_density:.2f} ({r_density_drawn:.2f}, {r_density_true:.2f})"),
    ("error", "{r_density_error:+.1%}"),
)
PAIRS_NOTE = (
    "The same features in a deep narrow space A and a shallow wide space B, a quarter as deep and twice as wide. "
    "R of slots is 2 (F_B / F_A) (rho_B / rho_A); R of density is entropy load over d_eff, B over A; its error is "
    "against the directions drawn, whose d_eff scatters about the planted one."
)


def write_page(results: Results, folder: Path) -> None:
    """Write `report.md` and its pictures."""
    replace_file(folder / "report.md", render_markdown(results).encode())
    replace_file(folder / "recovery.png", draw_recovery(results.rows))


def render_markdown(results: Results) -> str:
    """The tables: targets, estimators, recall by kind, pairs, and what every word means."""
    rows, world = results.rows, results.provenance.config["world"]
    kinds = world["kinds"]
    sections = {
        "Targets": _targets(rows),
        "Estimators": _estimators(rows),
        "Recall by kind": _recall(rows, kinds),
        "Pairs": [PAIRS_NOTE, "", *_pairs(rows)] if rows.select("r_slots") else [],
    }
    lines = [
        "# Planted truth",
        "",
        f"{world['n_features']} features ({', '.join(kinds)}) in {world['n_layers']} layers of width "
        f"{world['d_model']}; {len(results.provenance.config['seeds'])} world(s), one dictionary each; preset "
        f"`{results.provenance.preset}`. Mean over worlds, with the lowest and highest in brackets. Errors are signed: "
        "+ is too much.",
        "",
    ]
    for title, body in sections.items():
        lines += [f"## {title}", "", *body, ""] if body else []
    lines += ["![Estimates beside the truth](recovery.png)", "", "## Words", ""]
    return "\n".join([*lines, *(f"- **{key}**: {definition(key)}" for key in (*WORDS, "saturated"))]) + "\n"


def by_estimator(rows: LongTable) -> dict[Place, LongTable]:
    """The scores of each kind and size of dictionary, all worlds together."""
    scored = LongTable(tuple(row for row in rows.select(subject=None, role=None) if row.at.k is not None))
    return scored.groups("arm", "estimator", "n_features")


def name_of(at: Place) -> str:
    """An estimator in words."""
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


def _targets(rows: LongTable) -> list[str]:
    lines = []
    for one in check_targets(rows):
        target = f"{'>=' if one['score'] == 'mcc' else '<='} {one['target']:g}"
        met = "yes" if one["met"] else "**no**"
        lines.append([one["size"], one["score"], target, shown(one["mean"]), shown(one["worst"]), met])
    return markdown_table(["crosscoder size", "score", "target", "mean", "worst world", "met in every world"], lines)


def _estimators(rows: LongTable) -> list[str]:
    lines = []
    for at, group in by_estimator(rows).items():
        cells: list[Any] = [name_of(at), at.n_features]
        for title, key, form in ESTIMATES:
            found, truth = group.seed_range(key), group.seed_range(f"{key}_true")
            if "(true)" in title:
                cells.append(f"{found.value:{form}} ({truth.value:{form}})" if found and truth else "undefined")
            else:
                cells.append(shown(found, form))
        cells[2] += " (full: lower bound)" if any(group.values("saturated")) else ""
        lines.append(cells)
    return markdown_table(["estimator", "size", *(title for title, *_ in ESTIMATES)], lines)


def _recall(rows: LongTable, kinds: Sequence[str]) -> list[str]:
    lines = []
    for at, group in by_estimator(rows).items():
        recall = [group.seed_range("recall_by_kind", kind=kind) for kind in kinds]
        lines.append([name_of(at), at.n_features, *(shown(one and one.value, ".2f") for one in recall)])
    return markdown_table(["estimator", "size", *kinds], lines)


def _pairs(rows: LongTable) -> list[str]:
    lines = []
    for at in rows.select("r_slots").groups("kind"):
        one = {row.key: row.value for row in rows.select(kind=at.kind, subject=None)}
        counts = rows.values("count", kind=at.kind, subject=("A", "B"))
        lines.append([*(form.format(**one) for _, form in PAIRS), ", ".join(map(str, counts))])
    return markdown_table([*(title for title, _ in PAIRS), "counts A, B"], lines)


def shown(found: Estimate | float | None, form: str = ".3f") -> str:
    """A number, with the ends of its interval where it has one."""
    if isinstance(found, Estimate):
        ends = f" [{found.low:{form}}, {found.high:{form}}]" if found.low < found.high else ""
        return f"{found.value:{form}}{ends}"
    return "undefined" if found is None else f"{found:{form}}"


def markdown_table(title: list[str], rows: list[list[Any]]) -> list[str]:
    """A Markdown table; nothing without rows."""
    lines = [title, ["---"] * len(title), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines] if rows else []


def draw_recovery(rows: LongTable) -> bytes:
    """Count, MCC, rho and d_eff by dictionary size, recall by kind, and R beside the planted R, as PNG."""
    figure, axes = make_panels(2, 3, (13.5, 7.6))
    groups = by_estimator(rows)
    color = dict(zip(dict.fromkeys(map(name_of, groups)), PALETTE * len(groups)))
    panels = (("count", "Distinct features"), ("mcc", "MCC"), ("rho", "Layers a feature occupies"), ("d_eff", "d_eff"))
    for ax, (key, title) in zip(axes.flat, panels):
        _draw_score(ax, groups, color, key)
        axis_title(ax, title)
        axis_labels(ax, "dictionary size (features; a layer, for banks)", None)
    _draw_recall(axes[1][1], groups, color)
    _draw_pairs(axes[1][2], rows)
    share_legend(figure, axes)
    return to_png(figure)


def _draw_score(ax: Any, groups: dict[Place, LongTable], color: dict[str, str], key: str) -> None:
    found = {at: value for at, group in groups.items() if (value := group.seed_range(key)) is not None}
    if not found:
        mark_empty(ax)
        return
    for name in dict.fromkeys(map(name_of, found)):
        own = {at: value for at, value in found.items() if name_of(at) == name}
        points = [(Estimate.over([float(at.n_features or 0)]), value) for at, value in own.items()]
        plot_points(ax, points, color=color[name], arm=str(next(iter(own)).arm), label=name)
    truth = [1.0] if key == "mcc" else [value for at in found for value in groups[at].values(f"{key}_true")]
    ax.axhline(sum(truth) / len(truth), color=INK, linewidth=1.2, linestyle=":", label="planted")
    sizes = sorted({int(at.n_features or 0) for at in found})
    log_axis(ax.xaxis, [float(size) for size in sizes])
    ax.set_xticks(sizes, [str(size) for size in sizes])


def _draw_recall(ax: Any, groups: dict[Place, LongTable], color: dict[str, str]) -> None:
    axis_title(ax, "Recall by kind, largest dictionary of each")
    largest = {name_of(at): groups[at] for at in sorted(groups, key=lambda at: at.n_features or 0)}
    if not largest:
        mark_empty(ax)
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
    axis_title(ax, "R found beside R planted")
    axis_labels(ax, "planted R", "R found")
    if not rows.select("r_slots"):
        mark_empty(ax)
        return
    for key, label, color in (("r_slots", "R of slots", PALETTE[4]), ("r_density", "R of density", PALETTE[5])):
        planted, found = rows.values(f"{key}_true"), rows.values(key)
        ax.plot(planted, found, color=color, marker="D", linestyle="", label=label)
    ends = [0.0, 1.1 * max(rows.values("r_slots_true"))]
    ax.plot(ends, ends, color=FAINT, linewidth=1, linestyle=":")
