"""Two subjects in one crosscoder: planted shared and exclusive features come out as what they are."""

import pytest
import torch

from crosscoder import BatchTopK, Crosscoder
from crosscoder.dictionary import Diffing, stack_subjects
from crosscoder.measure.matching import decoder_cosine
from crosscoder.measure.profile import layer_profile
from crosscoder.measure.reading import measure_dictionary
from crosscoder.measure.universality import exclusive_shares
from crosscoder.training import TrainConfig, train

LAYERS, WIDTHS = (3, 1), (16, 24)  # other depth and other width
N_SHARED, N_FIRST, N_SECOND = 24, 8, 8
N_PLANTED = N_SHARED + N_FIRST + N_SECOND
FEATURES = 64


class Planted:
    """The same sparse features in two subjects: some in both, some in the first or the second alone."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.subject_F = torch.tensor([2] * N_SHARED + [0] * N_FIRST + [1] * N_SECOND)
        self.decoders = []
        for subject, (depth, width) in enumerate(zip(LAYERS, WIDTHS, strict=True)):
            rows_FD = torch.nn.functional.normalize(torch.randn(N_PLANTED, width, generator=generator), dim=1)
            here_F = (self.subject_F == 2) | (self.subject_F == subject)
            scale = (width / 1.5) ** 0.5  # about as long as activations are in a dictionary's inputs
            self.decoders.append((scale * rows_FD * here_F[:, None])[:, None].expand(-1, depth, -1))
        self.decoder_FLD = stack_subjects([decoder.contiguous() for decoder in self.decoders])

    def batch(self, seed, size=256):
        generator = torch.Generator().manual_seed(seed)
        active = torch.rand(size, N_PLANTED, generator=generator) < 0.05
        active_BF = active * (0.7 + 0.6 * torch.rand(active.shape, generator=generator))
        return stack_subjects([torch.einsum("bf,fld->bld", active_BF, decoder) for decoder in self.decoders])


@pytest.fixture(scope="module")
def planted():
    return Planted()


@pytest.fixture(scope="module")
def trained(planted):
    def fit(dedicated):
        cc = Crosscoder(
            n_layers=sum(LAYERS),
            d_model=max(WIDTHS),
            n_features=FEATURES,
            sparsity=BatchTopK(k=2),
            structure=Diffing(n_layers=LAYERS, d_models=WIDTHS, dedicated=dedicated),
        )
        config = TrainConfig(learning_rate=1e-2, dead_after_tokens=5_000, log_every=500)
        train(cc, [planted.batch(seed) for seed in range(300)], config=config, quiet=True)
        measured = measure_dictionary(cc, [planted.batch(10_000 + seed, 1024) for seed in range(4)])
        alive_F = measured.probability_F > 0.01
        return cc, measured, alive_F

    return {"free": fit(()), "dedicated": fit((0.125, 0.125))}


def partners(planted, cc, alive_F):
    """The planted feature nearest to each alive one, and their joint cosine."""
    found = cc.decoder_FLD().numpy()[alive_F].reshape(alive_F.sum(), -1)
    cosine = decoder_cosine(found, planted.decoder_FLD.flatten(1).numpy()).whole()
    return cosine.argmax(1), cosine.max(1)


@pytest.mark.parametrize("kind", ["free", "dedicated"])
def test_planted_features_are_found_and_padding_is_left_alone(planted, trained, kind):
    cc, measured, alive_F = trained[kind]
    assert measured.explained_variance > 0.9
    assert measured.explained_variance_L.min() > 0.85
    nearest, cosine = partners(planted, cc, alive_F)
    assert len(set(nearest[cosine > 0.9])) >= 0.85 * N_PLANTED
    assert cc.decoder_FLD()[:, : LAYERS[0], WIDTHS[0] :].eq(0).all()
    assert cc.encoder[:, : LAYERS[0], WIDTHS[0] :].eq(0).all()
    assert cc(planted.batch(5)).recon[:, : LAYERS[0], WIDTHS[0] :].eq(0).all()


def test_exclusive_shares_are_those_that_were_planted(trained):
    cc, _, alive_F = trained["free"]
    first, second = exclusive_shares(layer_profile(cc.decoder_FLD().numpy()[alive_F]), LAYERS[0])
    assert first == pytest.approx(N_FIRST / N_PLANTED, abs=0.08)
    assert second == pytest.approx(N_SECOND / N_PLANTED, abs=0.08)


@pytest.mark.parametrize("kind", ["free", "dedicated"])
def test_found_features_are_in_the_subjects_of_their_planted_partner(planted, trained, kind):
    cc, _, alive_F = trained[kind]
    nearest, cosine = partners(planted, cc, alive_F)
    profile_FL = layer_profile(cc.decoder_FLD().numpy()[alive_F])[cosine > 0.9]
    first, second = profile_FL[:, : LAYERS[0]].mean(1), profile_FL[:, LAYERS[0] :].mean(1)
    share = first / (first + second)
    owner = planted.subject_F.numpy()[nearest[cosine > 0.9]]
    assert (share[owner == 0] > 0.9).all()
    assert (share[owner == 1] < 0.1).all()
    assert ((share[owner == 2] > 0.1) & (share[owner == 2] < 0.9)).all()


def test_dedicated_features_hold_exclusive_planted_ones(planted, trained):
    cc, _, alive_F = trained["dedicated"]
    owner_F = cc.config.structure.owners(FEATURES).numpy()
    decoder = cc.decoder_FLD().numpy()
    assert (decoder[owner_F == 0][:, LAYERS[0] :] == 0).all()
    assert (decoder[owner_F == 1][:, : LAYERS[0]] == 0).all()
    nearest, cosine = partners(planted, cc, alive_F)
    for subject in (0, 1):
        own = (owner_F[alive_F] == subject) & (cosine > 0.9)
        assert own.sum() >= 2
        assert (planted.subject_F.numpy()[nearest[own]] == subject).all()
