"""The report's pictures of features: each function draws one from a study's rows, or returns None without data.

A colour is a subject and a line style is an arm, in every picture. `PICTURES` lists them in the report's
order; their words are in `templates/words.json`. `model_figures` has those of losses and layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from crosscoder.report.answer import ARM_NAME, SITE_NAME
from crosscoder.report.panels import (
    FAINT,
    INK,
    PALETTE,
    axis_labels,
    axis_title,
    log_axis,
    make_panels,
    mark_empty,
    own_legend,
    plain_ticks,
    plot_points,
    safe_label,
    share_legend,
)
from crosscoder.results.file import Results
from crosscoder.results.table import Estimate, LongTable, Place

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cells = dict[Place, LongTable]


def subject_color(results: Results, subject: str | None) -> str:
    """The colour of a subject, the same in every figure."""
    return PALETTE[results.subjects.index(str(subject)) % len(PALETTE)]


def subject_label(results: Results, subject: str | None) -> str:
    """`A (8 x 64)`: the key with layers and width, in characters that every font has."""
    n_layers, d_model = (results.of(str(subject), key) for key in ("n_layers", "d_model"))
    return f"{subject} ({n_layers}×{d_model})"


def known_range(cell: LongTable, key: str) -> Estimate | None:
    """Mean and range over a dictionary's seeds, those left out for which it is undefined."""
    return cell.seed_range(key, of_known=True)


def swept_site(cells: Cells) -> str:
    """The site where one arm of one subject has the most dictionary sizes; block writes if none has more."""
    sizes: dict[tuple[Any, ...], set[int | None]] = {}
    for at in cells:
        sizes.setdefault((at.site, at.subject, at.arm), set()).add(at.n_features)
    return max(sizes, key=lambda key: (len(sizes[key]), key[0] == "write"))[0]


def draw_counts(results: Results) -> Figure | None:
    """Feature count against dictionary size, both arms, all subjects: alive (left) and distinct (right).

    The site is the one with a sweep of sizes. Marks of later subjects are smaller and in front, so that all show where
    they coincide.
    """
    where: dict[str, Any] = {"state": "trained", "role": ("main", "size")}
    every = results.rows.cells("alive", **where)
    if not every:
        return None
    site = swept_site(every)
    figure, axes = make_panels(1, 2, (10, 4.6), sharex=True, sharey=True)
    seen: list[float] = []
    size = {subject: 4.0 + 3 * i for i, subject in enumerate(reversed(results.subjects))}
    for ax, of_crosscoder, of_bank in zip(axes[0], ("alive", "distinct"), ("alive", "merged"), strict=True):
        for subject in results.subjects:
            for arm, quantity in (("crosscoder", of_crosscoder), ("layerwise", of_bank)):
                chosen = results.rows.cells("alive", subject=subject, arm=arm, site=site, **where)
                shown = ("dictionary_size", quantity)
                _plot_sweep(ax, results, chosen, "n_features", shown, size[subject])
                found = [known_range(cell, key) for cell in chosen.values() for key in shown]
                seen += [one.value for one in found if one is not None and one.value > 0]
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
    axis_title(axes[0][0], f"{SITE_NAME[site].capitalize()}: alive features")
    axis_title(axes[0][1], f"{SITE_NAME[site].capitalize()}: distinct (duplicates joined, chains merged)")
    axis_labels(axes[0][0], "dictionary size (features)", "features counted")
    axis_labels(axes[0][1], "dictionary size (features)", None)
    share_legend(figure, axes)
    return figure


def _plot_sweep(ax: Axes, results: Results, cells: Cells, swept: str, axes: tuple[str, str], size: float = 6) -> None:
    """The cells of one subject and arm: a line joins those of one training seed only, in the order of what is swept."""
    for training_seed in sorted({at.training_seed or 0 for at in cells}):
        chosen = sorted((at for at in cells if at.training_seed == training_seed), key=lambda at: getattr(at, swept))
        points = [(known_range(cells[at], axes[0]), known_range(cells[at], axes[1])) for at in chosen]
        subject, arm = chosen[0].subject, str(chosen[0].arm)
        label = f"{subject_label(results, subject)}, {ARM_NAME[arm]}"
        color = subject_color(results, subject)
        plot_points(ax, points, color=color, arm=arm, label=label, size=size, in_order=True)


def _rule_band(ax: Axes, cells: Cells, color: str) -> None:
    """A pale bar from the smallest to the largest merged count over the merging rules."""
    for cell in cells.values():
        size, low, high = (known_range(cell, q) for q in ("dictionary_size", "merged_low", "merged_high"))
        if size and low and high:
            ax.plot([size.value] * 2, [low.low, high.high], color=color, alpha=0.22, linewidth=7, solid_capstyle="butt")


def main_spread(results: Results, **where: Any) -> LongTable | None:
    """The first training seed's main crosscoder; None if there is none."""
    cells = results.rows.cells("mean_rho", arm="crosscoder", role="main", **where)
    return cells[min(cells, key=lambda at: at.training_seed or 0)] if cells else None


def layer_labels(cell: LongTable) -> list[str]:
    """The label of each layer that a dictionary spans."""
    return [str(label) for label in next(iter(cell.values("layers")), [])]


def subject_panels(
    results: Results,
    cells: Cells,
    labels: tuple[str, str],
    *,
    subjects: Sequence[str] = (),
    panel: tuple[float, float] = (5, 2.9),
    alone: float = 6.5,
    margin: tuple[float, float] = (0, 0.6),
    **shared: Any,
) -> tuple[Figure, Any, list[tuple[Axes, str, str, str]]]:
    """A panel for each site (rows) and subject (columns; all are the default), labelled on the outside.

    Sizes are in inches; `alone` is the width where there is one subject.

    The figure, its axes, and `(axes, site, subject, colour)` of every panel.
    """
    sites = [site for site in SITE_NAME if any(at.site == site for at in cells)]
    subjects = subjects or results.subjects
    width = panel[0] * len(subjects) if len(subjects) > 1 else alone
    size = (width + margin[0], panel[1] * len(sites) + margin[1])
    figure, axes = make_panels(len(sites), len(subjects), size, **shared)
    panels = []
    for row, site in enumerate(sites):
        for column, subject in enumerate(subjects):
            ax = axes[row][column]
            axis_title(ax, f"{subject_label(results, subject)}, {SITE_NAME[site]}")
            axis_labels(ax, labels[0] if row == len(sites) - 1 else None, labels[1] if column == 0 else None)
            panels.append((ax, site, subject, subject_color(results, subject)))
    return figure, axes, panels


def draw_profiles(results: Results) -> Figure | None:
    """Layer profiles as heat maps: a row of pixels is one feature, sorted by its centre of mass.

    Colours are shares times layers, so that an even feature has the same colour in every shape.
    """
    from matplotlib.colors import PowerNorm

    cells = results.rows.cells("mean_rho", arm="crosscoder", role="main", state="trained")
    found = {at: cell for at, cell in cells.items() if any(cell.values("profile_heatmap"))}
    if not found:
        return None
    subjects = sorted({str(at.subject) for at in found})
    labels = ("layer", "feature, sorted")
    sizes: dict[str, Any] = {"panel": (4.6, 3.5), "alone": 4.6, "margin": (0.9, 0)}
    figure, axes, panels = subject_panels(results, found, labels, subjects=subjects, **sizes)
    deepest = max(len(layer_labels(cell)) for cell in found.values())
    norm = PowerNorm(0.5, vmin=0, vmax=deepest)
    image: Any = None
    for ax, site, subject, _ in panels:
        ax.grid(False)
        cell = main_spread(results, subject=subject, site=site, state="trained")
        if cell is None or not any(cell.values("profile_heatmap")):
            mark_empty(ax)
            continue
        names = layer_labels(cell)
        shown = [[share * len(names) for share in shares] for shares in cell.one("profile_heatmap")]
        image = ax.imshow(shown, aspect="auto", cmap="YlGnBu", norm=norm, interpolation="nearest")
        ticks = list(range(0, len(names), 1 + (len(names) - 1) // 16))
        ax.set_xticks(ticks, [safe_label(names[i], 8) for i in ticks])
    ticks = [tick for tick in (0, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if tick <= deepest]
    bar = figure.colorbar(image, ax=axes.ravel().tolist(), shrink=0.8, pad=0.02, ticks=ticks)
    plain_ticks(bar.ax.yaxis, ticks)
    bar.set_label("share of the feature's squared decoder norm × layers (1 = even)", fontsize=9.5, color=INK)
    bar.ax.tick_params(labelsize=9, colors=INK)
    return figure


def draw_spread(results: Results) -> Figure | None:
    """Histogram of rho / L, trained (filled) against untrained (outline), by site and subject."""
    cells = results.rows.cells("rho_histogram", role="main")
    if not cells:
        return None
    labels = ("ρ / L  (1 = evenly on every layer)", "share of features")
    figure, _, panels = subject_panels(results, cells, labels, sharex=True)
    for ax, site, subject, color in panels:
        states = {s: main_spread(results, subject=subject, site=site, state=s) for s in ("trained", "untrained")}
        drawn = {state: cell for state, cell in states.items() if cell is not None}
        for state, cell in drawn.items():
            _histogram(ax, cell, state, color)
        for n_layers in [len(layer_labels(cell)) for cell in drawn.values()][:1]:
            least = 1 / max(n_layers, 1)
            ax.axvline(least, ymax=0.7, color=INK, linewidth=1, linestyle=":", label=f"1 / L = {least:.3g}, one layer")
        ax.set(xlim=(0, 1.0))
        ax.set_ylim(0, 1.4 * ax.get_ylim()[1])  # the legend has the upper part to itself
        own_legend(ax, "upper left")
    return figure


def _histogram(ax: Axes, cell: LongTable, state: str, color: str) -> None:
    counts = [sum(column) for column in zip(*cell.values("rho_histogram"), strict=True)]
    shares = [value / (sum(counts) or 1) for value in counts]
    edges = [i / len(counts) for i in range(len(counts) + 1)]
    mean = known_range(cell, "mean_rho_share")
    label = f"{state}, mean {mean.value:.2f}" if mean else state
    if state == "trained":
        ax.stairs(shares, edges, fill=True, color=color, alpha=0.55, label=label)
    else:
        ax.stairs(shares, edges, color=INK, linewidth=1.5, linestyle="--", label=label)


def draw_frontier(results: Results) -> Figure | None:
    """Explained variance against L0, counted per token and per token and layer, by site."""
    where: dict[str, Any] = {"state": "trained", "role": ("main", "k")}
    cells = results.rows.cells("explained_variance", **where)
    sites = [site for site in SITE_NAME if any(at.site == site for at in cells)]
    if not sites:
        return None
    figure, axes = make_panels(len(sites), 2, (10, 3.4 * len(sites) + 0.7), sharey="row")
    axis_names = {"l0_token": "active features per token"}
    axis_names["l0_token_layer"] = "active features per token and layer"
    for row, site in enumerate(sites):
        for ax, quantity in zip(axes[row], axis_names, strict=True):
            for subject in results.subjects:
                for arm in ARM_NAME:
                    chosen = results.rows.cells("explained_variance", subject=subject, arm=arm, site=site, **where)
                    _plot_sweep(ax, results, chosen, "k", (quantity, "explained_variance"))
            axis_title(ax, f"{SITE_NAME[site].capitalize()}")
            axis_labels(ax, axis_names[quantity] if row == len(sites) - 1 else None, None)
        axis_labels(axes[row][0], None, "explained variance")
    share_legend(figure, axes)
    return figure


PICTURES: dict[str, Callable[[Results], Figure | None]] = {
    "counts": draw_counts,
    "profiles": draw_profiles,
    "spread": draw_spread,
    "frontier": draw_frontier,
}
