"""Welch intervals against simulated coverage, hand-worked cases, and what must never have an interval."""

import math

import numpy as np
import pytest
from scipy import stats

from crosscoder.measure import welch
from crosscoder.measure.welch import GroupMean, Variance

N_CASES = 2500
BINOMIAL = 3 * math.sqrt(0.9 * 0.1 / N_CASES)
WELCH = {(3, 3, 1, 1): 0.921, (3, 3, 1, 3): 0.899, (5, 5, 1, 1): 0.907, (5, 5, 1, 3): 0.898}
WELCH |= {(3, 5, 1, 3): 0.905, (3, 5, 3, 1): 0.888}
"""How often Welch's own formula, asked for 90 %, covers normal differences: 400,000 draws, n and sd of both groups."""


@pytest.mark.parametrize("case", WELCH)
def test_nine_in_ten_differences_cover_the_truth(case):
    n_first, n_second, sd_first, sd_second = case
    rng, covered = np.random.default_rng([0, *case]), 0
    for _ in range(N_CASES):
        first = 1 + sd_first * rng.standard_normal(n_first)
        second = 3 + sd_second * rng.standard_normal(n_second)
        covered += welch.difference(welch.group_mean(second), welch.group_mean(first)).covers(2)
    assert abs(covered / N_CASES - WELCH[case]) <= BINOMIAL


def test_the_difference_is_scipy_s_welch_interval():
    first, second = [0.1, 0.4, 0.2, 0.9], [1.0, 1.4, 3.0]
    found = welch.difference(welch.group_mean(second), welch.group_mean(first))
    theirs = stats.ttest_ind(second, first, equal_var=False).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))


def loads(rng, n, truth):
    """ln joint load and ln bank load of n trainings, the banks' far better known."""
    return 0.2 * rng.standard_normal(n), truth + 0.05 * rng.standard_normal(n)


def test_r_from_parts_of_the_same_trainings_is_combined_within_them():
    """r = ln 2 + q - g ln 4, where q and g hold the same joint loads: these cancel, and only the banks' remain."""
    rng, n, covered, apart = np.random.default_rng(3), 5, 0, 0
    truth = math.log(2) - 0.8
    for _ in range(N_CASES):
        (joint_a, bank_a), (joint_b, bank_b) = loads(rng, n, 0.8), loads(rng, n, 0.0)
        within = [welch.group_mean(joint + bank - joint) for joint, bank in ((joint_a, bank_a), (joint_b, bank_b))]
        found = welch.contrast([(1, within[1]), (-1, within[0])], math.log(2))
        plain = welch.difference(welch.group_mean(bank_b), welch.group_mean(bank_a))
        assert found.value == pytest.approx(plain.value + math.log(2))
        covered += found.covers(truth)
        parts = [welch.group_mean(one) for one in (joint_b, joint_a, bank_a - joint_a, bank_b - joint_b)]
        naive = welch.contrast(list(zip((1, -1, -1, 1), parts, strict=True)), math.log(2))
        assert naive.value == pytest.approx(found.value)
        apart += naive.covers(truth)
    assert abs(covered / N_CASES - 0.9) <= BINOMIAL
    assert apart == N_CASES  # the parts taken as independent: an interval many times too wide


def test_groups_that_read_the_same_documents_share_the_text_s_error():
    rng = np.random.default_rng(1)
    shared_E = rng.standard_normal(31)
    own_E = shared_E + 0.1 * rng.standard_normal(31)
    groups = [GroupMean(2.0, (Variance(0.04, 4),), 2 + shared_E), GroupMean(1.0, (Variance(0.09, 2),), 1 + own_E)]
    found = welch.contrast([(1, groups[0]), (-1, groups[1])], 0.5)
    text = 30 / 31 * np.square(shared_E - own_E - (shared_E - own_E).mean()).sum()  # of the difference, as a whole
    total = 0.04 + 0.09 + text
    freedom = total**2 / (0.04**2 / 4 + 0.09**2 / 2 + text**2 / 30)
    assert found.value == pytest.approx(1.5)
    assert found.high - found.value == pytest.approx(stats.t.ppf(0.95, freedom) * math.sqrt(total))
    alone = welch.contrast([(1, groups[0]), (-1, GroupMean(1.0, (Variance(0.09, 2),)))])
    assert alone.high - alone.low > 2 * (found.high - found.low)  # nothing of one's error is the other's too
    with pytest.raises(ValueError, match=r"on \[31, 30\] documents"):
        welch.difference(groups[0], groups[1]._replace(left_E=own_E[1:]))


def test_no_interval_of_no_replicates():
    good = welch.group_mean([1.0, 2.0])
    alone, copies = welch.group_mean([1.0]), welch.group_mean([2.0, 2.0, 2.0])
    assert alone.value == 1
    assert welch.group_mean([]) == "0 trainings; an interval over trainings needs two"
    assert "copies" in copies
    for both in ((good, alone), (alone, good), (alone, alone)):
        assert welch.difference(*both) == "1 training; an interval over trainings needs two"
        assert welch.contrast([(1, welch.excess(*both))]) == "1 training; an interval over trainings needs two"
    few = welch.group_mean([1.0, 2.0], np.ones((2, 29)))
    assert welch.difference(good, few) == "29 documents, of which the text's variance needs 30"
    assert "not every" in welch.group_mean([1.0, math.nan])


def left_out(sums_EQ):
    """ln of the ratio of two sums without each document."""
    totals_EQ = sums_EQ.sum(0) - sums_EQ
    return np.log(totals_EQ[:, 0] / totals_EQ[:, 1])


def test_the_jackknife_of_a_ratio_of_sums_covers_the_truth_over_documents():
    """Documents of unequal length whose tokens share a rate; the truth is the rate of all text, 1/4."""
    covered, cases = 0, 600
    for case in range(cases):
        rng = np.random.default_rng([case, 7])
        length = rng.integers(20, 60, size=40)
        document = np.repeat(np.arange(40), length)
        fires = rng.random(len(document)) < np.repeat(rng.beta(4, 12, size=40), length)
        sums = np.stack([np.bincount(document, weights=fires), np.bincount(document)], axis=1)
        value = math.log(sums[:, 0].sum() / sums[:, 1].sum())
        covered += welch.interval(value, [welch.document_jackknife(left_out(sums))]).covers(math.log(0.25))
    assert abs(covered / cases - 0.9) <= 3 * math.sqrt(0.09 / cases)


def test_the_jackknife_of_a_mean_is_its_squared_standard_error():
    values = np.random.default_rng(0).standard_normal(35)
    found = welch.document_jackknife((values.sum() - values) / 34)
    assert found == pytest.approx((values.var(ddof=1) / 35, 34))


def test_the_jackknife_refuses_few_documents_and_one_that_holds_all():
    assert welch.document_jackknife(np.ones(29)).startswith("29 documents, of which")
    alone = np.ones((30, 2))
    alone[1:, 0] = 0
    with np.errstate(divide="ignore"):
        assert "without document 0" in welch.document_jackknife(left_out(alone))


def test_what_is_left_of_a_mean_is_exact_and_of_a_step_has_the_variance_that_half_samples_have():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(35)
    left = welch.without_documents(lambda weight: (weight * values).mean(1), 35)
    assert left == pytest.approx((values.sum() - values) / 34)
    found, true = np.zeros((150, 2)), np.zeros(150)
    for case in range(150):
        value_EF = 0.5 * rng.standard_normal((31, 60)) + np.linspace(-0.5, 0.5, 60)

        def share(weight_WE, value_EF=value_EF):
            return ((weight_WE @ value_EF) / weight_WE.sum(1, keepdims=True) < 0).mean(1)

        alone = np.array([share(1.0 - np.eye(31)[[e]])[0] for e in range(31)])
        both = welch.without_documents(share, 31), alone
        found[case], true[case] = [welch.document_jackknife(left).value for left in both], share(np.ones((1, 31)))[0]
    smoothed, plain = found.mean(0) / true.var(ddof=1)
    assert 0.7 < smoothed < 1.4
    assert plain > 2  # leaving one out at a time finds several times what there is


@pytest.mark.parametrize("statistic", ["median", "share"])
def test_the_interval_over_trainings_and_documents_covers_the_truth(statistic):
    """A's features read what B's do, or .3 less; documents move all features of a shape, and each by itself."""
    rng, cases, n, at_E = np.random.default_rng([2, len(statistic)]), 300, 5, np.linspace(-1, 1, 40)
    bound, shift = {"median": (None, 0.3), "share": (0.0, 0.0)}[statistic]
    covered = np.zeros(2)

    def read(weight_WE, value_EF):
        value_WF = (weight_WE @ value_EF) / weight_WE.sum(1, keepdims=True)
        return np.median(value_WF, axis=1) if bound is None else (value_WF < bound).mean(1)

    for _ in range(cases):
        groups = []
        for mean in (0.0, shift):
            of_shape_E1, each = rng.normal(0, 0.6, (31, 1)), []
            for _ in range(n):
                value_EF = mean + at_E + rng.normal(0, 0.12) + of_shape_E1 + rng.normal(0, 0.5, (31, 40))
                left = welch.without_documents(lambda weight, x=value_EF: read(weight, x), 31)
                each.append([read(np.ones((1, 31)), value_EF)[0], *left])
            values = np.array(each)
            groups.append([welch.group_mean(values[:, 0], left) for left in (values[:, 1:], None)])
        covered += [welch.difference(second, first).covers(shift) for first, second in zip(*groups, strict=True)]
    with_text, without = covered / cases
    assert 0.85 <= with_text <= 0.95
    assert without < 0.85


@pytest.mark.parametrize(("n", "m"), [(6, 2), (5, 5)])
@pytest.mark.parametrize("together", [-0.6, 0.0, 0.9])
def test_a_training_and_its_null_count_once(n, m, together):
    """Nulls of some trainings that go with these, against or not at all: their excess is covered all the same."""
    rng, cases, covered = np.random.default_rng([n, 10 + int(10 * together)]), 800, 0
    for _ in range(cases):
        shapes = []
        for _ in range(2):
            own = rng.standard_normal(n)
            null = together * own[:m] + math.sqrt(1 - together**2) * rng.standard_normal(m)
            shapes.append(
                welch.excess(welch.group_mean(own, trainings=range(n)), welch.group_mean(null, trainings=range(m)))
            )
        covered += welch.difference(*shapes).covers(0.0)
    assert 0.87 <= covered / cases <= 0.95


def test_nulls_of_all_trainings_make_the_paired_t_and_of_others_welch_s():
    own, null = np.array([1.0, 1.4, 0.7, 2.0]), np.array([0.4, 0.9, 0.3, 1.1])
    groups = [welch.group_mean(one, trainings=range(4)) for one in (own, null)]
    found, paired = welch.contrast([(1, welch.excess(*groups))]), stats.ttest_rel(own, null).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx(tuple(paired))
    elsewhere = welch.excess(groups[0], welch.group_mean(null, trainings=[3, 4, 5, 6]))
    assert elsewhere.variances == (*groups[0].variances, *groups[1].variances)
    assert welch.excess(groups[0], "why") == "why"
