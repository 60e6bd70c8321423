"""The report's pictures: what they draw, where, and in which words."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from committed import PAIR, SINGLE, change, first_seeds, keep, with_rows
from matplotlib.text import Text

from crosscoder.report import figures
from crosscoder.report.answer import answer, known_of
from crosscoder.report.panels import make_panels, plot_points
from crosscoder.report.tables import TABLES, subject_table
from crosscoder.report.verdict_figures import draw_verdict
from crosscoder.results.file import Results
from crosscoder.results.table import Estimate, Place, Row


def two(results: Results = PAIR) -> Results:
    """The study without C."""
    return keep(results, lambda row: row.at.subject != "C")


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


def joined(ax) -> list[list[float]]:
    """The x of each line of a panel that has error bars."""
    containers = [container for container in ax.containers if hasattr(container, "lines")]
    return [list(container.lines[0].get_xdata()) for container in containers]


def test_each_training_run_has_its_mark_and_its_loss_beside_it():
    figure = figures.draw_loss(PAIR)
    runs = [(t, loss, "none" if i else "full") for s in "ABC" for i, (t, loss) in enumerate(runs_of(s))]
    for ax in figure.axes:
        assert sorted(single_marks(ax)) == sorted(runs)
    boxes = shown_boxes(figure, figure.axes[1])
    assert set(boxes) == {f"{loss:.3f}" for _, loss, _ in runs}
    assert overlaps(boxes) == []


def runs_of(subject: str) -> list[tuple[int, float]]:
    found = figures.subject_runs(PAIR, subject)
    assert len(found) == 2
    return found


def test_a_model_without_training_seeds_has_the_mark_of_its_one_checkpoint():
    assert figures.subject_runs(SINGLE, "S") == []  # tokens unknown
    known = with_rows(SINGLE, [*SINGLE.rows, Row(Place(subject="S"), "training_tokens", 1000)])
    assert figures.subject_runs(known, "S") == [(1000, SINGLE.of("S", "held_out_loss"))]


def test_the_models_table_shows_every_run():
    rows = {row.cells[0].text: row.cells for row in subject_table(PAIR).rows}
    assert rows["training tokens"][1].text == "368,640"
    assert rows["training tokens"][1].detail == "seeds 307,200; 430,080"
    assert rows["training tokens"][2].detail == ""  # B's runs agree
    assert rows["held-out loss (nats/token)"][1].detail == "seeds 3.641; 3.622"
    assert rows["epochs"][1].detail == ""


@pytest.mark.parametrize(("trigram", "said"), [(3.0, "none is"), (3.7, "1 are"), (9.0, "all are")])
def test_losses_are_said_beside_tables_of_the_text_where_those_were_counted(trigram, said):
    losses = sorted(known_of(PAIR, name, "held_out_loss") for name in PAIR.subjects)
    tables = {"bigram_loss": 9.5, "trigram_loss": trigram if trigram != 3.7 else math.nextafter(losses[0], 9)}
    counted = [
        Row(Place(subject=name, training_seed=0), key, value) for name in PAIR.subjects for key, value in tables.items()
    ]
    known = [row for row in PAIR.rows if row.key not in tables]
    assert "table" not in answer(with_rows(PAIR, known))[1]
    found = with_rows(PAIR, [*known, *counted])
    assert f"{said} better than a trigram table" in answer(found)[1]
    assert "loss of a bigram table (nats/token)" in {row.cells[0].text for row in subject_table(found).rows}


def with_points(*points: tuple[Any, str, float | None]) -> Results:
    """A study whose trained points are these alone: site, subject and debiased d_eff."""
    others = [row for row in two().rows if row.key not in ("d_eff_debiased", "d_eff_weighted")]
    rows = [
        Row(Place(subject=subject, training_seed=i, state="trained", site=site), "d_eff_debiased", value)
        for i, (site, subject, value) in enumerate(points)
    ]
    return with_rows(PAIR, [*others, *rows])


def test_reference_lines_start_at_the_block_writes_alone():
    writes = [("write", "B", 32.0), ("write", "B", 32.0), ("write", "A", 60.0)]
    expected = [line.get_ydata()[0] for line in slopes(draw_verdict(with_points(*writes)).axes[1])]
    assert expected == pytest.approx([0.25] * 3)
    mixed = draw_verdict(with_points(*writes, ("residual", "B", 4.0), ("residual", "A", None)))
    assert [line.get_ydata()[0] for line in slopes(mixed.axes[1])] == pytest.approx(expected)
    only = draw_verdict(with_points(("residual", "B", 16.0), ("residual", "A", 16.0)))
    assert [line.get_ydata()[0] for line in slopes(only.axes[1])] == pytest.approx([0.125] * 3)


def slopes(ax) -> list[Any]:
    return [line for line in ax.lines if len(line.get_xdata()) == 2]


def test_what_was_not_measured_is_said_left_of_the_panel():
    one = Estimate(1.0, 0.9, 1.1)
    values = {
        ("write", "load_debiased", "trained"): one,
        ("write", "load_debiased", "untrained"): None,
        ("write", "load_corrected", "trained"): None,
        ("write", "load_corrected", "untrained"): one,
        ("residual", "load_weighted", "trained"): None,
        ("residual", "load_weighted", "untrained"): None,
    }
    others = [row for row in PAIR.rows if row.key != "ratio"]
    rows = [Row(Place(state=state, site=site, estimator=e), "ratio", v) for (site, e, state), v in values.items()]
    figure = draw_verdict(with_rows(PAIR, [*others, *rows]))
    boxes = shown_boxes(figure, figure.axes[0])
    assert set(boxes) == {
        "block writes: untrained not measured",
        "block writes: trained not measured",
        "residual stream: not measured",
    }
    edge = figure.axes[0].get_window_extent().x0
    assert all(0 < box.x0 < box.x1 < edge for box in boxes.values())


def test_counts_are_drawn_on_the_site_that_has_sizes():
    def title(results: Results) -> str:
        return figures.draw_counts(results).axes[0].get_title(loc="left")

    assert title(PAIR) == "Block writes: alive features"  # where the sweep is
    residual = change_site(keep(PAIR, lambda row: row.at.role != "k"))
    assert title(residual) == "Residual stream: alive features"
    assert title(keep(PAIR, lambda row: row.at.site != "write")) == "Residual stream: alive features"


def change_site(results: Results) -> Results:
    """The study with both sites exchanged."""
    other: dict[Any, Any] = {"residual": "write", "write": "residual", None: None}
    return with_rows(results, [replace(row, at=replace(row.at, site=other[row.at.site])) for row in results.rows])


def test_marks_at_one_place_all_show():
    def wanted(row: Row) -> bool:
        return row.at.k is None or (row.at.arm, row.at.role, row.at.training_seed) == ("crosscoder", "main", 0)

    results = change(keep(two(), wanted), "alive", 150)
    ax = figures.draw_counts(results).axes[0]
    drawn = [container.lines[0] for container in ax.containers]
    assert len({(*line.get_xdata(), *line.get_ydata()) for line in drawn}) == 1
    sizes = [line.get_markersize() for line in drawn]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(drawn) == 2


@pytest.mark.parametrize(("draw", "n_joined"), [(figures.draw_frontier, 5), (figures.draw_counts, 4)])
def test_lines_join_one_training_seed_in_order(draw, n_joined):
    titled = [ax for ax in draw(two()).axes if ax.get_title(loc="left").startswith("Block writes")]
    found = joined(titled[0])
    assert len(found) >= 2 * 2 + 2  # two trainings of each crosscoder, and the banks
    assert max(map(len, found)) == n_joined  # a sweep, of the first training
    assert all(x == sorted(set(x)) for x in found)  # a second training would stand at the same size or k


def test_an_even_feature_has_one_colour_in_every_shape():
    def heatmap(row: Row) -> list[list[float]]:
        n_layers = len(row.value[0])
        return [[1 / n_layers] * n_layers, [1.0] + [0.0] * (n_layers - 1)]

    figure = figures.draw_profiles(change(two(), "profile_heatmap", heatmap))
    images = [ax.images[0] for ax in figure.axes if ax.images]
    assert {image.get_array().shape for image in images} == {(2, 8), (2, 2)}
    assert len({image.to_rgba(image.get_array()[0, 0]) for image in images}) == 1
    assert {float(image.get_array().max()) for image in images} == {8.0, 2.0}
    assert len({image.get_clim() for image in images}) == 1
    bar = next(ax for ax in figure.axes if "1 = even" in ax.get_ylabel())
    assert [tick.get_text() for tick in bar.get_yticklabels()] == ["0", "0.25", "0.5", "1", "2", "4", "8"]


def test_the_smallest_spread_of_each_shape_is_marked():
    axes = figures.draw_spread(two()).axes
    least = {ax.get_title(loc="left")[0]: [line.get_xdata()[0] for line in ax.lines] for ax in axes}
    assert least == {"A": [1 / 8], "B": [1 / 2]}


def test_spreads_are_of_the_first_training_seed():
    results = with_rows(PAIR, list(reversed(PAIR.rows.rows)))
    assert {at.training_seed for at in results.rows.cells("mean_rho")} == {0, 1}
    assert {at.training_seed for at in figures.first_trainings(results.rows.cells("mean_rho"))} == {0}


def with_costs(costs: dict[str, float]) -> Results:
    """The splices of the first training seed; ablating a layer costs 1 nat, or what is told."""
    clean = {row.at.subject: row.value for row in PAIR.rows.select("clean_loss", site="write", arm="crosscoder")}
    return change(two(), "ablated_loss", lambda row: clean[row.at.subject] + costs.get(row.at.layer, 1.0))


def test_recovery_of_a_loss_that_ablation_hardly_costs_is_drawn_hollow():
    ax = figures.draw_splice(with_costs({"2": 0.019, "3": 0.021})).axes[0]
    marks = [line for line in ax.lines if len(line.get_xdata()) == 1]
    assert [(line.get_xdata()[0], line.get_markerfacecolor()) for line in marks] == [(1, "white")] * 2  # both arms
    through = [container.lines[0] for container in ax.containers]
    assert all(mark.get_ydata()[0] in line.get_ydata() for mark, line in zip(marks, through, strict=True))
    assert all(line.get_markerfacecolor() != "white" for line in through)


def test_recovery_that_is_undefined_leaves_a_gap():
    results = change(with_costs({}), "loss_recovered", None, layer="2")
    ax = figures.draw_splice(results).axes[0]
    assert all(1 not in container.lines[0].get_xdata() for container in ax.containers)
    row = TABLES["splice"](results).rows[1]
    assert row.cells[4].text == "2"
    assert row.cells[-2].text == "–"
    assert row.cells[-1].text != "–"


def test_the_table_of_splices_says_what_they_are_of():
    note = TABLES["splice"](first_seeds(PAIR)).note
    assert note.startswith("Splices are of the first training seed's first dictionary seed;")
    assert "mean ablation, on 4,032 tokens" in note
    assert TABLES["splice"](PAIR).note.startswith("Splices are of training seeds 0, 1, dictionary seeds 0, 1;")


def test_points_are_joined_by_x_unless_they_have_an_order():
    _, axes = make_panels(1, 1, (3, 3))
    points = [(Estimate(x, x, x), Estimate(1.0, 1.0, 1.0)) for x in (3.0, 1.0, 2.0)]
    for in_order in (False, True):
        plot_points(axes[0][0], [*points, (None, None)], color="k", arm="crosscoder", label="", in_order=in_order)
    assert joined(axes[0][0]) == [[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]]
