"""Pairs of worlds: the same features on the same tokens, with the lifespans and dimensions that were asked for."""

import pytest
import torch

from crosscoder.data.world_pair import SIDES, PairConfig, WorldPair, planted_density_ratio, planted_slot_ratio


@pytest.mark.parametrize(("gamma", "ratio"), [(0, 2), (0.5, 1), (1, 0.5)])
def test_planted_ratios(gamma, ratio):
    assert planted_slot_ratio(gamma) == pytest.approx(ratio)
    assert planted_density_ratio(1 - gamma) == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("n_layers", "gamma", "delta"),
    [
        *[(16, 0, None), (16, 0.5, None), (16, 1, None), (4, 0, None), (4, 0.5, None), (4, 1, None)],
        *[(16, 1, 0.5), (8, 1, 0.5), (16, 0.5, 0.75), (8, 0.5, 0.8)],
    ],
)
def test_lifespans_and_dimensions_are_those_asked_for(n_layers, gamma, delta):
    pair = WorldPair(PairConfig(n_features=512, n_layers=n_layers, d_model=32, gamma=gamma, delta=delta))
    for side in SIDES:
        depth, width = pair.config.shape(side)
        decoder_FLD = pair.decoder_FLD[side]
        assert decoder_FLD.shape == (512, depth, width)
        torch.testing.assert_close(decoder_FLD.flatten(1).norm(dim=1), torch.ones(512))
        rho_F = (decoder_FLD.norm(dim=2) > 0).sum(1).float()
        assert rho_F.mean().item() == pytest.approx(depth**gamma, abs=1 / 512 + 1e-6)
        assert pair.drawn_dimension(side) == pytest.approx(width * depth**pair.delta, rel=0.05)
        assert decoder_FLD.norm(dim=2).gt(0).any(0).all(), "every layer is used"
    ratio = pair.drawn_dimension("A") / pair.drawn_dimension("B")
    assert ratio == pytest.approx(planted_density_ratio(pair.delta), rel=0.1)


def test_features_are_the_same_on_both_sides():
    pair = WorldPair(PairConfig(n_layers=8, gamma=0.5, delta=0.8))
    activations_BF = pair.activations(100, 3, 1)
    for side in SIDES:
        expected = torch.einsum("bf,fld->bld", activations_BF, pair.decoder_FLD[side])
        torch.testing.assert_close(pair.draw(side, 100, 3, 1), expected)
    layers = {
        side: pair.decoder_FLD[side].norm(dim=2).gt(0).float() @ (torch.arange(pair.config.shape(side)[0]) + 0.5)
        for side in SIDES
    }
    widths = {side: pair.decoder_FLD[side].norm(dim=2).gt(0).sum(1) for side in SIDES}
    depth_A, depth_B = layers["A"] / widths["A"] / 8, layers["B"] / widths["B"] / 2
    assert (depth_A - depth_B).abs().max() <= 0.5, "at the same relative depth, as far as two layers can tell"
    assert torch.corrcoef(torch.stack([depth_A, depth_B]))[0, 1] > 0.3


def test_noise_differs_between_sides_and_follows_the_seeds():
    quiet, loud = WorldPair(PairConfig()), WorldPair(PairConfig(noise=0.5))
    noise = {}
    for side in SIDES:
        y_BLD = loud.draw(side, 3000, 0, 0)
        noise[side] = y_BLD - quiet.draw(side, 3000, 0, 0)
        assert noise[side].std().item() == pytest.approx(0.5, rel=0.03)
        assert torch.equal(loud.draw(side, 3000, 0, 0), y_BLD)
        assert not torch.equal(loud.draw(side, 3000, 1, 0), y_BLD)
    assert not torch.equal(noise["A"].flatten()[:1000], noise["B"].flatten()[:1000])
    assert not torch.equal(WorldPair(PairConfig(seed=1)).decoder_FLD["A"], quiet.decoder_FLD["A"])


BAD = [("n_layers", 6), ("n_layers", 2), ("gamma", 1.5), ("n_features", 1), ("d_model", 1), ("p_min", 0.0)]


@pytest.mark.parametrize(("name", "value"), [*BAD, ("noise", -1), ("crowding", 1.0), ("sides", ("A", "C"))])
def test_bad_pairs_are_refused(name, value):
    with pytest.raises(ValueError, match="expected"):
        PairConfig(**{name: value})


def test_an_impossible_dimension_is_refused_with_what_is_possible():
    with pytest.raises(ValueError, match=r"delta = 0\.2 cannot be had at 16 layers .* expected 0\.50 to 1\.00"):
        WorldPair(PairConfig(n_features=512, n_layers=16, gamma=0.5, delta=0.2))


def test_another_training_has_the_same_features_in_other_directions():
    first, second = WorldPair(PairConfig()), WorldPair(PairConfig(training_seed=1))
    assert torch.equal(first.activations(50, 0, 0), second.activations(50, 0, 0))
    for side in SIDES:
        a, b = first.decoder_FLD[side], second.decoder_FLD[side]
        assert torch.equal(a.norm(dim=2) > 0, b.norm(dim=2) > 0), "the same windows"
        assert (a.flatten(1) * b.flatten(1)).sum(1).abs().mean() < 0.3


def test_a_third_shape_lies_between():
    config = PairConfig(n_features=512, n_layers=8, d_model=32, gamma=1, delta=0.5, sides=("A", "B", "C"))
    pair = WorldPair(config)
    assert config.shape("C") == (4, 45)
    assert pair.draw("C", 10, 0, 0).shape == (10, 4, 45)
    assert pair.drawn_dimension("C") == pytest.approx(45 * 4**0.5, rel=0.05)
    assert torch.equal(
        pair.decoder_FLD["A"], WorldPair(PairConfig(**{**vars(config), "sides": SIDES})).decoder_FLD["A"]
    )


def test_crowded_directions_leave_fewer_dimensions():
    pair = WorldPair(PairConfig(n_features=512, n_layers=4, d_model=32, gamma=0, crowding=0.5))
    assert (pair.config.rank("A"), pair.config.rank("B")) == (16, 64)
    for side, dimension in (("A", 16 * 4), ("B", 64)):
        assert pair.drawn_dimension(side) == pytest.approx(dimension, rel=0.05)
        torch.testing.assert_close(pair.decoder_FLD[side].flatten(1).norm(dim=1), torch.ones(512))
