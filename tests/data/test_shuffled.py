"""The null of layers that know nothing of each other."""

from types import SimpleNamespace

import pytest
import torch

from crosscoder.data.shuffled import shuffle_layers, shuffle_stream


@pytest.fixture
def source():
    """Batches whose number at every layer is the token's own."""
    token = torch.arange(512.0)[:, None, None].expand(512, 3, 2) + torch.tensor([0, 1000, 2000])[:, None]
    ones = torch.ones(3)
    return SimpleNamespace(n_layers=3, d_model=2, n_tokens=512, scale_L=ones, batch=lambda *_: token)


def test_every_layer_keeps_its_vectors_and_loses_its_partners(source):
    x = source.batch()
    y = shuffle_layers(source, 7).batch(0, 512, 0)
    for layer in range(3):
        torch.testing.assert_close(y[:, layer, 0].sort().values, x[:, layer, 0])
    torch.testing.assert_close(y[..., 0], y[..., 1])  # vectors stay whole
    for a, b in ((0, 1), (0, 2), (1, 2)):
        together = (y[:, a, 0] % 1000 == y[:, b, 0] % 1000).float().mean()
        assert together < 0.02, "layers were permuted alike"


def test_batches_are_functions_of_their_numbers(source):
    null = shuffle_layers(source, 7)
    torch.testing.assert_close(null.batch(3, 512, 0), null.batch(3, 512, 0))
    for other in (null.batch(4, 512, 0), null.batch(3, 512, 1), shuffle_layers(source, 8).batch(3, 512, 0)):
        assert not torch.equal(null.batch(3, 512, 0), other)
    assert (null.n_layers, null.d_model, null.n_tokens) == (3, 2, 512)


def test_a_stream_comes_out_the_same_each_time(source):
    stream = [source.batch(), source.batch()]
    first, second = shuffle_stream(stream, 1)
    assert not torch.equal(first, second)
    torch.testing.assert_close(next(shuffle_stream(stream, 1)), first)
    assert not torch.equal(next(shuffle_stream(stream, 2)), first)
