"""Stability, planted: features that all dictionaries have, that some have, and mixtures of one space."""

import numpy as np
import pytest
from scipy import linalg, sparse

from crosscoder.measure import stability
from crosscoder.measure.counting import binary_entropy
from crosscoder.measure.reading import Reading
from crosscoder.measure.stability import Rest, measure_stability

LAYERS, WIDTH, TOKENS = 2, 20, 400


def reading_of(rows_FN, tokens_F, *, value_F=None):
    """A dictionary with these joint rows; feature i is active on the first `tokens_F[i]` tokens."""
    value_F = np.ones(len(rows_FN)) if value_F is None else value_F
    code = (np.arange(TOKENS)[:, None] < np.asarray(tokens_F)) * value_F
    return Reading(
        seed=0,
        decoder_FLD=np.asarray(rows_FN).reshape(-1, LAYERS, WIDTH),
        code=sparse.csc_array(code.astype(np.float32)),
        explained_variance=0.9,
        dead_share=0,
        l0=1,
        index_F=np.arange(len(rows_FN)),
    )


def test_shares_of_what_is_found_in_three_of_four():
    """Features on axes of their own: 0 is in all four dictionaries, 1 in three, 2 in two; the rest is nobody else's."""
    eye, rng = np.eye(LAYERS * WIDTH), np.random.default_rng(0)
    has = [(0, 1, 2, 10), (2, 0, 1, 11), (0, 1, 12), (0, 13)]
    tokens, (size, value) = rng.integers(20, 200, 20), rng.uniform(0.5, 2, (2, 20))
    readings = [reading_of(size[list(f), None] * eye[list(f)], tokens[list(f)], value_F=value[list(f)]) for f in has]
    found = measure_stability(readings)
    assert [one.tolist() for one in found.found] == [[4, 3, 2, 1], [2, 4, 3, 1], [4, 3, 1], [4, 1]]

    def share(weight):
        return [sum(weight[f] for f in own if f < 2) / sum(weight[f] for f in own) for own in has]

    np.testing.assert_allclose(found.stable_share, [0.5, 0.5, 2 / 3, 0.5])
    np.testing.assert_allclose(found.load_share, share(binary_entropy(tokens / TOKENS)), rtol=1e-6)
    np.testing.assert_allclose(found.energy_share, share(tokens * (value * size) ** 2), rtol=1e-5)
    assert found.summary()["stable_share"] == pytest.approx((0.5 + 0.5 + 2 / 3 + 0.5) / 4)
    assert [one.shared for one in found.rests] == [0] * 6
    assert [(one.rank_first, one.rank_second) for one in found.rests][-1] == (2, 1)  # third and fourth but for 0


@pytest.mark.parametrize("cosine", [0.69, 0.71])
def test_a_match_is_a_cosine_of_seven_tenths(cosine):
    eye = np.eye(LAYERS * WIDTH)
    near = cosine * eye[0] + np.sqrt(1 - cosine**2) * eye[1]
    found = measure_stability([reading_of([row], [50]) for row in (eye[0], near, eye[0])])
    assert found.found[0].tolist() == [3 if cosine > 0.7 else 2]


HADAMARD = linalg.hadamard(4) / 2
BASES = (np.eye(4), HADAMARD, HADAMARD * [1, 1, 1, -1])
"""Three of one space; any two vectors of different ones have cosine +-.5."""


def test_the_rest_of_one_space_is_told_from_rests_of_random_ones():
    """Eight features that match nowhere, but span one space in all dictionaries; others that share nothing."""
    rng, width = np.random.default_rng(1), LAYERS * WIDTH
    stable, common = np.split(np.linalg.qr(rng.standard_normal((width, 11)))[0].T, [3])

    def dictionary(basis):
        own = rng.standard_normal((4, width))
        rows = np.concatenate([stable, linalg.block_diag(basis, basis) @ common, own])
        return reading_of(rows, np.full(len(rows), 50))

    found = measure_stability([dictionary(basis) for basis in BASES])
    assert found.rests == (Rest(rank_first=12, rank_second=12, shared=8, forced=0, chance=0),) * 3


@pytest.mark.parametrize(
    ("n_features", "forced", "chance"), [(20, 0, 20 * (1 - 2 / np.pi * np.arcsin(0.9))), (30, 20, 20)]
)
def test_random_rests_share_what_chance_gives(n_features, forced, chance):
    """Random spaces of half of all dimensions: squared cosines follow the arcsine law (Wachter 1980)."""
    rng = np.random.default_rng(4)
    rows = [rng.standard_normal((n_features, LAYERS * WIDTH)) for _ in range(3)]
    found = measure_stability([reading_of(one, np.full(n_features, 50)) for one in rows])
    for one in found.rests:
        assert (one.rank_first, one.rank_second, one.forced) == (n_features, n_features, forced)
        assert one.chance == pytest.approx(chance, abs=1)
        assert one.shared == pytest.approx(one.chance, abs=2)
    assert found.summary()["rest_forced"] == forced


def test_angles_are_counted_above_nine_tenths():
    eye = np.eye(LAYERS * WIDTH)
    turned = [c * eye[i] + np.sqrt(1 - c**2) * eye[10 + i] for i, c in enumerate((0.95, 0.89, 1.0, 0.91))]
    found = measure_stability([reading_of(rows, [50] * 4) for rows in (eye[:4], HADAMARD @ turned, eye[20:24])])
    assert [one.shared for one in found.rests] == [3, 0, 0]


def test_too_few_too_large_or_nothing_left(monkeypatch):
    eye = np.eye(LAYERS * WIDTH)
    same = [reading_of(eye[:4], [50] * 4) for _ in range(3)]
    assert [(one.rank_first, one.shared, one.chance) for one in measure_stability(same).rests] == [(0, 0, 0)] * 3
    monkeypatch.setattr(stability, "WHOLE_BYTES", 4 * LAYERS * WIDTH * 8 - 1)
    found = measure_stability(same)
    assert found.rests == ()
    assert found.reason is not None
    assert np.isnan(found.summary()["rest_shared"])
    assert found.summary()["stable_load_share"] == 1
