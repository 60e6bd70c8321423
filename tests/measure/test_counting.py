"""Features, matching and counting against cases worked out by hand."""

import math
import tracemalloc

import numpy as np
import pytest
from scipy import sparse

from crosscoder.measure import counting, dimension, matching, profile
from crosscoder.measure.reading import Measured, Outliers, Reading


def csc(dense):
    return sparse.csc_array(np.asarray(dense, dtype=np.float32))


def test_layer_profile_and_spread_of_known_features():
    decoder = np.zeros((4, 4, 3))
    decoder[0, 1] = [0, 2, 0]  # one layer
    decoder[1, :] = [1, 0, 0]  # all four evenly, one direction
    decoder[2, 0], decoder[2, 1] = [3, 0, 0], [0, 1, 0]  # shares .9 and .1
    shares = profile.layer_profile(decoder)
    np.testing.assert_allclose(shares[0], [0, 1, 0, 0])
    np.testing.assert_allclose(shares[1], [0.25] * 4)
    np.testing.assert_allclose(shares[2], [0.9, 0.1, 0, 0])
    np.testing.assert_allclose(shares[3], 0)
    np.testing.assert_allclose(profile.participation_ratio(shares), [1, 4, 1 / 0.82, 0])
    assert profile.lifespan(shares).tolist() == [1, 4, 1, 0]
    assert profile.heatmap(shares[:3]) == [shares[i].round(4).tolist() for i in (2, 0, 1)]  # by mean layer
    cosine = profile.adjacent_cosine(decoder, shares)
    assert cosine[1] == pytest.approx(1)
    assert np.isnan(cosine[[0, 2]]).all()


def test_drift_is_seen_as_a_cosine_below_one():
    angle = 0.3
    decoder = np.array([[[np.cos(i * angle), np.sin(i * angle)] for i in range(5)]])
    assert profile.adjacent_cosine(decoder, profile.layer_profile(decoder))[0] == pytest.approx(np.cos(angle))


def test_activation_correlation_is_pearson():
    rng = np.random.default_rng(0)
    a = rng.random((200, 4)) * (rng.random((200, 4)) < 0.3)
    b = np.column_stack([a[:, 2] * 3, rng.random(200), np.full(200, 2.0)])
    found = matching.activation_correlation(csc(a), csc(b)).whole()
    expected = np.corrcoef(a.T, b[:, :2].T)[:4, 4:]
    np.testing.assert_allclose(found[:, :2], expected, atol=1e-6)
    assert found[2, 0] == pytest.approx(1)
    np.testing.assert_allclose(found[:, 2], 0)  # a constant column correlates with nothing
    with pytest.raises(ValueError, match="200 and 3 tokens"):
        matching.activation_correlation(csc(a), csc(np.ones((3, 1))))


SIMILARITY = np.array([[0.9, 0.8, 0.0], [0.85, 0.1, 0.0], [0.0, 0.0, 0.72]])


def test_matching_rules_differ_as_they_should():
    assert matching.mutual_nearest_pairs(SIMILARITY, 0.7).tolist() == [[0, 0], [2, 2]]
    assert matching.hungarian_pairs(SIMILARITY, 0.7).tolist() == [[0, 1], [1, 0], [2, 2]]
    assert matching.mutual_nearest_pairs(SIMILARITY, 0.75).tolist() == [[0, 0]]
    assert matching.matched_share(matching.mutual_nearest_pairs(SIMILARITY, 0.7), 3, 4) == pytest.approx(2 / 3)


def test_rules_in_blocks_of_rows_find_what_they_find_in_one_piece(monkeypatch):
    """Also of equals, which the first wins, in whichever block the others are."""
    rng = np.random.default_rng(9)
    a, b = (rng.random((300, n)) * (rng.random((300, n)) < 0.1) for n in (50, 30))
    a[:, 40], b[:, 20], b[:, 25], a[:, 7] = a[:, 3], a[:, 3], a[:, 3], 0
    for similarity in (
        matching.activation_correlation(csc(a), csc(b)),
        matching.decoder_cosine(a.T[:, None], b.T[:, None]),
    ):
        whole = similarity.whole()
        pairs = matching.mutual_nearest_pairs(whole, 0.3).tolist()
        monkeypatch.setattr(matching, "BLOCK_BYTES", 8 * 30 * 4)
        starts, blocks = zip(*similarity.blocks(), strict=True)
        assert starts == tuple(range(0, 50, 4))
        assert matching.mutual_nearest_pairs(similarity, 0.3).tolist() == pairs
        found = matching.nearest(similarity)
        np.testing.assert_array_equal(found.index_a, whole.argmax(1))
        np.testing.assert_array_equal(found.index_b, whole.argmax(0))
        np.testing.assert_allclose(np.concatenate(blocks), whole, rtol=1e-12, atol=1e-15)
        monkeypatch.undo()
    assert [3, 20] in pairs


def test_counts_do_not_depend_on_the_blocks(monkeypatch):
    rng = np.random.default_rng(10)
    z = rng.random((400, 40)) * (rng.random((400, 40)) < 0.2)
    bank = bank_of(
        [np.hstack([z, z[:, :5]]), np.hstack([z[:, 20:], z[:, 20:], z[:, :5]])], [rng.normal(size=(45, 8))] * 2
    )
    before = counting.count_features(bank), counting.chains(bank), bank.distinct.index_F.tolist()
    monkeypatch.setattr(matching, "BLOCK_BYTES", 8 * 45 * 7)
    fresh = bank.only(np.arange(90))
    assert counting.count_features(fresh) == {
        **before[0],
        "effective_dimension": pytest.approx(before[0]["effective_dimension"]),
    }
    assert fresh.distinct.index_F.tolist() == before[2]
    for key, chain_F in counting.chains(fresh).items():
        assert chain_F.tolist() == before[1][key].tolist()


def test_a_layer_too_wide_for_one_to_one_assignment_is_merged_by_the_other_rules(monkeypatch, capsys):
    bank = bank_of([np.eye(50)[:, :3]] * 2, [np.eye(3)] * 2)
    monkeypatch.setattr(matching, "WHOLE_BYTES", 8 * 9 - 1)
    assert {rule for _, rule in counting.merged_counts(bank)} == {"mutual nearest", "threshold"}
    assert "3 by 3 features are too many for one-to-one assignment" in capsys.readouterr().err
    with pytest.raises(ValueError, match="3 by 3 similarities"):
        matching.hungarian_pairs(matching.decoder_cosine(np.eye(3)[:, None], np.eye(3)[:, None]), 0.7)


def test_twenty_thousand_features_are_matched_in_less_than_a_gibibyte():
    """One array of their correlations has 3 GiB."""
    rng, n_tokens, n_features = np.random.default_rng(11), 500, 20_000
    code = sparse.random_array((n_tokens, n_features), density=0.01, format="csc", rng=rng, dtype=np.float32)
    order = rng.permutation(n_features)
    first, second = (Reading(0, np.zeros((n_features, 1, 1)), sparse.csc_array(c), 1.0, 0.0, 1.0, index_F=order)
                     for c in (code, code[:, order]))  # fmt: skip
    tracemalloc.start()
    try:
        pairs = counting.SeedPair(first, second).pairs_m2
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**30
    assert (order[pairs[:, 1]] == pairs[:, 0]).mean() > 0.98
    assert len(pairs) > 0.9 * n_features


def test_alive_needs_more_than_ten_occurrences():
    code = np.zeros((1000, 3))
    code[:11, 0], code[:10, 1] = 1, 1
    measured = Measured(
        sparse.csr_array(code), 1, np.ones(1), 1.0, np.arange(1000), Outliers(1, 1, 0, *np.zeros((2, 1)))
    )
    assert measured.alive_GF.tolist() == [[True, False, False]]
    assert measured.probability_F.tolist() == [0.011, 0.01, 0]


def test_duplicates_are_counted_once_only_if_both_direction_and_activity_agree():
    rng = np.random.default_rng(1)
    active = rng.random((500, 3)) * (rng.random((500, 3)) < 0.2)
    code = csc(np.column_stack([active[:, 0], active[:, 0] * 2, active[:, 1], active[:, 0]]))
    decoder = np.array([[1.0, 0, 0], [1, 0.01, 0], [1, 0, 0.01], [0, 0, 1]])
    reading = Reading(0, decoder[:, None], code, 1.0, 0.0, 1.0, index_F=np.arange(4))
    assert reading.distinct.index_F.tolist() == [0, 2, 3]
    assert len(reading.only(np.zeros(4, dtype=bool)).distinct) == 0


def test_duplicates_of_a_bank_are_those_of_one_layer():
    z = np.random.default_rng(7).random((300, 1))
    bank = bank_of([np.hstack([z, z]), np.hstack([z, z])], [np.eye(2)[[0, 0]], np.eye(2)[[0, 1]]])
    assert bank.distinct.index_F.tolist() == [0, 2, 3]
    counts = counting.count_features(bank)
    assert (counts["alive"], counts["distinct"], counts["features_per_layer"]) == (4, 3, 1.5)
    assert counts["alive_per_layer"] == [2, 2]
    few = counting.count_features(bank, alike=False)
    assert few == {key: counts[key] for key in few}
    assert counts.keys() - few.keys() >= {"distinct", "merged", "features_per_layer"}


def test_a_dictionary_of_one_layer_is_bank_and_crosscoder_alike():
    z = np.random.default_rng(8).random((300, 1))
    counts = counting.count_features(bank_of([np.hstack([z, z])], [np.eye(2)[[0, 0]]]))
    assert (counts["alive"], counts["distinct"], counts["merged"]) == (2, 1, 2)
    assert counts["per_neuron_joint"] == counts["per_neuron_layer"] == 0.5


def bank_of(codes, decoders):
    """The reading of a bank whose layers have as many features each, all alive."""
    n_layers, n = len(codes), len(decoders[0])
    decoder_FLD = np.zeros((n_layers * n, n_layers, decoders[0].shape[1]))
    for layer, rows_FD in enumerate(decoders):
        decoder_FLD[layer * n : (layer + 1) * n, layer] = rows_FD
    groups = {"index_F": np.arange(n_layers * n), "n_groups": n_layers, "size": n_layers * n}
    return Reading(0, decoder_FLD, csc(np.hstack(codes)), 1.0, 0.0, 1.0, **groups)


def test_chains_over_layers_merge_and_the_band_brackets_them():
    rng = np.random.default_rng(2)
    z = rng.random((400, 5)) * (rng.random((400, 5)) < 0.2)
    codes = [z[:, [0, 1]], z[:, [0, 2]], z[:, [3, 0]]]  # feature 0 persists, the others live in one layer
    decoders = [np.eye(4)[[0, 1]], np.eye(4)[[0, 2]], np.eye(4)[[3, 0]]]
    counts = counting.merged_counts(bank_of(codes, decoders))
    assert set(counts.values()) == {4}
    assert len(counts) == 9
    turned = [np.eye(4)[[0, 1]], np.eye(4)[[1, 2]], np.eye(4)[[3, 2]]]
    counts = counting.merged_counts(bank_of(codes, turned))
    assert counts["correlation", "mutual nearest"] == 4
    assert counts["both", "mutual nearest"] == 6  # the persisting one changed direction


def test_threshold_links_percolate_and_one_to_one_links_do_not():
    z = np.random.default_rng(3).random((300, 1))
    codes = [np.hstack([z, z]), np.hstack([z, z])]
    decoders = [np.eye(2), np.eye(2)]
    counts = counting.merged_counts(bank_of(codes, decoders))
    assert counts["correlation", "threshold"] == 1
    assert counts["correlation", "hungarian"] == 2


def test_seed_corrected_lifespan():
    assert counting.seed_corrected_lifespan(0.29, 0.30, 8) == pytest.approx((0.29 / 0.3, 7.13), abs=0.01)
    assert counting.seed_corrected_lifespan(0.4, 0.3, 8) == (1, 8)
    assert counting.seed_corrected_lifespan(0.0, 0.3, 8) == (0, 1)
    assert all(math.isnan(x) for x in counting.seed_corrected_lifespan(0.1, 0.0, 8))


def test_adjacent_share():
    rng = np.random.default_rng(4)
    z = rng.random((400, 4)) * (rng.random((400, 4)) < 0.2)
    first = bank_of([z[:, [0, 1]], z[:, [0, 2]]], [np.eye(2)] * 2)
    assert counting.adjacent_share(first) == 0.5
    assert math.isnan(counting.adjacent_share(first.groups[0]))


def test_chapman_of_a_known_draw():
    assert counting.chapman(100, 100, 100) == pytest.approx(100)
    assert counting.chapman(100, 100, 50) == pytest.approx(101 * 101 / 51 - 1)


def test_capture_recapture_finds_the_size_of_a_planted_pool():
    rng = np.random.default_rng(5)
    first, second = (set(rng.choice(256, 150, replace=False)) for _ in range(2))
    assert counting.chapman(150, 150, len(first & second)) == pytest.approx(256, rel=0.1)


def test_binary_entropy():
    np.testing.assert_allclose(counting.binary_entropy(np.array([0, 0.5, 1])), [0, math.log(2), 0])
    whole, half = counting.binary_entropy(np.array([0.02])), counting.binary_entropy(np.array([0.01]))
    assert (2 * half - whole)[0] == pytest.approx(0.02 * math.log(2), rel=0.03)  # what splitting changes


def test_effective_dimension_of_known_arrangements():
    rng = np.random.default_rng(6)
    n_layers, width, n = 4, 32, 600
    directions = rng.standard_normal((n, width))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    local = np.zeros((n, n_layers, width))
    local[np.arange(n), np.arange(n) % n_layers] = directions
    assert dimension.effective_dimension(local.reshape(n, -1)) == pytest.approx(n_layers * width, rel=0.05)
    persistent = np.repeat(directions[:, None], n_layers, 1).reshape(n, -1)
    assert dimension.effective_dimension(persistent) == pytest.approx(width, rel=0.05)
    assert math.isnan(dimension.effective_dimension(directions[:1]))
    assert dimension.effective_dimension(np.eye(3)) == math.inf
