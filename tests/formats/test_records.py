"""A published dictionary in a model: spliced and intervened with as one that was trained here, at every token."""

import pytest
import torch
from folders import gemma_layers, write_gemma

from crosscoder import Crosscoder, JumpReLU
from crosscoder.data.residuals import find_blocks
from crosscoder.data.subject import build_subject
from crosscoder.dictionary import WeaklyCausal
from crosscoder.formats.convert import import_dictionary
from crosscoder.foundation.origin import MismatchError
from crosscoder.interventions import Where, replace, steer
from crosscoder.measure.splice import splice_losses

IDS = torch.randint(4, 64, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    """Its streams have norms far above ten times sqrt(D), as those of many models have."""
    made = build_subject(3, 32, vocab_size=64, context=32, seed=0).eval().requires_grad_(False)
    made.model.embed_tokens.weight.mul_(3000)
    return made


def test_it_is_spliced_at_every_token_but_the_first(model, tmp_path):
    dictionary = import_dictionary(write_gemma(tmp_path / "cc", [0, 1], gemma_layers(2, 16, 32)))
    plain = Crosscoder(n_layers=2, d_model=32, n_features=32, sparsity=JumpReLU(), structure=WeaklyCausal())
    plain.load_state_dict(dictionary.state_dict())
    found, expected = (
        splice_losses(one, model, list(find_blocks(model)), [IDS], layers=(1, 2), kind="residual")
        for one in (dictionary, plain.eval())
    )
    assert found == expected
    assert abs(found.sites["all"]["spliced_loss"] - found.clean["clean_loss"]) > 1e-3
    ids = {"input_ids": IDS}
    with torch.no_grad():
        before = model(**ids).logits
        with replace(model, dictionary):
            logits = model(**ids).logits
        with replace(model, plain, where=Where("residual", (1, 2))):
            assert torch.equal(model(**ids).logits, logits)
        assert not torch.allclose(logits, before)
        with steer(model, dictionary, {3: 1e4}):
            assert not torch.allclose(model(**ids).logits, before)


def test_a_place_that_is_not_harvested_is_refused(model, tmp_path):
    ends = (".pre_feedforward_layernorm.output", ".post_feedforward_layernorm.output")
    clt = import_dictionary(write_gemma(tmp_path / "clt", [0], gemma_layers(1, 16, 32), kind="clt", ends=ends))
    with pytest.raises(ValueError, match="expected a residual stream or block writes"), replace(model, clt):
        pass
    with pytest.raises(MismatchError, match="site: the dictionary other"):
        splice_losses(clt, model, list(find_blocks(model)), [IDS], layers=(1, 2), kind="residual")
