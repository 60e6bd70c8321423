"""Nearest features and features found again, against all cosines at once."""

import numpy as np
import pytest
import torch

from crosscoder import Crosscoder, LayerwiseSAE, TopK
from crosscoder.measure.neighbours import are_found, nearest_features
from crosscoder.measure.rows import FeatureRows


def rows(form, seed=0, n=9, layers=3):
    one = form(n_layers=layers, d_model=5, n_features=n, sparsity=TopK(k=2), seed=seed)
    return FeatureRows.of(one), one


def unit(matrix):
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def test_nearest_in_another_crosscoder_by_joint_cosine():
    (first, a), (second, b) = rows(Crosscoder), rows(Crosscoder, 1)
    cosine = unit(a.decoder.detach().flatten(1).numpy()) @ unit(b.decoder.detach().flatten(1).numpy()).T
    found = nearest_features(first, second, most=4, quiet=True)
    np.testing.assert_array_equal(found.feature_Fm, np.argsort(-cosine, axis=1)[:, :4])
    np.testing.assert_allclose(found.cosine_Fm, -np.sort(-cosine, axis=1)[:, :4], rtol=1e-4)
    assert (found.layer_Fm == -1).all()


def test_a_feature_is_not_its_own_neighbour():
    found = nearest_features(rows(Crosscoder)[0], most=20, quiet=True)
    assert found.feature_Fm.shape == (9, 9)
    for feature, others in enumerate(found.feature_Fm):
        assert sorted(others[:-1]) == [one for one in range(9) if one != feature]
    assert (found.feature_Fm[:, -1] == -1).all()
    assert np.isnan(found.cosine_Fm[:, -1]).all()


def test_a_bank_s_neighbours_are_in_other_layers():
    first, bank = rows(LayerwiseSAE)
    flat = unit(bank.decoder.detach().flatten(0, 1).numpy())
    layer = np.repeat(np.arange(3), 9)
    cosine = np.where(layer[:, None] == layer, -np.inf, flat @ flat.T)
    found = nearest_features(first, most=4, quiet=True)
    np.testing.assert_array_equal(found.feature_Fm, np.argsort(-cosine, axis=1)[:, :4])
    np.testing.assert_array_equal(found.layer_Fm, layer[found.feature_Fm])


def test_of_a_crosscoder_and_a_bank_rows_of_one_layer_are_compared():
    (first, cc), (second, bank) = rows(Crosscoder), rows(LayerwiseSAE, 1)
    both = nearest_features(first, second, most=2, quiet=True)
    for feature in range(9):
        each = [
            unit(cc.decoder[feature].detach().numpy())[at] @ unit(bank.decoder[at].detach().numpy()).T
            for at in range(3)
        ]
        joined = np.concatenate(each)
        best = np.argsort(-joined)[:2]
        assert both.feature_Fm[feature].tolist() == best.tolist()
        assert both.layer_Fm[feature].tolist() == (best // 9).tolist()
    back = nearest_features(second, first, most=1, quiet=True)
    assert back.layer_Fm[:, 0].tolist() == np.repeat(np.arange(3), 9).tolist()
    with pytest.raises(ValueError, match=r"dictionaries of \[3, 5\] and \[2, 5\]"):
        nearest_features(first, rows(Crosscoder, layers=2)[0], quiet=True)


@pytest.mark.parametrize("form", [Crosscoder, LayerwiseSAE])
def test_features_that_are_permuted_are_found_and_others_are_not(form):
    first, one = rows(form)
    _, other = rows(form, 1)
    with torch.no_grad():
        axis = 0 if form is Crosscoder else 1
        other.decoder.copy_(2 * one.decoder.roll(3, dims=axis))
        other.decoder.select(axis, 3).neg_()  # what was the first of each is gone
    found = are_found(first, FeatureRows.of(other))
    wanted = np.ones((1 if form is Crosscoder else 3, 9), dtype=bool)
    wanted[:, 0] = False
    np.testing.assert_array_equal(found, wanted.ravel())
