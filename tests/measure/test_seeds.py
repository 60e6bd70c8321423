"""Counts from several dictionary seeds, by hand: which features are stable, and what needs more seeds says so."""

from __future__ import annotations

import numpy as np
import pytest

from crosscoder.measure.density import ShapeReadings
from crosscoder.measure.seeds import seed_counts, size_limit
from tests.measure.test_comparison import activity, read, truth


def three_seeds() -> ShapeReadings:
    """Dictionaries of 40 features: 0-29 are in all three, 30-39 in one seed each."""
    decoder, code = truth(4, 16, 1, 0), activity()
    group = []
    for seed in range(3):
        kept = np.r_[0:30, 30 + 10 * seed : 40 + 10 * seed]
        group.append(read(decoder[kept], code[:, kept], seed))
    return ShapeReadings("A", 4, 16, (tuple(group),))


def test_stable_features_are_those_that_other_seeds_have_too():
    found = {row.name: row for row in seed_counts(three_seeds())}
    assert found["stable A"].estimate.value == 30
    assert found["chapman A"].estimate.value == pytest.approx(41 * 41 / 31 - 1)
    # 30 features seen three times, 30 once, none twice: 60 + 2/3 * 30 * 29 / 2
    assert found["chao2 A"].estimate.value == pytest.approx(60 + 2 / 3 * 30 * 29 / 2)


def test_what_needs_more_seeds_says_so():
    whole = three_seeds()
    two = ShapeReadings("A", 4, 16, (whole.seeds[0][:2],))
    found = {row.name: row for row in seed_counts(two)}
    assert found["chapman A"].estimate is not None
    assert "three dictionary seeds" in found["stable A"].missing
    one = ShapeReadings("A", 4, 16, (whole.seeds[0][:1],))
    assert all(row.estimate is None for row in seed_counts(one))


def test_a_dictionary_that_stops_growing_has_a_limit_and_one_that_does_not_has_none():
    sizes = [32, 32, 64, 64, 128, 128, 256, 256]
    stops = [30, 31, 55, 54, 80, 81, 88, 89]
    assert 85 < size_limit("A", sizes, stops).estimate.value < 110
    assert size_limit("A", sizes, sizes).missing
    assert size_limit("A", [], []).missing


def test_chapman_is_the_mean_over_trainings_and_reaches_over_all_of_them():
    whole = three_seeds()
    close, far = whole.seeds[0][:2], (whole.seeds[0][0], whole.seeds[0][1].only(np.r_[0:10, 30:40]))
    one, other = (seed_counts(ShapeReadings("A", 4, 16, (group,)))[0].estimate for group in (close, far))
    both = seed_counts(ShapeReadings("A", 4, 16, (close, far)))[0].estimate
    assert one.value < other.value
    assert both.value == pytest.approx((one.value + other.value) / 2)
    assert (both.low, both.high) == (min(one.low, other.low), max(one.high, other.high))
