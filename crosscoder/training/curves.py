"""The curves of runs: loss, held-out explained variance, L0 and dead share over tokens, several runs on one page.

Everything is read from the runs' own `metrics.jsonl` and `run.json`. `matplotlib` is imported inside the functions.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from crosscoder.foundation.artifact import DamagedArtifactError, read_json, replace_file
from crosscoder.foundation.console import say

METRICS, RUN, CURVES = "metrics.jsonl", "run.json", "curves.png"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
"""Okabe and Ito's, which colour-blind readers can tell apart."""
STYLES = ("-", "--", ":", "-.")
MOST_RUNS = len(COLOURS) * len(STYLES)
PANELS = (
    ("loss", "loss", None, True),
    ("explained variance", "held_out_explained_variance", "explained_variance", False),
    ("L0 (active features of a token)", "held_out_l0", "l0_token", False),
    ("dead share (faint: silent in training)", "held_out_dead_share", "silent_share", False),
)
"""Title, what is held out (with marks), what training batches say of the same (faint), and whether logarithmic."""


class Run(NamedTuple):
    """One run's curves: of each number the tokens and values at which it was logged."""

    name: str
    curves: dict[str, tuple[list[float], list[float]]]


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The run folders among some: each itself, or those in it, such as those of a chain or of `train_many`.

    Raises:
        FileNotFoundError: one is no run and holds none.
    """
    found = []
    for folder in folders:
        inside = [folder] if (folder / METRICS).is_file() else [p.parent for p in sorted(folder.glob(f"*/{METRICS}"))]
        if not inside:
            raise FileNotFoundError(f"{folder} holds no {METRICS}, nor a folder that does; give what train wrote")
        found += inside
    return list(dict.fromkeys(found))


def read_run(folder: Path, name: str = "") -> Run:
    """The curves of a run's folder.

    Raises:
        DamagedArtifactError: a whole line of the metrics is no table of numbers.
    """
    curves: dict[str, tuple[list[float], list[float]]] = {}
    lines, sizes = (folder / METRICS).read_text(encoding="utf-8").splitlines(), _sizes(folder)
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            tokens = float(entry["tokens"])
            if sizes is not None and "silent_features" in entry:
                entry["silent_share"] = entry["silent_features"] / sizes[0]
                entry["l0_token"] = entry["l0"] * sizes[1]
            known = {key: float(value) for key, value in entry.items() if value is not None}
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):  # torn by a process that was killed while writing
                break
            raise DamagedArtifactError(f"{folder / METRICS}, line {number}: {error!r}, expected numbers") from None
        for key, value in known.items():
            at, values = curves.setdefault(key, ([], []))
            at.append(tokens)
            values.append(value)
    return Run(name or folder.resolve().name, curves)


def plot_runs(runs: Sequence[Run]) -> bytes:
    """A PNG of the four panels; the same runs give the same bytes.

    Raises:
        ValueError: no run, or more than can be told apart.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not 0 < len(runs) <= MOST_RUNS:
        raise ValueError(f"{len(runs)} runs on one page; give 1 to {MOST_RUNS}")
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    for ax, (title, held_out, training, is_log) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        ax.set_title(title, fontsize=10.5, loc="left")
        ax.set_xlabel("tokens", fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, color="#E4E4E4", linewidth=0.8)
        for place, run in enumerate(runs):
            look: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "linestyle": STYLES[place // len(COLOURS)]}
            if training in run.curves:
                ax.plot(*run.curves[training], linewidth=1, alpha=0.4, **look)
            if held_out in run.curves:
                marks = {} if training is None else {"marker": "o", "markersize": 4}
                ax.plot(*run.curves[held_out], linewidth=1.6, label=_label(run.name), **marks, **look)
        if is_log and any(value > 0 for run in runs for value in run.curves.get(held_out, ((), ()))[1]):
            ax.set_yscale("log")
        if not ax.has_data():
            ax.text(0.5, 0.5, "not logged", ha="center", transform=ax.transAxes, color="#9A9A9A")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", frameon=False, fontsize=9, ncols=min(4, len(runs)))
    figure.supxlabel("marks: held-out tokens; faint lines: training batches", fontsize=8.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def draw_curves(folder: Path) -> None:
    """Put a run's picture beside its metrics; one that cannot be drawn is said, and costs nothing else."""
    try:
        replace_file(folder / CURVES, plot_runs([read_run(folder)]))
    except Exception as error:  # noqa: BLE001  (a picture is no reason to lose a finished run)
        say(f"warning: {folder / CURVES} was not drawn ({type(error).__name__}: {error})")


def _sizes(folder: Path) -> tuple[int, int] | None:
    """Features of a run's dictionary, of all its layers together, and rows of its code for each token; None where its
    record does not say."""
    try:
        found = read_json(folder / RUN)["config"]
        settings = found["dictionary"]
        n_rows = int(settings["n_layers"]) if found["class"] == "LayerwiseSAE" else 1
        return int(settings["n_features"]) * (1 if settings["shared"] else n_rows), n_rows
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _label(name: str, limit: int = 32) -> str:
    """A name that a figure can show: no mathematics, nothing that is not printed, cut at `limit`."""
    kept = "".join(c if c.isprintable() and ord(c) < 0x250 else "?" for c in name)
    return (kept if len(kept) <= limit else f"{kept[: limit - 1]}…").replace("$", r"\$").lstrip("_")
