import pytest
import torch

from crosscoder.data.synthetic import World, WorldConfig


def generator():
    return torch.Generator().manual_seed(0)


def test_rates_and_sizes_are_those_asked_for():
    world = World(WorldConfig(n_features=20, p_min=0.02, p_max=0.2))
    x_BLD, activations_BF = world.sample(20_000, generator())
    rate_F = (activations_BF > 0).float().mean(0)
    error_F = (world.probability_F * (1 - world.probability_F) / 20_000).sqrt()
    assert ((rate_F - world.probability_F).abs() < 4.5 * error_F).all()
    assert 0.02 <= world.probability_F.min() < 0.05
    assert 0.08 < world.probability_F.max() <= 0.2
    active = activations_BF[activations_BF > 0]
    assert 0.7 <= active.min() < 0.71
    assert 1.29 < active.max() <= 1.3
    torch.testing.assert_close(x_BLD, torch.einsum("bf,fld->bld", activations_BF, world.decoder_FLD))


@pytest.mark.parametrize("equal_energy", [True, False])
def test_norms(equal_energy):
    world = World(WorldConfig(n_features=60, equal_energy=equal_energy))
    norm_FL = world.decoder_FLD.norm(dim=2)
    if equal_energy:
        torch.testing.assert_close(norm_FL.square().sum(1), torch.ones(60))
    else:
        torch.testing.assert_close(norm_FL[norm_FL > 0], torch.ones(int((norm_FL > 0).sum())))


def test_kinds_live_where_they_should():
    world = World(WorldConfig(n_features=60, n_layers=5, drift_cosine=0.6))
    widths = set()
    for feature_LD, kind in zip(world.decoder_FLD, world.kind_F.tolist()):
        layers = feature_LD.norm(dim=1).nonzero().squeeze(1)
        assert len(layers) == int(layers[-1] - layers[0]) + 1, "a window has no gap"
        widths.add((kind, len(layers)))
        directions = torch.nn.functional.normalize(feature_LD[layers], dim=1)
        cosines = (directions[1:] * directions[:-1]).sum(1)
        expected = {1: 1.0, 2: 0.6}.get(kind, 0.0)
        torch.testing.assert_close(cosines, torch.full_like(cosines, expected), atol=1e-5, rtol=0)
    assert {width for kind, width in widths if kind == 0} == {1}
    assert {width for kind, width in widths if kind == 1} == {2, 3, 4, 5}


def test_everything_follows_the_seeds():
    config = WorldConfig(noise=0.1)
    torch.testing.assert_close(World(config).decoder_FLD, World(config).decoder_FLD, rtol=0, atol=0)
    assert not torch.equal(World(config).decoder_FLD, World(WorldConfig(seed=1)).decoder_FLD)
    before = torch.random.get_rng_state()
    batches = list(World(config).batches(8, 3, seed=2))
    again = list(World(config).batches(8, 3, seed=2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(x_BLD, y_BLD) for x_BLD, y_BLD in zip(batches, again))
    assert not torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], next(World(config).batches(8, 3, seed=3)))


def test_noise_has_the_size_asked_for():
    quiet, loud = World(WorldConfig()), World(WorldConfig(noise=0.5))
    difference = loud.sample(3000, generator())[0] - quiet.sample(3000, generator())[0]
    assert difference.std() == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize(
    "setting",
    [
        {"n_features": 0},
        {"d_model": 1},
        {"kinds": ()},
        {"kinds": ("global",)},
        {"n_layers": 1},
        {"p_min": 0.0},
        {"p_min": 0.5},
        {"p_max": 1.5},
        {"drift_cosine": 1.1},
        {"noise": -1.0},
        {"noise": float("nan")},
    ],
)
def test_bad_worlds_are_refused(setting):
    with pytest.raises(ValueError, match=r"expected|every feature is local"):
        WorldConfig(**setting)
