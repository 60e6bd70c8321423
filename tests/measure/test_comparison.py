"""Readings and comparisons of subjects, on features drawn by hand so that the answers are known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy import sparse

from crosscoder.foundation.artifact import DamagedArtifactError
from crosscoder.measure import comparison
from crosscoder.measure.comparison import ShapeReadings
from crosscoder.measure.counting import SeedPair
from crosscoder.measure.reading import Reading, load_reading, save_reading
from crosscoder.results.table import LongTable

T, F = 4000, 192
DOCUMENT_T = np.arange(T) // 100


def truth(n_layers: int, d_model: int, width: int, seed: int) -> np.ndarray:
    """F directions that keep their direction through windows of `width` layers laid side by side."""
    rng = np.random.default_rng(seed)
    decoder = np.zeros((F, n_layers, d_model))
    for i in range(F):
        first = (i % (n_layers // width)) * width
        decoder[i, first : first + width] = rng.normal(size=d_model)
    return decoder / np.linalg.norm(decoder.reshape(F, -1), axis=1)[:, None, None]


def activity(seed: int = 0) -> sparse.csc_array:
    rng = np.random.default_rng([seed, 7])
    fires = rng.random((T, F)) < 0.02
    return sparse.csc_array(np.where(fires, rng.uniform(0.5, 1.5, (T, F)), 0))


def read(decoder: np.ndarray, code: sparse.csc_array, seed: int, noise: float = 0.01) -> Reading:
    rng = np.random.default_rng([seed, 3])
    noisy = decoder + noise * rng.normal(size=decoder.shape) / math.sqrt(decoder[0].size)
    return Reading(seed, noisy.astype(np.float32), code, 0.95, 0.0, code.nnz / T, np.arange(len(decoder)))


def subject(
    name: str, n_layers: int, d_model: int, width: int, *, noise: float = 0.01, seeds: int = 2
) -> ShapeReadings:
    code = activity()
    return ShapeReadings(
        name,
        tuple(
            tuple(read(truth(n_layers, d_model, width, 10 * t + n_layers), code, 10 * t + d, noise) for d in range(2))
            for t in range(seeds)
        ),
    )


def test_reading_survives_a_file(tmp_path):
    reading = read(truth(4, 8, 2, 0), activity(), 3)
    save_reading(reading, tmp_path / "r.safetensors")
    back = load_reading(tmp_path / "r.safetensors")
    assert back.seed == 3
    assert back.l0 == reading.l0
    assert back.explained_variance == 0.95
    np.testing.assert_array_equal(back.decoder_FLD, reading.decoder_FLD)
    assert abs(back.code - reading.code).max() < 1e-6


def test_a_damaged_or_missing_reading_is_named(tmp_path):
    path = tmp_path / "r.safetensors"
    with pytest.raises(FileNotFoundError, match="no such reading"):
        load_reading(path)
    save_reading(read(truth(4, 8, 2, 0), activity(), 3), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedArtifactError, match=r"not what it should be .*delete it and run"):
        load_reading(path)


def test_of_duplicates_the_most_active_stands_for_all():
    decoder = truth(4, 8, 2, 0)[:3]
    code = activity()[:, :3].toarray()
    double = np.concatenate([decoder, decoder[:1]])
    fewer = code[:, :1].copy()
    fewer[np.flatnonzero(fewer)[:3]] = 0
    columns = sparse.csc_array(np.concatenate([code, fewer], axis=1))
    for order, kept in (([0, 1, 2, 3], [0, 1, 2]), ([3, 1, 2, 0], [1, 2, 3])):
        reading = Reading(0, double[order], columns[:, order], 0.9, 0.0, 1.0, np.arange(4))
        assert reading.distinct.index_F.tolist() == kept


def compared(a, b) -> LongTable:
    return LongTable(tuple(comparison.compare_shapes(a, b, DOCUMENT_T)))


def test_features_that_are_the_same_are_universal_and_fire_alike_and_others_are_neither():
    a, b = subject("A", 8, 32, 1, seeds=3), subject("B", 2, 64, 1, seeds=3)
    same = compared(a, b)
    assert same.one("universality").value == pytest.approx(1, abs=0.01)
    assert same.one("u_null") < 0.2
    assert same.one("matched_between") == 1
    (median,) = same.select("median_log_rate")
    assert median.missing or median.value.value == pytest.approx(0, abs=0.01)
    strange = ShapeReadings("B", tuple(tuple(read(r.decoder_FLD, activity(9), 1) for r in g) for g in b.seeds))
    other = compared(a, strange)
    assert abs(other.one("universality").value) < 0.05
    assert other.one("matched_between") < 0.1
    (rates,) = other.select("rate_dispersion")
    assert "features match" in rates.missing


def test_rates_that_are_halved_in_one_shape_are_seen():
    rng = np.random.default_rng(5)

    def thinned(share: float, seed: int) -> sparse.csc_array:
        return sparse.csc_array(activity().toarray() * (np.random.default_rng(seed).random((T, F)) < share))

    a = ShapeReadings("A", tuple((read(truth(8, 32, 1, 0), thinned(rng.uniform(0.9, 1), t), t),) for t in range(3)))
    b = ShapeReadings("B", tuple((read(truth(2, 64, 1, 0), thinned(0.75, 10 + t), t),) for t in range(3)))
    found = compared(a, b).one("median_log_rate")
    assert found.value == pytest.approx(math.log(0.75 / 0.95), abs=0.05)
    assert found.high < -0.1


def test_universality_needs_two_trainings():
    found = compared(subject("A", 8, 32, 1, seeds=1), subject("B", 2, 64, 1, seeds=1))
    (row,) = found.select("universality")
    assert row.value is None
    assert "ceiling" in row.missing


def test_trainings_have_the_means_of_their_dictionaries_and_pairs():
    one = subject("A", 8, 32, 1)
    found = LongTable(tuple(comparison.training_rows(one))).select(training_seed=1)
    assert found.one("d_eff_debiased") == pytest.approx(one.pairs[1][0].debiased.value)
    assert found.one("point_matched_share") == 1
    alone = ShapeReadings("A", tuple(group[:1] for group in one.seeds))
    assert LongTable(tuple(comparison.training_rows(alone))).one("d_eff_debiased", training_seed=0) is None


def test_readings_of_different_texts_are_refused():
    reading = read(truth(4, 8, 2, 0), activity(), 0)
    shorter = dataclasses.replace(reading, code=reading.code[:100])
    with pytest.raises(ValueError, match="on the same tokens"):
        ShapeReadings("A", ((reading, shorter),)).pairs[0][0].pairs_m2  # noqa: B018


def test_a_pair_knows_its_matches():
    one = subject("A", 8, 32, 1, seeds=1)
    pair = one.pairs[0][0]
    assert pair.matched_share == 1
    half = SeedPair(pair.first, pair.second.only(np.arange(F // 2)))
    assert len(half.pairs_m2) == F // 2
