"""Banks whose layers start alike, and the SAE that all layers share: symmetries, counting and what they learn."""

import numpy as np
import pytest
import torch

from crosscoder import BatchTopK, JumpReLU, LayerwiseSAE, ReLU, TopK
from crosscoder.dictionary.losses import loss_terms
from crosscoder.measure.reading import measure_dictionary
from crosscoder.training import TrainConfig, train
from crosscoder.training.state import FiringTracker
from tests.dictionary import test_dictionaries
from tests.dictionary.test_dictionaries import inputs

L, D, F = 3, 8, 40  # of `test_dictionaries.make`
RULES = pytest.mark.parametrize(
    "sparsity", [TopK(k=5), BatchTopK(k=5), JumpReLU(0.6), ReLU()], ids=lambda s: type(s).__name__
)


def make(*, shared=True, **settings):
    return test_dictionaries.make(LayerwiseSAE, shared=shared, **settings)


@RULES
def test_a_shared_sae_is_one_sae_that_reads_every_layer_as_a_token(sparsity):
    shared = make(sparsity=sparsity, prefixes=(0.25,), aux_k=3)
    one = make(sparsity=sparsity, prefixes=(0.25,), aux_k=3, n_layers=1, shared=False)
    one.load_state_dict({**shared.state_dict(), "input_scale": torch.ones(1)})
    x_BLD = inputs(30, L, D)
    rows = x_BLD.reshape(-1, 1, D)
    torch.testing.assert_close(shared(x_BLD).recon.reshape(-1, 1, D), one(rows).recon)
    dead = torch.zeros(1, F, dtype=torch.bool)
    dead[0, :6] = True
    ours, theirs = loss_terms(shared, x_BLD, dead_GF=dead), loss_terms(one, rows, dead_GF=dead)
    assert ours.terms.keys() == theirs.terms.keys()
    for name, term in ours.terms.items():
        torch.testing.assert_close(term, theirs.terms[name])
    sum(ours.terms.values()).backward()
    sum(theirs.terms.values()).backward()
    for (name, a), b in zip(shared.named_parameters(), one.parameters(), strict=True):
        assert a.grad.abs().sum() > 0, name
        torch.testing.assert_close(a.grad, b.grad)


@RULES
def test_a_shared_sae_does_not_know_the_order_of_layers(sparsity):
    shared, x = make(sparsity=sparsity), inputs(30, L, D)
    order = [2, 0, 1]
    torch.testing.assert_close(shared(x[:, order]).recon, shared(x).recon[:, order])
    torch.testing.assert_close(shared.encode(x[:, order]).to_dense(), shared.encode(x).to_dense()[:, order])
    torch.testing.assert_close(shared.encode(x).to_dense(), shared.encode_dense(x))
    bank = make(sparsity=sparsity, shared=False)
    assert not torch.allclose(bank(x[:, order]).recon, bank(x).recon[:, order])


def test_activity_of_a_shared_sae_has_a_column_for_each_feature_and_layer():
    shared, x = make().eval(), inputs(50, L, D)
    measured = measure_dictionary(shared, x.split(20))
    assert measured.n_groups == L
    expected = shared.encode(x).to_dense().detach().reshape(50, L * F)
    np.testing.assert_allclose(measured.code.toarray(), expected.float().numpy(), rtol=1e-6)
    decoder_FLD = shared.decoder_FLD()
    assert decoder_FLD.shape == (L * F, L, D)
    for layer in range(L):
        assert torch.equal(decoder_FLD[layer * F : (layer + 1) * F, layer], shared.decoder[0])
    assert decoder_FLD[:F, 1:].eq(0).all()


def test_a_feature_of_a_shared_sae_is_dead_if_no_layer_activates_it():
    shared, x = make(), inputs(50, L, D)
    firing = FiringTracker(1, F)
    code = shared.encode(x)
    firing.update(code, 50)
    fired_F = code.to_dense().gt(0).flatten(0, 1).any(0)
    assert torch.equal(firing.dead(50)[0], ~fired_F)


def test_the_trainer_trains_a_shared_sae_to_explain_every_layer():
    directions = inputs(24, D, seed=9).float()
    generator = torch.Generator().manual_seed(0)
    active = [torch.rand(128, L, 24, generator=generator) for _ in range(200)]
    data = [torch.einsum("blf,fd->bld", (a > 0.9) * a, directions) for a in active]
    shared = LayerwiseSAE(n_layers=L, d_model=D, n_features=F, sparsity=BatchTopK(k=3), shared=True)
    before = shared.encoder.detach().clone()
    result = train(shared, data, config=TrainConfig(learning_rate=1e-2, dead_after_tokens=1000), quiet=True)
    assert result.metrics[-1]["explained_variance"] > 0.8
    assert not torch.equal(before, shared.encoder)
    assert measure_dictionary(shared, data[-4:]).explained_variance_L.min() > 0.75


def test_same_start_gives_every_layer_the_same_directions():
    same = LayerwiseSAE(n_layers=L, d_model=D, n_features=F, sparsity=TopK(k=5), initial="same")
    assert torch.equal(same.encoder[0], same.encoder[2])
    assert torch.equal(same.encoder, same.decoder)
    assert same.encoder.is_contiguous()
    torch.testing.assert_close(same.decoder.norm(dim=2), torch.ones(L, F))
    other = LayerwiseSAE(n_layers=L, d_model=D, n_features=F, sparsity=TopK(k=5))
    assert not torch.equal(other.encoder[0], other.encoder[2])


def test_layers_that_start_alike_and_see_the_same_stay_alike():
    bank = LayerwiseSAE(n_layers=L, d_model=D, n_features=F, sparsity=TopK(k=3), initial="same")
    data = [x[:, None].expand(-1, L, -1).contiguous() for x in inputs(20, 64, D).float()]
    train(bank, data, quiet=True)
    torch.testing.assert_close(bank.decoder[0], bank.decoder[2])
    data[0][:, 2] += 0.5
    train(bank, data, quiet=True)
    assert not torch.allclose(bank.decoder[0], bank.decoder[2])
