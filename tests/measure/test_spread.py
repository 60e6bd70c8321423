"""Spread by decoder, by use and by decodability, against features whose layers are known."""

import math

import numpy as np
import pytest
from scipy import sparse

from crosscoder.measure import features, spread


def test_decoder_spread_by_hand():
    decoder = np.zeros((5, 4, 2))
    decoder[0, 1, 0] = 2
    decoder[1, :, 0] = 1
    decoder[2, 0, 0], decoder[2, 3, 1] = 1, 1  # two peaks
    decoder[3, 1, 0], decoder[3, 2, 0] = 3, 1
    found = spread.decoder_spread(decoder)
    np.testing.assert_allclose(found.rho, [1, 4, 2, 1 / 0.82, 0])
    np.testing.assert_allclose(found.entropy[[0, 1, 2, 4]], [1, 4, 2, 0])
    assert found.lifespan.tolist() == [1, 4, 2, 1, 0]
    np.testing.assert_allclose(found.center, [1, 1.5, 1.5, 1.1, math.nan])
    assert found.single_peak.tolist() == [True, True, False, True, False]
    assert found.adjacent_cosine[1] == pytest.approx(1)


def test_encoder_contributions_by_hand_and_in_chunks():
    x = np.arange(24, dtype=float).reshape(4, 2, 3)
    encoder = np.random.default_rng(0).standard_normal((5, 2, 3))
    token, feature = np.array([0, 3, 3]), np.array([4, 0, 4])
    found = spread.encoder_contributions(x, encoder, token, feature, chunk=2)
    assert found[1, 1] == pytest.approx(x[3, 1] @ encoder[0, 1])
    np.testing.assert_allclose(found, spread.encoder_contributions(x, encoder, token, feature))
    assert spread.encoder_contributions(x, encoder, token[:0], feature[:0]).shape == (0, 2)


CONTRIBUTION = np.array([[3.0, 1.0], [1.0, 3.0], [2.0, -1.0]])
FEATURE = np.array([0, 0, 2])


def test_functional_profile_by_hand():
    found = spread.functional_profile(CONTRIBUTION, FEATURE, 3)
    np.testing.assert_allclose(found, [[0.5, 0.5], [0, 0], [1, 0]])


def test_leave_one_out_drop_by_hand():
    activation = CONTRIBUTION.sum(1)
    found = spread.leave_one_out_drop(CONTRIBUTION, activation, FEATURE, 3)
    np.testing.assert_allclose(found, [[0.5, 0.5], [math.nan, math.nan], [1, -1]])
    strict = spread.leave_one_out_drop(CONTRIBUTION, activation, FEATURE, 3, threshold=np.array([1.5, 0, 0]))
    np.testing.assert_allclose(strict[0], [1 - 3 / 8, 1 - 3 / 8])  # what is left of 1 falls below the threshold


def test_use_tells_apart_what_decoder_norms_do_not():
    """Two features written evenly on four layers; one is read from all of them, the other from one."""
    rng = np.random.default_rng(1)
    n_tokens, n_layers, width = 600, 4, 16
    directions = np.linalg.qr(rng.standard_normal((width, 2)))[0].T
    active = rng.random((n_tokens, 2)) < 0.1
    x = np.einsum("tf,fd->td", active, directions)[:, None].repeat(n_layers, 1)
    x = x + 0.05 * rng.standard_normal(x.shape)
    decoder = directions[:, None].repeat(n_layers, 1)
    encoder = decoder / n_layers
    encoder[1, 1:] = 0
    assert spread.decoder_spread(decoder).rho.tolist() == [pytest.approx(4), pytest.approx(4)]
    token, feature = np.nonzero(active)
    contribution = spread.encoder_contributions(x, encoder, token, feature)
    profile = spread.functional_profile(contribution, feature, 2)
    np.testing.assert_allclose(features.participation_ratio(profile), [4, 1], rtol=0.02)
    drop = spread.leave_one_out_drop(contribution, contribution.sum(1), feature, 2)
    np.testing.assert_allclose(drop, [[0.25] * 4, [1, 0, 0, 0]], atol=0.02)


def test_area_under_curve_by_hand():
    score = np.array([[1.0, 0], [2, 0], [3, 0], [4, 0]])
    np.testing.assert_allclose(spread.area_under_curve(score, np.array([0, 1, 0, 1])), [0.75, 0.5])
    assert np.isnan(spread.area_under_curve(score, np.ones(4))).all()


def test_area_under_curve_of_shifted_normals():
    rng = np.random.default_rng(2)
    label = rng.random(20000) < 0.3
    score = rng.standard_normal((20000, 1)) + label[:, None]
    assert spread.area_under_curve(score, label)[0] == pytest.approx(0.7602, abs=0.01)  # Phi(1 / sqrt 2)


def test_gain_and_excess_by_hand():
    joint = np.array([0.99, 0.99, 0.80, 0.70, math.nan])
    single = np.array([[0.6, 0.8], [0.93, 0.5], [0.78, 0.6], [0.5, 0.6], [0.5, 0.5]])
    np.testing.assert_allclose(spread.joint_gain(joint, single)[:4], [0.19, 0.06, 0.02, 0.1])
    assert spread.genuine_share(joint, single) == 0.5
    assert math.isnan(spread.genuine_share(joint[4:], single[4:]))
    none = (np.full(4, 0.6), np.full((4, 2), 0.59))
    some = (np.array([0.9, 0.6, 0.6, 0.6]), np.full((4, 2), 0.59))
    found = spread.cross_layer_excess((joint, single), none, some)
    assert (found.x, found.share, found.shuffled, found.untrained) == (0.25, 0.5, 0, 0.25)
    assert math.isnan(spread.cross_layer_excess((joint, single), (joint[4:], single[4:]), some).x)


def test_excess_separates_codes_across_layers_from_persistence():
    """A label that is the sum of two layers' bits can be read from both together only; a persisting one from either."""
    rng = np.random.default_rng(3)

    def aucs(kind):
        bits = rng.random((4000, 2)) < 0.3
        label = bits.all(1) if kind == "split" else bits[:, 0]
        seen = bits if kind == "split" else bits[:, [0, 0]]
        scores = seen + 0.05 * rng.standard_normal(seen.shape)
        scores = rng.permuted(scores, axis=0) if kind == "shuffled" else scores
        both = spread.area_under_curve(scores.sum(1, keepdims=True), label)[0]
        return both, spread.area_under_curve(scores, label)

    def pool(kind):
        joint, single = zip(*(aucs(kind) for _ in range(5)), strict=True)
        return np.array(joint), np.stack(single)

    split = spread.cross_layer_excess(pool("split"), pool("shuffled"), pool("shuffled"))
    persistent = spread.cross_layer_excess(pool("persistent"), pool("shuffled"), pool("shuffled"))
    assert (split.x, persistent.x) == (1, 0)


@pytest.fixture
def shrunk():
    """Three features over two layers whose second decoder row is zero: shrunk away, carried by a twin, truly absent."""
    rng = np.random.default_rng(4)
    directions = np.linalg.qr(rng.standard_normal((12, 4)))[0].T
    code = (rng.random((3000, 4)) < 0.1) * rng.uniform(0.7, 1.3, (3000, 4))
    code[:, 3] = code[:, 1]  # the twin, which writes feature 1's direction on the second layer
    decoder = np.zeros((4, 2, 12))
    decoder[:3, 0] = directions[:3]
    decoder[3, 1] = directions[1]
    recon = np.einsum("tf,fld->tld", code, decoder)
    x = recon.copy()
    x[:, 1] += 0.6 * code[:, :1] * directions[0]
    return sparse.csc_array(code), x, recon, decoder


def test_latent_scaling_names_each_artefact(shrunk):
    found = spread.latent_scaling(*shrunk)
    np.testing.assert_allclose(found.nu_error_FL[:3], [[1, 0.6], [1, 0], [1, 0]], atol=1e-9)
    np.testing.assert_allclose(found.nu_recon_FL[:3], [[1, 0], [1, 1], [1, 0]], atol=1e-9)
    code, x, recon, decoder = shrunk
    with pytest.raises(ValueError, match="do not fit"):
        spread.latent_scaling(code, x[1:], recon, decoder)


def test_scaling_is_the_least_squares_multiple(shrunk):
    code, x, recon, decoder = shrunk
    f = code.todense()[:, 0]
    basis = np.outer(f, decoder[0, 0]).ravel()
    beta = [np.linalg.lstsq(basis[:, None], (x - recon)[:, layer].ravel(), rcond=None)[0][0] for layer in (0, 1)]
    found = spread.latent_scaling(code, x, recon, decoder).nu_error_FL[0, 1]
    assert found == pytest.approx(beta[1] / (beta[0] + 1))  # the peak's own part is put back


def test_corrected_profile_by_hand(shrunk):
    decoder = shrunk[3]
    nu = spread.latent_scaling(*shrunk).nu_error_FL
    profile = spread.corrected_profile(decoder, nu)
    np.testing.assert_allclose(profile[0], [1 / 1.36, 0.36 / 1.36], atol=1e-9)
    np.testing.assert_allclose(profile[2], [1, 0], atol=1e-9)
    np.testing.assert_allclose(spread.corrected_profile(decoder * 0, nu), 0)
    kept = spread.corrected_profile(np.ones((1, 3, 2)), np.array([[math.nan, -1, 7]]))
    np.testing.assert_allclose(kept, 1 / 3)
