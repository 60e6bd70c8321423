"""Shares of ln 2 in worlds where the answer is known, and that both ledgers add up."""

import math

import numpy as np
import pytest

from crosscoder.measure.room import LN2, LN4, ShapeRoom, fit_room, shares_of_ln2
from crosscoder.results.table import Estimate


def law(beta, delta):
    rng = np.random.default_rng(0)
    shapes = [(2, 128), (8, 64), (4, 90), (2, 64), (4, 128)] * 3
    rooms = [3 * d**beta * n**delta * math.exp(0.01 * rng.standard_normal()) for n, d in shapes]
    return fit_room([ShapeRoom(n, d, room) for (n, d), room in zip(shapes, rooms, strict=True)])


def about(value, reach):
    return Estimate(value, value - reach, value + reach)


def shares(q, g, beta, delta, log_ratio=None):
    r = about(LN2 + q - g * LN4, 0.05)
    return shares_of_ln2(q=about(q, 0.1), g=about(g, 0.04), r=r, law=law(beta, delta), log_ratio=log_ratio)


@pytest.mark.parametrize(
    ("q", "g", "beta", "delta", "expected"),
    [
        (0, 0, 1, 1, (0, 0, 1, 0, 0, 1)),  # the paradox: all of ln 2 is left
        (0, 0.5, 1, 0.5, (0, 1, 0, 1, 0, 0)),  # reconciled, by persistence and by geometry
        (-LN2, 0, 1, 1, (1, 0, 0, 0, 0, 0)),  # B says half as much
        (math.log(0.6), 0.31, 0.53, 0.66, (0.737, 0.62, -0.357, -0.26, 0.47, 0.053)),
    ],
)
def test_shares_are_the_planted_ones_and_both_ledgers_add_up(q, g, beta, delta, expected):
    found = shares(q, g, beta, delta)
    assert [one.value for one in (found.load, found.persistence, found.left_layers)] == pytest.approx(
        expected[:3], abs=1e-3
    )
    joint = found.geometry, found.width, found.left_joint
    assert [one.value for one in joint] == pytest.approx(expected[3:], abs=0.05)
    assert found.load.value + found.persistence.value + found.left_layers.value == pytest.approx(1)
    assert found.load.value + sum(one.value for one in joint) == pytest.approx(1)
    assert found.gap is None


def test_intervals_are_those_of_the_parts():
    found = shares(-0.3, 0.2, 0.8, 0.6)
    assert (found.load.low, found.load.high) == pytest.approx((0.2 / LN2, 0.4 / LN2))
    assert (found.persistence.low, found.persistence.high) == pytest.approx((0.32, 0.48))
    fitted = law(0.8, 0.6)
    assert found.geometry == fitted.contrast(2, -2)
    assert found.width.high == pytest.approx(1 - fitted.beta.low)
    room = fitted.contrast(-1, 2)
    reach = math.hypot(0.1 / LN2, room.high - room.value)
    assert found.left_joint.high - found.left_joint.value == pytest.approx(reach)


def test_the_pair_may_lie_off_the_law():
    found = shares(-0.3, 0.2, 0.8, 0.6, about(0.5, 0.1))
    assert found.gap == pytest.approx(0.5 / LN2 - found.left_joint.value)


def test_r_of_other_trainings_is_refused():
    with pytest.raises(ValueError, match=r"r is 0\.5, and ln 2"):
        shares_of_ln2(q=about(0, 0.1), g=about(0, 0.1), r=about(0.5, 0.1), law=law(1, 1))
