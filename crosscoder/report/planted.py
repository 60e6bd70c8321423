"""The planted-truth study shown: a Markdown page and pictures, from its plain results."""

from __future__ import annotations

from typing import Any

from crosscoder.report.panels import (
    FAINT,
    INK,
    PALETTE,
    axis_labels,
    axis_title,
    error_bars,
    log_axis,
    make_panels,
    mark_empty,
    plot_points,
    share_legend,
    to_png,
)
from crosscoder.results.table import Estimate
from crosscoder.verdict.decide import RULE

Results = dict[str, Any]


def render_markdown(results: Results) -> str:
    """The tables: targets, estimators, recall by kind, pairs, and what every word means."""
    world = results["run"]["config"]["world"]
    seeds = results["run"]["config"]["seeds"]
    lines = [
        "# Planted truth",
        "",
        f"{world['n_features']} features ({', '.join(world['kinds'])}) in {world['n_layers']} layers of width "
        f"{world['d_model']}; {len(seeds)} world(s), one dictionary each; preset `{results['preset']}`. "
        "Mean over worlds, with the lowest and highest in brackets. Errors are signed: + is too much.",
        "",
        *_targets(results),
        "## Estimators",
        "",
        *_estimators(results),
        "",
        "## Recall by kind",
        "",
        *_recall(results),
        "",
        *_pairs(results),
        *_verdicts(results),
        "![Estimates beside the truth](recovery.png)",
        "",
        "## Words",
        "",
        *(f"- **{name}**: {text}" for name, text in results["definitions"].items()),
    ]
    return "\n".join(lines) + "\n"


def _targets(results: Results) -> list[str]:
    if not results["targets"]:
        return []
    rows = [
        [check["size"], check["score"], _bound(check), _number(check["mean"]), _number(check["worst"]), _met(check)]
        for check in results["targets"]
    ]
    title = ["crosscoder size", "score", "target", "mean", "worst world", "met in every world"]
    return ["## Targets", "", *_table(title, rows), ""]


def _bound(check: dict[str, Any]) -> str:
    return f"{'>=' if check['score'] == 'mcc' else '<='} {check['target']:g}"


def _met(check: dict[str, Any]) -> str:
    return "yes" if check["met"] else "**no**"


def _estimators(results: Results) -> list[str]:
    rows = []
    for entry in results["summary"]:
        full = " (full: lower bound)" if entry["saturated"] else ""
        rows.append(
            [
                entry["estimator"],
                entry["size"],
                _range(entry.get("count"), "{:.0f}") + full,
                _range(entry.get("count_error"), "{:+.1%}"),
                _range(entry.get("mcc"), "{:.3f}"),
                _range(entry.get("precision"), "{:.2f}"),
                _estimate(entry, "rho", "{:.2f}"),
                _range(entry.get("rho_error"), "{:+.1%}"),
                _estimate(entry, "d_eff", "{:.1f}"),
                _range(entry.get("d_eff_error"), "{:+.1%}"),
                _range(entry.get("l0_error"), "{:+.1%}"),
                _range(entry.get("explained_variance"), "{:.3f}"),
            ]
        )
    title = ["estimator", "size", "count", "error", "MCC", "precision", "rho (true)", "error", "d_eff (true)", "error"]
    return _table([*title, "L0 error", "explained variance"], rows)


def _estimate(entry: dict[str, Any], key: str, form: str) -> str:
    value, truth = entry.get(key), entry.get(f"{key}_true")
    if value is None or truth is None:
        return "undefined"
    return f"{form.format(value['mean'])} ({form.format(truth['mean'])})"


def _range(entry: dict[str, float] | None, form: str) -> str:
    if entry is None:
        return "undefined"
    if entry["low"] == entry["high"]:
        return form.format(entry["mean"])
    return f"{form.format(entry['mean'])} [{form.format(entry['low'])}, {form.format(entry['high'])}]"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _recall(results: Results) -> list[str]:
    kinds = list(results["summary"][0]["recall_by_kind"]) if results["summary"] else []
    rows = [
        [entry["estimator"], entry["size"], *(f"{entry['recall_by_kind'][kind]:.2f}" for kind in kinds)]
        for entry in results["summary"]
    ]
    return _table(["estimator", "size", *kinds], rows)


def _pairs(results: Results) -> list[str]:
    if not results["pairs"]:
        return []
    rows = [
        [
            f"{row['gamma']:g}",
            f"{row['delta']:g}",
            f"{row['r_slots']:.2f} ({row['r_slots_true']:.2f})",
            f"{row['r_slots_error']:+.1%}",
            f"{row['r_density']:.2f} ({row['r_density_drawn']:.2f}, {row['r_density_true']:.2f})",
            f"{row['r_density_error']:+.1%}",
            f"{row['sides']['A']['count']}, {row['sides']['B']['count']}",
        ]
        for row in results["pairs"]
    ]
    title = ["gamma", "delta", "R of slots (planted)", "error", "R of density (drawn, planted)", "error", "counts A, B"]
    return [
        "## Pairs",
        "",
        "The same features in a deep narrow space A and a shallow wide space B, a quarter as deep and twice as wide. "
        "R of slots is 2 (F_B / F_A) (rho_B / rho_A); R of density is entropy load over d_eff, B over A; its error is "
        "against the directions drawn, whose d_eff scatters about the planted one.",
        "",
        *_table(title, rows),
        "",
    ]


def _verdicts(results: Results) -> list[str]:
    verdicts = results.get("verdicts") or {}
    if not verdicts.get("summary"):
        return []
    return ["## Verdicts", "", *verdict_lines(verdicts), "![R and delta by world](verdicts.png)", ""]


def verdict_lines(verdicts: Results) -> list[str]:
    """The table of planted verdicts, how often intervals cover, and what was wrong, in Markdown."""
    summary = verdicts["summary"]
    rows = []
    for entry in summary:
        labels = ", ".join(f"{label} {count}" for label, count in entry["labels"].items())
        cells = [entry["plant"], entry["expected"], f"{entry['right']} of {entry['n']}", labels]
        for key in ("R", "gamma", "delta"):
            one = entry[key]
            cells += [
                f"{_number(one['mean'])} ({one['planted']:.3g})",
                f"{one['covered']}, {one['covered_drawn']} of {one['n']}" + _missed(one["largest_miss"]),
            ]
        rows.append(cells)
    wrong = [
        f"- {row['plant']}, seed {row['seed']}: {row['label']}: {'; '.join(row['reasons'])}"
        for row in verdicts["rows"]
        if not row["right"]
    ]
    title = ["planted", "right verdict", "found", "verdicts"]
    for key in ("R", "gamma", "delta"):
        title += [f"{key}, mean (planted)", f"{key}'s interval covers planted, drawn"]
    return [
        "Each planted answer through the whole chain: crosscoders of every training and dictionary seed, banks, "
        "control, statistics, rule. Coverage is of 90 % intervals: of the planted value, and of that of the "
        "directions drawn.",
        "",
        *_table(title, rows),
        "",
        *(["Verdicts that were not right:", "", *wrong, ""] if wrong else []),
    ]


def _missed(largest: float | None) -> str:
    return f"; by at most {largest:.1g}" if largest else ""


def _table(title: list[str], rows: list[list[Any]]) -> list[str]:
    lines = [title, ["---"] * len(title), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def render_picture(results: Results) -> bytes:
    """Count, MCC, rho and d_eff by dictionary size, recall by kind, and R beside the planted R, as PNG."""
    figure, axes = make_panels(2, 3, (13.5, 7.6))
    panels = (("count", "Distinct features"), ("mcc", "MCC"), ("rho", "Layers a feature occupies"), ("d_eff", "d_eff"))
    for ax, (key, title) in zip(axes.flat, panels):
        _draw_score(ax, results, key)
        axis_title(ax, title)
        axis_labels(ax, "dictionary size (features; a layer, for banks)", None)
    _draw_recall(axes[1][1], results)
    _draw_pairs(axes[1][2], results)
    share_legend(figure, axes)
    return to_png(figure)


def render_verdicts(verdicts: Results) -> bytes:
    """R and delta of every planted world with their 90 % intervals beside what was planted, as PNG."""
    plants = [entry["plant"] for entry in verdicts["summary"]]
    figure, axes = make_panels(2, len(plants), (4.3 * len(plants), 7.0))
    bands = {"R": ((RULE.complete, PALETTE[4], "H0"), (RULE.equal, PALETTE[2], "H1"))}
    bands["delta"] = ((RULE.delta, PALETTE[2], "H1"),)
    for column, plant in enumerate(plants):
        rows = [row for row in verdicts["rows"] if row["plant"] == plant]
        n_right = sum(row["right"] for row in rows)
        for ax, key in zip(axes[:, column], bands, strict=True):
            for (low, high), color, name in bands[key]:
                ax.axvspan(low, high, color=color, alpha=0.18, linewidth=0, label=f"band of {name}")
            _draw_intervals(ax, rows, key)
        axis_title(axes[0][column], f"{plant}: {n_right} of {len(rows)} verdicts right")
        axes[0][column].set_xscale("log")
        axes[0][column].set(xlim=(0.25, 4))
        axes[0][column].set_xticks([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"])
        axes[0][column].minorticks_off()
        axes[1][column].set(xlim=(-0.4, 1.4))
        axis_labels(axes[0][column], "R, density of B over A", "world" if column == 0 else None)
        axis_labels(axes[1][column], "delta, growth of d_eff / D with depth", "world" if column == 0 else None)
    share_legend(figure, axes)
    return to_png(figure)


def _draw_intervals(ax: Any, rows: list[Results], key: str) -> None:
    for row in rows:
        found = row["statistics"][key]["found"]
        if found is None:
            continue
        covers = row["statistics"][key]["covers"]
        color = PALETTE[0] if covers else PALETTE[1]
        label = f"90 % interval that {'holds' if covers else 'misses'} it"
        ax.plot([found["low"], found["high"]], [row["seed"]] * 2, color=color, linewidth=1.6, label=label)
        ax.plot(found["mean"], row["seed"], "o" if row["right"] else "X", color=color, markersize=5)
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.axvline(rows[0]["statistics"][key]["planted"], color=INK, linewidth=1.2, linestyle=":", label="planted")


def _color(results: Results, estimator: str) -> str:
    names = list(dict.fromkeys(entry["estimator"] for entry in results["summary"]))
    return PALETTE[names.index(estimator) % len(PALETTE)]


def _draw_score(ax: Any, results: Results, key: str) -> None:
    summary = [entry for entry in results["summary"] if entry.get(key) is not None]
    if not summary:
        mark_empty(ax)
        return
    for name in dict.fromkeys(entry["estimator"] for entry in summary):
        own = [entry for entry in summary if entry["estimator"] == name]
        sizes = [Estimate(*[float(entry["size"])] * 3) for entry in own]
        ranges = [Estimate(entry[key]["mean"], entry[key]["low"], entry[key]["high"]) for entry in own]
        points = list(zip(sizes, ranges, strict=True))
        arm = "crosscoder" if name == "crosscoder" else "layerwise"
        plot_points(ax, points, color=_color(results, name), arm=arm, label=name)
    truth = [1.0] if key == "mcc" else [entry[f"{key}_true"]["mean"] for entry in summary]
    ax.axhline(sum(truth) / len(truth), color=INK, linewidth=1.2, linestyle=":", label="planted")
    sizes = sorted({entry["size"] for entry in summary})
    log_axis(ax.xaxis, [float(size) for size in sizes])
    ax.set_xticks(sizes, [str(size) for size in sizes])


def _draw_recall(ax: Any, results: Results) -> None:
    axis_title(ax, "Recall by kind, largest dictionary of each")
    largest = {entry["estimator"]: entry for entry in sorted(results["summary"], key=lambda entry: entry["size"])}
    if not largest:
        mark_empty(ax)
        return
    kinds = list(next(iter(largest.values()))["recall_by_kind"])
    width = 0.8 / len(largest)
    for index, (name, entry) in enumerate(largest.items()):
        place = [kind + (index - (len(largest) - 1) / 2) * width for kind in range(len(kinds))]
        heights = [entry["recall_by_kind"][kind] for kind in kinds]
        ax.bar(place, heights, width=width, color=_color(results, name))
    ax.set_xticks(range(len(kinds)), kinds)
    ax.set_ylim(0, 1.05)


def _draw_pairs(ax: Any, results: Results) -> None:
    axis_title(ax, "R found beside R planted")
    axis_labels(ax, "planted R", "R found")
    if not results["pairs"]:
        mark_empty(ax)
        return
    for key, label, color in (("r_slots", "R of slots", PALETTE[4]), ("r_density", "R of density", PALETTE[5])):
        planted = sorted({row[f"{key}_true"] for row in results["pairs"]})
        found = [[row[key] for row in results["pairs"] if row[f"{key}_true"] == value] for value in planted]
        ranges = [Estimate(sum(values) / len(values), min(values), max(values)) for values in found]
        means = [one.value for one in ranges]
        ax.errorbar(planted, means, yerr=error_bars(ranges), color=color, marker="D", linestyle="", label=label)
    ends = [0.0, 1.1 * max(row["r_slots_true"] for row in results["pairs"])]
    ax.plot(ends, ends, color=FAINT, linewidth=1, linestyle=":")
