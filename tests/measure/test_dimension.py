"""Effective dimension and its ceiling against arrangements whose geometry is known."""

import math

import numpy as np
import pytest
from scipy import sparse

from crosscoder.measure import dimension
from crosscoder.measure.reading import Reading


def test_equal_weights_give_the_raw_dimension():
    rows = np.random.default_rng(0).standard_normal((50, 12))
    assert dimension.weighted_dimension(rows) == pytest.approx(dimension.effective_dimension(rows))
    assert dimension.weighted_dimension(rows[:8], np.full(8, 3.0)) == pytest.approx(
        dimension.effective_dimension(rows[:8])
    )
    assert math.isnan(dimension.weighted_dimension(rows[:1]))


@pytest.mark.parametrize("n_dimensions", [2, 5])  # fewer and more than features
def test_weights_by_hand(n_dimensions):
    rows = np.zeros((3, n_dimensions))
    rows[:, :2] = [[1, 0], [1, 1], [0, 2]]  # squared cosines 1/2, 1/2 and 0
    weight = np.array([1.0, 2, 3])
    assert dimension.weighted_dimension(rows, weight) == pytest.approx((2 + 6 + 3) / (0.5 * 2 + 0.5 * 6))
    assert dimension.weighted_dimension(rows, np.array([1.0, 0, 1])) == math.inf
    code = sparse.csc_array(np.array([[2.0, 1, 1], [0, 1, 1]]))
    assert Reading(0, rows[:, None], code, 1.0, 0.0, 2.5, np.arange(3)).energy_F.tolist() == [2, 2, 4]


def noisy(rng, rows, cosine):
    """Unit rows with independent isotropic errors; `cosine` is that of two such copies of one row."""
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    noise = rng.standard_normal(rows.shape)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return math.sqrt(cosine) * rows + math.sqrt(1 - cosine) * noise


@pytest.mark.parametrize("n", [60, 400])  # fewer and more features than dimensions
def test_two_seeds_of_identical_rows_give_the_raw_dimension(n):
    rows = np.random.default_rng(1).standard_normal((n, 100))
    order = np.random.default_rng(2).permutation(n)
    pairs = np.stack([order, np.arange(n)], axis=1)
    found = dimension.debiased_dimension(rows, rows[order], pairs)
    assert found.value == pytest.approx(dimension.effective_dimension(rows))
    assert (found.self_cosine, found.reason) == (pytest.approx(1), None)


def test_two_seeds_remove_the_noise_of_one():
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((2000, 200)) * 0.02
    rows[:, :6] += rng.standard_normal((2000, 6))  # nearly six dimensions in two hundred
    truth = dimension.effective_dimension(rows)
    first, second = noisy(rng, rows, 0.92), noisy(rng, rows, 0.92)
    pairs = np.repeat(np.arange(2000)[:, None], 2, axis=1)
    found = dimension.debiased_dimension(first, second, pairs)
    assert found.self_cosine == pytest.approx(0.92, abs=0.005)
    assert found.value == pytest.approx(truth / 0.92**2, rel=0.02)  # shrunk cosines remain


def test_a_product_of_seeds_is_free_of_the_additive_bias_of_a_square():
    rng = np.random.default_rng(4)
    rows = np.kron(np.eye(50), np.ones((20, 1)))  # cosine 1 within a group of 20, 0 outside
    truth = dimension.effective_dimension(rows)
    first, second = noisy(rng, rows, 0.91), noisy(rng, rows, 0.91)
    pairs = np.repeat(np.arange(1000)[:, None], 2, axis=1)
    found = dimension.debiased_dimension(first, second, pairs)
    raw = dimension.effective_dimension(first)
    expected = 1 / (0.91**2 / truth + (1 - 0.91**2) / 50)  # each square gains the noise's 1 / N
    assert raw == pytest.approx(expected, rel=0.03)
    assert found.value == pytest.approx(truth / 0.91**2, rel=0.02)


def test_noisy_directions_are_refused_with_a_reason():
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((100, 50))
    pairs = np.repeat(np.arange(100)[:, None], 2, axis=1)
    found = dimension.debiased_dimension(noisy(rng, rows, 0.8), noisy(rng, rows, 0.8), pairs)
    assert found.value is None
    assert found.reason is not None
    assert "below 0.9" in found.reason
    alone = dimension.debiased_dimension(rows, rows, pairs[:1])
    assert alone.reason == "1 features match; a pair of features needs two"


def test_highest_probability_solves_the_ceiling():
    assert dimension.highest_probability(2.0, 1.0) == 1  # below e nothing constrains
    assert dimension.highest_probability(math.e, 1.0) == pytest.approx(1 / math.e, rel=1e-6)
    for density, constant in ((5.0, 1.0), (20.0, 1.0), (20.0, 3.0), (1e4, 0.5)):
        p = dimension.highest_probability(density, constant)
        assert p < 1 / math.e
        assert constant * density * p * math.log(1 / p) == pytest.approx(1)
    p = 0.01  # n / m = 1 / (p ln(1 / p)), with C = 1
    assert dimension.headroom(1 / (p * math.log(1 / p)), p, 1.0) == pytest.approx(1)
    assert dimension.headroom(2.0, 0.5, 1.0) == math.inf
