"""Planted truth: a crosscoder must find the features that were put there, with their spread."""

import numpy as np
import pytest
import torch

from crosscoder import BatchTopK, Crosscoder
from crosscoder.data.world import World, WorldConfig
from crosscoder.measure import matching, profile, recovery
from crosscoder.training import TrainConfig, train


@pytest.fixture(scope="module", params=[0, 1])
def found(request):
    """A world of 64 local, persistent and drifting features, and a crosscoder of 96 trained on it for 800 steps."""
    world = World(WorldConfig(n_features=64, n_layers=4, d_model=16, seed=request.param))
    # As many active features as there truly are: a wrong k mixes features.
    k = round(float(world.probability_F.sum()))
    dictionary = Crosscoder(n_layers=4, d_model=16, n_features=96, sparsity=BatchTopK(k=k))
    config = TrainConfig(steps=800, learning_rate=1e-2, dead_after_tokens=10_000, log_every=200)
    result = train(dictionary, world.batches(1024, 800, seed=1), config=config, quiet=True)
    return world, result


def test_planted_features_are_recovered(found):
    world, result = found
    cosine = recovery.assign(result.dictionary.decoder_FLD().numpy(), world.decoder_FLD.numpy()).cosine_F
    recall = {
        kind: float((cosine[world.kind_F.numpy() == i] >= 0.9).mean()) for i, kind in enumerate(world.config.kinds)
    }
    assert (cosine >= 0.9).mean() >= 0.9, recall
    assert result.metrics[-1]["explained_variance"] > 0.9


def test_their_spread_is_recovered(found):
    world, result = found
    truth = world.decoder_FLD.numpy()
    decoder = result.dictionary.decoder_FLD().numpy()
    similarity = matching.decoder_cosine(truth.reshape(64, -1), decoder.reshape(96, -1))
    best = similarity.argmax(1)
    good = similarity.max(1) >= 0.9
    rho_true = profile.participation_ratio(profile.layer_profile(truth))[good]
    rho_found = profile.participation_ratio(profile.layer_profile(decoder[best]))[good]
    assert abs(rho_found.mean() / rho_true.mean() - 1) < 0.1
    assert np.corrcoef(rho_true, rho_found)[0, 1] > 0.9


def test_an_untrained_crosscoder_recovers_nothing(found):
    world, _ = found
    fresh = Crosscoder(n_layers=4, d_model=16, n_features=96, seed=1)
    cosine = recovery.assign(fresh.decoder_FLD().numpy(), world.decoder_FLD.numpy()).cosine_F
    assert (cosine >= 0.9).mean() == 0


def test_the_world_is_not_noise(found):
    world, _ = found
    x_BLD, active_BF = world.sample(2000, torch.Generator().manual_seed(3))
    torch.testing.assert_close(x_BLD, torch.einsum("bf,fld->bld", active_BF, world.decoder_FLD))
