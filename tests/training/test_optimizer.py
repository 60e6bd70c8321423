"""RowAdam against torch's Adam with projection and renormalisation written out."""

import copy

import pytest
import torch

from crosscoder import Crosscoder, LayerwiseSAE, TopK
from crosscoder.dictionary.losses import loss_terms
from crosscoder.training import train
from crosscoder.training.optimizer import RowAdam


def make(cls, decoder):
    return cls(n_layers=3, d_model=8, n_features=20, sparsity=TopK(k=4), decoder=decoder)


def x(seed):
    return torch.randn(32, 3, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cls", [Crosscoder, LayerwiseSAE])
@pytest.mark.parametrize("decoder", ["unit", "free"])
def test_steps_equal_adam_with_the_rows_kept_by_hand(cls, decoder):
    ours, theirs = make(cls, decoder), make(cls, decoder)
    row_adam, adam = RowAdam(ours, lr=1e-2), torch.optim.Adam(theirs.parameters(), lr=1e-2)
    groups = ours.grouped().center_GN.shape[0]
    for seed in range(4):
        for dictionary in (ours, theirs):
            dictionary.zero_grad()
            loss_terms(dictionary, x(seed)).terms["recon"].backward()
        rows, grad = theirs.grouped().decoder_GFN.detach(), theirs.decoder.grad.view(theirs.grouped().decoder_GFN.shape)
        if decoder == "unit":
            grad -= (grad * rows).sum(-1, keepdim=True) * rows
        norms = torch.stack([p.grad.reshape(groups, -1).square().sum(1) for p in theirs.parameters()]).sum(0).sqrt()
        torch.testing.assert_close(row_adam.gradient_norms(), norms)
        scale = torch.linspace(0.3, 0.9, groups)
        for parameter in theirs.parameters():
            parameter.grad.view(groups, -1).mul_(scale[:, None])
        row_adam.step(scale_G=scale)
        adam.step()
        if decoder == "unit":
            with torch.no_grad():
                rows.div_(rows.norm(dim=-1, keepdim=True))
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, dict(theirs.named_parameters())[name], rtol=1e-4, atol=1e-5)
    norms = ours.grouped().decoder_GFN.norm(dim=-1)
    assert torch.allclose(norms, torch.ones_like(norms)) == (decoder == "unit")


def test_the_rounded_encoder_follows_the_encoder():
    dictionary = make(Crosscoder, "unit")
    optimizer = RowAdam(dictionary, lr=1e-2, keep_working_copy=True)
    for seed in range(2):
        optimizer.zero_grad()
        loss_terms(dictionary, x(seed), working_GFN=optimizer.working_GFN).terms["recon"].backward()
        optimizer.step()
        assert torch.equal(optimizer.working_GFN, dictionary.grouped().encoder_GFN.bfloat16())


def test_a_strided_parameter_is_refused_and_a_strided_batch_is_not():
    bank = make(LayerwiseSAE, "free")
    bank.encoder.data = bank.encoder.data.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="encoder has strides"):
        train(bank, [x(0)], quiet=True)
    train(make(Crosscoder, "free"), [torch.randn(3, 32, 8).transpose(0, 1)], quiet=True)


def test_a_copy_of_the_optimiser_goes_on():
    dictionary = make(Crosscoder, "unit")
    twin = copy.deepcopy(RowAdam(dictionary, lr=1e-2))
    loss_terms(twin._dictionary, x(0)).terms["recon"].backward()
    before = twin._dictionary.encoder.clone()
    twin.step()
    assert not torch.equal(before, twin._dictionary.encoder)
    assert RowAdam(make(Crosscoder, "unit")).gradient_norms().tolist() == [0]


def test_narrow_dictionaries_are_refused_with_a_mend():
    with pytest.raises(ValueError, match=r"use dictionary\.float\(\)"):
        train(make(Crosscoder, "unit").to(torch.bfloat16), [x(0)], quiet=True)


def test_batches_made_for_inference_or_with_gradients_are_taken():
    with torch.inference_mode():
        made = x(0)
    wanting = x(1).requires_grad_(True)
    train(make(Crosscoder, "unit"), [made, wanting], quiet=True)
    assert wanting.grad is None
