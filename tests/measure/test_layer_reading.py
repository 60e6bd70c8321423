"""The precision of one layer's reading, where it is known which layers tell a feature."""

import numpy as np
import pytest
import torch

from crosscoder import BatchTopK, Crosscoder, LayerwiseSAE
from crosscoder.data.sources import Marked
from crosscoder.measure import examples
from crosscoder.measure.examples import Wanted, read_features
from crosscoder.measure.layer_reading import layer_precision

N = 4000


def activity(form=Crosscoder, **wanted):
    """Feature 0 is on both layers, and layer 1 also has something else in its direction; feature 1 is on layer 1."""
    generator = torch.Generator().manual_seed(0)
    is_on = (torch.rand(N, 3, generator=generator) < torch.tensor([0.1, 0.05, 0.2])).float()
    x_TLD = 0.02 * torch.randn(N, 2, 4, generator=generator)
    x_TLD[:, 0, 0] += is_on[:, 0]
    x_TLD[:, 1, 0] += is_on[:, 0] + is_on[:, 2]  # the third is no feature of the dictionary
    x_TLD[:, 1, 1] += is_on[:, 1]
    dictionary = form(n_layers=2, d_model=4, n_features=2, sparsity=BatchTopK(k=1))
    with torch.no_grad():
        if form is Crosscoder:
            weight = torch.zeros(2, 2, 4)
            weight[0, 0, 0], weight[0, 1, 0], weight[1, 1, 1] = 1.0, 0.1, 1.0
            dictionary.encoder.copy_(weight)
            weight[0, 1, 0] = 1.0
            dictionary.decoder.copy_(weight)
        else:
            weight = torch.zeros(2, 2, 4)
            weight[0, 0, 0], weight[1, 1, 1], weight[0, 1, 2], weight[1, 0, 3] = 1.0, 1.0, 1.0, 1.0
            dictionary.encoder.copy_(weight)
            dictionary.decoder.copy_(weight)
        dictionary.threshold.fill_(0.5)
    every = torch.arange(N)
    batches = [Marked.plain(x, at) for x, at in zip(x_TLD.split(512), every.split(512), strict=True)]
    return read_features(dictionary, batches, context=16, n_tokens=N, wanted=Wanted(**wanted), quiet=True), is_on


def test_a_layer_that_something_else_moves_is_less_precise():
    found, is_on = activity(sampled=64)
    precision = layer_precision(found, quiet=True)[..., 0]
    rate, other = float(is_on[:, 0].mean()), float(((is_on[:, 2] > 0) & (is_on[:, 0] == 0)).float().mean())
    assert precision[0, 0] == pytest.approx(1, abs=0.02)
    # Where both are on the reading is twice as high; the threshold is that of nine in ten, where the feature is alone.
    assert precision[0, 1] == pytest.approx(rate / (rate + other), abs=0.05)
    assert precision[0, 2] > 0.9
    assert precision[1, 1] == pytest.approx(1, abs=0.02)
    assert np.isnan(precision[1, 0])  # it writes nothing there


def test_a_part_of_the_tokens_says_nearly_the_same(monkeypatch):
    whole = layer_precision(activity(sampled=64)[0], quiet=True)[..., 0]
    monkeypatch.setattr(examples, "SAMPLE_BYTES", 4 * 8 * 900)
    found, _ = activity(sampled=64)
    assert len(found.sample.x_NLD) == pytest.approx(800, abs=120)
    np.testing.assert_allclose(layer_precision(found, quiet=True)[..., 0], whole, atol=0.08)


def test_a_bank_s_features_have_one_reading():
    found, _ = activity(LayerwiseSAE)
    precision = layer_precision(found, quiet=True)[..., 0]
    assert precision.shape == (4, 2)
    np.testing.assert_allclose(precision[[0, 3]], 1, atol=0.02)
    assert np.isnan(precision[[1, 2]]).all()  # never active


def test_the_interval_covers_what_all_tokens_say(monkeypatch):
    truth = layer_precision(activity(sampled=1000)[0], quiet=True)[0, :, 0]
    monkeypatch.setattr(examples, "SAMPLE_BYTES", 4 * 8 * 900)
    covered = []
    for seed in range(12):
        value, low, high = layer_precision(activity(sampled=32, seed=seed)[0], quiet=True)[0].T
        assert (low <= value).all()
        assert (value <= high).all()
        covered += list((low <= truth) & (truth <= high))
        assert low[1] > 0.15  # layer 1 is told from nothing at all
    assert np.mean(covered) >= 0.9
    value, low, high = layer_precision(activity(sampled=8)[0], quiet=True)[0, 1]
    assert low == pytest.approx(0.1, abs=0.03)  # its rate: eight tokens have no reading that is surely low enough
    assert value < high
