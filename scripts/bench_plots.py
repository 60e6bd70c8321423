"""The benchmarks' pictures: time against one letter of the shape, and the roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_common import Limits


def pyplot_for_files() -> Any:
    """matplotlib's pyplot, drawing to files alone; None, said aloud, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "crosscoder"
    import matplotlib.pyplot as plt

    return plt


def draw_sweep(
    path: Path, letter: str, values: Sequence[int], curves: Mapping[str, Sequence[float | None]], title: str
) -> None:
    """Milliseconds against one letter of the shape; curves whose name holds `floor` or `sum` are dashed."""
    plt = pyplot_for_files()
    if plt is None:
        return
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, ms in curves.items():
        points = [(value, y) for value, y in zip(values, ms, strict=True) if y is not None]
        style = "--" if "floor" in name or "sum" in name else "-"
        axes.plot([x for x, _ in points], [y for _, y in points], style, marker="o", markersize=3, label=name)
    axes.set(xscale="log", yscale="log", xlabel=letter, ylabel="ms a step", title=title)
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_roofline(path: Path, limits: Limits, points: Sequence[tuple[str, float, float]], title: str) -> None:
    """Achieved FLOP/s against FLOP a byte, under the measured limits; a point is (name, FLOP a byte, FLOP/s)."""
    plt = pyplot_for_files()
    if plt is None:
        return
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    drawn = [point for point in points if point[1] > 0 and point[2] > 0]
    low, high = min([0.05, *(x for _, x, _ in drawn)]), max([1e4, *(x for _, x, _ in drawn)])
    grid = [low * (high / low) ** (i / 99) for i in range(100)]
    for name, rate in limits.flop.items():
        axes.plot(grid, [min(rate, limits.bandwidth * x) / 1e9 for x in grid], label=f"limit, {name} product")
    for index, (name, x, y) in enumerate(drawn):
        axes.plot(x, y / 1e9, "o", color=f"C{(index + 2) % 10}", markersize=4)
        axes.annotate(name, (x, y / 1e9), fontsize=7, xytext=(4, -3), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="GFLOP/s", title=title)
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
