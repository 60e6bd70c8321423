"""Warm-started chains: layer l begins where layer l - 1 ended."""

import pytest
import torch

from crosscoder import BatchTopK, Crosscoder, LayerwiseSAE, TopK, load_dictionary
from crosscoder.training import NonFiniteError, TrainConfig, train, train_warm_chain

L, D, F = 3, 8, 24


def data(n, *, turn=0.1, size=64):
    """Persistent features whose directions turn a little from layer to layer."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(16, D, generator=generator)
    layers = torch.stack([rows + turn * layer * torch.randn(16, D, generator=generator) for layer in range(L)], dim=1)
    active = [torch.rand(size, 16, generator=generator) for _ in range(n)]
    return [torch.einsum("bf,fld->bld", (a > 0.85) * a, layers) for a in active]


def make(sparsity=None, **settings):
    return LayerwiseSAE(n_layers=L, d_model=D, n_features=F, sparsity=sparsity or TopK(k=3), **settings)


CONFIG = TrainConfig(learning_rate=5e-3, log_every=5, dead_after_tokens=256)


def survivors(bank):
    """Share of features whose nearest at the next layer has the same number."""
    encoder = torch.nn.functional.normalize(bank.decoder.detach(), dim=2)
    cosine = torch.einsum("lfd,lgd->lfg", encoder[:-1], encoder[1:])
    return (cosine.argmax(2) == torch.arange(F)).float().mean().item()


def test_a_chain_is_made_of_plain_runs():
    batches = data(20)
    bank = train_warm_chain(make(), batches, config=CONFIG, quiet=True)
    single = LayerwiseSAE(n_layers=1, d_model=D, n_features=F, sparsity=TopK(k=3))
    single.load_state_dict({name: tensor[:1] for name, tensor in make().state_dict().items()})
    for layer in range(L):
        with torch.no_grad():
            single.decoder_bias.zero_()
        train(single, [x[:, layer : layer + 1] for x in batches], config=CONFIG, quiet=True)
        for name, parameter in bank.dictionary.named_parameters():
            assert torch.equal(parameter[layer], single.get_parameter(name)[0]), (layer, name)
    assert not bank.dictionary.training
    assert bank.steps == 60
    assert bank.tokens == 20 * 64
    assert [entry["layer"] for entry in bank.metrics] == [0.0] * 4 + [1.0] * 4 + [2.0] * 4


def test_features_keep_their_number_along_a_chain_and_not_in_independent_saes():
    batches = data(80)
    chain = train_warm_chain(make(), batches, config=CONFIG, quiet=True).dictionary
    alone = train(make(), batches, config=CONFIG, quiet=True).dictionary
    alike = train(make(initial="same"), batches, config=CONFIG, quiet=True).dictionary
    assert survivors(chain) > 0.9
    assert survivors(alone) < 0.3
    assert survivors(alone) < survivors(alike) <= survivors(chain)
    with torch.no_grad():
        errors = [(bank(batches[0]).recon - batches[0]).square().mean() for bank in (chain, alone)]
    assert errors[0] < 1.2 * errors[1]


def test_every_layer_has_a_threshold_and_a_centre_of_its_own():
    batches = [x + torch.arange(3.0)[:, None] for x in data(20)]
    bank = make(BatchTopK(k=3))
    with torch.no_grad():
        bank.input_scale.copy_(torch.tensor([1.0, 2.0, 3.0]))
    trained = train_warm_chain(bank, lambda start: iter(batches[start:]), config=CONFIG, quiet=True).dictionary
    assert trained is bank
    assert len(trained.threshold.unique()) == 3
    assert torch.isfinite(trained.threshold).all()
    assert trained.decoder_bias.mean(1).diff().gt(0.5).all()
    assert trained.input_scale.tolist() == [1, 2, 3]


def test_a_killed_chain_goes_on_to_the_same_bits(tmp_path):
    batches = data(12)
    config = TrainConfig(steps=12, checkpoint_every=4, log_every=1)
    whole = train_warm_chain(make(), batches, config=config, quiet=True)
    seen = []

    def failing(start):
        for index in range(start, 12):
            seen.append(index)
            yield batches[index] * (torch.inf if len(seen) == 19 else 1)

    with pytest.raises(NonFiniteError):
        train_warm_chain(make(), failing, config=config, folder=tmp_path, quiet=True)
    assert not (tmp_path / "dictionary").exists()
    resumed = train_warm_chain(make(), batches, config=config, folder=tmp_path, resume=True, quiet=True)
    for name, parameter in whole.dictionary.named_parameters():
        assert torch.equal(parameter, resumed.dictionary.get_parameter(name)), name
    assert whole.metrics == resumed.metrics
    saved = load_dictionary(tmp_path / "dictionary")
    assert torch.equal(saved.encoder, whole.dictionary.encoder)
    assert saved.config == whole.dictionary.config


@pytest.mark.parametrize(
    "dictionary", [make(shared=True), Crosscoder(n_layers=L, d_model=D, n_features=F, sparsity=TopK(k=3))]
)
def test_one_dictionary_is_no_chain(dictionary):
    with pytest.raises(ValueError, match="of 3 layers has 1 dictionary; a chain needs a LayerwiseSAE"):
        train_warm_chain(dictionary, data(2), quiet=True)


def test_batches_that_can_be_read_once_are_refused():
    with pytest.raises(ValueError, match="batches is a generator, and a chain reads its batches once a layer"):
        train_warm_chain(make(), (x for x in data(2)), quiet=True)
