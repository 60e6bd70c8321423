"""How many features there are: estimators against hand-computed cases and pools and curves of known size."""

import math

import numpy as np
import pytest

from crosscoder.measure import counting, saturation
from crosscoder.measure.density import ShapeReadings
from crosscoder.results.table import Place
from tests.measure.test_comparison import activity, read, truth

SIZES = np.array([64, 96, 128, 192, 256, 384, 512, 768, 1024], dtype=float)


def test_chao2_by_hand():
    found = np.zeros((9, 3), dtype=bool)
    found[:4, 0] = True  # four features in one seed
    found[4:6, :2] = True  # two in two
    found[6:8] = True  # two in all; the ninth in none
    estimate = saturation.chao2(found)
    assert estimate.value == pytest.approx(8 + (2 / 3) * 4 * 3 / (2 * 3))
    unseen, variance = 4 / 3, 4 / 3 + (4 / 9) * (4 * 49 / 36 + 16 * 2 * 9 / (4 * 81))
    factor = math.exp(1.644854 * math.sqrt(math.log(1 + variance / unseen**2)))
    assert estimate.high == pytest.approx(8 + unseen * factor)
    assert estimate.low == pytest.approx(8 + unseen / factor)
    assert saturation.chao2(found[4:8]).value == 4  # none was found once only


def test_chao2_covers_the_size_of_a_planted_pool():
    rng = np.random.default_rng(0)
    estimates = [saturation.chao2(rng.random((256, 4)) < 0.6) for _ in range(200)]
    assert np.mean([e.value for e in estimates]) == pytest.approx(256, rel=0.02)
    assert 0.80 <= np.mean([e.covers(256) for e in estimates]) <= 0.97


def test_chao2_is_a_lower_bound_where_features_differ():
    rng = np.random.default_rng(1)
    ease = rng.beta(1, 2, size=(400, 1))
    assert saturation.chao2(rng.random((400, 4)) < ease).value < 400


def test_chapman_interval_by_hand_and_on_a_pool():
    estimate = saturation.chapman_interval(100, 90, 60)
    assert estimate.value == pytest.approx(counting.chapman(100, 90, 60))
    unseen = estimate.value - 130
    variance = 101 * 91 * 40 * 30 / (61**2 * 62)
    assert estimate.high == pytest.approx(
        130 + unseen * math.exp(1.644854 * math.sqrt(math.log1p(variance / unseen**2)))
    )
    rng, covered = np.random.default_rng(2), 0
    for _ in range(200):
        first, second = rng.random((2, 256)) < 0.6
        covered += saturation.chapman_interval(first.sum(), second.sum(), (first & second).sum()).covers(256)
    assert 0.80 <= covered / 200 <= 0.97
    assert saturation.chapman_interval(50, 50, 50).high == 50


def test_incidence_joins_matches_of_all_seeds():
    links = {(0, 1): np.array([[0, 1]]), (0, 2): np.zeros((0, 2), dtype=int), (1, 2): np.array([[1, 0], [0, 1]])}
    found = saturation.incidence([2, 2, 2], links)
    assert sorted(found.sum(1).tolist()) == [1, 2, 3]
    assert found.sum(0).tolist() == [2, 2, 2]


def test_stable_features_are_matched_in_half_of_the_others():
    links = [np.array([[0, 5], [1, 2]]), np.array([[1, 0]]), np.array([[1, 1], [2, 0]])]
    assert saturation.stable_features(4, links).tolist() == [False, True, False, False]
    assert saturation.stable_features(4, links[:2]).tolist() == [True, True, False, False]


PLANTED = {
    "stretched exponential": 300 * (1 - np.exp(-((SIZES / 250) ** 1.3))),
    "hyperbola": 300 * SIZES / (SIZES + 200),
    "power law": 8 * SIZES**0.6,
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_curve_that_was_planted_is_chosen(name):
    noise = np.exp(np.random.default_rng(3).normal(0, 0.005, SIZES.size))
    curves = saturation.fit_curves(SIZES, PLANTED[name] * noise)
    assert curves[0].name == name
    np.testing.assert_allclose(curves[0].at(SIZES), PLANTED[name], rtol=0.02)
    if name == "power law":
        assert curves[0].limit == math.inf
        assert curves[0].parameters[0] == pytest.approx(0.6, rel=0.05)
    else:
        assert curves[0].limit == pytest.approx(300, rel=0.05)


def test_aicc_and_its_weights_by_hand():
    y = 8 * SIZES**0.6 * np.exp(0.01 * np.array([1, -1, 1, -1, 1, -1, 1, -1, 0]))
    curve = next(c for c in saturation.fit_curves(SIZES, y) if c.name == "power law")
    fit = np.polyfit(np.log(SIZES), np.log(y), 1)
    square = np.square(np.log(y) - np.polyval(fit, np.log(SIZES))).sum()
    assert curve.parameters[0] == pytest.approx(fit[0], rel=1e-4)
    assert curve.aicc == pytest.approx(9 * math.log(square / 9) + 6 + 24 / 5, rel=1e-4)
    np.testing.assert_allclose(
        saturation.akaike_weights([2.0, 0.0, 0.0]), np.array([math.exp(-1), 1, 1]) / (2 + math.exp(-1))
    )


def test_a_limit_is_quoted_where_growth_stops():
    noise = np.exp(np.random.default_rng(4).normal(0, 0.01, SIZES.size))
    found = saturation.fit_limit(SIZES, PLANTED["stretched exponential"] * noise, seed=0, n_draws=40)
    assert found.covers(300)
    assert found.high / found.low < 1.2


def test_growth_without_limit_is_not_identified():
    noise = np.exp(np.random.default_rng(5).normal(0, 0.01, SIZES.size))
    for counts in (PLANTED["power law"] * noise, 0.97 * SIZES * noise):  # also a dictionary that returns its own size
        found = saturation.fit_limit(SIZES, counts, seed=0, n_draws=20)
        assert found.startswith("not identified: growth without limit has probability")


def test_a_limit_far_beyond_the_data_is_not_identified():
    small = np.array([8.0, 12, 16, 24, 32, 48])
    found = saturation.fit_limit(small, 3000 * small / (small + 3000), seed=0, n_draws=20)
    assert found.startswith("not identified: the interval of F_inf ends beyond")


def test_too_few_sizes_are_not_identified():
    found = saturation.fit_limit([64, 128, 256, 512], [50, 90, 130, 150], seed=0)
    assert found == "not identified: 4 counts at 4 sizes cannot tell three curves apart; 6 at 4 sizes can"


def three_seeds() -> ShapeReadings:
    """Dictionaries of 40 features: 0-29 are in all three, 30-39 in one seed each."""
    decoder, code = truth(4, 16, 1, 0), activity()
    group = []
    for seed in range(3):
        kept = np.r_[0:30, 30 + 10 * seed : 40 + 10 * seed]
        group.append(read(decoder[kept], code[:, kept], seed))
    return ShapeReadings("A", 4, 16, (tuple(group),))


def test_stable_features_are_those_that_other_seeds_have_too():
    found = {row.key: row for row in saturation.seed_counts(three_seeds(), "write")}
    assert found["stable_features"].value.value == 30
    assert found["chapman"].value.value == pytest.approx(41 * 41 / 31 - 1)
    # 30 features seen three times, 30 once, none twice: 60 + 2/3 * 30 * 29 / 2
    assert found["chao2"].value.value == pytest.approx(60 + 2 / 3 * 30 * 29 / 2)


def test_what_needs_more_seeds_says_so():
    whole = three_seeds()
    two = ShapeReadings("A", 4, 16, (whole.seeds[0][:2],))
    found = {row.key: row for row in saturation.seed_counts(two, "write")}
    assert found["chapman"].value is not None
    assert "three dictionary seeds" in found["stable_features"].missing
    one = ShapeReadings("A", 4, 16, (whole.seeds[0][:1],))
    assert all(row.value is None for row in saturation.seed_counts(one, "write"))


def test_a_dictionary_that_stops_growing_has_a_limit_and_one_that_does_not_has_none():
    at, sizes = Place(subject="A", site="write"), [32, 32, 64, 64, 128, 128, 256, 256]
    stops = [30, 31, 55, 54, 80, 81, 88, 89]
    assert 85 < saturation.size_limit(at, sizes, stops).value.value < 110
    assert saturation.size_limit(at, sizes, sizes).missing
    assert saturation.size_limit(at, [], []).missing


def test_chapman_is_the_mean_over_trainings_and_reaches_over_all_of_them():
    whole = three_seeds()
    close, far = whole.seeds[0][:2], (whole.seeds[0][0], whole.seeds[0][1].only(np.r_[0:10, 30:40]))
    one, other = (
        saturation.seed_counts(ShapeReadings("A", 4, 16, (group,)), "write")[0].value for group in (close, far)
    )
    both = saturation.seed_counts(ShapeReadings("A", 4, 16, (close, far)), "write")[0].value
    assert one.value < other.value
    assert both.value == pytest.approx((one.value + other.value) / 2)
    assert (both.low, both.high) == (min(one.low, other.low), max(one.high, other.high))
