"""Traps of a trained dictionary: what the naive number says, and the number that tells."""

import math

import numpy as np
import pytest
import torch

from crosscoder import BatchTopK, Crosscoder
from crosscoder.data.order import seeded_generator
from crosscoder.data.world import Firing, Nuisance, World, WorldConfig
from crosscoder.dictionary import NormPenalty, ReLU
from crosscoder.measure import counting, profile, recovery
from crosscoder.measure.reading import measure_dictionary, read_dictionary
from crosscoder.training import TrainConfig, train

SHAPE = {"n_layers": 4, "d_model": 16}


def trained(world, *, steps=500, learning_rate=1e-2, kept_bias=None, **settings):
    dictionary = Crosscoder(**SHAPE, **settings)
    if kept_bias is not None:
        with torch.no_grad():
            dictionary.encoder_bias.copy_(kept_bias)
    config = TrainConfig(steps=steps, learning_rate=learning_rate, dead_after_tokens=10_000, log_every=steps)
    batches = (world.draw(256, 1, index) for index in range(steps))
    return train(dictionary, batches, config=config, quiet=True).dictionary


def held_out(world, dictionary, n=20_480):
    """Inputs, planted activity, and what the dictionary makes of it."""
    x_BLD, activations_BF = world.sample(n, seeded_generator("traps"))
    measured = measure_dictionary(dictionary, x_BLD.split(4096))
    alive = measured.alive_GF[0].nonzero()[0]
    return x_BLD, activations_BF.numpy(), measured, alive


@pytest.fixture(scope="module")
def hierarchy():
    firing = Firing(dependence="hierarchical", strength=0.3, group=2)
    return World(WorldConfig(n_features=32, kinds=("persistent",), p_min=0.1, p_max=0.2, firing=firing))


def absorption_rate(active_T, parent_T, child_T):
    """How much less often a parent's feature is active where its child is too (Chanin et al. 2024, arXiv 2409.14507).

    0: it fires alike. 1: the child's feature says the parent too, and the parent's own stays silent.
    """
    return 1 - active_T[parent_T & child_T].mean() / active_T[parent_T & ~child_T].mean()


class TestAbsorption:
    """Children fire with their parents only, so a child's feature can say both and save one active feature."""

    def numbers(self, world, k):
        dictionary = trained(world, n_features=48, sparsity=BatchTopK(k=k))
        _, planted, measured, _ = held_out(world, dictionary)
        found = recovery.assign(dictionary.decoder_FLD().numpy(), world.decoder_FLD.numpy())
        active = measured.code.toarray() > 0
        parents = np.arange(0, 32, 2)
        rates = [
            absorption_rate(active[:, found.partner_F[i]], planted[:, i] > 0, planted[:, i + 1] > 0) for i in parents
        ]
        return np.nanmean(rates), found.recalled_F[parents].mean(), found.recalled_F[parents + 1].mean()

    def test_trap_absorption(self, hierarchy):
        assert float(hierarchy.probability_F.sum()) == pytest.approx(3, abs=0.1)
        absorbed, parents, children = self.numbers(hierarchy, k=2)
        free, _, children_free = self.numbers(hierarchy, k=3)
        assert parents >= 0.85, "the naive number: parents' directions are found, nothing seems amiss"
        assert absorbed >= 0.4
        assert free <= 0.25
        assert children <= 0.3, "a child's feature points at child and parent"
        assert children_free >= children + 0.2


class TestSplitting:
    def test_trap_splitting(self):
        """Circles have no right number of features: twice the dictionary finds twice as many, the load hardly moves."""
        world = World(
            WorldConfig(
                n_features=16,
                kinds=("persistent",),
                p_min=0.02,
                nuisance=Nuisance(n_circles=8, circle_probability=0.04),
            )
        )
        count, load, total = {}, {}, {}
        for size in (24, 48):
            dictionary = trained(world, n_features=size, sparsity=BatchTopK(k=1))
            found = read_dictionary(dictionary, held_out(world, dictionary)[0].split(4096))
            count[size], p = len(found.distinct), found.probability_F
            load[size], total[size] = counting.binary_entropy(p).sum(), p.sum()
        assert count[48] >= 1.8 * count[24], "the naive number: nearly twice as many features, duplicates joined"
        assert load[48] <= 1.25 * load[24]
        assert load[48] - load[24] <= 1.05 * total[24] * math.log(2), "at most p ln 2 for each feature split once"


def test_trap_dead_features_are_not_few_features():
    """Much of the dictionary starts out of reach and nothing revives it: fewer features are counted than planted."""
    world = World(WorldConfig(n_features=64, p_min=0.03, p_max=0.05))
    bias = torch.zeros(64)
    bias[36:] = -0.5
    counts, dead, saturated = {}, {}, {}
    for name, aux_k in (("dead", 0), ("revived", None)):
        dictionary = trained(world, n_features=64, sparsity=BatchTopK(k=2), aux_k=aux_k, kept_bias=bias)
        alive = held_out(world, dictionary)[3]
        counts[name], dead[name] = len(alive), 1 - len(alive) / 64
        saturated[name] = recovery.is_saturated(len(alive), 64)
    assert counts["dead"] <= 0.8 * 64, "the naive number: the world seems to have fewer features"
    assert not saturated["dead"], "and the dictionary seems to have room to spare"
    assert dead["dead"] >= 0.2, "what tells"
    assert counts["revived"] >= 0.9 * 64
    assert dead["revived"] <= 0.1


@pytest.fixture(scope="module")
def uneven():
    world = World(WorldConfig(n_features=32, kinds=("persistent",), p_min=0.03, p_max=0.06, noise=0.02))
    directions = torch.randn(32, 16, generator=torch.Generator().manual_seed(3))
    profile_L = torch.tensor([1, 1, 0.3, 0.3])
    directions = directions / directions.norm(dim=1, keepdim=True)
    world.decoder_FLD = directions[:, None] * (profile_L / profile_L.norm())[:, None]
    return world


def refitted_variances(code_TF, x_TN, decoder_FN, bias_N):
    """Explained variance with activations as they are, and with each feature's times one constant of its own.

    The constants are the least-squares ones (Wright and Sharkey 2024): `((f^T f) * (W W^T)) c = diag(f^T x W^T)`.
    """
    code, x, decoder = code_TF.astype(float), x_TN.astype(float) - bias_N, decoder_FN.astype(float)
    moment_F = ((code.T @ x) * decoder).sum(1)
    scale_F = np.linalg.lstsq((code.T @ code).toarray() * (decoder @ decoder.T), moment_F, rcond=None)[0]
    variance = np.square(x - x.mean(0)).sum()
    return tuple(1 - np.square(x - (code * scale) @ decoder).sum() / variance for scale in (1.0, scale_F))


class TestShrinkage:
    """Features at full size in two layers and .3 of it in two more, under a penalty on the sum of layers' norms."""

    def numbers(self, world, **settings):
        dictionary = trained(world, n_features=48, **settings)
        x_BLD, planted, measured, alive = held_out(world, dictionary)
        decoder_FN = dictionary.decoder_FLD().flatten(1).numpy()
        found = recovery.assign(decoder_FN[alive][:, None], world.decoder_FLD.flatten(1)[:, None].numpy())
        partner = alive[found.partner_F[found.recalled_F]]
        code = measured.code.tocsc()
        bias_N = dictionary.grouped().center_GN[0].detach().numpy()
        before, after = refitted_variances(code, x_BLD.flatten(1).numpy(), decoder_FN, bias_N)
        assert before == pytest.approx(measured.explained_variance, abs=1e-4)
        assert len(partner) >= 25
        size = code.toarray()[:, partner] * np.linalg.norm(decoder_FN[partner], axis=1)
        is_on = planted[:, found.recalled_F] > 0
        return {
            "size": (size * is_on).sum() / (planted[:, found.recalled_F]).sum(),
            "before": before,
            "after": after,
            "rho": profile.participation_ratio(profile.layer_profile(dictionary.decoder_FLD().numpy()[partner])).mean(),
        }

    def test_trap_shrinkage(self, uneven):
        true = profile.participation_ratio(profile.layer_profile(uneven.decoder_FLD.numpy())).mean()
        shrunk = self.numbers(
            uneven,
            sparsity=ReLU(NormPenalty(norm="l1", coefficient=0.3)),
            decoder="free",
            learning_rate=5e-3,
            steps=800,
        )
        fair = self.numbers(uneven, sparsity=BatchTopK(k=2))
        assert shrunk["size"] <= 0.7, "activations do not shrink: no trap"
        assert fair["size"] >= 0.8
        assert shrunk["before"] <= fair["before"] - 0.05, "the naive number: the same features seem to explain less"
        assert shrunk["after"] >= shrunk["before"] + 0.03
        assert fair["after"] <= fair["before"] + 0.01
        assert shrunk["rho"] <= 0.92 * true, "the naive number: features seem to occupy fewer layers"
        assert abs(fair["rho"] / true - 1) <= 0.03
