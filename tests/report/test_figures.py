"""The report's pictures: what they draw, where, and in which words."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from matplotlib.text import Text
from study_results import make_results

from crosscoder.report import figures, model_figures
from crosscoder.report.panels import make_panels, plot_points
from crosscoder.report.tables import splice_table, subject_table
from crosscoder.report.verdict_figures import draw_verdict

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


def with_points(*points: tuple[str, str, float | None]) -> dict[str, Any]:
    """A study whose verdict has these trained points: site, subject and debiased d_eff."""
    results = make_results()
    like = results["verdict"]["points"][0]
    results["verdict"]["points"] = [
        like | {"site": site, "subject": subject, "d_eff_debiased": value} for site, subject, value in points
    ]
    return results


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


def test_names_of_slopes_lie_on_no_mark():
    for value in (16.0, 32.0, 64.0):  # at the ends of the slopes 0, 1/2 and 1
        figure = draw_verdict(with_points(("write", "B", 32.0), ("write", "A", value)))
        ax = figure.axes[1]
        boxes = shown_boxes(figure, ax)
        assert set(boxes) == {"δ = 0", "δ = 0.5", "δ = 1"}
        for x, y, _ in single_marks(ax):
            at = ax.transData.transform((x, y))
            radius = 3.5 * figure.dpi / 72
            assert not any(b.padded(radius).contains(*at) for b in boxes.values())
        assert [tick.get_text() for tick in ax.get_xticklabels()] == ["2\nB", "8\nA"]


def test_what_was_not_measured_is_said_left_of_the_panel():
    results = make_results()
    ratio = {"mean": 1.0, "low": 0.9, "high": 1.1}
    rows = [row | {"trained": ratio, "untrained": ratio} for row in results["verdict"]["estimators"][:3]]
    rows[0]["untrained"] = rows[1]["trained"] = None
    rows[2] |= {"trained": None, "untrained": None, "site": "residual"}
    results["verdict"]["estimators"] = rows
    figure = draw_verdict(results)
    boxes = shown_boxes(figure, figure.axes[0])
    assert set(boxes) == {
        "block writes: untrained not measured",
        "block writes: trained not measured",
        "residual stream: not measured",
    }
    edge = figure.axes[0].get_window_extent().x0
    assert all(0 < box.x0 < box.x1 < edge for box in boxes.values())


def with_second_training(results: dict[str, Any]) -> dict[str, Any]:
    """The main dictionaries again, of a further training seed."""
    for name in ("counts", "quality"):
        cells = results[name]["cells"]
        cells += [cell | {"training_seed": 1} for cell in cells if cell["role"] == "main"]
    return results


def joined(ax) -> list[list[float]]:
    """The x values of each line that has marks."""
    containers = [container for container in ax.containers if hasattr(container, "has_xerr")]
    return [list(container.lines[0].get_xdata()) for container in containers]


def test_counts_are_drawn_on_the_site_that_has_sizes():
    results = make_results()
    figure = figures.draw_counts(results)
    assert figure.axes[0].get_title(loc="left") == "Residual stream: alive features"
    moved = {"residual": "write", "write": "residual"}
    for cell in results["counts"]["cells"]:
        cell["site"] = moved[cell["site"]]
    figure = figures.draw_counts(results)
    assert figure.axes[0].get_title(loc="left") == "Block writes: alive features"
    assert max(len(x) for x in joined(figure.axes[0])) == 4
    results["counts"]["cells"] = figures.select(results["counts"]["cells"], site="residual", role="main")
    assert figures.draw_counts(results).axes[0].get_title(loc="left") == "Residual stream: alive features"


def test_marks_at_one_place_all_show():
    results = make_results()
    cells = figures.select(results["counts"]["cells"], state="trained", site="residual", arm="crosscoder", role="main")
    results["counts"]["cells"] = cells
    for cell in cells:
        cell["per_seed"], cell["summary"] = [cells[0]["per_seed"][0]], {}
    ax = figures.draw_counts(results).axes[0]
    drawn = [c.lines[0] for c in ax.containers]
    assert len({(*line.get_xdata(), *line.get_ydata()) for line in drawn}) == 1
    sizes = [line.get_markersize() for line in drawn]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(drawn) == 2


@pytest.mark.parametrize(("draw", "n_joined"), [(figures.draw_frontier, 3), (figures.draw_counts, 4)])
def test_lines_join_one_training_seed_in_order(draw, n_joined):
    ax = draw(with_second_training(make_results())).axes[0]
    found = joined(ax)
    assert sorted(len(x) for x in found) == [1] * 4 + [n_joined] * 4  # two subjects, two arms
    assert all(x == sorted(x) for x in found)


def test_a_site_without_a_sweep_has_no_frontier():
    figure = figures.draw_frontier(with_second_training(make_results()))
    writes = [ax for ax in figure.axes if ax.get_title(loc="left") == "Block writes"]
    assert len(writes) == 2
    assert all(len(x) == 1 for ax in writes for x in joined(ax))


def test_an_even_feature_has_one_colour_in_every_shape():
    results = make_results()
    for cell in results["spread"]["cells"]:
        n_layers = len(cell["layers"])
        if cell["heatmap"]:
            cell["heatmap"] = [[1 / n_layers] * n_layers, [1.0] + [0.0] * (n_layers - 1)]
    figure = figures.draw_profiles(results)
    images = [ax.images[0] for ax in figure.axes if ax.images]
    assert {image.get_array().shape for image in images} == {(2, 8), (2, 2)}
    assert len({image.to_rgba(image.get_array()[0, 0]) for image in images}) == 1
    assert {float(image.get_array().max()) for image in images} == {8.0, 2.0}
    assert len({image.get_clim() for image in images}) == 1
    bar = next(ax for ax in figure.axes if "1 = even" in ax.get_ylabel())
    assert [tick.get_text() for tick in bar.get_yticklabels()] == ["0", "0.25", "0.5", "1", "2", "4", "8"]


def test_the_smallest_spread_of_each_shape_is_marked():
    axes = figures.draw_spread(make_results()).axes
    least = {ax.get_title(loc="left")[0]: [line.get_xdata()[0] for line in ax.lines] for ax in axes}
    assert least == {"A": [1 / 8], "B": [1 / 2]}


def test_spreads_are_of_the_first_training_seed():
    results = make_results()
    cells = results["spread"]["cells"]
    results["spread"]["cells"] = [cell | {"training_seed": 1} for cell in cells] + cells
    found = figures.main_spread(results, subject="A", site="write", state="trained")
    assert found is not None
    assert found["training_seed"] == 0


def with_splices(costs: dict[str, float]) -> dict[str, Any]:
    """Every spliced site's ablation costs 1 nat, those named as told."""
    results = make_results()
    for cell in results["quality"]["cells"]:
        for splice in filter(None, (seed["splice"] for seed in cell["per_seed"])):
            for site in splice["sites"]:
                site["ablated_loss"] = splice["clean_loss"] + costs.get(site["site"], 1.0)
    return results


def test_recovery_of_a_loss_that_ablation_hardly_costs_is_drawn_hollow():
    ax = model_figures.draw_splice(with_splices({"2": 0.019, "3": 0.021})).axes[0]
    marks = [line for line in ax.lines if len(line.get_xdata()) == 1]
    assert [(line.get_xdata()[0], line.get_markerfacecolor()) for line in marks] == [(1, "white")] * 2  # both arms
    through = [c.lines[0] for c in ax.containers]
    assert all(mark.get_ydata()[0] in line.get_ydata() for mark, line in zip(marks, through, strict=True))
    assert all(line.get_markerfacecolor() != "white" for line in through)


def test_recovery_that_is_undefined_leaves_a_gap():
    results = with_splices({})
    for cell in results["quality"]["cells"]:
        for splice in filter(None, (seed["splice"] for seed in cell["per_seed"])):
            splice["sites"][1] |= {"ablated_loss": splice["clean_loss"], "loss_recovered": None}
    ax = model_figures.draw_splice(results).axes[0]
    assert all(1 not in c.lines[0].get_xdata() for c in ax.containers)
    row = splice_table(results).rows[1]
    assert [cell.text for cell in row.cells[4:]][:1] == ["2"]
    assert row.cells[-2].text == "–"
    assert row.cells[-1].text == "0.0625"


def test_the_table_of_splices_says_what_they_are_of():
    results = make_results()
    note = splice_table(results).note
    assert "training seeds 0, dictionary seeds 0, 1" in note
    assert "on 16,384 tokens" in note
    for cell in results["quality"]["cells"]:
        cell["per_seed"][1]["splice"] = None
    assert splice_table(results).note.startswith("Splices are of the first training seed's first dictionary seed;")


def test_points_are_joined_by_x_unless_they_have_an_order():
    _, axes = make_panels(1, 1, (3, 3))
    points = [((x, x, x), (1.0, 1.0, 1.0)) for x in (3.0, 1.0, 2.0)]
    for in_order in (False, True):
        plot_points(axes[0][0], [*points, (None, None)], color="k", arm="crosscoder", label="", in_order=in_order)
    assert joined(axes[0][0]) == [[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]]
