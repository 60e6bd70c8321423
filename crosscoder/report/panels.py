"""Empty panels, axes, legends and error bars in the report's style.

Colours are from the Okabe-Ito palette, which colour-blind readers can tell apart. `matplotlib` is imported
inside the functions, and figures are made without pyplot, so that no global state is touched.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from crosscoder.report.answer import ARMS
from crosscoder.results.table import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, GRID, FAINT = "#333333", "#E4E4E4", "#9A9A9A"
DPI = 150
BARS: dict[str, Any] = {"linewidth": 1.6, "elinewidth": 1.1, "capsize": 3}


def to_png(figure: Figure) -> bytes:
    """The figure as PNG, panels without data marked so; the same figure gives the same bytes."""
    for ax in figure.axes:
        if not ax.has_data():
            ax.text(0.5, 0.5, "not measured", ha="center", transform=ax.transAxes, color=FAINT)
            ax.grid(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def make_panels(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(FAINT)
        ax.tick_params(colors=INK, labelsize=9)
        ax.grid(True, color=GRID, linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def describe(ax: Axes, title: str | None = None, x: str | None = None, y: str | None = None) -> None:
    """Title and axis labels of a panel, those that are given."""
    if title:
        ax.set_title(title, fontsize=10.5, color=INK, loc="left", pad=8)
    if x:
        ax.set_xlabel(x, fontsize=9.5, color=INK)
    if y:
        ax.set_ylabel(y, fontsize=9.5, color=INK)


def plain_ticks(axis: Any, values: Sequence[float]) -> None:
    """Ticks at these values alone, written as plain numbers."""
    axis.set_ticks(values, [f"{value:g}" for value in values])
    axis.axes.minorticks_off()


def share_legend(figure: Figure) -> None:
    """One legend of all labels above the panels, so that it covers no point."""
    found = [one for ax in figure.axes for one in zip(*ax.get_legend_handles_labels(), strict=True)]
    entries = {label: handle for handle, label in reversed(found)}  # of a label in several panels, the first
    labels, columns = sorted(entries), len(entries) if len(entries) <= 4 else -(-len(entries) // 2)
    if labels:
        style: dict[str, Any] = {"frameon": False, "fontsize": 9, "handlelength": 2.8, "ncols": columns}
        figure.legend([entries[label] for label in labels], labels, loc="outside upper center", **style)


def plot_points(
    ax: Axes,
    points: Sequence[tuple[Estimate | None, Estimate | None]],
    *,
    color: str,
    arm: str,
    label: str,
    size: float = 6,
    in_order: bool = False,
) -> None:
    """Means joined by a line, with the seed range as bars: `points` hold `(x range, y range)`.

    The line goes by x, or `in_order` as the points are given. Marks are filled for a crosscoder and white for a bank.
    """
    look = ARMS[arm]
    known = [(x, y) for x, y in points if x is not None and y is not None]
    if not known:
        return
    x, y = zip(*(known if in_order else sorted(known, key=lambda point: point[0].value)), strict=True)
    x_means, y_means = ([one.value for one in side] for side in (x, y))
    style: dict[str, Any] = {"marker": look.marker, "markersize": size, "markerfacecolor": look.face(color)}
    style |= {"color": color, "linestyle": look.line, "label": label}
    ax.errorbar(x_means, y_means, error_bars(y), error_bars(x), **style, **BARS)


def error_bars(ranges: Iterable[Estimate]) -> list[list[float]]:
    """How far each range reaches below and above its value."""
    pairs = [(max(one.value - one.low, 0.0), max(one.high - one.value, 0.0)) for one in ranges]
    return [[down for down, _ in pairs], [up for _, up in pairs]]


def log_axis(axis: Any, values: list[float]) -> None:
    """A base-2 axis with a plain number at every power of two that the values span."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    powers = [2.0**i for i in range(40) if min(values) / 2 <= 2.0**i <= max(values) * 2]
    axis.set_major_locator(FixedLocator(powers[:: 1 + len(powers) // 8]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def safe_label(value: Any, limit: int = 24) -> str:
    """A string that a figure can show: no mathematics, no characters outside Latin script, cut at `limit`."""
    kept = "".join(c if c.isprintable() and ord(c) < 0x250 else "?" for c in str(value))
    kept = kept if len(kept) <= limit else f"{kept[: limit - 1]}…"
    return kept.replace("$", r"\$")
