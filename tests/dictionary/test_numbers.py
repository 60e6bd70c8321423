"""Numbers that are out of range, and tensors of unusual kinds: a right answer or one clear line."""

import pytest
import torch

from crosscoder import BatchTopK, Crosscoder, JumpReLU, LayerwiseSAE, ReLU, TopK
from crosscoder.dictionary.codec import checked_input, non_finite
from crosscoder.formats.saelens import save_saelens
from crosscoder.foundation.origin import MismatchError
from crosscoder.measure.reading import measure_dictionary, read_dictionary
from crosscoder.training import train

L, D, F = 2, 4, 8
RULES = [TopK(k=2), BatchTopK(k=2), JumpReLU(), ReLU()]


def make(cls=Crosscoder, rule=None, **settings):
    made = cls(n_layers=L, d_model=D, n_features=F, sparsity=rule or TopK(k=2), decoder="free", **settings)
    made(torch.randn(64, L, D, generator=torch.Generator().manual_seed(1)))
    return made.eval()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("cls", [Crosscoder, LayerwiseSAE])
def test_scores_that_overflow_in_evaluation_are_no_silent_nan(cls, rule):
    signs = torch.randn(3, L, D, generator=torch.Generator().manual_seed(2)).sign()
    usual = make(cls, rule)
    for size in (1.0, 1e10, 1e30):
        assert usual(size * signs).recon.isfinite().all()
    with pytest.raises(ValueError, match=r"token 0 holds 3e\+38.*are more than torch.float32 holds"):
        usual(3e38 * signs)
    with torch.no_grad():
        usual.encoder.mul_(1e30)  # after the largest weight was looked at
    with pytest.raises(ValueError, match=r"more than torch.float32 holds"):
        usual(1e10 * signs)
    with torch.no_grad():
        usual.encoder.mul_(1e-30)
        usual.decoder.mul_(1e38)
        usual.decoder_bias.zero_()
    with pytest.raises(ValueError, match="not finite"):
        usual(1e6 * signs)


INPUTS = {
    "one number": (torch.tensor(1.0), "shape"),
    "a row": (torch.ones(D), "shape"),
    "complex": (torch.ones(3, L, D, dtype=torch.complex64), "dtype"),
    "a flag": (torch.ones(3, L, D, dtype=torch.bool), "dtype"),
    "no numbers": (torch.ones(3, L, D, device="meta"), "meta device"),
    "sparse": (torch.ones(3, L, D).to_sparse(), "layout"),
    "a list": ([[1.0]], "list"),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("call", ["__call__", "encode", "encode_dense"])
def test_inputs_of_another_kind_are_refused_in_one_line(name, call):
    given, said = INPUTS[name]
    for training in (True, False):
        with pytest.raises(ValueError, match=said):
            getattr(make().train(training), call)(given)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float64]
)
def test_every_floating_point_dtype_is_read(dtype):
    x = torch.randn(8, L, D).to(dtype)
    exact = make()(x.float())
    assert torch.equal(make()(x).recon, exact.recon)
    torch.testing.assert_close(make().encode_dense(x).float(), exact.code.to_dense())
    assert train(make(), [x] * 2, quiet=True).steps == 2


def test_what_was_made_in_inference_mode_is_read_and_trained():
    with torch.inference_mode():
        x, made = torch.randn(16, L, D), make(rule=BatchTopK(k=2))
    for one in (made, make()):
        for training in (True, False):
            assert one.train(training)(x).recon.isfinite().all()
            assert one.encode_dense(x).isfinite().all()
    assert train(made, [x] * 2, quiet=True).steps == 2
    assert not checked_input(x, made.config).is_inference()


def test_strides_do_not_matter():
    x = torch.randn(L, D, 8).permute(2, 0, 1)
    one = torch.randn(1, L, D)
    cc = make()
    assert torch.equal(cc(x).recon, cc(x.contiguous()).recon)
    assert torch.equal(cc(one.expand(8, L, D)).recon, cc(one.repeat(8, 1, 1)).recon)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e-45])
def test_no_export_holds_infinity(tmp_path, scale):
    cc = make()
    cc.input_scale.fill_(scale)
    with pytest.raises(ValueError, match=r"input_scale is .*set positive|out of float32's range") as caught:
        save_saelens(cc, tmp_path / "out")
    assert not isinstance(caught.value, MismatchError)
    assert not (tmp_path / "out").exists()


def test_a_scale_of_zero_is_not_loaded(tmp_path):
    cc = make()
    cc.input_scale[1] = 0
    cc.save_pretrained(tmp_path / "cc")
    with pytest.raises(ValueError, match="input_scale is not positive"):
        Crosscoder.from_pretrained(tmp_path / "cc")


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e4])
def test_a_constant_layer_has_no_number_and_the_others_have(constant):
    x = torch.randn(512, L, D)
    x[:, 1] = constant
    measured = measure_dictionary(make(), [x])
    assert measured.explained_variance_L[0] == pytest.approx(measured.explained_variance_L[0])
    assert measured.explained_variance_L[1] != measured.explained_variance_L[1]
    assert measured.explained_variance == pytest.approx(measured.explained_variance)
    assert len(read_dictionary(make(), [x]))
    with pytest.raises(ValueError, match="every layer is constant"):
        measure_dictionary(make(), [torch.full((64, L, D), constant)])


LARGE = torch.finfo(torch.float32).max


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("numbers", "found"),
    [
        ({}, ""),
        ({(3, 1, 2): torch.nan}, " in 1 of 64 tokens, first at token 3, layer 1"),
        ({(63, 2, 7): torch.inf, (5, 0, 0): -torch.inf}, " in 2 of 64 tokens, first at token 5, layer 0"),
        ({(0, 0, 0): -torch.inf, (0, 1, 0): torch.nan}, " in 1 of 64 tokens, first at token 0, layer 0"),
        ({(0, 0, 0): LARGE, (1, 0, 0): LARGE}, ""),  # whose sum is more than their dtype holds
        ({(0, 0, 0): LARGE, (1, 0, 0): LARGE, (2, 1, 0): torch.nan}, " in 1 of 64 tokens, first at token 2, layer 1"),
        ({(0, 0, 0): LARGE, (1, 0, 0): -LARGE}, ""),
    ],
)
def test_one_number_that_is_not_finite_is_found_and_large_ones_are_none(numbers, found, dtype):
    x_BLD = torch.randn(64, 3, 8).to(dtype)
    for place, value in numbers.items():
        x_BLD[place] = torch.finfo(dtype).max * (value / LARGE) if abs(value) == LARGE else value
    assert non_finite(x_BLD) == found
    assert non_finite(x_BLD.transpose(1, 2)[:, :, :0]) == ""
