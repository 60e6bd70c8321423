"""The room of writes against spectra that are known, and its law over shapes against planted exponents."""

import itertools
import math

import numpy as np
import pytest
import torch

from crosscoder.measure.room import LN2, LN4, ShapeRoom, WriteMoments, fit_room, participation_ratio, shares_of_ln2
from crosscoder.results.table import Estimate


def moments_of(x_TLD, n_parts=1):
    moments = WriteMoments(*x_TLD.shape[1:])
    for part in np.array_split(x_TLD, n_parts):
        moments.add(part)
    return moments


def test_two_points_of_known_spectrum_have_the_closed_form():
    """Equal variance in 3 of 6 dimensions is a room of 3; a scale of 2 on one layer weighs its variances by 4."""
    rng = np.random.default_rng(0)
    x_TLD = np.zeros((20_000, 2, 3))
    x_TLD[:, 0, :2], x_TLD[:, 1, 0] = rng.standard_normal((20_000, 2)), rng.standard_normal(20_000)
    moments = moments_of(x_TLD, 7)
    found = participation_ratio(moments)
    assert found.value == pytest.approx(3, rel=1e-3)
    assert found.n_tokens == 20_000
    assert found.energy_L == pytest.approx([2 / 3, 1 / 3], rel=0.03)
    scaled = participation_ratio(moments, [1.0, 2.0])
    assert scaled.value == pytest.approx((1 + 1 + 4) ** 2 / (1 + 1 + 16), rel=0.02)
    assert scaled.value == pytest.approx(participation_ratio(moments_of(x_TLD * [[[1.0], [2.0]]])).value)


def spectrum(n):
    return 1 / np.arange(1, n + 1) ** 0.5


@pytest.mark.parametrize(("n_tokens", "share"), [(80, 1.0), (800, 0.1)], ids=["normal", "sparse"])
def test_few_tokens_have_the_room_of_many(n_tokens, share):
    """Sparse: nine tokens in ten are the mean, a kurtosis of 30 that a correction for normal data would not know."""
    rng, variance_N = np.random.default_rng(1), spectrum(60)
    truth = variance_N.sum() ** 2 / np.square(variance_N).sum()
    unbiased, plain = [], []
    for _ in range(200):
        x_TN = rng.standard_normal((n_tokens, 60)) * (rng.random((n_tokens, 1)) < share) / math.sqrt(share)
        found = participation_ratio(moments_of((5 + x_TN * np.sqrt(variance_N)).reshape(-1, 3, 20), 2))
        unbiased.append(1 / found.value)
        plain.append(1 / found.plain)
    assert np.mean(unbiased) * truth == pytest.approx(1, abs=0.03)
    assert np.mean(plain) * truth > 1.4


def test_both_traces_are_the_mean_over_all_distinct_tokens():
    """The U-statistics, token by token: |xi - xj|^2 |xk - xl|^2 / 4 and ((xi - xj) (xk - xl))^2 / 4."""
    x_TN = np.random.default_rng(2).exponential(size=(12, 4)) * [3, 1, 1, 0.5] + 2
    for scale_L in (None, [3.0, 0.5]):
        scaled_TN = x_TN if scale_L is None else x_TN * np.repeat(scale_L, 2)
        above, below = [], []
        for i, j, k, m in itertools.permutations(range(12), 4):
            first, second = scaled_TN[i] - scaled_TN[j], scaled_TN[k] - scaled_TN[m]
            above.append((first @ first) * (second @ second))
            below.append((first @ second) ** 2)
        found = participation_ratio(moments_of(x_TN.reshape(12, 2, 2), 3), scale_L)
        assert found.value == pytest.approx(np.mean(above) / np.mean(below), rel=1e-9)


def test_a_mean_far_from_zero_costs_no_digits():
    x_TLD = np.random.default_rng(3).standard_normal((300, 2, 4))
    far = participation_ratio(moments_of(x_TLD + 1e5, 3))
    assert far.value == pytest.approx(participation_ratio(moments_of(x_TLD)).value, rel=1e-7)


def test_tensors_of_half_precision_are_added_in_float64():
    x_TLD = torch.randn(50, 2, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    moments = WriteMoments(2, 3)
    moments.add(x_TLD)
    assert moments.square_NN.dtype == np.float64
    assert participation_ratio(moments).value == participation_ratio(moments_of(x_TLD.double().numpy())).value


def test_what_has_no_room_says_why():
    assert participation_ratio(WriteMoments(2, 3)) == "0 tokens; an unbiased covariance needs four"
    assert "constant" in participation_ratio(moments_of(np.ones((9, 2, 3))))
    few = np.random.default_rng(5).standard_normal((5, 1, 400))
    assert "5 tokens are too few for 400 dimensions" in participation_ratio(moments_of(few))
    with pytest.raises(ValueError, match=r"1\.1 GiB, more than the 1\.0 GiB"):
        WriteMoments(12, 1024)


GRID = [(2, 128), (8, 64), (4, 90), (2, 64), (4, 64), (8, 90)]


def planted(rng, beta, delta, *, shapes=GRID, n=3, sd=0.1, shape_sd=0.0):
    runs = []
    for depth, width in shapes:
        at = 0.4 + beta * math.log(width) + delta * math.log(depth) + shape_sd * rng.standard_normal()
        runs += [ShapeRoom(depth, width, math.exp(at + sd * rng.standard_normal())) for _ in range(n)]
    return runs


def test_nine_in_ten_intervals_hold_the_planted_exponents():
    rng, covered, cases = np.random.default_rng(6), np.zeros(4), 600
    for _ in range(cases):
        law = fit_room(planted(rng, 0.5, 0.7))
        covered += law.beta.covers(0.5), law.delta.covers(0.7), law.excess_depth.covers(0.45), law.misfit > 0.1
    assert (np.abs(covered / cases - 0.9) <= 3 * math.sqrt(0.09 / cases)).all()


def test_a_room_of_parameters_alone_has_no_excess_of_depth():
    law = fit_room(planted(np.random.default_rng(7), 0.8, 0.4, sd=0.01))
    assert law.excess_depth.value == pytest.approx(0, abs=0.02)
    assert law.excess_depth.value == pytest.approx(law.delta.value - law.beta.value / 2)


def test_shapes_off_the_law_are_a_misfit():
    assert fit_room(planted(np.random.default_rng(8), 0.5, 0.7, sd=0.02, shape_sd=0.3)).misfit < 1e-4
    assert fit_room(planted(np.random.default_rng(8), 0.5, 0.7, n=1)).misfit is None


def test_over_shapes_intervals_hold_where_shapes_are_off_the_law():
    rng, covered, cases = np.random.default_rng(10), np.zeros((2, 2)), 400
    for _ in range(cases):
        runs = planted(rng, 0.5, 0.7, n=4, sd=0.05, shape_sd=0.2)
        for row, unit in zip(covered, ("training", "shape"), strict=True):
            law = fit_room(runs, unit=unit)
            row += law.delta.covers(0.7), law.excess_depth.covers(0.45)
    assert (np.abs(covered[1] / cases - 0.9) <= 3 * math.sqrt(0.09 / cases)).all()
    assert (covered[0] / cases < 0.75).all()
    assert law.misfit is None
    assert "3 shapes, of 3 shapes" in fit_room(planted(rng, 0.5, 0.5, shapes=GRID[:2] + GRID[4:5]), unit="shape")


def test_a_grid_that_cannot_tell_depth_from_width_is_refused():
    rng = np.random.default_rng(9)
    iso = [(2, 128), (4, 90), (8, 64), (14, 48)]  # of equal parameters but for rounding
    assert "depth is fixed by width in the shapes 2x128, 4x90" in fit_room(planted(rng, 0.5, 0.5, shapes=iso))
    assert fit_room(planted(rng, 0.5, 0.5, shapes=[*iso, (4, 64)])).delta.covers(0.5)
    assert "one width" in fit_room(planted(rng, 0.5, 0.5, shapes=[(2, 64), (4, 64), (8, 64)]))
    assert "of 2 shapes" in fit_room(planted(rng, 0.5, 0.5, shapes=iso[:2]))
    assert "copies" in fit_room(planted(rng, 0.5, 0.5, sd=0.0))
    with pytest.raises(ValueError, match="above 0"):
        fit_room([ShapeRoom(2, 64, -1.0)])


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
