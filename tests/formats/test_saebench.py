"""One layer of a bank as SAEBench wants it: the bank's own codes and reconstructions, on raw activations."""

import pytest
import torch

from crosscoder.dictionary import BatchTopK, Crosscoder, LayerwiseSAE, TopK
from crosscoder.formats.saebench import SAEBenchSAE
from crosscoder.foundation.origin import MismatchError
from tests.formats.test_saelens import RULES, D, F, L, raw_inputs, trained

NAMES = {"model_name": "tiny", "hook_name": "blocks.4.hook_resid_post"}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_it_is_the_bank_s_layer(rule):
    bank = trained(LayerwiseSAE, sparsity=rule)
    a_BLD = raw_inputs()
    with torch.no_grad():
        out = bank(a_BLD * bank.input_scale[:, None])
        sae = SAEBenchSAE(bank, 1, **NAMES)
        code, recon = sae.encode(a_BLD[:, 1]), sae(a_BLD[:, 1])
        sequences = a_BLD[:, 1].view(2, -1, D)
        assert sae.decode(sae.encode(sequences)).shape == sequences.shape
        torch.testing.assert_close(sae(sequences).flatten(0, 1), recon)
    torch.testing.assert_close(code, out.code.to_dense()[:, 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(recon, (out.recon / bank.input_scale[:, None])[:, 1], rtol=1e-4, atol=1e-5)
    assert (sae.W_enc.shape, sae.W_dec.shape, sae.b_enc.shape, sae.b_dec.shape) == ((D, F), (F, D), (F,), (D,))
    assert (sae.cfg.hook_layer, sae.cfg.d_sae, sae.cfg.dtype) == (4, F, "float32")


def test_it_moves_to_other_dtypes():
    sae = SAEBenchSAE(trained(LayerwiseSAE, sparsity=BatchTopK(k=4)), 0, **NAMES).to(torch.bfloat16)
    assert {sae.dtype, sae.W_enc.dtype, sae.threshold.dtype} == {torch.bfloat16}
    assert sae.cfg.dtype == "bfloat16"
    assert sae.encode(raw_inputs()[:, 0]).dtype == torch.bfloat16
    assert sae.cfg.to_dict()["d_in"] == D


def test_what_it_cannot_be_is_refused():
    with pytest.raises(ValueError, match=f"Crosscoder reads {L} layers at once"):
        SAEBenchSAE(trained(Crosscoder, sparsity=TopK(k=4)), 0, **NAMES)
    bank = trained(LayerwiseSAE, sparsity=TopK(k=4))
    with pytest.raises(ValueError, match="nobody says which model and hook"):
        SAEBenchSAE(bank, 0)
    with pytest.raises(ValueError, match="0 to 2"):
        SAEBenchSAE(bank, 3, **NAMES)
    bank.input_scale.fill_(1)
    with pytest.raises(MismatchError, match="SAEBench needs the scale"):
        SAEBenchSAE(bank, 0, **NAMES)
