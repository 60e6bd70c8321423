"""Layers of features by decoder, by use and by decodability, against features whose layers are known."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from crosscoder.measure import probes, profile

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from bench_verdicts_worlds import area_under_curve


def test_gain_and_share_by_hand():
    joint = np.array([0.99, 0.99, 0.80, 0.70, math.nan])
    single = np.array([[0.6, 0.8], [0.93, 0.5], [0.78, 0.6], [0.5, 0.6], [0.5, 0.5]])
    np.testing.assert_allclose(probes.joint_gain(joint, single)[:4], [0.19, 0.06, 0.02, 0.1])
    assert probes.genuine_share(joint, single) == 0.5
    assert math.isnan(probes.genuine_share(joint[4:], single[4:]))


def test_the_genuine_share_separates_codes_across_layers_from_persistence():
    """A label that is the sum of two layers' bits can be read from both together only; a persisting one from either."""
    rng = np.random.default_rng(3)

    def aucs(kind):
        bits = rng.random((4000, 2)) < 0.3
        label = bits.all(1) if kind == "split" else bits[:, 0]
        seen = bits if kind == "split" else bits[:, [0, 0]]
        scores = seen + 0.05 * rng.standard_normal(seen.shape)
        scores = rng.permuted(scores, axis=0) if kind == "shuffled" else scores
        both = area_under_curve(scores.sum(1, keepdims=True), label)[0]
        return both, area_under_curve(scores, label)

    def pool(kind):
        joint, single = zip(*(aucs(kind) for _ in range(5)), strict=True)
        return np.array(joint), np.stack(single)

    shares = [probes.genuine_share(*pool(kind)) for kind in ("split", "persistent", "shuffled")]
    assert shares == [1, 0, 0]


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
    error = np.zeros((3000, 2, 12))
    error[:, 1] = 0.6 * code[:, :1] * directions[0]
    moment = np.einsum("tf,tld->fld", code, error)
    return profile.latent_scaling(moment, np.square(code).sum(0), decoder), code, error, decoder


def test_latent_scaling_finds_what_was_shrunk_away_and_nothing_else(shrunk):
    np.testing.assert_allclose(shrunk[0][:3], [[1, 0.6], [1, 0], [1, 0]], atol=1e-9)


def test_scaling_is_the_least_squares_multiple(shrunk):
    found, code, error, decoder = shrunk
    basis = np.outer(code[:, 0], decoder[0, 0]).ravel()
    beta = [np.linalg.lstsq(basis[:, None], error[:, layer].ravel(), rcond=None)[0][0] for layer in (0, 1)]
    assert found[0, 1] == pytest.approx(beta[1] / (beta[0] + 1))  # the peak's own part is put back


def test_corrected_profile_by_hand(shrunk):
    nu, _, _, decoder = shrunk
    shares = profile.corrected_profile(decoder, nu)
    np.testing.assert_allclose(shares[0], [1 / 1.36, 0.36 / 1.36], atol=1e-9)
    np.testing.assert_allclose(shares[2], [1, 0], atol=1e-9)
    np.testing.assert_allclose(profile.corrected_profile(decoder * 0, nu), 0)
    kept = profile.corrected_profile(np.ones((1, 3, 2)), np.array([[math.nan, -1, 7]]))
    np.testing.assert_allclose(kept, 1 / 3)
