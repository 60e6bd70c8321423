"""Functional spread and joint decodability of a whole dictionary: against the plain formulas, and planted cases."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from crosscoder import BatchTopK, Crosscoder, LayerwiseSAE, TopK
from crosscoder.dictionary import JumpReLU
from crosscoder.measure import probe_passes, profile
from crosscoder.measure.probes import measure_functional_spread

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from bench_verdicts_worlds import area_under_curve

N_LAYERS, D_MODEL = 3, 8
RIDGE = 1e-3


def planted_crosscoder(encoder_FLD, decoder_FLD, *, threshold=0.4, **settings):
    n_features, n_layers, d_model = encoder_FLD.shape
    dictionary = Crosscoder(
        n_layers=n_layers, d_model=d_model, n_features=n_features, **{"sparsity": BatchTopK(k=1), **settings}
    )
    with torch.no_grad():
        dictionary.encoder.copy_(encoder_FLD)
        dictionary.decoder.copy_(decoder_FLD)
        dictionary.threshold.fill_(threshold)
    return dictionary.eval()


def batches_of(x_TLD, size=500):
    return lambda: x_TLD.split(size)


@pytest.fixture(scope="module")
def seen():
    """Six directions, in all layers or some, noisy; 3,000 tokens in documents of 50; encoder off by noise."""
    generator = torch.Generator().manual_seed(0)
    mask_FL = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 0], [0, 1, 1], [0, 0, 1], [1, 1, 0]])
    direction = torch.randn(6, N_LAYERS, D_MODEL, generator=generator) * mask_FL[:, :, None]
    direction = direction / direction.flatten(1).norm(dim=1)[:, None, None]
    active = (torch.rand(3000, 6, generator=generator) < 0.1) * (0.7 + 0.6 * torch.rand(3000, 6, generator=generator))
    x = torch.einsum("tf,fld->tld", active, direction) + 0.25 * torch.randn(3000, 3, 8, generator=generator) + 3
    encoder = direction + 0.05 * torch.randn(direction.shape, generator=generator)
    dictionary = planted_crosscoder(encoder, direction)
    with torch.no_grad():
        dictionary.decoder_bias += 3
    return dictionary, x, np.arange(3000) // 50


@pytest.fixture(scope="module")
def measured(seen):
    dictionary, x, document = seen
    return measure_functional_spread(dictionary, batches_of(x), document_T=document, ridge=RIDGE)


def ridge_auc(x_TN, label_T, fitted_T, scored_T):
    """The definition: ridge regression of the label on one half, AUC on the other."""
    x = x_TN[fitted_T] - x_TN[fitted_T].mean(0)
    gram = x.T @ x / len(x)
    penalty = 1e-3 * np.trace(gram) / len(gram) * np.eye(len(gram))
    weight = np.linalg.solve(gram + penalty, x.T @ (label_T[fitted_T] - label_T[fitted_T].mean()))
    return area_under_curve((x_TN[scored_T] @ weight)[:, None], label_T[scored_T])[0]


class TestAgainstThePlainFormulas:
    def test_aucs_are_those_of_ridge_probes_on_other_documents(self, seen, measured):
        dictionary, x, document = seen
        label = dictionary.encode(x).to_dense().detach().numpy() > 0
        fitted = document % 2 == 0
        flat = x.double().flatten(1).numpy()
        inside = []
        for i in range(6):
            parts = [flat[:, layer * 8 : layer * 8 + 8] for layer in range(3)] + [flat]
            expected = [ridge_auc(part, label[:, i], fitted, ~fitted) for part in parts]
            np.testing.assert_allclose([*measured.auc_nL[i], measured.auc_joint_n[i]], expected, atol=5e-4)
            inside.append([ridge_auc(part, label[:, i], fitted, fitted) for part in parts[:-1]])
        assert np.abs(inside - measured.auc_nL).max() > 0.01, "scored on the documents it was fitted on"

    def test_profile_and_drop_are_those_of_the_arrays(self, seen, measured):
        dictionary, x, _ = seen
        code = dictionary.encode(x).to_dense().detach().double().numpy()[:, :, None]
        centred = (x - x.mean(0)).double().numpy()
        part = np.einsum("tld,fld->tfl", centred, dictionary.encoder.detach().double().numpy())
        total = np.maximum((part * (code > 0)).sum(0), 0)
        np.testing.assert_allclose(measured.profile_nL, total / total.sum(1, keepdims=True), atol=1e-5)

        def drop(threshold):
            left = np.where((code > 0) & (code - part > threshold), code - part, 0)
            return 1 - left.sum(0) / code.sum(0)

        np.testing.assert_allclose(measured.drop_nL, drop(0.4), atol=2e-3)
        assert np.abs(measured.drop_nL - drop(0)).max() > 0.02, "the threshold was not heeded"

    def test_scaling_is_that_of_the_arrays(self, seen, measured):
        dictionary, x, _ = seen
        out = dictionary(x)
        code, error = out.code.to_dense().detach().double(), (x - out.recon.detach()).double()
        moment = torch.einsum("tf,tld->fld", code, error).numpy()
        found = profile.latent_scaling(moment, code.square().sum(0).numpy(), dictionary.decoder.detach().numpy())
        np.testing.assert_allclose(measured.nu_error_nL, found, atol=1e-4)

    def test_the_batch_size_does_not_matter(self, seen, measured):
        dictionary, x, document = seen
        again = measure_functional_spread(dictionary, batches_of(x, 171), document_T=document, ridge=RIDGE)
        for name in ("profile_nL", "drop_nL", "auc_nL", "auc_joint_n", "nu_error_nL", "precision_nL"):
            np.testing.assert_allclose(getattr(again, name), getattr(measured, name), atol=2e-3)

    def test_precision_by_hand(self):
        counts = np.zeros((2, 1, 1, 4), dtype=int)
        counts[:, 0, 0] = [[90, 8, 2, 0], [1, 0, 4, 5]]  # without, with
        assert probe_passes.precision_at_recall(counts, 0.9)[0, 0] == pytest.approx(9 / 11)
        assert probe_passes.precision_at_recall(counts, 0.95)[0, 0] == pytest.approx(10 / 110)
        assert probe_passes.binned_auc(counts)[0, 0] == pytest.approx((0.5 * 0.9 + 4 * 0.99 + 5) / 10)


def test_a_spread_decoder_read_from_one_layer():
    """Decoder norms call both features spread over four layers; what reads them differs."""
    generator = torch.Generator().manual_seed(1)
    direction = torch.linalg.qr(torch.randn(16, 2, generator=generator)).Q.T
    decoder = direction[:, None].expand(2, 4, 16) / 2
    encoder = decoder.clone()
    encoder[1, 1:], encoder[1, 0] = 0, direction[1] * 2
    active = (torch.rand(6000, 2, generator=generator) < 0.1).float()
    x = torch.einsum("tf,fld->tld", active, decoder) + 0.02 * torch.randn(6000, 4, 16, generator=generator)
    found = measure_functional_spread(planted_crosscoder(encoder, decoder), batches_of(x))
    np.testing.assert_allclose(found.decoder_rho_n, [4, 4], rtol=1e-4)
    np.testing.assert_allclose(found.functional_rho_n, [4, 1], rtol=0.02)
    np.testing.assert_allclose(found.drop_nL, [[0.25 * 0.9] * 4, [1, 0, 0, 0]], atol=0.01)  # a mean of .1 stays


def test_complete_shrinkage_is_seen_and_true_absence_is_not():
    """Two decoders without a second layer: one feature is there at .8 of its size, the other is not."""
    generator = torch.Generator().manual_seed(2)
    direction = torch.linalg.qr(torch.randn(16, 2, generator=generator)).Q.T
    decoder = torch.zeros(2, 2, 16)
    decoder[:, 0] = direction
    truth = decoder.clone()
    truth[0, 1] = 0.8 * direction[0]
    active = (torch.rand(6000, 2, generator=generator) < 0.1).float()
    x = torch.einsum("tf,fld->tld", active, truth) + 0.02 * torch.randn(6000, 2, 16, generator=generator)
    found = measure_functional_spread(planted_crosscoder(decoder, decoder), batches_of(x))
    np.testing.assert_allclose(found.nu_error_nL, [[1, 0.8], [1, 0]], atol=0.02)
    np.testing.assert_allclose(found.decoder_rho_n, [1, 1])
    np.testing.assert_allclose(found.corrected_rho_n, [1.64**2 / (1 + 0.8**4), 1], atol=0.03)


class TestWhatIsMeasured:
    def test_a_sample_is_drawn_from_the_alive(self, seen, measured):
        dictionary, x, document = seen
        some = {"n_features": 3, "seed": 1, "ridge": RIDGE}
        found = measure_functional_spread(dictionary, batches_of(x), document_T=document, **some)
        assert len(found.feature_n) == 3
        np.testing.assert_allclose(found.auc_nL, measured.auc_nL[found.feature_n], atol=1e-6)
        with pytest.raises(ValueError, match="n_features=None"):
            found.genuine_F()
        assert measured.genuine_F().tolist() == measured.genuine_n.tolist()

    def test_the_dead_and_the_rare(self, seen):
        dictionary, x, document = seen
        rare = Crosscoder(n_layers=3, d_model=8, n_features=6, sparsity=BatchTopK(k=1))
        rare.load_state_dict(dictionary.state_dict())
        with torch.no_grad():
            rare.encoder_bias[0] = -10
        is_active = rare.eval().encode(x).to_dense()[:, 1] > 0
        alone = x[~is_active | (torch.from_numpy(document) % 2 == 1)]
        found = measure_functional_spread(rare, batches_of(alone), document_T=document[: len(alone)])
        assert found.feature_n.tolist() == [1, 2, 3, 4, 5]
        assert found.n_alive == 5
        odd = document[~is_active.numpy() | (document % 2 == 1)]
        found = measure_functional_spread(rare, batches_of(alone), document_T=odd)
        assert np.isnan(found.auc_nL[0]).all()
        assert np.isnan(found.precision_joint_n[0])
        assert np.isfinite(found.auc_nL[1:]).all()
        summary = found.summary()
        assert summary["probed"] == 4
        assert all(math.isfinite(value) for value in summary.values())

    def test_every_rule_has_its_limit(self, seen):
        dictionary, x, _ = seen
        assert probe_passes.activation_limits(dictionary).tolist() == pytest.approx([0.4] * 6)
        weighed = planted_crosscoder(dictionary.encoder.data, 2 * dictionary.decoder.data, selection_weight="l2")
        assert probe_passes.activation_limits(weighed).tolist() == pytest.approx([0.2] * 6)
        jump = planted_crosscoder(dictionary.encoder.data, dictionary.decoder.data, sparsity=JumpReLU(threshold=0.3))
        assert probe_passes.activation_limits(jump).tolist() == pytest.approx([0.3] * 6)
        top = planted_crosscoder(dictionary.encoder.data, dictionary.decoder.data, sparsity=TopK(k=2))
        assert probe_passes.activation_limits(top).tolist() == [0.0] * 6
        assert measure_functional_spread(top, batches_of(x - 3)).n_alive == 6

    def test_the_mode_is_left_as_it_was(self, seen):
        dictionary, x, _ = seen
        dictionary.train()
        measure_functional_spread(dictionary, batches_of(x))
        assert dictionary.training
        dictionary.eval()

    def test_what_cannot_be_measured_is_refused(self, seen):
        dictionary, x, document = seen
        for shared in (False, True):
            bank = LayerwiseSAE(n_layers=3, d_model=8, n_features=40, shared=shared)
            with pytest.raises(ValueError, match="bank"):
                measure_functional_spread(bank, batches_of(x))
        for labels in (document[:-1], np.append(document, 0)):
            with pytest.raises(ValueError, match="one for each"):
                measure_functional_spread(dictionary, batches_of(x), document_T=labels)
        with pytest.raises(ValueError, match="at least two documents"):
            measure_functional_spread(dictionary, batches_of(x), document_T=document * 0)
        with pytest.raises(ValueError, match="nothing to measure"):
            measure_functional_spread(dictionary, batches_of(x * 0 + 3))


def test_trap_a_joint_probe_with_few_tokens_fits_noise():
    """Noisy features of all layers, 250 fitted tokens, 4 layers of 48: all layers together tell more than one, but a
    probe of 192 numbers with a small penalty fits noise and hides it."""
    generator = torch.Generator().manual_seed(1)
    direction = torch.nn.functional.normalize(torch.randn(12, 4, 48, generator=generator), dim=-1)
    active = (torch.rand(500, 12, generator=generator) < 0.15) * 1.0
    x = torch.einsum("tf,fld->tld", active, direction) + 0.4 * torch.randn(500, 4, 48, generator=generator)
    dictionary = planted_crosscoder(direction, direction / 4, threshold=2.0)
    small, chosen = (
        measure_functional_spread(dictionary, batches_of(x), document_T=np.arange(500) // 20, ridge=ridge)
        for ridge in (1e-3, None)
    )
    assert np.nanmean(chosen.gain_n) > np.nanmean(small.gain_n) + 0.03
    assert np.nanmean(chosen.gain_n) > 0
    assert chosen.ridges[-1] > 0.1
    assert len(chosen.ridges) == 5
