"""What learned thresholds, penalties and nested prefixes do to a training run, and what dictionaries learn by them."""

from dataclasses import replace

import pytest
import torch

from crosscoder import BatchTopK, Crosscoder, JumpReLU, LayerwiseSAE, ReLU, TopK
from crosscoder.data.world import World, WorldConfig
from crosscoder.dictionary import L0Penalty, NormPenalty, TanhPenalty, TargetL0Penalty
from crosscoder.dictionary.losses import explained_variance
from crosscoder.training import TrainConfig, train
from tests.dictionary.test_variants import BOTH, EVERY_RULE


def world_batches(n_steps, *, seed=1):
    """A planted world of 64 features, about two of them active, at the house's scale: E x^2 = 1 for each number."""
    world = World(WorldConfig(n_features=64, n_layers=4, d_model=16))
    scale = world.sample(4096, torch.Generator().manual_seed(9))[0].square().mean().sqrt()
    return [world.draw(256, seed, index) / scale for index in range(n_steps)]


@pytest.fixture(scope="module")
def held_out():
    return torch.cat(world_batches(8, seed=2))


@pytest.fixture(scope="module")
def batches():
    return world_batches(250)


def learn(cls, sparsity, batches, **settings):
    decoder = "free" if isinstance(sparsity, ReLU) else "unit"
    dictionary = cls(n_layers=4, d_model=16, n_features=96, sparsity=sparsity, decoder=decoder, **settings)
    config = TrainConfig(learning_rate=1e-2, dead_after_tokens=10_000, log_every=1000)
    return train(dictionary, batches, config=config, quiet=True).dictionary


def measured(dictionary, x_BLD):
    """Explained variance, mean over layers, and mean L0 of a row."""
    out = dictionary(x_BLD)
    return explained_variance(x_BLD, out.recon.detach()).mean().item(), out.code.l0().float().mean().item()


@pytest.mark.parametrize(
    "sparsity",
    [
        JumpReLU(penalty=TargetL0Penalty(target=2.0)),
        JumpReLU(penalty=L0Penalty(coefficient=0.03)),
        JumpReLU(penalty=TanhPenalty(scale=1.0, coefficient=0.03)),
        ReLU(NormPenalty(norm="l1")),
        ReLU(NormPenalty(norm="l2")),
    ],
    ids=["target", "L0", "tanh", "L1 of norms", "L2 of norms"],
)
def test_a_crosscoder_explains_a_planted_world_with_few_features(sparsity, batches, held_out):
    ev, l0 = measured(learn(Crosscoder, sparsity, batches), held_out)
    assert ev > 0.93
    assert 1 < l0 < 9


@pytest.mark.parametrize(
    ("sparsity", "most"), [(JumpReLU(penalty=TargetL0Penalty(target=2.0)), 2.5), (ReLU(), 15)], ids=["target", "L1"]
)
def test_a_bank_explains_a_planted_world(sparsity, most, batches, held_out):
    ev, l0 = measured(learn(LayerwiseSAE, sparsity, batches), held_out)
    assert ev > 0.85
    assert l0 < most


@pytest.mark.parametrize(
    ("cls", "target"), [(Crosscoder, 4.0), (Crosscoder, 12.0), (LayerwiseSAE, 2.0), (LayerwiseSAE, 4.0)]
)
def test_a_target_is_met_where_scores_are_not_in_two_heaps(cls, target):
    noise = list(torch.randn(150, 256, 4, 16, generator=torch.Generator().manual_seed(0)))
    dictionary = learn(cls, JumpReLU(penalty=TargetL0Penalty(target, coefficient=10.0)), noise)
    l0 = dictionary.encode(torch.cat(noise[:4])).l0().float()
    assert (l0.view(1024, -1).mean(0) / target - 1).abs().max() < 0.15


@BOTH
@EVERY_RULE
def test_the_coefficient_and_its_warm_up_change_the_parameters(cls, sparsity, batches):
    def after_two_steps(coefficient, warmup):
        rule = replace(sparsity, penalty=replace(sparsity.penalty, coefficient=coefficient))
        dictionary = cls(n_layers=4, d_model=16, n_features=96, sparsity=rule)
        config = TrainConfig(penalty_warmup_steps=warmup, log_every=1)
        return train(dictionary, batches[:2], config=config, quiet=True)

    usual, dearer, slower = after_two_steps(0.3, 0), after_two_steps(0.6, 0), after_two_steps(0.3, 9)
    for other in (dearer, slower):
        assert any(
            not torch.equal(a, b)
            for a, b in zip(usual.dictionary.parameters(), other.dictionary.parameters(), strict=True)
        )
    first = usual.metrics[0]["loss/penalty"]
    assert first > 0
    assert dearer.metrics[0]["loss/penalty"] == pytest.approx(2 * first)
    assert slower.metrics[0]["loss/penalty"] == pytest.approx(first / 10)
    entry = slower.metrics[1]
    assert entry["loss"] == pytest.approx(sum(value for key, value in entry.items() if key.startswith("loss/")))


def part_explained(dictionary, x, kept_F):
    """Explained variance, mean over layers, of the kept features of each dictionary alone."""
    code = dictionary.encode(x).to_dense() * kept_F
    recon = torch.einsum("bgf,gfn->bgn", code.view(len(x), -1, 96), dictionary.grouped().decoder_GFN)
    return explained_variance(x, recon.reshape(x.shape).detach() + dictionary.decoder_bias.detach()).mean().item()


@BOTH
@pytest.mark.parametrize("rule", [TopK, BatchTopK])
def test_the_first_prefix_explains_more_than_as_many_others(cls, rule, batches, held_out):
    dictionary = learn(cls, rule(k=4), batches[:150], prefixes=(0.125, 0.25, 0.5))
    generator = torch.Generator().manual_seed(0)
    chosen = [torch.zeros(96).index_fill(0, torch.randperm(96, generator=generator)[:12], 1.0) for _ in range(10)]
    first = part_explained(dictionary, held_out, torch.arange(96) < 12)
    assert first > 1.5 * max(part_explained(dictionary, held_out, kept_F) for kept_F in chosen)
    assert part_explained(dictionary, held_out, torch.ones(96)) > 0.8
