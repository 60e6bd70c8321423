"""The planted-truth study shown: a Markdown page and pictures, as pivots of its rows."""

from __future__ import annotations

from collections import Counter
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
from crosscoder.verdict.decide import RULE

TARGETS = {"mcc": 0.93, "count_error": 0.08, "rho_error": 0.05, "d_eff_error": 0.10}
"""What a crosscoder is to reach in every world: at least this MCC, at most these errors either way."""
STATISTICS = ("R", "gamma", "delta")
WORDS = ("mcc", "recall", "precision", "count_error", "rho_error", "rho_error_matched", "d_eff_error", "l0_error")
VERDICT_WORDS = ("planted_verdict", "planted_control", "coverage")
PAIRS_NOTE = (
    "The same features in a deep narrow space A and a shallow wide space B, a quarter as deep and twice as wide. "
    "R of slots is 2 (F_B / F_A) (rho_B / rho_A); R of density is entropy load over d_eff, B over A; its error is "
    "against the directions drawn, whose d_eff scatters about the planted one."
)
VERDICTS_NOTE = (
    "Each planted answer through the whole chain: crosscoders of every training and dictionary seed, banks, control, "
    "statistics, rule. Coverage is of 90 % intervals: of the planted value, and of that of the directions drawn."
)


def write_page(results: Results, folder: Path) -> None:
    """Write `report.md` and its pictures."""
    replace_file(folder / "report.md", render_markdown(results).encode())
    replace_file(folder / "recovery.png", draw_recovery(results.rows))
    if results.rows.select("found_verdict"):
        replace_file(folder / "verdicts.png", draw_verdicts(results.rows))


def render_markdown(results: Results) -> str:
    """The tables: targets, estimators, recall by kind, pairs, verdicts, and what every word means."""
    rows, world = results.rows, results.provenance.config["world"]
    kinds, has_verdicts = world["kinds"], bool(rows.select("found_verdict"))
    words = [*WORDS, "saturated", *(VERDICT_WORDS if has_verdicts else ())]
    sections = {
        "Targets": _targets(rows),
        "Estimators": _estimators(rows),
        "Recall by kind": _recall(rows, kinds),
        "Pairs": [PAIRS_NOTE, "", *_pairs(rows)] if rows.select("r_slots") else [],
        "Verdicts": [*verdict_lines(rows), "![R and delta by world](verdicts.png)"] if has_verdicts else [],
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
    return "\n".join([*lines, *(f"- **{key}**: {definition(key)}" for key in words)]) + "\n"


def by_estimator(rows: LongTable) -> dict[Place, LongTable]:
    """The scores of each kind and size of dictionary, all worlds together."""
    scored = LongTable(tuple(row for row in rows.select(subject=None, role=None) if row.at.k is not None))
    return scored.groups("arm", "estimator", "n_features")


def by_seed(rows: LongTable, key: str, **where: Any) -> dict[int | None, Any]:
    """What is known of a key by the seed of its world."""
    return {row.at.seed: row.value for row in rows.select(key, **where) if row.value is not None}


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
    lines = [
        [
            check["size"],
            check["score"],
            f"{'>=' if check['score'] == 'mcc' else '<='} {check['target']:g}",
            _number(check["mean"]),
            _number(check["worst"]),
            "yes" if check["met"] else "**no**",
        ]
        for check in check_targets(rows)
    ]
    return _table(["crosscoder size", "score", "target", "mean", "worst world", "met in every world"], lines)


def _estimators(rows: LongTable) -> list[str]:
    lines = []
    for at, group in by_estimator(rows).items():
        full = " (full: lower bound)" if any(group.values("saturated")) else ""
        shown = [_range(group.seed_range(key), f"{{:{form}}}") for key, form in _SCORES]
        shown[0] += full
        for place, key, form in ((4, "rho", ".2f"), (6, "d_eff", ".1f")):
            value, truth = group.seed_range(key), group.seed_range(f"{key}_true")
            known = value is not None and truth is not None
            shown.insert(place, f"{value.value:{form}} ({truth.value:{form}})" if known else "undefined")
        lines.append([name_of(at), at.n_features, *shown])
    title = ["estimator", "size", "count", "error", "MCC", "precision", "rho (true)", "error", "d_eff (true)", "error"]
    return _table([*title, "L0 error", "explained variance"], lines)


_SCORES = (
    ("count", ".0f"),
    ("count_error", "+.1%"),
    ("mcc", ".3f"),
    ("precision", ".2f"),
    ("rho_error", "+.1%"),
    ("d_eff_error", "+.1%"),
    ("l0_error", "+.1%"),
    ("explained_variance", ".3f"),
)


def _recall(rows: LongTable, kinds: Sequence[str]) -> list[str]:
    lines = []
    for at, group in by_estimator(rows).items():
        recall = [group.seed_range("recall_by_kind", kind=kind) for kind in kinds]
        lines.append([name_of(at), at.n_features, *(_range(one, "{:.2f}", ends=False) for one in recall)])
    return _table(["estimator", "size", *kinds], lines)


def _pairs(rows: LongTable) -> list[str]:
    lines = []
    for at in rows.select("r_slots").groups("kind"):
        one = {row.key: row.value for row in rows.select(kind=at.kind, subject=None)}
        counts = rows.values("count", kind=at.kind, subject=("A", "B"))
        lines.append(
            [
                f"{one['planted_gamma']:g}",
                f"{one['planted_delta']:g}",
                f"{one['r_slots']:.2f} ({one['r_slots_true']:.2f})",
                f"{one['r_slots_error']:+.1%}",
                f"{one['r_density']:.2f} ({one['r_density_drawn']:.2f}, {one['r_density_true']:.2f})",
                f"{one['r_density_error']:+.1%}",
                ", ".join(map(str, counts)),
            ]
        )
    title = ["gamma", "delta", "R of slots (planted)", "error", "R of density (drawn, planted)", "error", "counts A, B"]
    return _table(title, lines)


def verdict_lines(rows: LongTable) -> list[str]:
    """The table of planted verdicts, how often intervals cover, and what was wrong, in Markdown."""
    lines, wrong = [], []
    for at in rows.select("found_verdict").groups("kind"):
        group = rows.select(kind=at.kind)
        right, labels = group.values("right_verdict"), Counter(group.values("found_verdict"))
        cells = [at.kind, group.values("expected_verdict")[0], f"{sum(right)} of {len(right)}"]
        cells.append(", ".join(f"{label} {count}" for label, count in labels.items()))
        for name in STATISTICS:
            found, drawn = (by_seed(group, key, estimator=name) for key in ("found", "drawn"))
            planted = group.values("planted", estimator=name)[0]
            held = sum(one.covers(planted) for one in found.values())
            held_drawn = sum(one.covers(drawn[seed]) for seed, one in found.items())
            miss = max((max(0.0, one.low - planted, planted - one.high) for one in found.values()), default=0.0)
            mean = sum(one.value for one in found.values()) / len(found) if found else None
            cells.append(f"{_number(mean)} ({planted:.3g})")
            cells.append(f"{held}, {held_drawn} of {len(found)}" + (f"; by at most {miss:.1g}" if miss else ""))
        lines.append(cells)
    for row in rows.select("right_verdict"):
        if not row.value:
            where = {"kind": row.at.kind, "seed": row.at.seed}
            label, reasons = rows.one("found_verdict", **where), rows.one("verdict_reasons", **where)
            wrong.append(f"- {row.at.kind}, seed {row.at.seed}: {label}: {'; '.join(reasons)}")
    title = ["planted", "right verdict", "found", "verdicts"]
    for name in STATISTICS:
        title += [f"{name}, mean (planted)", f"{name}'s interval covers planted, drawn"]
    said = ["Verdicts that were not right:", "", *wrong, ""] if wrong else []
    return [VERDICTS_NOTE, "", *_table(title, lines), "", *said]


def _range(found: Estimate | None, form: str, *, ends: bool = True) -> str:
    if found is None:
        return "undefined"
    value = form.format(found.value)
    return (
        f"{value} [{form.format(found.low)}, {form.format(found.high)}]" if ends and found.low < found.high else value
    )


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _table(title: list[str], rows: list[list[Any]]) -> list[str]:
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
        points = [(Estimate(*(float(at.n_features or 0),) * 3), value) for at, value in own.items()]
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


def draw_verdicts(rows: LongTable) -> bytes:
    """R and delta of every planted world with their 90 % intervals beside what was planted, as PNG."""
    plants = [at.kind for at in rows.select("found_verdict").groups("kind")]
    figure, axes = make_panels(2, len(plants), (4.3 * len(plants), 7.0))
    bands = {"R": ((RULE.complete, PALETTE[4], "H0"), (RULE.equal, PALETTE[2], "H1"))}
    bands["delta"] = ((RULE.delta, PALETTE[2], "H1"),)
    for column, plant in enumerate(plants):
        group = rows.select(kind=plant)
        right = by_seed(group, "right_verdict")
        for ax, name in zip(axes[:, column], bands, strict=True):
            for (low, high), color, hypothesis in bands[name]:
                ax.axvspan(low, high, color=color, alpha=0.18, linewidth=0, label=f"band of {hypothesis}")
            _draw_intervals(ax, group.select(estimator=name), right)
        ratio, delta = axes[:, column]
        axis_title(ratio, f"{plant}: {sum(right.values())} of {len(right)} verdicts right")
        ratio.set(xscale="log", xlim=(0.25, 4))
        ratio.set_xticks([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"])
        ratio.minorticks_off()
        delta.set(xlim=(-0.4, 1.4))
        axis_labels(ratio, "R, density of B over A", "world" if column == 0 else None)
        axis_labels(delta, "delta, growth of d_eff / D with depth", "world" if column == 0 else None)
    share_legend(figure, axes)
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
