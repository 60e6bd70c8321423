"""The picture of the verdict: R by every estimator, and how the effective dimension grows with depth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from crosscoder.report import panels
from crosscoder.report.answer import SITE_NAME
from crosscoder.report.panels import FAINT, INK, PALETTE, describe
from crosscoder.results.file import Results
from crosscoder.results.quantities import ESTIMATORS, PRIMARY_ESTIMATOR
from crosscoder.results.table import Estimate, LongTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = {"write": (PALETTE[0], "o"), "residual": (PALETTE[1], "s")}
HEIGHTS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10)
SMALLEST, LARGEST = 0.125, 8.0  # of R on the picture's axis


def draw_verdict(results: Results) -> Figure | None:
    """R with the bands of H0 and H1 (left), and d_eff / D against L with the slopes 0, 1/2 and 1 (right)."""
    if results.verdict is None:
        return None
    figure, axes = panels.make_panels(1, 2, (11.5, 5.6), width_ratios=(1.25, 1))
    _draw_ratios(axes[0][0], results.rows.select("ratio"), results.verdict.rule)
    _draw_dimensions(axes[0][1], results, results.verdict.rule)
    panels.share_legend(figure)
    return figure


def _draw_ratios(ax: Axes, ratios: LongTable, rule: dict[str, Any]) -> None:
    names = [name for name in ESTIMATORS if len(ratios.select(estimator=name))]
    for band, color, label in (("complete", 4, "band of H0: layers alone"), ("equal", 2, "band of H1: reconciled")):
        ax.axvspan(*rule[band], color=PALETTE[color], alpha=0.18, linewidth=0, label=label)
    for row in ratios:
        if not isinstance(row.value, Estimate):
            continue
        color, marker = MARKS[str(row.at.site)]
        trained = row.at.state == "trained"
        height = len(names) - names.index(str(row.at.estimator)) + (0.16 if row.at.site == "write" else -0.16)
        height -= 0.0 if trained else 0.12
        ends = (row.value.low, row.value.value, row.value.high)
        low, mean, high = (float(np.clip(end, SMALLEST, LARGEST)) for end in ends)
        ax.plot([low, high], [height] * 2, color=color, linewidth=1.4, alpha=0.9 if trained else 0.5)
        face = color if trained else "white"
        label = f"{SITE_NAME[str(row.at.site)]}, {row.at.state}"
        ax.plot(mean, height, marker, color=color, markerfacecolor=face, markersize=6, label=label, ls="")
    ax.set(xscale="log", xlim=(SMALLEST, LARGEST), ylim=(0.4, len(names) + 0.6))
    panels.plain_ticks(ax.xaxis, (0.125, 0.25, 0.5, 1, 2, 4, 8))
    shown = [name.replace("_", ", ") + (" *" if name == PRIMARY_ESTIMATOR else "") for name in names]
    ax.set_yticks(range(len(names), 0, -1), shown)
    _name_missing(ax, ratios, names)
    title = "R: density of B over density of A (* decides, on the writes)"
    describe(ax, title, "R; 2 the paradox, 1 reconciliation")


def _name_missing(ax: Axes, ratios: LongTable, names: list[str]) -> None:
    """Under an estimator's name, left of the panel: which values of which site it lacks."""
    for i, name in enumerate(names):
        lines = []
        for at, rows in ratios.select(estimator=name).groups("site").items():
            known = [row.at.state for row in rows if row.value is not None]
            missing = [state for state in ("trained", "untrained") if state not in known]
            if missing:
                state = f"{missing[0]} " if len(missing) == 1 else ""
                lines.append(f"{SITE_NAME[str(at.site)]}: {state}not measured")
        at = (-0.02, len(names) - i - 0.17)
        ax.text(*at, "\n".join(lines), transform=ax.get_yaxis_transform(), ha="right", va="top", fontsize=7, color=INK)


def _draw_dimensions(ax: Axes, results: Results, rule: dict[str, Any]) -> None:
    debiased = any(results.rows.values("d_eff_debiased", state="trained"))
    key = "d_eff_debiased" if debiased else "d_eff_weighted"
    seen = []
    for row in results.rows.select(key, state="trained"):
        if row.value is None:
            continue
        subject = str(row.at.subject)
        depth, width = results.of(subject, "n_layers"), results.of(subject, "d_model")
        color, marker = MARKS[str(row.at.site)]
        value = row.value / width
        ax.plot(depth, value, marker, color=color, markersize=7, ls="", label=f"{SITE_NAME[str(row.at.site)]}, trained")
        seen.append((depth, value, subject, row.at.site))
    if not seen:
        panels.mark_empty(ax)
        return
    primary = [point for point in seen if point[3] == "write"] or seen
    first, last = min(depth for depth, *_ in primary), max(depth for depth, *_ in seen)
    base = float(np.exp(np.mean([np.log(v) for depth, v, *_ in primary if depth == first])))
    x = np.array([first, last])
    for slope, style in ((0.0, ":"), (0.5, "-"), (1.0, "--")):
        ax.plot(x, base * (x / first) ** slope, style, color=FAINT, linewidth=1.2)
        end = (x[1], base * (x[1] / first) ** slope)
        ax.annotate(f"δ = {slope:g}", end, (9, 0), textcoords="offset points", va="center", fontsize=8.5, color=INK)
    low, high = rule["delta"]
    ax.fill_between(x, base * (x / first) ** low, base * (x / first) ** high, color=PALETTE[2], alpha=0.18, linewidth=0)
    ax.set(xscale="log", yscale="log", xlim=(min(depth for depth, *_ in seen) / 1.2, last * 1.5))
    names: dict[int, set[str]] = {}
    for depth, _, subject, _ in seen:
        names.setdefault(depth, set()).add(panels.safe_label(subject))
    ax.set_xticks(sorted(names), [f"{depth}\n{', '.join(sorted(names[depth]))}" for depth in sorted(names)])
    low, high = ax.get_ylim()
    panels.plain_ticks(ax.yaxis, [tick for tick in HEIGHTS if low <= tick <= high])
    title = "Effective dimension over width" + ("" if debiased else " (not debiased)")
    describe(ax, title, "layers L, model", "d_eff / D")
