"""The report's pictures: each function draws one from plain results, or returns None without data for it.

A colour is a subject and a line style is an arm, in every picture. `PICTURES` lists them in the report's
order; their words are in `templates/words.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from crosscoder.analysis.panels import (
    FAINT,
    INK,
    PALETTE,
    axis_labels,
    axis_title,
    error_bars,
    log_axis,
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

Results = dict[str, Any]
Cell = dict[str, Any]

ARM_NAME = {"crosscoder": "crosscoder", "layerwise": "per-layer SAEs"}
SITE_NAME = {"residual": "residual stream", "write": "block writes"}


def subject_color(results: Results, subject: str) -> str:
    """The colour of a subject, the same in every figure."""
    return PALETTE[sorted(results["subjects"]).index(subject) % len(PALETTE)]


def subject_label(results: Results, subject: str) -> str:
    """`A (8 x 64)`: the key with layers and width, in characters that every font has."""
    entry = results["subjects"][subject]
    return f"{subject} ({entry['n_layers']}×{entry['d_model']})"


def seed_range(cell: Cell, quantity: str) -> tuple[float, float, float] | None:
    """`(mean, low, high)` over the dictionary seeds: the summary, else from the seeds; None if undefined."""
    entry = cell["summary"].get(quantity)
    if entry is not None:
        return entry["mean"], entry["low"], entry["high"]
    values = [seed[quantity] for seed in cell["per_seed"] if seed.get(quantity) is not None]
    return (sum(values) / len(values), min(values), max(values)) if values else None


def select(cells: Iterable[Cell], **wanted: Any) -> list[Cell]:
    """The cells whose fields equal `wanted`; a tuple means any of its items."""
    return [
        cell for cell in cells if all(cell[k] in v if isinstance(v, tuple) else cell[k] == v for k, v in wanted.items())
    ]


def draw_counts(results: Results) -> Figure | None:
    """Feature count against dictionary size, both arms, all subjects: alive (left) and distinct (right)."""
    cells = select(results["counts"]["cells"], state="trained", site="residual", role=("main", "size"))
    if not cells:
        return None
    figure, axes = make_panels(1, 2, (10, 4.6), sharex=True, sharey=True)
    seen: list[float] = []
    panels = {"alive": {"crosscoder": "alive", "layerwise": "alive"}}
    panels["distinct"] = {"crosscoder": "distinct", "layerwise": "merged"}
    for ax, quantities in zip(axes[0], panels.values(), strict=True):
        for subject in sorted(results["subjects"]):
            for arm, quantity in quantities.items():
                chosen = select(cells, subject=subject, arm=arm)
                points = [(seed_range(c, "dictionary_size"), seed_range(c, quantity)) for c in chosen]
                label = f"{subject_label(results, subject)}, {ARM_NAME[arm]}"
                plot_points(ax, points, color=subject_color(results, subject), arm=arm, label=label)
                seen += [v[0] for pair in points for v in pair if v is not None and v[0] > 0]
                if quantity == "merged":
                    _rule_band(ax, chosen, subject_color(results, subject))
    if not seen:
        return None
    low, high = min(seen) / 1.3, max(seen) * 1.3
    for ax in axes[0]:
        ax.plot([low, high], [low, high], color=FAINT, linewidth=1, linestyle=":", label="every feature alive")
        ax.set(xlim=(low, high), ylim=(low, high))
        log_axis(ax.xaxis, seen)
        log_axis(ax.yaxis, seen)
    axis_title(axes[0][0], "Alive features")
    axis_title(axes[0][1], "Distinct features (duplicates joined, chains merged)")
    axis_labels(axes[0][0], "dictionary size (features)", "features counted")
    axis_labels(axes[0][1], "dictionary size (features)", None)
    share_legend(figure, axes)
    return figure


def _rule_band(ax: Axes, cells: list[Cell], color: str) -> None:
    """A pale bar from the smallest to the largest merged count over the merging rules."""
    for cell in cells:
        size, low, high = (seed_range(cell, q) for q in ("dictionary_size", "merged_low", "merged_high"))
        if size and low and high:
            ax.plot([size[0]] * 2, [low[1], high[2]], color=color, alpha=0.22, linewidth=7, solid_capstyle="butt")


def _is_main(results: Results, cell: Cell) -> bool:
    where = {key: cell[key] for key in ("subject", "state", "site", "n_features", "k")}
    return bool(select(results["counts"]["cells"], arm="crosscoder", role="main", **where))


def main_spread(results: Results, **wanted: Any) -> Cell | None:
    """The spread cell of the main crosscoder, else the first that matches; None if there is none."""
    cells = select(results["spread"]["cells"], **wanted)
    return next((cell for cell in cells if _is_main(results, cell)), cells[0] if cells else None)


def draw_profiles(results: Results) -> Figure | None:
    """Layer profiles as heat maps: a row of pixels is one feature, sorted by its centre of mass."""
    from matplotlib.colors import PowerNorm

    found = {
        (site, subject): cell
        for site in SITE_NAME
        for subject in sorted(results["subjects"])
        if (cell := main_spread(results, subject=subject, site=site, state="trained")) and cell["heatmap"]
    }
    if not found:
        return None
    sites = [site for site in SITE_NAME if any(key[0] == site for key in found)]
    subjects = sorted({key[1] for key in found})
    figure, axes = make_panels(len(sites), len(subjects), (4.6 * len(subjects) + 0.9, 3.5 * len(sites)))
    image: Any = None
    for row, site in enumerate(sites):
        for column, subject in enumerate(subjects):
            ax, cell = axes[row][column], found.get((site, subject))
            axis_title(ax, f"{subject_label(results, subject)}, {SITE_NAME[site]}")
            ax.grid(False)
            if cell is None:
                mark_empty(ax)
                continue
            norm = PowerNorm(0.5, vmin=0, vmax=1)
            image = ax.imshow(cell["heatmap"], aspect="auto", cmap="YlGnBu", norm=norm, interpolation="nearest")
            step = 1 + (len(cell["layers"]) - 1) // 16
            ticks = list(range(0, len(cell["layers"]), step))
            ax.set_xticks(ticks, [safe_label(cell["layers"][i], 8) for i in ticks])
            axis_labels(ax, "layer" if row == len(sites) - 1 else None, "feature, sorted" if column == 0 else None)
    bar = figure.colorbar(image, ax=axes.ravel().tolist(), shrink=0.8, pad=0.02, ticks=[0, 0.05, 0.125, 0.25, 0.5, 1])
    bar.set_label("share of the feature's squared decoder norm", fontsize=9.5, color=INK)
    bar.ax.tick_params(labelsize=9, colors=INK)
    return figure


def draw_spread(results: Results) -> Figure | None:
    """Histogram of rho / L, trained (filled) against untrained (outline), by site and subject."""
    cells = results["spread"]["cells"]
    sites = [site for site in SITE_NAME if select(cells, site=site)]
    if not sites:
        return None
    subjects = sorted(results["subjects"])
    size = (5 * len(subjects) if len(subjects) > 1 else 6.5, 2.9 * len(sites) + 0.4)
    figure, axes = make_panels(len(sites), len(subjects), size, sharex=True)
    for row, site in enumerate(sites):
        for column, subject in enumerate(subjects):
            ax, color = axes[row][column], subject_color(results, subject)
            axis_title(ax, f"{subject_label(results, subject)}, {SITE_NAME[site]}")
            for state in ("trained", "untrained"):
                cell = main_spread(results, subject=subject, site=site, state=state)
                if cell is not None:
                    _histogram(ax, cell, state, color)
            ax.set(xlim=(0, 1.0))
            ax.set_ylim(bottom=0)
            last = "ρ / L  (1 = evenly on every layer)" if row == len(sites) - 1 else None
            axis_labels(ax, last, "share of features" if column == 0 else None)
            own_legend(ax, "best")
    return figure


def _histogram(ax: Axes, cell: Cell, state: str, color: str) -> None:
    edges = cell["per_seed"][0]["rho_histogram"]["edges"]
    seeds = [s["rho_histogram"] for s in cell["per_seed"] if s["rho_histogram"]["edges"] == edges]
    counts = [sum(column) for column in zip(*(seed["counts"] for seed in seeds), strict=True)]
    shares = [value / (sum(counts) or 1) for value in counts]
    mean = seed_range(cell, "mean_rho_share")
    label = f"{state}, mean {mean[0]:.2f}" if mean else state
    if state == "trained":
        ax.stairs(shares, edges, fill=True, color=color, alpha=0.55, label=label)
    else:
        ax.stairs(shares, edges, color=INK, linewidth=1.5, linestyle="--", label=label)


def draw_frontier(results: Results) -> Figure | None:
    """Explained variance against L0, counted per token and per token and layer, by site."""
    cells = select(results["quality"]["cells"], state="trained", role=("main", "k"))
    sites = [site for site in SITE_NAME if select(cells, site=site)]
    if not sites:
        return None
    figure, axes = make_panels(len(sites), 2, (10, 3.4 * len(sites) + 0.7), sharey="row")
    axis_names = {
        "l0_token": "active features per token",
        "l0_token_layer": "active features per token and layer",
    }
    for row, site in enumerate(sites):
        for ax, quantity in zip(axes[row], axis_names, strict=True):
            for subject in sorted(results["subjects"]):
                for arm in ARM_NAME:
                    chosen = select(cells, subject=subject, arm=arm, site=site)
                    points = [(seed_range(c, quantity), seed_range(c, "explained_variance")) for c in chosen]
                    label = f"{subject_label(results, subject)}, {ARM_NAME[arm]}"
                    plot_points(ax, points, color=subject_color(results, subject), arm=arm, label=label)
            axis_title(ax, f"{SITE_NAME[site].capitalize()}")
            axis_labels(ax, axis_names[quantity] if row == len(sites) - 1 else None, None)
        axis_labels(axes[row][0], None, "explained variance")
    share_legend(figure, axes)
    return figure


def draw_loss(results: Results) -> Figure | None:
    """Held-out loss of each subject against tokens; a ring marks the pair that the study compares."""
    subjects = [s for s in sorted(results["subjects"]) if results["subjects"][s]["curve"]]
    if not subjects:
        return None
    figure, axes = make_panels(1, 2, (10, 4.0))
    for column, ax in enumerate(axes[0]):
        for subject in subjects:
            entry, color = results["subjects"][subject], subject_color(results, subject)
            curve = sorted(entry["curve"], key=lambda point: point["tokens"])
            tokens = [point["tokens"] for point in curve]
            loss = [point["held_out_loss"] for point in curve]
            label = subject_label(results, subject)
            ax.plot(tokens, loss, color=color, linewidth=1.8, marker=".", markersize=5, label=label)
            if entry["tokens"] is not None and entry["held_out_loss"] is not None:
                _ring(ax, entry, color, annotate=column == 1)
    unit = safe_label(results["subjects"][subjects[0]]["held_out_loss_unit"])
    axis_labels(axes[0][0], "training tokens", f"held-out loss ({unit})")
    axis_labels(axes[0][1], "training tokens", None)
    axis_title(axes[0][0], "Whole training")
    axis_title(axes[0][1], "Around the compared checkpoints")
    _zoom(axes[0][1], results, subjects)
    if any(results["subjects"][subject]["held_out_loss"] is not None for subject in subjects):
        ring = {"markersize": 11, "fillstyle": "none", "markeredgewidth": 2, "color": FAINT}
        axes[0][0].plot([], [], "o", label="compared checkpoint", **ring)
    for ax in axes[0]:
        ax.xaxis.set_major_formatter(token_formatter())
    share_legend(figure, axes)
    return figure


def _ring(ax: Axes, entry: dict[str, Any], color: str, *, annotate: bool) -> None:
    x, y = entry["tokens"], entry["held_out_loss"]
    ax.plot([x], [y], "o", markersize=13, fillstyle="none", markeredgewidth=2, color=color)
    if annotate:
        ax.axhline(y, color=color, linewidth=0.9, linestyle=":")
        ax.annotate(f"{y:.3f}", (x, y), (0, 11), textcoords="offset points", ha="center", color=color, fontsize=9)


def _zoom(ax: Axes, results: Results, subjects: list[str]) -> None:
    entries = [results["subjects"][subject] for subject in subjects]
    marks = [e["held_out_loss"] for e in entries if e["held_out_loss"] is not None]
    lowest = min(point["held_out_loss"] for e in entries for point in e["curve"])
    if not marks:
        return
    low, high = min(lowest, *marks), max(marks)
    margin = max(high - low, 0.02 * abs(high), 1e-6)
    ax.set_ylim(low - 0.5 * margin, high + 1.5 * margin)
    inside = [p["tokens"] for e in entries for p in e["curve"] if p["held_out_loss"] <= high + 1.5 * margin]
    inside += [e["tokens"] for e in entries if e["tokens"] is not None]
    if inside and max(inside) > min(inside):
        pad = 0.08 * (max(inside) - min(inside))
        ax.set_xlim(min(inside) - pad, max(inside) + pad)


def draw_layers(results: Results) -> Figure | None:
    """Explained variance of every layer as bars, one panel a subject and site, both arms side by side."""
    from matplotlib.patches import Patch

    cells = select(results["quality"]["cells"], state="trained", role="main")
    sites = [site for site in SITE_NAME if select(cells, site=site)]
    if not sites:
        return None
    subjects = sorted(results["subjects"])
    size = (5 * len(subjects) if len(subjects) > 1 else 6.5, 2.8 * len(sites) + 0.6)
    figure, axes = make_panels(len(sites), len(subjects), size, sharey=True)
    for row, site in enumerate(sites):
        for column, subject in enumerate(subjects):
            ax, color = axes[row][column], subject_color(results, subject)
            axis_title(ax, f"{subject_label(results, subject)}, {SITE_NAME[site]}")
            for arm, shift in (("crosscoder", -0.2), ("layerwise", 0.2)):
                for cell in select(cells, subject=subject, site=site, arm=arm)[:1]:
                    _layer_bars(ax, cell, shift, color)
            last = "layer" if row == len(sites) - 1 else None
            axis_labels(ax, last, "explained variance" if column == 0 else None)
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
    sites = [site for site in SITE_NAME if select(cells, site=site)]
    size = (5 * len(subjects) if len(subjects) > 1 else 6.5, 2.9 * len(sites) + 0.6)
    figure, axes = make_panels(len(sites), len(subjects), size, sharey="row")
    for row, site in enumerate(sites):
        for column, subject in enumerate(subjects):
            ax = axes[row][column]
            _splice_panel(ax, select(cells, subject=subject, site=site), subject_color(results, subject))
            axis_title(ax, f"{subject_label(results, subject)}, {SITE_NAME[site]}")
            last = "spliced layer" if row == len(sites) - 1 else None
            axis_labels(ax, last, "loss recovered" if column == 0 else None)
    return figure


def _splice_panel(ax: Axes, cells: list[Cell], color: str) -> None:
    names: list[str] = []
    for cell in cells:
        ranges = dict(splice_ranges(cell, "loss_recovered"))
        names += [name for name in ranges if name not in names]
        points = [((names.index(n), names.index(n), names.index(n)), v) for n, v in ranges.items()]
        plot_points(ax, points, color=color, arm=cell["arm"], label=ARM_NAME[cell["arm"]])
    if names:
        ticks = sorted({*range(0, len(names), 1 + len(names) // 16), len(names) - 1})
        ax.set_xticks(ticks, [safe_label(names[i], 8) for i in ticks])
        ax.axhline(1, color=FAINT, linewidth=1, linestyle=":")
        ax.margins(y=0.3)
    own_legend(ax, "lower left")


def splice_ranges(cell: Cell, quantity: str) -> list[tuple[str, tuple[float, float, float]]]:
    """Each spliced site with `(mean, low, high)` of `quantity` over the seeds, in the order seen."""
    values: dict[str, list[float]] = {}
    for seed in cell["per_seed"]:
        for site in (seed["splice"] or {"sites": []})["sites"]:
            values.setdefault(site["site"], []).append(site[quantity])
    return [(name, (sum(v) / len(v), min(v), max(v))) for name, v in values.items()]


PICTURES: dict[str, Callable[[Results], Figure | None]] = {
    "counts": draw_counts,
    "profiles": draw_profiles,
    "spread": draw_spread,
    "frontier": draw_frontier,
    "loss": draw_loss,
    "layers": draw_layers,
    "splice": draw_splice,
}
