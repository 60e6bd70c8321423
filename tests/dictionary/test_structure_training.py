"""Training under a structure: weights outside the masks stay zero, and dead features revive inside them."""

import pytest
import torch

from crosscoder import BatchTopK, Crosscoder, JumpReLU, ReLU, TopK
from crosscoder.dictionary import Diffing, NormPenalty
from crosscoder.dictionary.losses import loss_terms
from crosscoder.training import TrainConfig, train
from tests.dictionary.structures import EVERY, EVERY_MASK, FIRST_WRITTEN, D, F, L, batches_of, inputs, make, masks


@EVERY_MASK
@pytest.mark.parametrize(
    ("sparsity", "decoder"),
    [(TopK(k=4), "unit"), (BatchTopK(k=4), "free"), (ReLU(NormPenalty("l1", 0.1)), "free"), (JumpReLU(), "unit")],
    ids=["TopK", "BatchTopK", "ReLU", "JumpReLU"],
)
def test_the_trainer_keeps_masked_weights_at_zero(structure, sparsity, decoder):
    cc = Crosscoder(
        n_layers=L, d_model=D, n_features=F, sparsity=sparsity, structure=structure, decoder=decoder, prefixes=(0.5,)
    )
    before = cc.decoder.detach().clone()
    config = TrainConfig(learning_rate=1e-2, dead_after_tokens=64, resample_every=5, log_every=100)
    train(cc, batches_of(structure, 25), config=config, quiet=True)
    for weight, mask in zip((cc.encoder, cc.decoder), masks(cc), strict=True):
        assert weight[~mask].eq(0).all()
        assert weight[mask].ne(0).all()
    assert not torch.equal(cc.decoder, before)
    if decoder == "unit":
        torch.testing.assert_close(cc.decoder.flatten(1).norm(dim=1), torch.ones(F))
    if isinstance(structure, Diffing):
        assert cc.decoder_bias[3, 4:].eq(0).all()


@EVERY
@pytest.mark.parametrize("means", ["aux_k", "resampling"])
def test_dead_features_revive(structure, means):
    """Features that are too weak to be chosen, or negative on every token, where AuxK has no gradient."""

    def active_pairs(*, on):
        aux_k = None if on and means == "aux_k" else 0
        shape = {"n_layers": L, "d_model": D, "n_features": F}
        cc = Crosscoder(**shape, sparsity=TopK(k=3), structure=structure, aux_k=aux_k)
        with torch.no_grad():
            if means == "aux_k":
                cc.encoder[:8] *= 1e-3
            else:
                cc.encoder_bias[:8] = -10.0
        every = 20 if on and means == "resampling" else 0
        config = TrainConfig(learning_rate=2e-2, dead_after_tokens=128, resample_every=every, log_every=200)
        train(cc, data, config=config, quiet=True)
        return int(cc.encode(torch.cat(data[-10:])).to_dense()[:, :8].gt(0).sum())

    data = batches_of(structure, 80)
    assert active_pairs(on=True) > 1.5 * active_pairs(on=False) + 20


@EVERY
def test_the_auxiliary_term_counts_the_layers_that_are_written(structure):
    cc = make(structure, aux_k=2)
    dead = torch.zeros(1, F, dtype=torch.bool)
    dead[0, :6] = True
    x, first = inputs(40), FIRST_WRITTEN.get(structure, 0)
    read, write = masks(cc)
    term = loss_terms(cc, x, dead_GF=dead).terms["aux_k"]
    z = torch.einsum("bld,fld->bf", x - cc.decoder_bias, (cc.encoder * read)[:6]) + cc.encoder_bias[:6]
    best = z.relu().topk(2, dim=1)
    code = torch.zeros_like(z).scatter(1, best.indices, best.values)
    residual = (x - cc(x).recon).detach()[:, first:]
    error = torch.einsum("bf,fld->bld", code, (cc.decoder * write)[:6])[:, first:] - residual
    torch.testing.assert_close(term, error.square().sum() / residual.square().sum() / 32)
    term.backward()
    for weight, mask in ((cc.encoder, read), (cc.decoder, write)):
        assert weight.grad[6:].eq(0).all()
        assert weight.grad[~mask].eq(0).all()
        assert weight.grad[:6].abs().sum() > 0
