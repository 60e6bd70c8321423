"""The report's pictures of models and features: each function draws one from a study's rows, or None without data.

A colour is a subject and a line style is an arm, in every picture. `PICTURES` lists them in the report's
order; their words are in `templates/words.json`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from crosscoder.report import panels
from crosscoder.report.answer import ARMS
from crosscoder.report.panels import FAINT, INK, PALETTE, describe
from crosscoder.report.tables import SMALL_HARM
from crosscoder.results.file import Results
from crosscoder.results.table import SITE_NAME, Estimate, LongTable, Place

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cells = dict[Place, LongTable]
LOSS_UNIT = "nats/token"
# The mark of a training: full for the first, wide rings for further ones, so that neither hides the other.
RINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("compared checkpoint", {"markersize": 8}),
    ("compared checkpoint, further training seeds", {"markersize": 13, "fillstyle": "none", "markeredgewidth": 2}),
)
LABEL: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": 9}  # a loss beside its ring, and the line to it
ARROW = {"arrowstyle": "-", "linewidth": 0.7, "shrinkA": 2, "shrinkB": 5, "relpos": (1, 0.5)}
SHIFT = {"crosscoder": -0.2, "layerwise": 0.2}  # of an arm's bars beside the layer's tick
OUTLINE: dict[str, dict[str, Any]] = {
    "trained": {"fill": True, "alpha": 0.55},
    "untrained": {"color": INK, "linewidth": 1.5, "linestyle": "--"},
}


def subject_color(results: Results, subject: str | None) -> str:
    """The colour of a subject, the same in every figure."""
    return PALETTE[results.subjects.index(str(subject)) % len(PALETTE)]


def subject_label(results: Results, subject: str | None) -> str:
    """`A (8 x 64)`: the key with layers and width, in characters that every font has."""
    n_layers, d_model = (results.of(str(subject), key) for key in ("n_layers", "d_model"))
    return f"{subject} ({n_layers}×{d_model})"


def first_trainings(cells: Cells) -> Cells:
    """The dictionaries of the first training seed that each subject, site, arm and state has."""
    first: dict[tuple[Any, ...], Place] = {}
    for at in sorted(cells, key=lambda at: at.training_seed or 0):
        first.setdefault((at.subject, at.site, at.arm, at.state), at)
    return {at: cells[at] for at in first.values()}


def layer_labels(cell: LongTable) -> list[str]:
    """The label of each layer that a dictionary spans."""
    return [str(label) for label in next(iter(cell.values("layers")), [])]


def _sites(cells: Cells) -> list[str]:
    return [site for site in SITE_NAME if any(at.site == site for at in cells)]


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
    cells = results.rows.cells("alive", state="trained", role=("main", "size"))
    if not cells:
        return None
    site = swept_site(cells)
    cells = {at: cell for at, cell in cells.items() if at.site == site}
    keys = {at: ("dictionary_size", *ARMS[str(at.arm)].counts) for at in cells}
    found = [cell.known_range(key) for at, cell in cells.items() for key in keys[at]]
    seen = [one.value for one in found if one is not None and one.value > 0]
    if not seen:
        return None
    figure, axes = panels.make_panels(1, 2, (10, 4.6), sharex=True, sharey=True)
    size = {subject: 4.0 + 3 * i for i, subject in enumerate(reversed(results.subjects))}
    low, high = min(seen) / 1.3, max(seen) * 1.3
    for i, ax in enumerate(axes[0]):
        shown = {arm: ("dictionary_size", look.counts[i]) for arm, look in ARMS.items()}
        _plot_sweeps(ax, results, cells, "n_features", shown, size)
        ax.plot([low, high], [low, high], color=FAINT, linewidth=1, linestyle=":", label="every feature alive")
        ax.set(xlim=(low, high), ylim=(low, high))
        panels.log_axis(ax.xaxis, seen)
        panels.log_axis(ax.yaxis, seen)
    title = SITE_NAME[site].capitalize()
    describe(axes[0][0], f"{title}: alive features", "dictionary size (features)", "features counted")
    describe(axes[0][1], f"{title}: distinct (duplicates joined, chains merged)", "dictionary size (features)")
    panels.share_legend(figure)
    return figure


def _plot_sweeps(
    ax: Axes, results: Results, cells: Cells, swept: str, shown: dict[str, tuple[str, str]], size: dict[str, float]
) -> None:
    """Two quantities of each arm: a line joins the dictionaries of one training seed, in the order of what is swept.

    `size` is that of each subject's marks.
    """
    for subject, arm in itertools.product(results.subjects, reversed(ARMS)):
        own = {at: cell for at, cell in cells.items() if (at.subject, at.arm) == (subject, arm)}
        label, color = f"{subject_label(results, subject)}, {ARMS[arm].name}", subject_color(results, subject)
        for training_seed in sorted({at.training_seed or 0 for at in own}):
            line = sorted((at for at in own if at.training_seed == training_seed), key=lambda at: getattr(at, swept))
            points = [(own[at].known_range(shown[arm][0]), own[at].known_range(shown[arm][1])) for at in line]
            panels.plot_points(ax, points, color=color, arm=arm, label=label, size=size[subject], in_order=True)
        if shown[arm][1] == "merged":
            _rule_band(ax, own, color)


def _rule_band(ax: Axes, cells: Cells, color: str) -> None:
    """A pale bar from the smallest to the largest merged count over the merging rules."""
    for cell in cells.values():
        size, low, high = (cell.known_range(q) for q in ("dictionary_size", "merged_low", "merged_high"))
        if size and low and high:
            ax.plot([size.value] * 2, [low.low, high.high], color=color, alpha=0.22, linewidth=7, solid_capstyle="butt")


def draw_frontier(results: Results) -> Figure | None:
    """Explained variance against L0, counted per token and per token and layer, by site."""
    cells = results.rows.cells("explained_variance", state="trained", role=("main", "k"))
    sites = _sites(cells)
    if not sites:
        return None
    figure, axes = panels.make_panels(len(sites), 2, (10, 3.4 * len(sites) + 0.7), sharey="row")
    names = {"l0_token": "active features per token", "l0_token_layer": "active features per token and layer"}
    for row, site in zip(axes, sites, strict=True):
        here = {at: cell for at, cell in cells.items() if at.site == site}
        for ax, key in zip(row, names, strict=True):
            shown = dict.fromkeys(ARMS, (key, "explained_variance"))
            _plot_sweeps(ax, results, here, "k", shown, dict.fromkeys(results.subjects, 6.0))
            describe(ax, SITE_NAME[site].capitalize(), names[key] if site == sites[-1] else None)
        describe(row[0], y="explained variance")
    panels.share_legend(figure)
    return figure


def subject_panels(
    results: Results,
    cells: Cells,
    x: str,
    y: str,
    *,
    only_known: bool = False,
    panel: tuple[float, float] = (5, 2.9),
    alone: float = 6.5,
    margin: tuple[float, float] = (0, 0.6),
    **shared: Any,
) -> tuple[Figure, list[tuple[Axes, Cells, str]]]:
    """The figure, and `(axes, own cells, colour)` of a panel for each site (rows) and subject (columns).

    `only_known` leaves out subjects without cells. Sizes are in inches; `alone` is the width for one subject.
    """
    sites, subjects = _sites(cells), [name for name in results.subjects if any(at.subject == name for at in cells)]
    subjects = subjects if only_known else results.subjects
    width = panel[0] * len(subjects) if len(subjects) > 1 else alone
    size = (width + margin[0], panel[1] * len(sites) + margin[1])
    figure, axes = panels.make_panels(len(sites), len(subjects), size, **shared)
    found = []
    for ax, (site, subject) in zip(axes.flat, itertools.product(sites, subjects), strict=True):
        title = f"{subject_label(results, subject)}, {SITE_NAME[site]}"
        describe(ax, title, x if site == sites[-1] else None, y if subject == subjects[0] else None)
        own = {at: cell for at, cell in cells.items() if (at.site, at.subject) == (site, subject)}
        found.append((ax, own, subject_color(results, subject)))
    return figure, found


def draw_profiles(results: Results) -> Figure | None:
    """Layer profiles as heat maps: a row of pixels is one feature, sorted by its centre of mass.

    Colours are shares times layers, so that an even feature has the same colour in every shape.
    """
    from matplotlib.colors import PowerNorm

    cells = first_trainings(results.rows.cells("mean_rho", arm="crosscoder", role="main", state="trained"))
    cells = {at: cell for at, cell in cells.items() if any(cell.values("profile_heatmap"))}
    if not cells:
        return None
    sizes: dict[str, Any] = {"panel": (4.6, 3.5), "alone": 4.6, "margin": (0.9, 0)}
    figure, drawn = subject_panels(results, cells, "layer", "feature, sorted", only_known=True, **sizes)
    deepest = max(len(layer_labels(cell)) for cell in cells.values())
    norm = PowerNorm(0.5, vmin=0, vmax=deepest)
    image: Any = None
    for ax, own, _ in drawn:
        ax.grid(False)
        for cell in own.values():
            names = layer_labels(cell)
            shown = [[share * len(names) for share in shares] for shares in cell.one("profile_heatmap")]
            image = ax.imshow(shown, aspect="auto", cmap="YlGnBu", norm=norm, interpolation="nearest")
            ticks = range(0, len(names), 1 + (len(names) - 1) // 16)
            ax.set_xticks(ticks, [panels.safe_label(names[i], 8) for i in ticks])
    ticks = [tick for tick in (0, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if tick <= deepest]
    bar = figure.colorbar(image, ax=[ax for ax, *_ in drawn], shrink=0.8, pad=0.02, ticks=ticks)
    panels.plain_ticks(bar.ax.yaxis, ticks)
    bar.set_label("share of the feature's squared decoder norm × layers (1 = even)", fontsize=9.5, color=INK)
    bar.ax.tick_params(labelsize=9, colors=INK)
    return figure


def draw_spread(results: Results) -> Figure | None:
    """Histogram of rho / L, trained (filled) against untrained (outline), by site and subject."""
    cells = first_trainings(results.rows.cells("mean_rho", arm="crosscoder", role="main", state=tuple(OUTLINE)))
    cells = {at: cell for at, cell in cells.items() if cell.values("rho_histogram")}
    if not cells:
        return None
    x, y = "ρ / L  (1 = evenly on every layer)", "share of features"
    figure, drawn = subject_panels(results, cells, x, y, sharex=True)
    for ax, own, color in drawn:
        for at, cell in sorted(own.items(), key=lambda one: str(one[0].state)):  # the trained one first
            _histogram(ax, cell, str(at.state), color)
        for n_layers in [len(layer_labels(cell)) for cell in own.values()][:1]:
            least = 1 / max(n_layers, 1)
            ax.axvline(least, ymax=0.7, color=INK, linewidth=1, linestyle=":", label=f"1 / L = {least:.3g}, one layer")
        ax.set(xlim=(0, 1.0))
        ax.set_ylim(0, 1.4 * ax.get_ylim()[1])  # the legend has the upper part to itself
        panels.own_legend(ax, "upper left")
    return figure


def _histogram(ax: Axes, cell: LongTable, state: str, color: str) -> None:
    counts = [sum(column) for column in zip(*cell.values("rho_histogram"), strict=True)]
    shares = [value / (sum(counts) or 1) for value in counts]
    edges = [i / len(counts) for i in range(len(counts) + 1)]
    mean = cell.known_range("mean_rho_share")
    label = f"{state}, mean {mean.value:.2f}" if mean else state
    style: dict[str, Any] = {"color": color, **OUTLINE[state]}
    ax.stairs(shares, edges, label=label, **style)


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
    figure, axes = panels.make_panels(1, 2, (11, 4.4))
    for ax in axes[0]:
        for subject in subjects:
            color = subject_color(results, subject)
            x, y = zip(*subject_curve(results, subject), strict=True)
            label = subject_label(results, subject)
            ax.plot(x, y, color=color, linewidth=1.8, marker=".", markersize=5, label=label)
            for i, (tokens, loss) in enumerate(subject_runs(results, subject)):
                ax.plot([tokens], [loss], "o", color=color, **RINGS[min(i, 1)][1])
    describe(axes[0][0], "Whole training", "training tokens", f"held-out loss ({LOSS_UNIT})")
    describe(axes[0][1], "Around the compared checkpoints", "training tokens")
    _zoom(axes[0][1], results, subjects)
    longest = max(len(subject_runs(results, subject)) for subject in subjects)
    for label, ring in RINGS[:longest]:
        axes[0][0].plot([], [], "o", label=label, color=INK, **ring)
    for ax in axes[0]:
        ax.xaxis.set_major_formatter(panels.token_formatter())
    panels.share_legend(figure)
    return figure


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
        beside, arrow = (tokens - 0.15 * width, start - level * line), {"color": color, **ARROW}
        ax.annotate(f"{loss:.3f}", (tokens, loss), beside, color=color, arrowprops=arrow, **LABEL)


def draw_layers(results: Results) -> Figure | None:
    """Explained variance of every layer as bars, one panel a subject and site, both arms side by side."""
    from matplotlib.patches import Patch

    cells = results.rows.cells("explained_variance_per_layer", state="trained", role="main")
    if not cells:
        return None
    figure, drawn = subject_panels(results, first_trainings(cells), "layer", "explained variance", sharey=True)
    for ax, own, color in drawn:
        for at, cell in own.items():
            _layer_bars(ax, cell, str(at.arm), color)
        ax.grid(False, axis="x")
    panels.share_legend(figure, {arm.name: Patch(**arm.bar(FAINT)) for arm in ARMS.values()})
    return figure


def _layer_bars(ax: Axes, cell: LongTable, arm: str, color: str) -> None:
    from matplotlib.ticker import MaxNLocator

    layers = zip(*cell.values("explained_variance_per_layer"), strict=False)
    known = {i + 1 + SHIFT[arm]: Estimate.over(values) for i, values in enumerate(layers) if None not in values}
    heights, reach = [one.value for one in known.values()], panels.error_bars(known.values())
    ax.bar(list(known), heights, 0.38, yerr=reach, ecolor=INK, capsize=2, label=ARMS[arm].name, **ARMS[arm].bar(color))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))


def draw_splice(results: Results) -> Figure | None:
    """Loss recovered when a site is replaced by its reconstruction, one panel a subject; of the first training."""
    cells = first_trainings(results.rows.cells("spliced_loss", state="trained", role="main"))
    if not cells:
        return None
    figure, drawn = subject_panels(results, cells, "spliced layer", "loss recovered", only_known=True, sharey="row")
    for panel in drawn:
        _splice_panel(*panel)
    return figure


def _splice_panel(ax: Axes, cells: Cells, color: str) -> None:
    names: list[str] = []
    for at, cell in cells.items():
        layers = list(dict.fromkeys(str(row.at.layer) for row in cell.select("spliced_loss")))
        names += [name for name in layers if name not in names]
        places = {name: Estimate.over([float(names.index(name))]) for name in layers}
        ranges = {name: cell.known_range("loss_recovered", layer=name) for name in layers}
        arm, points = str(at.arm), [(places[name], ranges[name]) for name in layers]
        panels.plot_points(ax, points, color=color, arm=arm, label=ARMS[arm].name, face=color)
        for name, found in ranges.items():
            if found is not None and splice_harm(cell, name) < SMALL_HARM:
                x, y = [places[name].value], [found.value]
                ax.plot(x, y, ARMS[arm].marker, color=color, markerfacecolor="white", markersize=6, zorder=5)
    if names:
        ticks = sorted({*range(0, len(names), 1 + len(names) // 16), len(names) - 1})
        ax.set_xticks(ticks, [panels.safe_label(names[i], 8) for i in ticks])
        ax.axhline(1, color=FAINT, linewidth=1, linestyle=":")
        ax.margins(y=0.3)
    panels.own_legend(ax, "lower left")


def splice_harm(cell: LongTable, layer: str) -> float:
    """What ablating a spliced layer costs, ablated less clean loss in nats a token, on average over the seeds."""
    costs = [row.value - cell.one("clean_loss", seed=row.at.seed) for row in cell.select("ablated_loss", layer=layer)]
    return sum(costs) / len(costs)


PICTURES: dict[str, Callable[[Results], Figure | None]] = {
    "counts": draw_counts,
    "profiles": draw_profiles,
    "spread": draw_spread,
    "frontier": draw_frontier,
    "loss": draw_loss,
    "layers": draw_layers,
    "splice": draw_splice,
}
