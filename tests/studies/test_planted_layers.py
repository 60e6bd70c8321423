"""Which features need several layers: X, functional spread and both nulls on crosscoders trained in planted worlds."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from crosscoder import BatchTopK, Crosscoder
from crosscoder.data.sources import PlantedSource, ShuffledSource
from crosscoder.data.world import World, WorldConfig
from crosscoder.measure import recovery
from crosscoder.measure.probes import FunctionalSpread, measure_functional_spread
from crosscoder.training import TrainConfig, train

STEPS, BATCH, HELD_OUT = 350, 256, 4


@dataclass
class Arm:
    dictionary: Crosscoder
    measured: FunctionalSpread


def tokens_of(world):
    config = world.config
    scale_L = torch.ones(config.n_layers)
    return PlantedSource(world.draw, scale_L=scale_L, d_model=config.d_model, held_out_stream=2, held_out_tokens=4096)


def fit(source, shape, *, n_features, k, seed=0):
    """A crosscoder trained on one stream of a source's tokens and measured on another."""
    dictionary = Crosscoder(**shape, n_features=n_features, sparsity=BatchTopK(k=k), seed=seed)
    config = TrainConfig(steps=STEPS, learning_rate=1e-2, dead_after_tokens=10_000, log_every=STEPS)
    train(dictionary, source.batches(BATCH, seed=1, steps=STEPS), config=config, quiet=True)
    held_out = source.batches(4096, seed=2, steps=HELD_OUT)
    return Arm(dictionary, measure_functional_spread(dictionary, lambda: held_out(0)))


def study(config, *, n_features):
    """A world with its dictionary and the dictionaries of both nulls.

    An untrained subject's residual stream carries its embeddings from layer to layer: features that all persist.
    """
    world = World(config)
    carried = World(replace(config, kinds=("persistent",), seed=config.seed + 100))
    sizes = {
        "shape": {"n_layers": config.n_layers, "d_model": config.d_model},
        "n_features": n_features,
        "k": round(float(world.probability_F.sum())),
    }
    arms = {
        "trained": fit(tokens_of(world), **sizes),
        "shuffled": fit(ShuffledSource(tokens_of(world), 9), **sizes),
        "untrained": fit(tokens_of(carried), **sizes),
    }
    return world, arms


@pytest.fixture(scope="module")
def lasting():
    return study(WorldConfig(n_features=48, kinds=("local", "persistent"), noise=0.05, p_min=0.02), n_features=64)


@pytest.fixture(scope="module")
def codes():
    """Half of the features are words over 7 atoms a layer, so each atom is on in 1 - .945^6 = .29 of other tokens."""
    config = WorldConfig(n_features=98, d_model=24, kinds=("local", "split"), noise=0.05, p_min=0.05, p_max=0.06)
    return study(config, n_features=120)


def excess(arms):
    share, *nulls = (arms[name].measured.summary()["genuine_share"] for name in ("trained", "shuffled", "untrained"))
    return share - max(nulls)


def partners(world, arm):
    """Rows of the measurement that are a recalled planted feature's partner, and the planted features themselves."""
    found_FLD = arm.dictionary.decoder_FLD().numpy()[arm.measured.feature_n]
    assignment = recovery.assign(found_FLD, world.decoder_FLD.numpy())
    recalled = np.flatnonzero(assignment.recalled_F)
    return assignment.partner_F[recalled], recalled


def test_lasting_features_are_not_cross_layer(lasting):
    world, arms = lasting
    assert len(partners(world, arms["trained"])[1]) >= 0.8 * 48
    assert arms["trained"].measured.summary()["genuine_share"] <= 0.05
    assert excess(arms) <= 0.05


def test_functional_spread_agrees_with_the_planted_one(lasting):
    world, arms = lasting
    rows, planted = partners(world, arms["trained"])
    true, found = world.rho_F.numpy()[planted], arms["trained"].measured.functional_rho_n[rows]
    assert abs(found.mean() / true.mean() - 1) <= 0.1
    assert np.corrcoef(true, found)[0, 1] > 0.9


def test_codes_across_layers_are(codes):
    world, arms = codes
    assert len(partners(world, arms["trained"])[1]) >= 0.85 * 98
    share = arms["trained"].measured.summary()["genuine_share"]
    assert share == pytest.approx(0.5, abs=0.1), "the planted share of split features"
    assert excess(arms) >= 0.25


def test_it_is_the_codes_that_are_called_so(codes):
    world, arms = codes
    rows, planted = partners(world, arms["trained"])
    is_split = world.kind_F.numpy()[planted] == 1
    called = arms["trained"].measured.genuine_n[rows]
    assert called[is_split].mean() >= 0.9
    assert called[~is_split].mean() == 0
    genuine_F = arms["trained"].measured.genuine_F()
    kept = arms["trained"].dictionary.decoder_FLD().numpy()[~genuine_F]
    left = recovery.assign(kept, world.decoder_FLD.numpy()).recalled_F
    assert left[world.kind_F.numpy() == 0].mean() >= 0.85
    assert left[world.kind_F.numpy() == 1].mean() <= 0.1


def test_trap_rare_atoms_hide_codes_from_the_area_under_the_curve():
    """Where few others share an atom, one layer's false alarms are few among all tokens, though most of its alarms.

    The preregistered thresholds then see no cross-layer feature at all; precision does.
    """
    config = WorldConfig(n_features=96, kinds=("local", "persistent", "split"), p_min=0.015, p_max=0.055)
    world = World(config)
    arm = fit(
        tokens_of(world), {"n_layers": 4, "d_model": 16}, n_features=128, k=round(float(world.probability_F.sum()))
    )
    rows, planted = partners(world, arm)
    is_split = world.kind_F.numpy()[planted] == 2
    assert is_split.sum() >= 25
    assert arm.measured.genuine_n.mean() <= 0.05, "the rule has learnt to see them: say so in its definition"
    best_layer = arm.measured.precision_nL.max(1)[rows]
    assert arm.measured.precision_joint_n[rows][is_split].mean() >= 0.8
    assert best_layer[is_split].mean() <= 0.4
    assert best_layer[~is_split].mean() >= 0.8


def test_trap_noise_makes_lasting_features_look_joint():
    """A feature that is the same in four noisy layers is averaged by the joint probe: J passes without any code."""
    generator = torch.Generator().manual_seed(4)
    direction = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q[:8]
    decoder = direction[:, None].expand(8, 4, 16) / 2
    dictionary = Crosscoder(n_layers=4, d_model=16, n_features=8, sparsity=BatchTopK(k=1)).eval()
    with torch.no_grad():
        dictionary.encoder.copy_(decoder)
        dictionary.decoder.copy_(decoder)
        dictionary.threshold.fill_(0.5)
    share = {}
    for noise in (0.1, 0.4):
        active = (torch.rand(20_000, 8, generator=generator) < 0.05).float()
        x = torch.einsum("tf,fld->tld", active, decoder) + noise * torch.randn(20_000, 4, 16, generator=generator)
        measured = measure_functional_spread(dictionary, lambda x=x: x.split(4096))
        share[noise] = measured.summary()["genuine_share"]
    assert share == {0.1: 0.0, 0.4: 1.0}, "no longer fooled: say so in the docstring of measure_functional_spread"


def test_trap_dense_noise_is_all_cross_layer():
    """Without any feature, a threshold on a random direction of Gaussian layers cannot be told from one layer.

    The share is then larger than that of a world made of codes, so a null with dense activations outweighs any X.
    """
    dictionary = Crosscoder(n_layers=4, d_model=16, n_features=32, sparsity=BatchTopK(k=1)).eval()
    dictionary.threshold.fill_(2.0)
    x = torch.randn(20_000, 4, 16, generator=torch.Generator().manual_seed(5))
    measured = measure_functional_spread(dictionary, lambda: x.split(4096))
    assert measured.n_alive == 32
    assert measured.summary()["genuine_share"] >= 0.9
    assert measured.precision_nL.max() <= 0.2
