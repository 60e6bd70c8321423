"""Matches between subjects, and the nulls and scales that they are read against."""

import numpy as np
import pytest
from scipy import optimize, sparse, stats

from crosscoder.measure import matching, universality
from crosscoder.results.table import Estimate

DOCUMENTS = np.repeat(np.arange(40), 25)


def planted(seed, n_shared, n_own, noise=0.0):
    """Two codes over 1,000 tokens in bursts within documents, sharing their first features."""
    shared_rng, own_rng = np.random.default_rng(1000), np.random.default_rng(seed)

    def draw(rng, n):
        rate = np.repeat(rng.beta(0.3, 3, size=(40, n)), 25, axis=0)
        return rng.random((1000, n)) * (rng.random((1000, n)) < rate)

    code = np.hstack([draw(shared_rng, n_shared), draw(own_rng, n_own)])
    return sparse.csc_array(code * (1 + noise * own_rng.standard_normal(code.shape)))


def test_agreement_by_hand():
    found = universality.agreement(np.array([[0.9, 0.8], [0.85, 0.1], [0.2, 0.6]]))
    assert found.forward_F.tolist() == [0.9, 0.85, 0.6]
    assert found.backward_F.tolist() == [0.9, 0.8]
    assert found.u == pytest.approx(((0.9 + 0.85 + 0.6) / 3 + (0.9 + 0.8) / 2) / 2)
    with pytest.raises(ValueError, match=r"\(0, 3\)"):
        universality.agreement(np.zeros((0, 3)))


def test_shifting_moves_rows_round():
    code = sparse.csc_array(np.array([[1.0, 0], [0, 2], [3, 0]]))
    before = code.todense().copy()
    assert universality.shift_tokens(code, 1).todense().tolist() == [[3, 0], [1, 0], [0, 2]]
    assert universality.shift_tokens(code, 3).todense().tolist() == before.tolist()
    np.testing.assert_array_equal(code.todense(), before)  # the caller's values stay where they were


def test_shifts_pass_the_longest_document():
    shifts = universality.circular_shifts(np.array([0] * 7 + [1] * 3 + [2] * 6 + [3] * 4), 500, seed=0)
    assert (shifts.min(), shifts.max()) == (7, 13)
    with pytest.raises(ValueError, match="11 of 20 tokens"):
        universality.circular_shifts(np.array([0] * 11 + [1] * 9), 2, seed=0)


def test_the_null_keeps_rates_and_breaks_alignment():
    a, b = planted(1, 20, 0, noise=0.1), planted(2, 20, 0, noise=0.1)
    u = universality.agreement(matching.activation_correlation(a, b)).u
    null = universality.shifted_null(a, b, DOCUMENTS, seed=0, n_draws=10)
    unrelated = universality.agreement(matching.activation_correlation(planted(3, 0, 20), planted(4, 0, 20))).u
    assert u > 0.95
    assert null.mean() == pytest.approx(unrelated, abs=0.06)
    np.testing.assert_array_equal(null, universality.shifted_null(a, b, DOCUMENTS, seed=0, n_draws=10))


def test_best_matches_solve_no_assignment_problem(monkeypatch):
    """Its cost grows with the cube of the features: hours at 16 thousand, for a number that is not printed."""

    def refuse(*_, **__):
        raise AssertionError("an assignment problem was solved")

    monkeypatch.setattr(optimize, "linear_sum_assignment", refuse)
    universality.agreement(np.random.default_rng(0).random((50, 40)))


def test_universality_orders_subjects_by_what_they_share():
    first = planted(1, 24, 0, noise=0.3)
    ceiling = universality.agreement(matching.activation_correlation(first, planted(2, 24, 0, noise=0.3))).u
    null = float(universality.shifted_null(first, planted(2, 24, 0, noise=0.3), DOCUMENTS, seed=0, n_draws=10).mean())
    scores, top = [], Estimate(ceiling, ceiling, ceiling)
    for shared in (0, 12, 24):
        a, b = planted(3, shared, 24 - shared, noise=0.3), planted(4, shared, 24 - shared, noise=0.3)
        u = universality.agreement(matching.activation_correlation(a, b)).u
        scores.append(universality.universality_estimate(Estimate(u, u, u), null=null, ceiling=top))
    np.testing.assert_allclose([score.value for score in scores], [0, 0.5, 1], atol=0.1)


def test_universality_has_an_interval_even_where_nothing_is_shared():
    ceiling = Estimate(0.8, 0.8, 0.8)
    found = universality.universality_estimate(Estimate(0.2, 0.1, 0.35), null=0.3, ceiling=ceiling)
    assert (found.value, found.low, found.high) == (pytest.approx(-0.2), pytest.approx(-0.4), pytest.approx(0.1))
    with pytest.raises(ValueError, match="too near 0"):
        universality.universality_estimate(Estimate(0.2, 0.1, 0.3), null=0.3, ceiling=Estimate(0.4, 0.25, 0.5))


def test_a_larger_pool_inflates_matches_until_pools_are_equal():
    a, b, larger = planted(5, 0, 15), planted(6, 0, 15), planted(7, 0, 120)

    equal, unequal = (universality.agreement(matching.activation_correlation(a, other)) for other in (b, larger))
    assert unequal.forward_F.mean() > 1.4 * equal.forward_F.mean()
    pools = [universality.equal_pools(a, larger, seed=seed) for seed in range(10)]
    drawn = [universality.agreement(matching.activation_correlation(*pool)).u for pool in pools]
    assert np.mean(drawn) == pytest.approx(equal.u, rel=0.25)
    kept = universality.equal_pools(a, larger, seed=0)
    assert [code.shape for code in kept] == [(1000, 15), (1000, 15)]
    assert (kept[0] != a).nnz == 0


def test_u_without_documents_is_the_correlation_of_the_same_pairs_on_the_other_tokens():
    a, b = planted(1, 12, 3, noise=0.5), planted(2, 12, 8, noise=0.5)
    found = matching.nearest(matching.activation_correlation(a, b))
    group_T = np.repeat(np.arange(4), [100, 400, 300, 200])
    left = universality.u_left(a, b, found, group_T, 4)
    for group, value in enumerate(left):
        rest = group_T != group
        x, y = a.toarray()[rest], b.toarray()[rest]
        there = [np.corrcoef(x[:, i], y[:, j])[0, 1] for i, j in enumerate(found.index_a)]
        back = [np.corrcoef(x[:, i], y[:, j])[0, 1] for j, i in enumerate(found.index_b)]
        assert value == pytest.approx((np.mean(there) + np.mean(back)) / 2, abs=1e-9)
    assert len(set(left.round(6))) == 4


def test_the_text_widens_the_interval_of_universality_by_what_it_does_to_the_ratio():
    u, ceiling = Estimate(0.5, 0.45, 0.55), Estimate(0.7, 0.68, 0.72)
    draw = np.random.default_rng(0)
    left = 0.5 + 0.01 * draw.standard_normal(40), 0.7 + 0.01 * draw.standard_normal(40)
    without = universality.universality_estimate(u, null=0.1, ceiling=ceiling)
    found = universality.universality_estimate(u, null=0.1, ceiling=ceiling, left=left)
    ratio_E = (left[0] - 0.1) / (left[1] - 0.1)
    reach = stats.t.ppf(0.95, 39) * np.sqrt(39 / 40 * ((ratio_E - ratio_E.mean()) ** 2).sum())
    assert found.high - found.value == pytest.approx(np.hypot(without.high - without.value, reach))
    assert found.value - found.low == pytest.approx(np.hypot(without.value - without.low, reach))
    few = universality.universality_estimate(u, null=0.1, ceiling=ceiling, left=(left[0][:29], left[1][:29]))
    assert "29 documents" in few


def test_exclusive_shares_do_not_depend_on_how_many_layers_a_subject_has():
    profile = np.array([[0.25] * 4 + [0.0], [0.23] * 4 + [0.08], [0.0] * 4 + [1.0], [0.0] * 5])
    assert universality.exclusive_shares(profile, 4) == (0.25, 0.25)
