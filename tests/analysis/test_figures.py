"""The report's pictures: what they draw, where, and in which words."""

from __future__ import annotations

import itertools
from typing import Any

from matplotlib.text import Text
from study_results import make_results

from crosscoder.analysis import model_figures
from crosscoder.analysis.tables import subject_table

RUNS = {"A": ((307_200, 2.64), (430_080, 2.62)), "B": ((530_432, 2.618), (530_432, 2.615))}


def with_runs() -> dict[str, Any]:
    """A study of two training seeds: A's differ in tokens, B's do not."""
    results = make_results()
    for subject, runs in RUNS.items():
        entry = results["subjects"][subject]
        entry["runs"] = [
            {"seed": i, "tokens": tokens, "held_out_loss": loss, "untrained_loss": 6.9}
            for i, (tokens, loss) in enumerate(runs)
        ]
        entry["tokens"] = sum(tokens for tokens, _ in runs) // 2
        entry["held_out_loss"] = sum(loss for _, loss in runs) / 2
    return results


def shown_boxes(figure, ax) -> dict[str, Any]:
    """The extent in pixels of the words of each annotation of a panel, without its arrow."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    return {text.get_text(): Text.get_window_extent(text, renderer) for text in ax.texts if text.get_text()}


def overlaps(boxes) -> list[tuple[str, str]]:
    return [(a, b) for (a, x), (b, y) in itertools.combinations(boxes.items(), 2) if x.overlaps(y)]


def single_marks(ax) -> list[tuple[float, float, str]]:
    """Marks that stand alone, with how they are filled."""
    lines = [line for line in ax.lines if len(line.get_xdata()) == 1]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0]), line.get_fillstyle()) for line in lines]


def test_each_training_run_has_its_mark_and_its_loss_beside_it():
    figure = model_figures.draw_loss(with_runs())
    expected = [(*run, "none" if i else "full") for runs in RUNS.values() for i, run in enumerate(runs)]
    for ax in figure.axes:
        assert sorted(single_marks(ax)) == sorted(expected)
    boxes = shown_boxes(figure, figure.axes[1])
    assert set(boxes) == {"2.640", "2.620", "2.618", "2.615"}
    assert overlaps(boxes) == []


def test_without_runs_the_mark_is_the_mean_checkpoint():
    results = make_results()
    entry = results["subjects"]["A"]
    assert model_figures.subject_runs(entry) == [(entry["tokens"], entry["held_out_loss"])]
    entry["tokens"] = None
    assert model_figures.subject_runs(entry) == []


def test_the_models_table_shows_every_run():
    rows = {row.cells[0].text: row.cells for row in subject_table(with_runs()).rows}
    assert rows["training tokens"][1].detail == "seeds 307,200; 430,080"
    assert rows["training tokens"][2].detail == ""  # B's runs agree
    assert rows["held-out loss (nats/token)"][2].detail == "seeds 2.618; 2.615"
    assert rows["epochs"][1].detail == ""
