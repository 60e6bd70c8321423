import pytest
import torch

from crosscoder.data.world import (
    KINDS,
    Firing,
    Nuisance,
    World,
    WorldConfig,
    mean_interference_dimension,
    split_codewords,
)


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
    batch = World(config).draw(8, 2, 0)
    assert torch.equal(batch, World(config).draw(8, 2, 0))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(batch, World(config).draw(8, 2, 1))
    assert not torch.equal(batch, World(config).draw(8, 3, 0))


def test_noise_has_the_size_asked_for():
    quiet, loud = World(WorldConfig()), World(WorldConfig(noise=0.5))
    difference = loud.sample(3000, generator())[0] - quiet.sample(3000, generator())[0]
    assert difference.std() == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (WorldConfig, [{"n_features": 0}, {"d_model": 1}, {"kinds": ()}, {"kinds": ("global",)}, {"n_layers": 1}]),
        (WorldConfig, [{"p_min": 0.0}, {"p_min": 0.5}, {"p_max": 1.5}, {"drift_cosine": 1.1}, {"noise": -1.0}]),
        (WorldConfig, [{"p_max": 0.6, "firing": Firing(dependence="exclusive", group=2)}]),
        (Firing, [{"law": "pareto"}, {"dependence": "both"}, {"strength": 1.1}, {"group": 1}]),
        (Nuisance, [{"n_circles": -1}, {"circle_probability": 2.0}]),
    ],
)
def test_bad_worlds_are_refused(config, settings):
    for setting in settings:
        with pytest.raises(ValueError, match=r"expected|every feature is local"):
            config(**setting)


def test_worlds_stay_what_they_were():
    """The numbers of a world are quoted in results, so its stream of random numbers is part of its meaning."""
    world = World(WorldConfig())
    sums = [world.decoder_FLD[i].sum().item() for i in (0, 1, 62)]
    assert sums == pytest.approx([1.009086, -0.170994, -2.042397], abs=1e-5)
    assert world.probability_F[[0, 1, 62]].tolist() == pytest.approx([0.036540, 0.016697, 0.023527], abs=1e-6)
    assert world.draw(8, 2, 0).sum().item() == pytest.approx(5.016480, abs=1e-4)


def test_composite_kinds_do_not_move_the_others():
    """Windows are drawn one after another; split and gated features in between take nothing from their stream."""
    worlds = [
        World(WorldConfig(n_features=8, kinds=("local", *kinds, "drifting")))
        for kinds in (("split", "split"), ("split", "gated"), ("gated", "gated"))
    ]
    windows_F = torch.tensor([0, 3, 4, 7])
    for other in worlds[1:]:
        assert torch.equal(other.decoder_FLD[windows_F], worlds[0].decoder_FLD[windows_F])
        assert not torch.equal(other.decoder_FLD[2], worlds[0].decoder_FLD[2])


@pytest.mark.parametrize(("n", "n_layers"), [(4, 2), (9, 2), (64, 4), (200, 8), (1, 3)])
def test_split_words_share_one_letter_at_most(n, n_layers):
    word_NL, n_letters = split_codewords(n, n_layers, generator())
    assert word_NL.shape == (n, n_layers)
    assert word_NL.min() >= 0
    assert word_NL.max() < n_letters
    shared_NN = (word_NL[:, None] == word_NL[None]).sum(2).fill_diagonal_(0)
    assert shared_NN.max() <= 1


def test_split_features_are_made_of_few_atoms():
    world = World(WorldConfig(n_features=64, n_layers=4, d_model=32, kinds=("split",)))
    for layer in range(4):
        atoms = torch.unique((world.decoder_FLD[:, layer] * 1e4).round(), dim=0)
        assert len(atoms) <= 11, "64 features, and a layer shows 11 directions"
    assert len(torch.unique((world.decoder_FLD.flatten(1) * 1e4).round(), dim=0)) == 64


def test_gated_features_need_both_layers():
    world = World(WorldConfig(n_features=16, n_layers=4, d_model=16, kinds=("gated",)))
    for start in range(0, 16, 4):
        group_4LD = world.decoder_FLD[start : start + 4]
        layers = (group_4LD.norm(dim=2) > 0).all(0).nonzero().flatten().tolist()
        assert len(layers) == 2
        assert layers[1] == layers[0] + 1
        for layer in layers:
            halves = torch.unique((group_4LD[:, layer] * 1e4).round(), dim=0)
            assert len(halves) == 2, "one layer shows two directions for four features"
        assert len(torch.unique((group_4LD.flatten(1) * 1e4).round(), dim=0)) == 4


def test_truth_is_stated():
    local = World(WorldConfig(n_features=400, n_layers=4, d_model=16, kinds=("local",)))
    assert local.rho_F.tolist() == [1.0] * 400
    assert mean_interference_dimension(local.decoder_FLD) == pytest.approx(4 * 16, rel=0.05)
    world = World(WorldConfig(n_features=100, kinds=KINDS, equal_energy=False))
    rho_F = dict(zip(KINDS, (world.rho_F[world.kind_F == i] for i in range(5))))
    assert (rho_F["split"] == 4).all()
    assert (rho_F["gated"] == 2).all()
    assert (rho_F["persistent"] >= 2).all()
    norm_FL = world.decoder_FLD.norm(dim=2)
    torch.testing.assert_close(norm_FL, norm_FL.round())  # 1 wherever a feature lives
    equal = World(WorldConfig(n_features=60)).decoder_FLD
    torch.testing.assert_close(equal.square().sum((1, 2)), torch.ones(60))


def test_zipf_spans_the_range_in_ranks():
    world = World(WorldConfig(n_features=64, p_min=0.001, p_max=0.064, firing=Firing(law="zipf")))
    sorted_F = world.probability_F.sort(descending=True).values
    torch.testing.assert_close(sorted_F, 0.064 / torch.arange(1, 65))


def rates_and_pairs(firing, n=200_000, p=0.1):
    world = World(WorldConfig(n_features=6, p_min=p, p_max=p, firing=firing))
    active_BF = (world.sample(n, generator())[1] > 0).float()
    return world, active_BF.mean(0), (active_BF.T @ active_BF) / n


def test_correlated_features_keep_their_rates_and_fire_together():
    world, rate_F, joint_FF = rates_and_pairs(Firing(dependence="correlated", strength=0.8, group=3))
    torch.testing.assert_close(rate_F, world.probability_F, atol=0.004, rtol=0)
    # P(two Gaussians of correlation .8 both below the 10 % quantile), from the bivariate distribution function
    assert joint_FF[0, 1].item() == pytest.approx(0.05624, abs=0.002)
    assert joint_FF[0, 3].item() == pytest.approx(0.01, abs=0.002), "groups are independent"


def test_children_fire_only_under_their_parent():
    world, rate_F, joint_FF = rates_and_pairs(Firing(dependence="hierarchical", strength=0.4, group=3))
    torch.testing.assert_close(world.probability_F, torch.tensor([0.1, 0.04, 0.04, 0.1, 0.04, 0.04]))
    torch.testing.assert_close(rate_F, world.probability_F, atol=0.004, rtol=0)
    torch.testing.assert_close(joint_FF[0, 1], rate_F[1])
    assert joint_FF[1, 2].item() == pytest.approx(0.016, abs=0.002), "siblings are independent given the parent"


def test_exclusive_features_keep_their_rates_and_never_meet():
    world, rate_F, joint_FF = rates_and_pairs(Firing(dependence="exclusive", group=4))
    torch.testing.assert_close(rate_F, world.probability_F, atol=0.004, rtol=0)
    assert joint_FF[:4, :4].fill_diagonal_(0).max() == 0
    assert joint_FF[4, 5] == 0
    assert joint_FF[0, 4].item() == pytest.approx(0.01, abs=0.002)


def test_a_circle_is_a_circle():
    nuisance = Nuisance(n_circles=1, circle_probability=0.25)
    clean, dirty = (
        World(config).sample(4000, generator()) for config in (WorldConfig(), WorldConfig(nuisance=nuisance))
    )
    assert torch.equal(clean[1], dirty[1]), "the truth is the same with and without"
    points_BN = (dirty[0] - clean[0]).flatten(1)
    radius_B = points_BN.norm(dim=1)
    there_B = radius_B > 0.5
    assert there_B.float().mean().item() == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(radius_B[there_B], torch.ones(int(there_B.sum())), rtol=1e-4, atol=0)
    values = torch.linalg.svdvals(points_BN[there_B])
    assert values[1] > 0.9 * values[0], "both directions alike"
    assert values[2] < 1e-3 * values[0], "and no third"
