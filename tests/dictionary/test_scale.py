import pytest
import torch

from crosscoder import BatchTopK, Crosscoder, JumpReLU, LayerwiseSAE, TopK, WeaklyCausal
from crosscoder.dictionary.scale import at_usual_scale, is_raw, rescale

SCALE = torch.tensor([4.0, 0.5, 0.125])
SHAPE = {"n_layers": 3, "d_model": 8, "n_features": 20}


def drawn(form=Crosscoder, **settings):
    made = form(**SHAPE, **{"sparsity": TopK(k=4), **settings}).eval()
    generator = torch.Generator().manual_seed(1)
    for weight in made.parameters():
        weight.data.add_(0.3 * torch.randn(weight.shape, generator=generator))
    made.threshold.fill_(0.3)
    return made


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"structure": WeaklyCausal()},
        {"sparsity": JumpReLU(threshold=0.2)},
        {"sparsity": BatchTopK(k=3)},
        {"form": LayerwiseSAE},
        {"form": LayerwiseSAE, "sparsity": JumpReLU(threshold=0.2)},
    ],
)
def test_of_raw_activations_the_function_stays(given):
    before, after = drawn(**given), drawn(**given)
    rescale(after, SCALE)
    assert is_raw(before)
    assert not is_raw(after)
    raw_BLD = torch.randn(50, 3, 8, generator=torch.Generator().manual_seed(2))
    own, found = before(raw_BLD), after(raw_BLD * SCALE[:, None])
    assert own.code.features.tolist() == found.code.features.tolist()
    torch.testing.assert_close(found.code.values, own.code.values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.recon / SCALE[:, None], own.recon, rtol=1e-5, atol=1e-5)
    rescale(after, torch.ones(3))
    torch.testing.assert_close(after.decoder, before.decoder)


def test_one_sae_of_all_layers_has_one_factor():
    shared = drawn(LayerwiseSAE, shared=True)
    raw_BLD = torch.randn(50, 3, 8)
    own = shared(raw_BLD)
    with pytest.raises(ValueError, match="one SAE reads all layers"):
        rescale(shared, SCALE)
    rescale(shared, torch.full((3,), 4.0))
    found = shared(4 * raw_BLD)
    assert own.code.features.tolist() == found.code.features.tolist()
    torch.testing.assert_close(found.recon / 4, own.recon, rtol=1e-5, atol=1e-5)


def test_only_raw_ones_take_the_usual_scale_and_those_that_cannot_say_so(capsys):
    scaled = drawn()
    scaled.set_input(SCALE, None)
    at_usual_scale(scaled, lambda: pytest.fail("is not asked"))
    raw, weighed = drawn(), drawn(selection_weight="l2")
    at_usual_scale(raw, lambda: SCALE)
    assert raw.input_scale.tolist() == SCALE.tolist()
    at_usual_scale(weighed, lambda: SCALE)
    assert is_raw(weighed)
    assert "the loud ones count more" in capsys.readouterr().err
    other = drawn()
    at_usual_scale(other, lambda: SCALE[:2])  # of other layers: refused where they are read
    assert is_raw(other)
