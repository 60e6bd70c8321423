"""Readings, densities and comparisons of subjects, on features drawn by hand so that the answers are known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy import sparse

from crosscoder.foundation.artifact import DamagedArtifactError
from crosscoder.measure import comparison, counting, density
from crosscoder.measure.density import SeedPair, ShapeReadings
from crosscoder.measure.reading import Reading, load_reading, save_reading
from crosscoder.results.quantities import PRIMARY_ESTIMATOR
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
        n_layers,
        d_model,
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
    with pytest.raises(DamagedArtifactError, match="not a reading"):
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


@pytest.mark.parametrize(("width_a", "width_b", "ratio"), [(1, 1, 2.0), (8, 2, 0.5)])
def test_density_ratio_returns_what_was_planted(width_a, width_b, ratio):
    """Features of one layer: d_eff = L D, so R = 2. Features of all layers: d_eff = D, so R = 1/2."""
    a, b = subject("A", 8, 32, width_a), subject("B", 2, 64, width_b)
    log = density.density_ratio(b, a, PRIMARY_ESTIMATOR, DOCUMENT_T)
    assert not isinstance(log, str)
    assert math.exp(log.value) == pytest.approx(ratio, rel=0.1)
    assert log.estimate().covers(math.log(ratio))


def test_noise_inflates_the_raw_dimension_and_not_the_debiased_one():
    clean, noisy = (subject("A", 8, 32, 8, noise=n) for n in (0.001, 0.3))
    raw = [density.shape_density(s, "load_raw", DOCUMENT_T).value for s in (clean, noisy)]
    corrected = [density.shape_density(s, "load_corrected", DOCUMENT_T).value for s in (clean, noisy)]
    assert raw[1] < 0.9 * raw[0]
    assert corrected[1] == pytest.approx(corrected[0], rel=0.08)


def test_dictionaries_that_disagree_have_no_primary_density():
    reason = density.shape_density(subject("A", 8, 32, 8, noise=1.0), PRIMARY_ESTIMATOR, DOCUMENT_T)
    assert isinstance(reason, str)
    assert "0.9" in reason
    assert not isinstance(density.shape_density(subject("A", 8, 32, 8, noise=1.0), "load_raw", DOCUMENT_T), str)


def test_one_dictionary_seed_has_no_debiased_density():
    whole = subject("A", 8, 32, 8)
    alone = ShapeReadings("A", 8, 32, tuple(group[:1] for group in whole.seeds))
    assert "two" in density.shape_density(alone, PRIMARY_ESTIMATOR, DOCUMENT_T)


def test_entropy_load_of_a_density_is_the_sum_of_binary_entropies():
    one = subject("A", 8, 32, 1, seeds=1)
    reading, pair = one.readings[0], one.pairs[0][0]
    p = reading.probability_F
    load = float((-p * np.log(p) - (1 - p) * np.log(1 - p)).sum())
    assert density.shape_density(one, PRIMARY_ESTIMATOR, DOCUMENT_T).value == pytest.approx(load / pair.debiased.value)


def test_slots_count_a_feature_on_every_layer_it_occupies():
    a = subject("A", 8, 32, 8)
    assert density.shape_density(a, "count_joint", DOCUMENT_T).value == pytest.approx(F / 256)
    assert density.shape_density(a, "count_slots", DOCUMENT_T).value == pytest.approx(8 * F / 256, rel=1e-3)


def site_of(trained, untrained=None) -> comparison.SiteReadings:
    return comparison.SiteReadings(site="write", trained=trained, untrained=untrained or {}, document_T=DOCUMENT_T)


def measured(trained, untrained=None) -> LongTable:
    return LongTable(tuple(comparison.measure_site(site_of(trained, untrained))))


def test_exponents_of_planted_shapes():
    """Features through all layers: gamma 1, delta 0; features of one layer: gamma 0, delta 1."""
    for whole, gamma, delta in ((True, 1, 0), (False, 0, 1)):
        shapes = {
            name: subject(name, layers, width, layers if whole else 1)
            for name, layers, width in (("A", 8, 32), ("B", 2, 64), ("C", 4, 45))
        }
        found = measured(shapes)
        assert found.one("gamma").value == pytest.approx(gamma, abs=0.05)
        assert found.one("delta").value == pytest.approx(delta, abs=0.12)
        assert found.one("trained_difference") is None
        assert found.select("trained_difference").rows[0].missing


def test_the_control_is_subtracted():
    trained = {"A": subject("A", 8, 32, 1), "B": subject("B", 2, 64, 1)}
    untrained = {"A": subject("A", 8, 32, 8), "B": subject("B", 2, 64, 2)}
    found = measured(trained, untrained)
    assert found.one("trained_difference", estimator=PRIMARY_ESTIMATOR).value == pytest.approx(math.log(4), abs=0.15)
    assert found.one("gamma_excess").value == pytest.approx(-1, abs=0.05)


def test_a_control_without_agreement_is_compared_by_single_dictionaries():
    trained = {"A": subject("A", 8, 32, 1), "B": subject("B", 2, 64, 1)}
    noisy = {"A": subject("A", 8, 32, 8, noise=1.0), "B": subject("B", 2, 64, 2, noise=1.0)}
    found = measured(trained, noisy)
    assert found.one("ratio", state="untrained", estimator=PRIMARY_ESTIMATOR) is None
    weighted = [
        math.log(found.one("ratio", state=s, estimator="load_weighted").value) for s in ("trained", "untrained")
    ]
    difference = found.one("trained_difference", estimator="load_weighted")
    assert difference.value == pytest.approx(weighted[0] - weighted[1])


def test_universality_is_one_for_the_same_features_and_near_null_for_others():
    same = {"A": subject("A", 8, 32, 1), "B": subject("B", 2, 64, 1)}
    found = LongTable(tuple(comparison.measure_universality(site_of(same))))
    assert found.one("universality").value == pytest.approx(1, abs=0.01)
    assert found.one("u_null") < 0.2
    assert found.one("rate_median_ratio") == pytest.approx(1)
    assert found.one("share_forward_7") == found.one("share_backward_7") == 1
    b = same["B"]
    other = ShapeReadings("B", 2, 64, tuple(tuple(read(r.decoder_FLD, activity(9), 1) for r in g) for g in b.seeds))
    strange = LongTable(tuple(comparison.measure_universality(site_of({"A": same["A"], "B": other}))))
    assert abs(strange.one("universality").value) < 0.05


def test_universality_needs_two_trainings():
    one = {"A": subject("A", 8, 32, 1, seeds=1), "B": subject("B", 2, 64, 1, seeds=1)}
    (found,) = LongTable(tuple(comparison.measure_universality(site_of(one)))).select("universality")
    assert found.value is None
    assert "ceiling" in found.missing


def test_points_are_means_over_dictionary_seeds_and_their_pairs():
    one = subject("A", 8, 32, 1)
    found = measured({"A": one}).select(subject="A", training_seed=1, state="trained")
    assert found.one("point_load") == pytest.approx(
        np.mean([counting.binary_entropy(r.probability_F).sum() for r in one.seeds[1]])
    )
    assert found.one("d_eff_debiased") == pytest.approx(one.pairs[1][0].debiased.value)
    alone = ShapeReadings("A", 8, 32, tuple(group[:1] for group in one.seeds))
    assert measured({"A": alone}).one("d_eff_debiased", training_seed=0) is None


def test_readings_of_different_texts_are_refused():
    reading = read(truth(4, 8, 2, 0), activity(), 0)
    shorter = dataclasses.replace(reading, code=reading.code[:100])
    with pytest.raises(ValueError, match="on the same tokens"):
        ShapeReadings("A", 4, 8, ((reading, shorter),)).pairs[0][0].pairs_m2  # noqa: B018
    with pytest.raises(ValueError, match="each needs at least one"):
        ShapeReadings("A", 4, 8, ((reading,), ()))


def test_a_pair_knows_its_matches():
    one = subject("A", 8, 32, 1, seeds=1)
    pair = one.pairs[0][0]
    assert pair.matched_share == 1
    half = SeedPair(pair.first, pair.second.only(np.arange(F // 2)))
    assert len(half.pairs_m2) == F // 2
