"""Sizes of activations refitted by least squares, against the plain problem."""

import numpy as np
import pytest
from scipy import sparse

from crosscoder.measure.shrinkage import refit_sizes


@pytest.fixture
def halved():
    """Five features written exactly, but with activations at a known share of their size; the last never fires."""
    rng = np.random.default_rng(0)
    code = (rng.random((400, 5)) < 0.2) * rng.uniform(0.7, 1.3, (400, 5))
    code[:, 4] = 0
    decoder, bias = rng.standard_normal((5, 12)), rng.standard_normal(12)
    share = np.array([0.5, 0.8, 1.0, 0.5, 1.0])
    return sparse.csc_array(code * share), code @ decoder + bias, decoder, bias, share


def test_sizes_are_found(halved):
    *arguments, share = halved
    found = refit_sizes(*arguments)
    np.testing.assert_allclose(found.scale_F[:4], 1 / share[:4])
    assert found.scale_F[4] == pytest.approx(0)
    assert found.refitted_variance == pytest.approx(1)


def test_variance_before_is_the_plain_one(halved):
    code, x, decoder, bias, _ = halved
    error = x - code @ decoder - bias
    plain = 1 - np.square(error).sum() / np.square(x - x.mean(0)).sum()
    assert refit_sizes(code, x, decoder, bias).explained_variance == pytest.approx(plain)
    assert plain < 0.9


def test_scales_are_those_of_the_whole_regression(halved):
    code, x, decoder, bias, _ = halved
    x = x + np.random.default_rng(1).standard_normal(x.shape)
    columns = np.stack([np.outer(code.toarray()[:, i], decoder[i]).ravel() for i in range(5)], axis=1)
    expected = np.linalg.lstsq(columns, (x - bias).ravel(), rcond=None)[0]
    np.testing.assert_allclose(refit_sizes(code, x, decoder, bias).scale_F, expected, atol=1e-9)


def test_what_does_not_fit_is_refused(halved):
    code, x, decoder, bias, _ = halved
    for arguments in ((code, x[1:], decoder, bias), (code, x, decoder[:, 1:], bias), (code, x, decoder, bias[1:])):
        with pytest.raises(ValueError, match="do not fit"):
            refit_sizes(*arguments)
    with pytest.raises(ValueError, match="constant"):
        refit_sizes(code, np.ones_like(x), decoder, bias)
