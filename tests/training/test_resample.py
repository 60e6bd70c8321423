"""Resampling of dead features: where they begin again, what is forgotten, and that a resumed run does the same."""

import math
from itertools import islice

import pytest
import torch

from crosscoder import BatchTopK, Crosscoder, JumpReLU, LayerwiseSAE, ReLU, TopK
from crosscoder.dictionary import NormPenalty
from crosscoder.training import NonFiniteError, TrainConfig, train
from crosscoder.training.optimizer import RowAdam
from crosscoder.training.state import ENCODER_SHARE, FiringTracker, TrainState, resample_dead
from tests.training.test_trainer import D, F, L
from tests.training.test_trainer import batches as trained_on

BOTH = pytest.mark.parametrize("cls", [Crosscoder, LayerwiseSAE])


def state_of(dictionary):
    """A state after one step, in which the first four features of every dictionary are dead."""
    groups = dictionary.grouped().center_GN.shape[0]
    optimizer = RowAdam(dictionary, lr=1e-3)
    for parameter in dictionary.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    optimizer.step()
    state = TrainState(dictionary, optimizer, FiringTracker(groups, F), step=7)
    state.firing.silent_GF[:, :4] = 100
    return state


def batch(n=40, seed=0):
    return torch.randn(n, L, D, generator=torch.Generator().manual_seed(seed))


@BOTH
@pytest.mark.parametrize("sparsity", [ReLU(), JumpReLU(0.4)], ids=["ReLU", "JumpReLU"])
def test_dead_features_start_again_at_rows_with_an_error(cls, sparsity):
    dictionary = cls(n_layers=L, d_model=D, n_features=F, sparsity=sparsity, decoder="free")
    state, x = state_of(dictionary), batch()
    before = {name: p.detach().clone() for name, p in dictionary.named_parameters()}
    error = torch.zeros_like(x)
    error[10:20] = batch(10, seed=1)
    grouped = dictionary.grouped()
    groups = len(grouped.center_GN)
    norm_G = grouped.encoder_GFN[:, 4:].detach().norm(dim=2).mean(1)
    assert resample_dead(state, x, error, dead_after_tokens=100) == 4 * groups
    rows_GRN = (x.reshape(40, groups, -1) - grouped.center_GN).detach().transpose(0, 1)
    grouped = dictionary.grouped()
    for g in range(groups):
        cosine = torch.nn.functional.cosine_similarity(grouped.decoder_GFN[g, :4, None], rows_GRN[g], dim=2)
        chosen = cosine.argmax(1)
        torch.testing.assert_close(cosine.amax(1), torch.ones(4))
        assert set(chosen.tolist()) <= set(range(10, 20))
        assert len(set(chosen.tolist())) == 4
        torch.testing.assert_close(grouped.decoder_GFN[g, :4].norm(dim=1), torch.ones(4))
        expected = ENCODER_SHARE * norm_G[g] * grouped.decoder_GFN[g, :4]
        torch.testing.assert_close(grouped.encoder_GFN[g, :4], expected)
    assert state.firing.silent_GF.eq(0).all()
    for name, parameter in dictionary.named_parameters():
        if name == "decoder_bias":
            assert torch.equal(parameter, before[name])
            continue
        rows = parameter.reshape(groups, F, -1)
        assert torch.equal(rows[:, 4:], before[name].reshape(groups, F, -1)[:, 4:])
        for key in ("exp_avg", "exp_avg_sq"):
            moments = state.optimizer.state[parameter][key].reshape(groups, F, -1)
            assert moments[:, :4].eq(0).all()
            assert moments[:, 4:].ne(0).all()
    assert dictionary.encoder_bias.reshape(groups, F)[:, :4].eq(0).all()
    if dictionary.log_threshold is not None:
        assert dictionary.log_threshold.reshape(groups, F)[:, :4].eq(math.log(0.4)).all()


def test_worse_rows_are_drawn_more_often():
    drawn = torch.zeros(3)
    for step in range(400):
        cc = Crosscoder(n_layers=1, d_model=3, n_features=F, sparsity=ReLU())
        state = state_of(cc)
        with torch.no_grad():
            cc.decoder_bias.zero_()
        state.step, state.firing.silent_GF[:, 1:] = step, 0
        x = torch.eye(3)[:, None]
        error = torch.tensor([1.0, 2.0, 0.0])[:, None, None] ** 0.5 * torch.ones(3, 1, 3)
        resample_dead(state, x, error, dead_after_tokens=100)
        drawn[cc.decoder[0, 0].argmax()] += 1
    assert drawn[2] == 0
    assert abs(drawn[1] / 400 - 0.8) < 0.07  # squared losses are 1 : 4


def test_more_dead_features_than_rows_with_an_error_wait():
    cc = Crosscoder(n_layers=L, d_model=D, n_features=F, sparsity=ReLU())
    state, x = state_of(cc), batch()
    error = torch.zeros_like(x)
    error[:3] = 1.0
    assert resample_dead(state, x, error, dead_after_tokens=100) == 3
    assert state.firing.silent_GF[0, :5].tolist() == [0, 0, 0, 100, 0]
    assert resample_dead(state, x, torch.zeros_like(x), dead_after_tokens=100) == 0


def test_the_draw_is_a_function_of_seed_and_step():
    def decoder(seed, step):
        cc = Crosscoder(n_layers=L, d_model=D, n_features=F, sparsity=ReLU(), seed=seed)
        state = state_of(cc)
        state.step = step
        x = batch()
        resample_dead(state, x, x, dead_after_tokens=100)
        return cc.decoder[:4].detach()

    assert torch.equal(decoder(0, 5), decoder(0, 5))
    assert not torch.allclose(decoder(0, 5), decoder(0, 6))
    assert not torch.allclose(decoder(0, 5), decoder(1, 5))


def test_all_dead_is_no_special_case():
    cc = Crosscoder(n_layers=L, d_model=D, n_features=F, sparsity=ReLU())
    state, x = state_of(cc), batch()
    state.firing.silent_GF += 100
    assert resample_dead(state, x, x, dead_after_tokens=100) == F
    torch.testing.assert_close(cc.encoder.flatten(1).norm(dim=1), torch.full((F,), ENCODER_SHARE))


def data(n):
    return list(islice(trained_on(), n))


def with_dead(cls, sparsity=None):
    dictionary = cls(n_layers=L, d_model=D, n_features=F, sparsity=sparsity or ReLU(NormPenalty("l1", 0.1)))
    with torch.no_grad():
        dictionary.encoder_bias.view(-1, F)[:, :8] = -10.0
    return dictionary


@BOTH
@pytest.mark.parametrize("sparsity", [ReLU(NormPenalty("l1", 0.1)), JumpReLU(), TopK(k=3), BatchTopK(k=3)], ids=str)
def test_resampled_features_take_part_again(cls, sparsity):
    def active(every):
        config = TrainConfig(dead_after_tokens=128, resample_every=every, learning_rate=3e-3, log_every=10)
        result = train(with_dead(cls, sparsity), batches, config=config, quiet=True)
        return result, int(result.dictionary.encode(torch.cat(batches[-4:])).to_dense()[..., :8].gt(0).sum())

    batches = data(60)
    (without, none), (result, some) = active(0), active(10)
    assert some > none + 10
    assert "resampled" not in without.metrics[0]
    assert sum(entry["resampled"] for entry in result.metrics) >= 8


def test_nothing_is_resampled_while_the_rate_falls():
    def last_resampled(decay_fraction):
        config = TrainConfig(dead_after_tokens=0, resample_every=1, decay_fraction=decay_fraction, log_every=1)
        cc = Crosscoder(n_layers=L, d_model=D, n_features=F, sparsity=ReLU())
        metrics = train(cc, data(20), config=config, quiet=True).metrics
        return max(entry["step"] for entry in metrics if entry["resampled"])

    assert last_resampled(0.0) == 20
    assert last_resampled(0.5) == 10


@BOTH
def test_a_resumed_run_resamples_to_the_same_bits(cls, tmp_path):
    batches = data(24)
    config = TrainConfig(
        steps=24, dead_after_tokens=128, resample_every=6, checkpoint_every=5, log_every=1, decay_fraction=0.2
    )
    whole = train(with_dead(cls), batches, config=config, quiet=True)
    with pytest.raises(NonFiniteError):
        train(with_dead(cls), [*batches[:8], batches[0] * torch.inf], config=config, folder=tmp_path, quiet=True)
    resumed = train(with_dead(cls), batches, config=config, folder=tmp_path, resume=True, quiet=True)
    assert sum(entry["resampled"] for entry in whole.metrics[5:]) > 0
    assert whole.metrics[5:] == resumed.metrics[5:]
    for name, parameter in whole.dictionary.named_parameters():
        assert torch.equal(parameter, resumed.dictionary.get_parameter(name)), name


def test_a_rounded_working_copy_is_written_too():
    cc = Crosscoder(n_layers=L, d_model=D, n_features=F, sparsity=ReLU())
    optimizer = RowAdam(cc, lr=1e-3, keep_working_copy=True)
    for parameter in cc.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.replace_rows(torch.tensor([3, 5]), {"encoder": torch.full((2, L * D), 0.3)})
    assert torch.equal(optimizer.working_GFN, cc.encoder.bfloat16().flatten(1)[None])
