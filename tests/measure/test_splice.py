"""Splicing on a real (tiny, random) model: limits that must hold exactly."""

import pytest
import torch

from crosscoder import Crosscoder, TopK
from crosscoder.data.residuals import find_blocks
from crosscoder.data.subject import build_subject
from crosscoder.measure import splice
from crosscoder.measure.splice import splice_losses


@pytest.fixture(scope="module")
def model():
    return build_subject(3, 32, vocab_size=64, context=16, seed=0).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def ids():
    return [torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(i)) for i in range(2)]


@pytest.fixture
def any_harm(monkeypatch):
    """Ratios are formed however little an ablation costs: a random model hardly minds any."""
    monkeypatch.setattr(splice, "SMALLEST_HARM", float("-inf"))


class Fixed(Crosscoder):
    """A dictionary whose reconstruction is a given function of its input."""

    def __init__(self, n_layers, function):
        super().__init__(n_layers=n_layers, d_model=32, n_features=4, sparsity=TopK(k=1))
        self.function = function

    def forward(self, x):
        return super().forward(x)._replace(recon=self.function(x))


@pytest.mark.parametrize("kind", ["residual", "write"])
@pytest.mark.usefixtures("any_harm")
def test_a_perfect_reconstruction_changes_nothing(model, ids, kind):
    perfect = Fixed(3, lambda x: x)
    perfect.input_scale.copy_(torch.tensor([0.5, 2.0, 3.0]))
    result = splice_losses(perfect, model, list(find_blocks(model)), ids, layers=[1, 2, 3], kind=kind)
    assert list(result.sites) == ["1", "2", "3", "all"]
    for site in result.sites.values():
        assert site["spliced_loss"] == pytest.approx(result.clean["clean_loss"], abs=1e-5)
        assert site["loss_recovered"] == pytest.approx(1, abs=1e-2)
        assert site["kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", ["residual", "write"])
@pytest.mark.usefixtures("any_harm")
def test_a_reconstruction_of_zero_is_the_zero_ablation(model, ids, kind):
    nothing = Fixed(3, torch.zeros_like)
    blocks = list(find_blocks(model))
    result = splice_losses(nothing, model, blocks, ids, layers=[1, 2, 3], kind=kind, ablation="zero")
    for site in result.sites.values():
        assert site["spliced_loss"] == pytest.approx(site["ablated_loss"], abs=1e-6)
        assert site["loss_recovered"] == pytest.approx(0, abs=1e-6)
        assert site["kl"] > 0


def test_first_positions_stay_clean_and_hooks_are_gone(model, ids):
    nothing = Fixed(1, torch.zeros_like)
    before = model(ids[0]).logits
    splice_losses(nothing, model, list(find_blocks(model)), ids, layers=[2], kind="residual")
    assert torch.equal(model(ids[0]).logits, before)


def test_loss_is_the_model_s_own(model, ids):
    perfect = Fixed(1, lambda x: x)
    result = splice_losses(perfect, model, list(find_blocks(model)), ids, layers=[2], kind="residual", skip_positions=0)
    own = torch.stack([model(batch, labels=batch).loss for batch in ids]).mean()
    assert result.clean["clean_loss"] == pytest.approx(own.item(), abs=1e-5)
    assert result.clean["splice_tokens"] == 2 * 4 * 15


def test_no_ratio_where_removing_a_site_costs_nothing(model, ids):
    with torch.no_grad():  # a block that adds nothing
        silent = build_subject(2, 32, vocab_size=64, context=16, seed=1).eval()
        silent.model.layers[0].self_attn.o_proj.weight.zero_()
        silent.model.layers[0].mlp.down_proj.weight.zero_()
    nothing = Fixed(1, torch.zeros_like)
    result = splice_losses(nothing, silent, list(find_blocks(silent)), ids, layers=[1], kind="write")
    assert result.sites["1"]["loss_recovered"] is None
    assert result.sites["1"]["spliced_loss"] == pytest.approx(result.clean["clean_loss"], abs=1e-6)


def test_layers_must_fit_the_dictionary(model, ids):
    with pytest.raises(ValueError, match="2 layers named for a dictionary of 1"):
        splice_losses(Fixed(1, lambda x: x), model, list(find_blocks(model)), ids, layers=[1, 2], kind="residual")
