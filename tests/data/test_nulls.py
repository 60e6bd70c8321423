"""Surrogates: what they share with the activations they stand for, what they lose, and that their records say so."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from crosscoder.data.nulls import GaussianSource, covariance_bytes, estimate_moments, make_null, symmetric_root
from crosscoder.data.shards import stored_source, write_shards
from crosscoder.data.sources import Marked, ShuffledSource, SiteSource, Source
from crosscoder.data.stream import ActivationStream
from crosscoder.foundation.origin import MismatchError, require_same

L, D, N_TOKENS = 3, 4, 10_000


class Table(Source):
    """Batches of a table of tokens in its order, again from the first on after the last."""

    def __init__(self, x_TLD):
        self.x_TLD = x_TLD
        _, self.n_layers, self.d_model = x_TLD.shape
        self.scale_L = torch.ones(self.n_layers)

    def batch(self, index, size, seed):
        return self.x_TLD[torch.arange(index * size, (index + 1) * size) % len(self.x_TLD)]

    def marked(self):
        return iter([Marked.plain(self.x_TLD, torch.arange(len(self.x_TLD)))])


def sparse_tokens(n=N_TOKENS, n_features=30, scale=1.0):
    """Few of 30 features at a time, each at all layers, far from zero: nothing like a Gaussian."""
    generator = torch.Generator().manual_seed(3)
    active = torch.rand(n, n_features, generator=generator) < 0.05
    code = active * (1 + torch.randn(n, n_features, generator=generator).abs())
    features = torch.randn(n_features, L * D, generator=generator) * torch.linspace(0.2, 2, L * D)
    return (scale * (code @ features) + 5).view(n, L, D)


@pytest.fixture(scope="module")
def null():
    return GaussianSource(Table(sparse_tokens()), 7, n_tokens=N_TOKENS, held_out_tokens=9000)


def kurtosis(x_BN):
    """Of every number, less a Gaussian's 3."""
    x_BN = (x_BN - x_BN.mean(0)) / x_BN.std(0)
    return x_BN.pow(4).mean(0) - 3


@pytest.mark.parametrize("split", ["train", "held out"])
def test_draws_have_the_mean_and_joint_covariance_and_no_features(null, split):
    """Within standard errors: sqrt(C_ii / n), and for a Gaussian's covariance sqrt((C_ii C_jj + C_ij^2) / n)."""
    truth = sparse_tokens().flatten(1).double().numpy()
    drawn = [null.batch(i, 500, 0) for i in range(80)] if split == "train" else null.held_out()
    x = torch.cat(list(drawn)).flatten(1).double()
    n, covariance = len(x), np.cov(truth.T)
    assert n == {"train": 40_000, "held out": 9000}[split]
    spread = covariance.diagonal()
    mean_z = (x.numpy().mean(0) - truth.mean(0)) / np.sqrt(spread / n)
    z = (np.cov(x.numpy().T) - covariance) / np.sqrt((np.outer(spread, spread) + covariance**2) / n)
    assert np.abs(mean_z).max() < 4
    assert np.abs(z).max() < 4.5  # of 78 different entries
    assert 0.5 < np.sqrt((z**2).mean()) < 1.5  # draws that are too regular fail too
    error = (24 / n) ** 0.5
    assert kurtosis(x).abs().max() < 5 * error
    assert kurtosis(torch.from_numpy(truth)).min() > 20 * error


def test_moments_are_of_every_token_once_and_exact_far_from_zero():
    x_TLD = sparse_tokens(n=9001, scale=1e-3) + 1000
    found = GaussianSource(Table(x_TLD), 0, n_tokens=9001, held_out_tokens=1).moments
    table = x_TLD[:9000].flatten(1).double().numpy()  # 3 batches of 3,000
    np.testing.assert_allclose(found.mean_N, table.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance_NN, np.cov(table.T), rtol=1e-7, atol=1e-13)


def test_fewer_tokens_than_numbers_keep_their_trace_and_their_span():
    x_TLD = torch.randn(20, 4, 30, generator=torch.Generator().manual_seed(0))
    null = GaussianSource(Table(x_TLD), 0, n_tokens=20, held_out_tokens=10)
    covariance = null.moments.covariance_NN
    root = symmetric_root(covariance)
    torch.testing.assert_close(root @ root, covariance, rtol=0, atol=1e-12)
    assert (root @ root).trace().item() == pytest.approx(covariance.trace().item(), rel=1e-13)
    centred = x_TLD.flatten(1).double() - null.moments.mean_N
    drawn = null.batch(0, 50, 0).flatten(1).double() - null.moments.mean_N
    assert torch.linalg.matrix_rank(drawn, rtol=1e-4) == 19
    outside = drawn - drawn @ torch.linalg.pinv(centred) @ centred
    assert outside.abs().max() < 1e-5


def test_every_batch_is_a_function_of_its_number_size_and_seed(null):
    again = GaussianSource(Table(sparse_tokens()), 7, n_tokens=N_TOKENS, held_out_tokens=9000)
    ahead = again.batch(5, 64, 2)
    batches = list(null.batches(64, seed=2, steps=6)(0))
    assert torch.equal(batches[5], ahead)
    assert torch.equal(batches[1], again.batch(1, 64, 2))
    other = GaussianSource(Table(sparse_tokens()), 8, n_tokens=N_TOKENS, held_out_tokens=9000)
    held_out = list(null.held_out())
    assert [len(part) for part in held_out] == [4096, 4096, 808]
    assert torch.equal(held_out[1], list(again.held_out())[1])
    assert not any(torch.equal(null.batch(1, 4096, seed), held_out[1]) for seed in range(3))
    seen = [*batches, null.batch(1, 64, 3), other.batch(1, 64, 2), *(part[:64] for part in held_out)]
    assert len({part.sum().item() for part in seen}) == len(seen)


def test_what_cannot_be_drawn_is_refused_before_any_token_is_read():
    with pytest.raises(ValueError, match=r"30 layers of width 576 .* 17,280 squared, 12\.\d GiB .* 14 layers or fewer"):
        covariance_bytes(30, 576)
    wide = Table(torch.zeros(1, 2, 5000))
    with pytest.raises(ValueError, match=r"at most 8,192 .* 1 layers or fewer \(--layers\)"):
        GaussianSource(wide, 0, n_tokens=10, held_out_tokens=10)
    for wrong in ({"n_tokens": 1, "held_out_tokens": 1}, {"n_tokens": 2, "held_out_tokens": 0}):
        with pytest.raises(ValueError, match="expected at least"):
            GaussianSource(Table(sparse_tokens(4)), 0, **wrong)
    with pytest.raises(ValueError, match="at least two tokens, got 1"):
        estimate_moments([torch.zeros(1, 2, 3)])


@pytest.fixture(params=["residual", "write"])
def source(request, harvester, blocks):
    stream = ActivationStream(harvester, blocks, ahead=False)
    return SiteSource(stream, stream, request.param)


def test_a_null_of_a_model_says_what_it_is_everywhere(source):
    shuffled, gaussian = make_null("shuffled", source), make_null("gaussian", source)
    assert make_null(None, source) is source
    assert [type(one) for one in (shuffled, gaussian)] == [ShuffledSource, GaussianSource]
    assert [one.reads.null for one in (source, shuffled, gaussian)] == [None, "shuffled", "gaussian"]
    assert len({one.fingerprint for one in (source, shuffled, gaussian)}) == 3
    assert str(gaussian.reads).startswith(
        "the gaussian null (tokens of a Gaussian of the same mean and covariance over"
    )
    assert replace(gaussian.reads, null=None) == source.reads
    assert gaussian.sites == source.sites
    assert sum(map(len, gaussian.held_out())) == source.held_out_activations.n_tokens
    torch.testing.assert_close(
        gaussian.moments.covariance_NN, torch.cov(torch.cat([*source.held_out()]).flatten(1).T.double()), rtol=1e-5,
        atol=1e-8,
    )  # fmt: skip
    for mine, other, mend in (
        (gaussian, source, r"null: the dictionary gaussian, the text none \(--null gaussian\)"),
        (source, gaussian, r"null: the dictionary none, the text gaussian \(leave out --null\)"),
        (shuffled, gaussian, r"\(--null shuffled\)"),
    ):
        with pytest.raises(MismatchError, match=mend):
            require_same(mine.reads, other.reads, owner="the dictionary", given="the text")
    with pytest.raises(ValueError, match="are the gaussian null already; make the shuffled one of the model's own"):
        ShuffledSource(gaussian, 0)


def test_a_store_without_a_record_gives_no_null(harvester, blocks, tmp_path):
    write_shards(harvester, blocks, tmp_path / "s")
    source = stored_source(tmp_path / "s", tmp_path / "s", "residual")
    source.train.harvested = None
    with pytest.raises(ValueError, match=r"could be taken for the model's own; harvest them again"):
        make_null("gaussian", source)
