"""Quantities at a common fidelity: laws that a straight line in logs gives back exactly, and what is refused."""

import math

import pytest

from crosscoder.measure.fidelity import SweepPoint, lost_share, read_at


def sweep(fidelities, quantity=lambda f: 3 * f**-0.7):
    return [SweepPoint(2.0**i, f, quantity(f)) for i, f in enumerate(fidelities)]


@pytest.mark.parametrize("target", [0.15, 0.1, 0.4, 0.03])
def test_a_power_law_is_read_exactly_within_the_sweep_and_at_its_ends(target):
    points = sweep([0.4, 0.2, 0.12, 0.06, 0.03])
    found = read_at(points[::-1], target)
    assert found.value == pytest.approx(3 * target**-0.7, rel=1e-12)
    assert found.elasticity == pytest.approx(-0.7)
    assert found.bend == pytest.approx(0, abs=1e-12)


def test_a_line_between_the_neighbours_and_not_a_fit_to_all():
    points = [SweepPoint(1, 0.4, 50), SweepPoint(2, 0.2, 4), SweepPoint(3, 0.05, 16), SweepPoint(4, 0.01, 900)]
    found = read_at(points, 0.1)
    assert found.value == pytest.approx(8)  # half-way in both logarithms
    assert found.elasticity == pytest.approx(-1)
    assert read_at(points, 0.2)[:2] == pytest.approx((4, -1))  # the side of larger k
    assert read_at(points, 0.01)[:2] == pytest.approx((900, -math.log(900 / 16) / math.log(5)))


def test_the_bend_says_what_the_line_is_worth():
    curved = lambda f: math.exp(0.5 * math.log(f) ** 2)
    found = read_at(sweep([0.4, 0.2, 0.1, 0.05, 0.025], curved), 0.14)
    assert found.bend == pytest.approx(abs(math.log(curved(0.14) / found.value)), rel=0.35)
    flat = read_at(sweep([0.4, 0.2, 0.1, 0.05], lambda f: 2.0), 0.14)
    assert (flat.value, flat.elasticity, flat.bend) == (pytest.approx(2), 0, 0)


def test_nothing_is_read_beyond_the_points():
    assert "0.15 is not enclosed" in read_at(sweep([0.4, 0.3, 0.2, 0.16]), 0.15)
    assert "larger k" in read_at(sweep([0.4, 0.3, 0.2, 0.16]), 0.15)
    assert "smaller k" in read_at(sweep([0.14, 0.1, 0.08, 0.06]), 0.15)
    assert read_at(sweep([0.4, 0.2, 0.1]), 0.15) == "3 k were run, of which a fidelity needs 4"
    assert "above 0" in read_at(sweep([0.4, 0.2, 0.1, -0.01], lambda f: 1.0), 0.15)


def test_a_sweep_that_is_not_monotone_around_the_target_says_where():
    twice = read_at(sweep([0.4, 0.12, 0.2, 0.05]), 0.15)
    assert "crossed 3 times" in twice
    beside = read_at(sweep([0.3, 0.31, 0.12, 0.05]), 0.15)
    assert "does not fall from 0.3 (k 1" in beside
    assert "to 0.31 (k 2" in beside
    assert "rises with k" in read_at(sweep([0.05, 0.12, 0.2, 0.4]), 0.15)
    assert read_at(sweep([0.5, 0.52, 0.4, 0.2, 0.1]), 0.15).elasticity == pytest.approx(-0.7)  # far from the target


def test_what_was_asked_wrongly_is_refused():
    points = sweep([0.4, 0.2, 0.1, 0.05])
    with pytest.raises(ValueError, match="each once"):
        read_at([*points, points[0]], 0.15)
    with pytest.raises(ValueError, match="finite"):
        read_at([*points, SweepPoint(99, math.nan, 1)], 0.15)
    with pytest.raises(ValueError, match="above 0"):
        read_at(points, 0.0)


def test_the_share_of_the_harm_that_is_lost():
    assert lost_share(spliced_loss=2.7, clean_loss=2.5, ablated_loss=4.5) == pytest.approx(0.1)
    assert "costs" in lost_share(spliced_loss=2.7, clean_loss=2.5, ablated_loss=2.5)
