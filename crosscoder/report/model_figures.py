"""The report's pictures of the models: their losses, each layer's explained variance, and what splicing costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from crosscoder.report.figures import (
    ARM_NAME,
    Cell,
    Results,
    select,
    subject_color,
    subject_label,
    subject_panels,
)
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

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMALL_HARM = 0.02  # nats a token: where ablating a site costs less, the share of it that is recovered is noise


def subject_runs(entry: dict[str, Any]) -> list[tuple[int, float]]:
    """`(tokens, held-out loss)` of each training seed's checkpoint, the first seed's first; the means without runs."""
    runs = sorted(entry.get("runs", []), key=lambda run: run["seed"])
    if runs:
        return [(run["tokens"], run["held_out_loss"]) for run in runs]
    known = entry["tokens"] is not None and entry["held_out_loss"] is not None
    return [(entry["tokens"], entry["held_out_loss"])] if known else []


def draw_loss(results: Results) -> Figure | None:
    """Held-out loss of each subject's first run against tokens; rings mark the checkpoints that the study compares."""
    subjects = [s for s in sorted(results["subjects"]) if results["subjects"][s]["curve"]]
    if not subjects:
        return None
    figure, axes = make_panels(1, 2, (11, 4.4))
    for ax in axes[0]:
        for subject in subjects:
            color = subject_color(results, subject)
            curve = sorted(results["subjects"][subject]["curve"], key=lambda point: point["tokens"])
            x, y = [point["tokens"] for point in curve], [point["held_out_loss"] for point in curve]
            label = subject_label(results, subject)
            ax.plot(x, y, color=color, linewidth=1.8, marker=".", markersize=5, label=label)
            for i, (tokens, loss) in enumerate(subject_runs(results["subjects"][subject])):
                ax.plot([tokens], [loss], "o", color=color, **_ring_style(i))
    unit = safe_label(results["subjects"][subjects[0]]["held_out_loss_unit"])
    axis_labels(axes[0][0], "training tokens", f"held-out loss ({unit})")
    axis_labels(axes[0][1], "training tokens", None)
    axis_title(axes[0][0], "Whole training")
    axis_title(axes[0][1], "Around the compared checkpoints")
    _zoom(axes[0][1], results, subjects)
    longest = max(len(subject_runs(results["subjects"][subject])) for subject in subjects)
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
    entries = [results["subjects"][subject] for subject in subjects]
    marks = [(*run, subject) for subject, entry in zip(subjects, entries) for run in subject_runs(entry)]
    if not marks:
        return
    losses = [loss for _, loss, _ in marks]
    low, high = min(losses), max(losses)
    margin = max(3 * (high - low), 0.02 * abs(high), 1e-6)
    ax.set_ylim(low - margin, high + 1.5 * margin)
    near = [p["tokens"] for e in entries for p in e["curve"] if low - margin <= p["held_out_loss"] <= high + margin]
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

    cells = select(results["quality"]["cells"], state="trained", role="main")
    if not cells:
        return None
    labels = ("layer", "explained variance")
    figure, axes, panels = subject_panels(results, cells, sorted(results["subjects"]), labels, sharey=True)
    for ax, site, subject, color in panels:
        for arm, shift in (("crosscoder", -0.2), ("layerwise", 0.2)):
            chosen = select(cells, subject=subject, site=site, arm=arm)
            for cell in sorted(chosen, key=lambda cell: cell["training_seed"])[:1]:
                _layer_bars(ax, cell, shift, color)
        ax.grid(False, axis="x")
        if not ax.has_data():
            mark_empty(ax)
    filled = Patch(facecolor=FAINT, edgecolor=FAINT)
    hatched = Patch(facecolor="white", edgecolor=FAINT, hatch="////")
    share_legend(figure, axes, {ARM_NAME["crosscoder"]: filled, ARM_NAME["layerwise"]: hatched})
    return figure


def _layer_bars(ax: Axes, cell: Cell, shift: float, color: str) -> None:
    from matplotlib.ticker import MaxNLocator

    layers = list(zip(*(seed["explained_variance_per_layer"] for seed in cell["per_seed"]), strict=False))
    ranges = [(sum(v) / len(v), min(v), max(v)) for v in layers]
    x = [i + 1 + shift for i in range(len(ranges))]
    filled = cell["arm"] == "crosscoder"
    ax.bar(
        x,
        [mean for mean, _, _ in ranges],
        0.38,
        yerr=error_bars(ranges),
        color=color if filled else "white",
        edgecolor=color,
        hatch=None if filled else "////",
        ecolor=INK,
        capsize=2,
        label=ARM_NAME[cell["arm"]],
    )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))


def draw_splice(results: Results) -> Figure | None:
    """Loss recovered when a site is replaced by its reconstruction, one panel a subject."""
    cells = [
        cell
        for cell in select(results["quality"]["cells"], state="trained", role="main")
        if any(seed["splice"] and seed["splice"]["sites"] for seed in cell["per_seed"])
    ]
    if not cells:
        return None
    subjects = sorted({cell["subject"] for cell in cells})
    figure, _, panels = subject_panels(results, cells, subjects, ("spliced layer", "loss recovered"), sharey="row")
    for ax, site, subject, color in panels:
        _splice_panel(ax, select(cells, subject=subject, site=site), color)
    return figure


def _splice_panel(ax: Axes, cells: list[Cell], color: str) -> None:
    names: list[str] = []
    for cell in cells:
        ranges, harms = dict(splice_ranges(cell, "loss_recovered")), splice_harms(cell)
        names += [name for name in ranges if name not in names]
        at = {name: (names.index(name),) * 3 for name in ranges}
        plot_points(
            ax,
            [(at[name], ranges[name]) for name in ranges],
            color=color,
            arm=cell["arm"],
            label=ARM_NAME[cell["arm"]],
            face=color,
        )
        noisy = [name for name, value in ranges.items() if value is not None and harms[name] < SMALL_HARM]
        for name in noisy:
            y = [(ranges[name] or (0.0,))[0]]
            ax.plot(at[name][:1], y, MARKER[cell["arm"]], color=color, markerfacecolor="white", markersize=6, zorder=5)
    if names:
        ticks = sorted({*range(0, len(names), 1 + len(names) // 16), len(names) - 1})
        ax.set_xticks(ticks, [safe_label(names[i], 8) for i in ticks])
        ax.axhline(1, color=FAINT, linewidth=1, linestyle=":")
        ax.margins(y=0.3)
    own_legend(ax, "lower left")


def splice_ranges(cell: Cell, quantity: str) -> list[tuple[str, tuple[float, float, float] | None]]:
    """Each spliced site with `(mean, low, high)` of `quantity` over the seeds that have it, in the order seen."""
    values: dict[str, list[float]] = {}
    for seed in cell["per_seed"]:
        for site in (seed["splice"] or {"sites": []})["sites"]:
            known = values.setdefault(site["site"], [])
            known += [] if site[quantity] is None else [site[quantity]]
    return [(name, (sum(v) / len(v), min(v), max(v)) if v else None) for name, v in values.items()]


def splice_harms(cell: Cell) -> dict[str, float]:
    """What ablating each spliced site costs, ablated less clean loss in nats a token, on average over the seeds."""
    costs: dict[str, list[float]] = {}
    for splice in (seed["splice"] for seed in cell["per_seed"] if seed["splice"]):
        for site in splice["sites"]:
            costs.setdefault(site["site"], []).append(site["ablated_loss"] - splice["clean_loss"])
    return {name: sum(values) / len(values) for name, values in costs.items()}


PICTURES: dict[str, Callable[[Results], Figure | None]] = {
    "loss": draw_loss,
    "layers": draw_layers,
    "splice": draw_splice,
}
