"""The report's pictures: what they draw, and where."""

from __future__ import annotations

import math
from typing import Any

import pytest
from committed import SINGLE, change, keep
from made import FVU, OWN, SHAPES, made

from crosscoder.measure.fidelity import TARGETS
from crosscoder.report import figures
from crosscoder.report.panels import make_panels, plot_points
from crosscoder.results.table import Estimate

AB = {name: SHAPES[name] for name in ("A", "B")}


def joined(ax) -> list[list[float]]:
    """The x of each line of a panel that has error bars."""
    containers = [container for container in ax.containers if hasattr(container, "lines")]
    return [list(container.lines[0].get_xdata()) for container in containers]


def marks(ax, marker: str) -> list[float]:
    """The x of each mark of a form that stands alone."""
    return [float(line.get_xdata()[0]) for line in ax.lines if line.get_marker() == marker]


def test_ratios_stand_where_the_rows_say_beside_every_null():
    ax = figures.draw_ratios(made()).axes[0]
    real, null = [], []
    for key in figures.RATIOS:
        for row in made().rows.select(key):
            if row.value is not None:
                (real if row.at.state == "trained" else null).append(math.exp(row.value.value))
    assert len(real) == 6
    assert sorted(marks(ax, "D")) == pytest.approx(sorted(real))
    assert sorted(marks(ax, "s")) == pytest.approx(sorted(null))
    assert len(null) > 8
    assert ax.get_xlim() == (figures.SMALLEST, figures.LARGEST)


def test_what_lies_beyond_the_axis_is_drawn_at_its_end():
    far = change(made(), "load_log_ratio", Estimate(5.0, 4.0, 6.0), state="trained")
    ax = figures.draw_ratios(far).axes[0]
    assert marks(ax, "D").count(figures.LARGEST) == 2


def test_single_trainings_surround_the_ratio():
    for key in figures.RATIOS:
        single = figures.training_ratios(made().rows, AB, key, "fvu")
        whole = made().rows.one(key, state="trained", estimator="fvu").value
        for values in single.values():
            assert len(values) == len(OWN)
            assert sum(map(math.log, values)) / len(OWN) == pytest.approx(whole)
    assert figures.training_ratios(made().rows.select(subject="A"), AB, "load_log_ratio", "fvu") == {}


def test_a_pair_without_ratios_has_no_picture_of_them():
    assert figures.draw_ratios(keep(made(), lambda row: row.key not in figures.RATIOS)) is None
    assert figures.draw_ratios(SINGLE) is None
    assert figures.draw_spread(made()) is None


def test_spreads_of_one_model_stand_beside_its_nulls():
    ax = figures.draw_spread(SINGLE).axes[0]
    where = {"site": "write", "arm": "crosscoder", "role": "main"}

    def known(key, state):
        found = SINGLE.rows.known_range(key, state=state, **where)
        return [found.value] if found else []

    assert marks(ax, "D") == [x for key in figures.SPREADS for x in known(key, "trained")]
    states = ("gaussian", "frozen_encoder", "untrained", "shuffled")
    nulls = [x for key in figures.SPREADS for state in states for x in known(key, state)]
    assert sorted(marks(ax, "s")) == sorted(nulls)
    assert len(nulls) == 9


def test_loads_are_lines_of_one_training_over_its_k():
    figure = figures.draw_loads(made())
    assert len(figure.axes) == 2
    for ax in figure.axes:
        found = joined(ax)
        assert len(found) == 2 * len(OWN)
        assert all(x == pytest.approx(list(FVU)) for x in found)
        dotted = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == ":"]
        assert dotted == list(TARGETS["fvu"])
    assert figures.draw_loads(SINGLE) is None


def test_an_even_feature_has_one_colour_in_every_shape():
    def heatmap(row: Any) -> list[list[float]]:
        n_layers = len(row.value[0])
        return [[1 / n_layers] * n_layers, [1.0] + [0.0] * (n_layers - 1)]

    figure = figures.draw_profiles(change(made(), "profile_heatmap", heatmap))
    images = [ax.images[0] for ax in figure.axes if ax.images]
    assert {image.get_array().shape for image in images} == {(2, 8), (2, 2)}
    assert len({image.to_rgba(image.get_array()[0, 0]) for image in images}) == 1
    assert {float(image.get_array().max()) for image in images} == {8.0, 2.0}
    assert len({image.get_clim() for image in images}) == 1


def test_points_are_joined_by_x_unless_they_have_an_order():
    _, axes = make_panels(1, 1, (3, 3))
    points = [(Estimate(x, x, x), Estimate(1.0, 1.0, 1.0)) for x in (3.0, 1.0, 2.0)]
    for in_order in (False, True):
        plot_points(axes[0][0], [*points, (None, None)], color="k", arm="crosscoder", label="", in_order=in_order)
    assert joined(axes[0][0]) == [[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]]
