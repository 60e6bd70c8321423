"""The report's pictures: each function draws one from a study's rows, or gives None without data.

A colour is a subject, a line style an arm, a grey square a null. `PICTURES` lists them; their words are in
`templates/words.json`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from crosscoder.measure.fidelity import TARGETS, Currency
from crosscoder.measure.statistics import exponentiate
from crosscoder.report import panels
from crosscoder.report.answer import ARMS, STATES, beside_nulls, joint_site
from crosscoder.report.panels import FAINT, INK, PALETTE, describe
from crosscoder.report.table import WORDS
from crosscoder.results.file import Results
from crosscoder.results.quantities import QUANTITIES
from crosscoder.results.table import COMPARED, SITE_NAME, Estimate, LongTable, Place
from crosscoder.verdict.legs import SITE, Shapes, load, log_room, read_logs
from crosscoder.verdict.rule import CURRENCIES, EQUAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RATIOS = {"load_log_ratio": "Load", "bank_log_ratio": "Features a neuron and layer"}
RATIOS |= {"room_log_ratio": "Crowding of all layers, R"}
"""What is drawn as B over A."""
EQUALLY = {"fvu": "variance", "loss": "loss"}
SPREADS = ("causal_layers", "mean_rho_model", "mean_rho")
WIDTH = 5.0  # inches of the first picture, which a telephone shows whole
SMALLEST, LARGEST = 0.2, 5.0  # of the axis of ratios


class Mark(NamedTuple):
    """One line of a picture: its label, value with interval, single trainings of A and of B, and whether it is real."""

    label: str
    value: Estimate
    trainings: dict[str, list[float]]
    real: bool


def subject_color(results: Results, subject: str | None) -> str:
    """The colour of a subject, the same in every figure."""
    return PALETTE[results.subjects.index(str(subject)) % len(PALETTE)]


def subject_label(results: Results, subject: str | None) -> str:
    """`A (8×64)`: the key with layers and width."""
    n_layers, d_model = (results.of(str(subject), key) for key in ("n_layers", "d_model"))
    return f"{subject} ({n_layers}×{d_model})"


def draw_ratios(results: Results) -> Figure | None:
    """Load, features a neuron and crowding, B over A in both currencies, with single trainings, beside the nulls."""
    if results.verdict is None:
        return None
    shapes = {name: (results.of(name, "n_layers"), results.of(name, "d_model")) for name in COMPARED}
    groups = {said: _ratio_marks(results, key, shapes) for key, said in RATIOS.items()}
    groups = {said: marks for said, marks in groups.items() if marks}
    if not groups:
        return None
    figure, ax = _draw_marks(groups, clip=(SMALLEST, LARGEST))
    ax.axvspan(math.exp(-EQUAL), math.exp(EQUAL), color=PALETTE[2], alpha=0.18, linewidth=0)
    ax.axvline(2, color=PALETTE[1], linewidth=1.2, linestyle="--")
    ax.set(xscale="log", xlim=(SMALLEST, LARGEST))
    panels.plain_ticks(ax.xaxis, (0.25, 0.5, 1, 2, 4))
    describe(ax, None, "B over A")
    return figure


def _ratio_marks(results: Results, key: str, shapes: Shapes) -> list[Mark]:
    """Trained in each currency, then every null."""
    marks = []
    for state in STATES:
        for currency in CURRENCIES:
            real = state == "trained"
            rows = results.rows.select(key, site=SITE, estimator=currency, state=(state, None) if real else state)
            for value in rows.values(key):
                label = f"{WORDS['states'][state]}, {EQUALLY[currency]}"
                single = training_ratios(results.rows, shapes, key, currency) if real else {}
                marks.append(Mark(label, exponentiate(value), single, real))
    return marks


def training_ratios(table: LongTable, shapes: Shapes, key: str, currency: Currency) -> dict[str, list[float]]:
    """B over A with one training of the one and the mean of the other, by which of the two is single."""
    logs = {name: _training_logs(table, shapes, key, name, currency) for name in COMPARED}
    if not all(logs.values()):
        return {}
    mean = {name: math.fsum(values) / len(values) for name, values in logs.items()}
    a, b = COMPARED
    return {
        a: [math.exp(mean[b] - value) for value in logs[a]],
        b: [math.exp(value - mean[a]) for value in logs[b]],
    }


def _training_logs(table: LongTable, shapes: Shapes, key: str, name: str, currency: Currency) -> list[float]:
    arm = "layerwise" if key == "bank_log_ratio" else "crosscoder"
    logs = read_logs(table, name, arm, currency, "trained", load)
    if isinstance(logs, str):
        return []
    if key == "bank_log_ratio":  # a layer's load over its neurons
        return [value - math.log(shapes[name][1]) for value in logs.values()]
    room = log_room(table, name, "trained", "model") if key == "room_log_ratio" else dict.fromkeys(logs, 0.0)
    return [] if isinstance(room, str) else [value - room[t] for t, value in logs.items() if t in room]


def draw_spread(results: Results) -> Figure | None:
    """On how many layers one model's features act, or are written to, beside the nulls."""
    if results.verdict is not None:
        return None
    site, groups = joint_site(results), dict[str, list[Mark]]()
    for key in SPREADS:
        found = beside_nulls(results, key, site=site)
        if "trained" in found:
            marks = [Mark(WORDS["states"][state], one, {}, state == "trained") for state, one in found.items()]
            groups[QUANTITIES[key].words[:1].upper() + QUANTITIES[key].words[1:]] = marks
    if not groups:
        return None
    figure, ax = _draw_marks(groups)
    ax.set_xlim(left=min(1.0, ax.get_xlim()[0]))
    describe(ax, None, f"layers ({SITE_NAME[site]})")
    return figure


def _draw_marks(
    groups: dict[str, list[Mark]], clip: tuple[float, float] = (-math.inf, math.inf)
) -> tuple[Figure, Axes]:
    """A line a mark under the name of its group; what lies beyond `clip` is drawn at its end."""
    n_lines = sum(len(marks) + 1 for marks in groups.values())
    figure, axes = panels.make_panels(1, 1, (WIDTH, 0.9 + 0.27 * n_lines))
    ax, height, names = axes[0][0], n_lines, dict[int, str]()

    def inside(value: float) -> float:
        return min(max(value, clip[0]), clip[1])

    for said, marks in groups.items():
        names[height] = said
        height -= 1
        for mark in marks:
            names[height] = mark.label
            color = INK if mark.real else FAINT
            ends = [inside(mark.value.low), inside(mark.value.high)]
            ax.plot(ends, [height] * 2, color=color, linewidth=2.2 if mark.real else 1.4)
            for subject, values in mark.trainings.items():
                first = subject == COMPARED[0]
                style: dict[str, Any] = {"markersize": 5, "color": PALETTE[not first], "alpha": 0.8, "ls": ""}
                style["markerfacecolor"] = "none" if first else style["color"]
                ax.plot(
                    [inside(one) for one in values], [height + (0.2 if first else -0.2)] * len(values), "o", **style
                )
            shape, size = ("D", 7) if mark.real else ("s", 5)
            ax.plot([inside(mark.value.value)], [height], shape, color=color, markersize=size, zorder=4)
            height -= 1
    ax.set(ylim=(0.3, n_lines + 0.7))
    ax.set_yticks(list(names), list(names.values()))
    for tick in ax.get_yticklabels():
        if tick.get_text() in groups:
            tick.set_fontweight("bold")
    ax.tick_params(axis="both", labelsize=10.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    return figure, ax


def draw_loads(results: Results) -> Figure | None:
    """Load against variance unexplained, by arm: a line a training, from which loads at common fidelity are read."""
    where = {"state": "trained", "site": SITE, "role": ("main", "k"), "subject": COMPARED}
    cells = results.rows.cells("entropy_load", **where)
    if results.verdict is None or len({at.k for at in cells}) < 3:
        return None
    figure, axes = panels.make_panels(2, 1, (WIDTH, 6.6), sharex=True)
    for ax, (arm, look) in zip(axes.flat, ARMS.items()):
        own = {at: cell for at, cell in cells.items() if at.arm == arm}
        for name, t in sorted({(str(at.subject), at.training_seed or 0) for at in own}):
            line = sorted((at for at in own if (at.subject, at.training_seed) == (name, t)), key=lambda at: at.k or 0)
            points = [(_unexplained(own[at]), own[at].known_range("entropy_load")) for at in line]
            color, label = subject_color(results, name), subject_label(results, name)
            panels.plot_points(ax, points, color=color, arm=arm, label=label, size=4.5, in_order=True)
        for target in TARGETS["fvu"]:
            ax.axvline(target, color=FAINT, linewidth=1, linestyle=":")
        ax.set(xscale="log", yscale="log")
        panels.plain_ticks(ax.xaxis, (0.02, 0.05, 0.1, 0.2, 0.5))
        low, high = ax.get_ylim()
        panels.plain_ticks(ax.yaxis, [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500) if low <= tick <= high])
        a_layer = " (of a layer)" if arm == "layerwise" else ""
        describe(ax, look.name, "variance unexplained", f"load, nats a token{a_layer}")
    panels.share_legend(figure)
    return figure


def _unexplained(cell: LongTable) -> Estimate | None:
    found = cell.known_range("explained_variance", layer=None)
    return None if found is None or found.high >= 1 else Estimate(1 - found.value, 1 - found.high, 1 - found.low)


def draw_profiles(results: Results) -> Figure | None:
    """Layer profiles as heat maps: a row of pixels is one feature, sorted by its centre of mass.

    Colours are shares times layers, so that an even feature has the same colour in every shape.
    """
    from matplotlib.colors import PowerNorm

    where = {"arm": "crosscoder", "role": "main", "state": "trained", "site": joint_site(results)}
    cells = results.rows.cells("profile_heatmap", **where)
    first: dict[str | None, Place] = {}
    for at in sorted(cells, key=lambda at: at.training_seed or 0):
        if any(cells[at].values("profile_heatmap")):
            first.setdefault(at.subject, at)
    if not first:
        return None
    figure, axes = panels.make_panels(1, len(first), (2.4 * len(first) + 1.2, 3.6))
    names = {name: layer_labels(cells[at]) for name, at in first.items()}
    deepest = max(map(len, names.values()))
    image: Any = None
    for ax, (name, at) in zip(axes[0], first.items()):
        ax.grid(False)
        shown = [[share * len(names[name]) for share in shares] for shares in cells[at].one("profile_heatmap")]
        norm = PowerNorm(0.5, vmin=0, vmax=deepest)
        image = ax.imshow(shown, aspect="auto", cmap="YlGnBu", norm=norm, interpolation="nearest")
        ticks = range(0, len(names[name]), 1 + (len(names[name]) - 1) // 16)
        ax.set_xticks(ticks, [panels.safe_label(names[name][i], 8) for i in ticks])
        describe(ax, subject_label(results, name), "layer", "feature, sorted")
    ticks = [tick for tick in (0, 0.25, 1, 2, 4, 8, 16, 32, 64) if tick <= deepest]
    bar = figure.colorbar(image, ax=list(axes[0]), shrink=0.8, pad=0.02, ticks=ticks)
    panels.plain_ticks(bar.ax.yaxis, ticks)
    bar.set_label("share × layers (1 = even)", fontsize=9.5, color=INK)
    return figure


def layer_labels(cell: LongTable) -> Sequence[str]:
    """The label of each layer that a dictionary spans."""
    return [str(label) for label in next(iter(cell.values("layers")), [])]


PICTURES: dict[str, Callable[[Results], Figure | None]] = {
    "ratios": draw_ratios,
    "spread": draw_spread,
    "loads": draw_loads,
    "profiles": draw_profiles,
}
