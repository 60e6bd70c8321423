"""A handful of tokens of huge norm, as real models have, does not decide what is learnt or what is measured."""

from dataclasses import replace

import pytest
import torch

from crosscoder import Crosscoder, TopK
from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.shards import ActivationShards, write_shards
from crosscoder.data.sources import SiteSource, StackedSource
from crosscoder.data.stream import ActivationStream
from crosscoder.data.subject import build_subject
from crosscoder.data.tokens import TokenBlocks
from crosscoder.foundation.origin import MismatchError, TokenOrigin
from crosscoder.measure.health import describe
from crosscoder.measure.reading import common_tokens, measure_dictionary, read_dictionary
from crosscoder.training import TrainConfig, train

END, SINKS = 3, torch.tensor([40, 555, 1300, 1301, 2200])


class Spiked(ActivationShards):
    """A store in which a few tokens, inside sequences, are 300 times as long from the second block on."""

    def gather(self, tokens_T):
        x_TLD = super().gather(tokens_T)
        x_TLD[torch.isin(tokens_T, SINKS), 2:] *= 300
        return x_TLD


@pytest.fixture(scope="module")
def blocks():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 40, (100, 32), generator=generator)
    ids[::7, 11] = END
    found = TokenBlocks(ids, vocab_size=40)
    found.origin = TokenOrigin(tokenizer="tiny", special_ids=(0, END), context=32)
    return found


@pytest.fixture(scope="module")
def model():
    return build_subject(3, 16, vocab_size=40, context=32, head_dim=4, seed=0).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(model, blocks, tmp_path_factory):
    home = tmp_path_factory.mktemp("acts")
    write_shards(ResidualHarvester(model), blocks, home / "s")
    write_shards(ResidualHarvester(model, keep_outliers=True), blocks, home / "kept")
    return home


def scores(kind, folder):
    store = kind.load(folder)
    source = SiteSource(store, store, "residual")
    dictionary = Crosscoder(n_layers=3, d_model=16, n_features=48, sparsity=TopK(k=6))
    train(dictionary, source.batches(256, seed=0, steps=150), config=TrainConfig(steps=150), quiet=True)
    return dictionary, measure_dictionary(dictionary, source.marked()), read_dictionary(dictionary, source.marked())


def test_sinks_inside_sequences_move_no_score(folder):
    (_, clean, _), (dictionary, spiked, reading) = (scores(kind, folder / "s") for kind in (ActivationShards, Spiked))
    assert spiked.explained_variance == pytest.approx(clean.explained_variance, abs=0.005)
    assert 1 - spiked.alive_GF.mean() <= 1 - clean.alive_GF.mean() + 0.01
    found = spiked.outliers
    assert found.explained_variance_usual == spiked.explained_variance
    assert found.explained_variance_every < spiked.explained_variance - 0.05  # what would have been said
    assert found.share == pytest.approx(len(SINKS) / 3085, rel=0.01)
    assert found.share_L[0] == 0 < found.share_L[1] == found.share_L[2] == found.share
    assert found.energy_L[0] < 0.01 < 0.9 < found.energy_L[1]
    assert "outliers: 0.162% of the harvested tokens" in describe(dictionary, reading)[-1]
    assert clean.outliers.share == 0
    assert clean.outliers.explained_variance_every == clean.explained_variance


def test_outliers_that_are_kept_decide_and_are_still_counted(folder):
    _, kept, _ = scores(Spiked, folder / "kept")
    assert kept.code.shape[0] == 3200  # first positions and special tokens too
    assert kept.explained_variance == kept.outliers.explained_variance_every != kept.outliers.explained_variance_usual
    assert kept.outliers.share == len(SINKS) / 3200


def test_special_tokens_and_first_positions_are_left_out_and_counted(folder, model, blocks):
    store = ActivationShards.load(folder / "s")
    assert store.index.dropped == {"first_positions": 100, "special_tokens": 15}
    ids = blocks[:].flatten()[store.token_T]
    assert END not in ids
    assert store.positions_T.min() == 1
    stream = ActivationStream(ResidualHarvester(model), blocks)
    assert torch.equal(stream.token_T, store.token_T)
    for index in (0, 3, 20):  # counts differ from block to block
        ours, theirs = (SiteSource(each, None, "write").batch(index, 200, 1) for each in (store, stream))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_batch_is_smaller_by_its_outliers(folder):
    source = SiteSource(Spiked.load(folder / "s"), None, "residual")
    sizes = [len(source.batch(index, 617, 0)) for index in range(5)]
    assert sum(sizes) == 5 * 617 - len(SINKS)


def test_stacked_models_lose_the_outliers_of_either(folder):
    stores = [kind.load(folder / "s") for kind in (ActivationShards, Spiked)]
    stacked = StackedSource([SiteSource(store, store, "residual") for store in stores])
    assert sum(len(x_BLD) for x_BLD in stacked.held_out()) == 3085 - len(SINKS)
    assert sum(len(stacked.batch(index, 617, 0)) for index in range(5)) == 3085 - len(SINKS)


def test_a_batch_of_outliers_alone_is_named(folder):
    source = SiteSource(Spiked.load(folder / "s"), None, "residual")
    with pytest.raises(ValueError, match=r"all 1 tokens of batch \d+ are outliers"):
        [source.batch(index, 1, 0) for index in range(3085)]


def test_splits_that_do_not_belong_together_are_refused(folder):
    """As a harvest that was stopped between the two leaves them."""
    usual, kept = (ActivationShards.load(folder / name) for name in ("s", "kept"))
    with pytest.raises(MismatchError, match="outliers kept: the training split no, the held-out split yes"):
        SiteSource(usual, kept, "residual")


def test_readings_of_two_models_are_compared_on_the_tokens_of_both(folder):
    readings = []
    for kind in (ActivationShards, Spiked):
        store = kind.load(folder / "s")
        dictionary = Crosscoder(n_layers=3, d_model=16, n_features=8, sparsity=TopK(k=2))
        readings.append(read_dictionary(dictionary, SiteSource(store, store, "residual").marked()))
    token_T = common_tokens(readings)
    assert len(token_T) == 3085 - len(SINKS)
    first, second = (reading.on_tokens(token_T) for reading in readings)
    assert (first.token_T == second.token_T).all()
    assert first.code.shape == second.code.shape
    assert (first.code != readings[1].code).nnz == 0  # the same features on the same tokens
    with pytest.raises(ValueError, match="no token in common"):
        common_tokens([first, replace(second, token_T=second.token_T + 10**6)])
