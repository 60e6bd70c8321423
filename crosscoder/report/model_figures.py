"""The report's pictures of the models: their losses, each layer's explained variance, and what splicing costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from crosscoder.report.answer import ARM_NAME
from crosscoder.report.figures import Cells, subject_color, subject_label, subject_panels
from crosscoder.report.panels import (
    FAINT,
    INK,
    MARKER,
    axis_labels,
    axis_title,
    error_bars,
    make_panels,
    mark_empty,
    own_legend,
    plot_points,
    safe_label,
    share_legend,
    token_formatter,
)
from crosscoder.report.tables import SMALL_HARM
from crosscoder.results.file import Results
from crosscoder.results.table import Estimate, LongTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS_UNIT = "nats/token"


def subject_runs(results: Results, subject: str) -> list[tuple[int, float]]:
    """`(tokens, held-out loss)` of each training seed's checkpoint, the first seed's first."""
    tokens, losses = (results.rows.values(key, subject=subject) for key in ("training_tokens", "held_out_loss"))
    return list(zip(tokens, losses, strict=False))


def subject_curve(results: Results, subject: str) -> list[tuple[int, float]]:
    """`(tokens, held-out loss)` of each checkpoint of the first training seed."""
    tokens, losses = (results.of(subject, key) or [] for key in ("curve_tokens", "curve_loss"))
    return sorted(zip(tokens, losses, strict=True))


def draw_loss(results: Results) -> Figure | None:
    """Held-out loss of each subject's first run against tokens; rings mark the checkpoints that the study compares."""
    subjects = [subject for subject in results.subjects if subject_curve(results, subject)]
    if not subjects:
        return None
    figure, axes = make_panels(1, 2, (11, 4.4))
    for ax in axes[0]:
        for subject in subjects:
            color = subject_color(results, subject)
            x, y = zip(*subject_curve(results, subject), strict=True)
            label = subject_label(results, subject)
            ax.plot(x, y, color=color, linewidth=1.8, marker=".", markersize=5, label=label)
            for i, (tokens, loss) in enumerate(subject_runs(results, subject)):
                ax.plot([tokens], [loss], "o", color=color, **_ring_style(i))
    axis_labels(axes[0][0], "training tokens", f"held-out loss ({LOSS_UNIT})")
    axis_labels(axes[0][1], "training tokens", None)
    axis_title(axes[0][0], "Whole training")
    axis_title(axes[0][1], "Around the compared checkpoints")
    _zoom(axes[0][1], results, subjects)
    longest = max(len(subject_runs(results, subject)) for subject in subjects)
    for i, words in enumerate(("compared checkpoint", "compared checkpoint, further training seeds")[:longest]):
        axes[0][0].plot([], [], "o", label=words, color=INK, **_ring_style(i))
    for ax in axes[0]:
        ax.xaxis.set_major_formatter(token_formatter())
    share_legend(figure, axes)
    return figure


def _ring_style(i: int) -> dict[str, Any]:
    """The first training seed's mark is full; further ones are wide rings, so that neither hides the other."""
    return {"markersize": 8} if i == 0 else {"markersize": 13, "fillstyle": "none", "markeredgewidth": 2}


def _zoom(ax: Axes, results: Results, subjects: list[str]) -> None:
    """The neighbourhood of the rings, each with its loss."""
    marks = [(*run, subject) for subject in subjects for run in subject_runs(results, subject)]
    if not marks:
        return
    losses = [loss for _, loss, _ in marks]
    low, high = min(losses), max(losses)
    margin = max(3 * (high - low), 0.02 * abs(high), 1e-6)
    ax.set_ylim(low - margin, high + 1.5 * margin)
    curves = [point for subject in subjects for point in subject_curve(results, subject)]
    near = [tokens for tokens, loss in curves if low - margin <= loss <= high + margin]
    near += [tokens for tokens, _, _ in marks]
    pad = 0.12 * (max(near) - min(near)) or 1.0
    left, right = min(near) - pad, max(near) + pad
    ax.set_xlim(left, right)
    _label_losses(ax, [(tokens, loss, subject_color(results, subject)) for tokens, loss, subject in sorted(marks)])


def _label_losses(ax: Axes, marks: list[tuple[int, float, str]]) -> None:
    """Each ring's loss below and to its left, where a curve that falls has not been; close ones one under the other."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    width, line = 0.1 * (right - left), 0.062 * (top - bottom)
    start = min(loss for _, loss, _ in marks) - 1.3 * line
    placed: list[tuple[int, int]] = []
    for tokens, loss, color in marks:
        level = next(n for n in range(len(marks)) if all(n != m or tokens - x > width for x, m in placed))
        placed.append((tokens, level))
        arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.7, "shrinkA": 2, "shrinkB": 5}
        arrow["relpos"] = (1, 0.5)
        ax.annotate(
            f"{loss:.3f}",
            (tokens, loss),
            (tokens - 0.15 * width, start - level * line),
            ha="right",
            va="center",
            color=color,
            fontsize=9,
            arrowprops=arrow,
        )


def draw_layers(results: Results) -> Figure | None:
    """Explained variance of every layer as bars, one panel a subject and site, both arms side by side."""
    from matplotlib.patches import Patch

    cells = results.rows.cells("explained_variance_per_layer", state="trained", role="main")
    if not cells:
        return None
    labels = ("layer", "explained variance")
    figure, axes, panels = subject_panels(results, cells, labels, sharey=True)
    for ax, site, subject, color in panels:
        for arm, shift in (("crosscoder", -0.2), ("layerwise", 0.2)):
            chosen = [at for at in cells if (at.subject, at.site, at.arm) == (subject, site, arm)]
            for at in sorted(chosen, key=lambda at: at.training_seed or 0)[:1]:
                _layer_bars(ax, cells[at], arm, shift, color)
        ax.grid(False, axis="x")
        if not ax.has_data():
            mark_empty(ax)
    filled = Patch(facecolor=FAINT, edgecolor=FAINT)
    hatched = Patch(facecolor="white", edgecolor=FAINT, hatch="////")
    share_legend(figure, axes, {ARM_NAME["crosscoder"]: filled, ARM_NAME["layerwise"]: hatched})
    return figure


def _layer_bars(ax: Axes, cell: LongTable, arm: str, shift: float, color: str) -> None:
    from matplotlib.ticker import MaxNLocator

    layers = zip(*cell.values("explained_variance_per_layer"), strict=False)
    known = {i + 1 + shift: values for i, values in enumerate(layers) if None not in values}
    ranges = list(map(Estimate.over, known.values()))
    filled = arm == "crosscoder"
    ax.bar(
        list(known),
        [one.value for one in ranges],
        0.38,
        yerr=error_bars(ranges),
        color=color if filled else "white",
        edgecolor=color,
        hatch=None if filled else "////",
        ecolor=INK,
        capsize=2,
        label=ARM_NAME[arm],
    )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))


def draw_splice(results: Results) -> Figure | None:
    """Loss recovered when a site is replaced by its reconstruction, one panel a subject."""
    cells = results.rows.cells("spliced_loss", state="trained", role="main")
    if not cells:
        return None
    subjects = [subject for subject in results.subjects if any(at.subject == subject for at in cells)]
    labels = ("spliced layer", "loss recovered")
    figure, _, panels = subject_panels(results, cells, labels, subjects=subjects, sharey="row")
    for ax, site, subject, color in panels:
        _splice_panel(ax, {at: cell for at, cell in cells.items() if (at.subject, at.site) == (subject, site)}, color)
    return figure


def _splice_panel(ax: Axes, cells: Cells, color: str) -> None:
    names: list[str] = []
    for at, cell in cells.items():
        layers = list(dict.fromkeys(str(row.at.layer) for row in cell.select("spliced_loss")))
        names += [name for name in layers if name not in names]
        places = {name: Estimate.over([float(names.index(name))]) for name in layers}
        ranges = {name: cell.seed_range("loss_recovered", of_known=True, layer=name) for name in layers}
        arm, points = str(at.arm), [(places[name], ranges[name]) for name in layers]
        plot_points(ax, points, color=color, arm=arm, label=ARM_NAME[arm], face=color)
        for name, found in ranges.items():
            if found is not None and splice_harm(cell, name) < SMALL_HARM:
                x, y = [places[name].value], [found.value]
                ax.plot(x, y, MARKER[arm], color=color, markerfacecolor="white", markersize=6, zorder=5)
    if names:
        ticks = sorted({*range(0, len(names), 1 + len(names) // 16), len(names) - 1})
        ax.set_xticks(ticks, [safe_label(names[i], 8) for i in ticks])
        ax.axhline(1, color=FAINT, linewidth=1, linestyle=":")
        ax.margins(y=0.3)
    own_legend(ax, "lower left")


def splice_harm(cell: LongTable, layer: str) -> float:
    """What ablating a spliced layer costs, ablated less clean loss in nats a token, on average over the seeds."""
    costs = [row.value - cell.one("clean_loss", seed=row.at.seed) for row in cell.select("ablated_loss", layer=layer)]
    return sum(costs) / len(costs)


PICTURES: dict[str, Callable[[Results], Figure | None]] = {
    "loss": draw_loss,
    "layers": draw_layers,
    "splice": draw_splice,
}
