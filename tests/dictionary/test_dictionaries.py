"""Both dictionaries: symmetries, limits, gradients, and what they refuse."""

import math

import numpy as np
import pytest
import torch

from crosscoder import BatchTopK, Crosscoder, JumpReLU, LayerwiseSAE, TopK
from crosscoder.dictionary.losses import explained_variance, loss_terms
from crosscoder.training.step import geometric_median, initialize_bias

BOTH = pytest.mark.parametrize("cls", [Crosscoder, LayerwiseSAE])
RULES = pytest.mark.parametrize("sparsity", [TopK(k=5), BatchTopK(k=5)])


def make(cls, sparsity=TopK(k=5), *, seed=0, dtype=torch.float64, **settings):  # noqa: B008
    """A dictionary whose encoder, decoder and biases all differ."""
    settings = {"n_layers": 3, "d_model": 8, "n_features": 40, "sparsity": sparsity, "seed": seed, **settings}
    dictionary = cls(**settings).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return dictionary


def inputs(*shape, seed=5, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    ("cls", "shared", "groups", "row", "rows"),
    [
        (Crosscoder, False, (), (6, 16), ()),
        (LayerwiseSAE, False, (6,), (16,), (6,)),
        (LayerwiseSAE, True, (1,), (16,), (6,)),
    ],
)
def test_public_shapes(cls, shared, groups, row, rows):
    dictionary = cls(n_layers=6, d_model=16, n_features=64, sparsity=TopK(k=4), shared=shared)
    x_BLD = inputs(7, 6, 16, dtype=torch.float32)
    out = dictionary(x_BLD)
    assert out.recon.shape == x_BLD.shape
    assert out.code.to_dense().shape == (7, *rows, 64)
    assert out.code.features.dtype == torch.int32
    assert out.code.offsets.tolist() == list(range(0, 28 * math.prod(rows) + 1, 4))
    assert dictionary.encoder.shape == dictionary.decoder.shape == (*groups, 64, *row)
    assert dictionary.encoder_bias.shape == (*groups, 64)
    assert dictionary.decoder_bias.shape == (*groups, *row)


@BOTH
@RULES
@pytest.mark.parametrize("weight", ["none", "l2", "l1"])
def test_sparse_path_equals_dense_path_in_value_and_gradient(cls, sparsity, weight):
    dictionary = make(cls, sparsity=sparsity, selection_weight=weight)
    x = inputs(2, 7, 3, 8)
    out = dictionary(x)
    dense = dictionary.encode_dense(x)
    torch.testing.assert_close(out.code.to_dense(), dense)
    parameters = list(dictionary.parameters())
    sparse_grad = torch.autograd.grad((out.recon - x).square().sum(), parameters)
    rows = torch.einsum("bgf,gfn->bgn", dense.reshape(14, -1, 40), dictionary.grouped().decoder_GFN)
    recon = rows.reshape(x.shape) + dictionary.decoder_bias
    torch.testing.assert_close(out.recon, recon)
    dense_grad = torch.autograd.grad((recon - x).square().sum(), parameters)
    for a, b in zip(sparse_grad, dense_grad, strict=True):
        torch.testing.assert_close(a, b)


def test_permuting_layers_permutes_the_reconstruction():
    cc = make(Crosscoder)
    x = inputs(9, 3, 8)
    before = cc(x).recon
    order = [2, 0, 1]
    with torch.no_grad():
        for parameter in (cc.encoder, cc.decoder):
            parameter.copy_(parameter[:, order].clone())
        cc.decoder_bias.copy_(cc.decoder_bias[order].clone())
    torch.testing.assert_close(cc(x[:, order]).recon, before[:, order])


def test_scaling_encoder_up_and_decoder_down_leaves_the_reconstruction():
    cc = make(Crosscoder, decoder="free", selection_weight="l2")
    x = inputs(9, 3, 8)
    before = cc(x).recon
    with torch.no_grad():
        factor = torch.rand(40, dtype=torch.float64) + 0.5
        cc.encoder.mul_(factor[:, None, None])
        cc.encoder_bias.mul_(factor)
        cc.decoder.div_(factor[:, None, None])
    torch.testing.assert_close(cc(x).recon, before)


def test_layers_of_a_bank_do_not_see_each_other():
    bank = make(LayerwiseSAE)
    x = inputs(9, 3, 8)
    before = bank(x).recon
    x[:, 1] = 0
    after = bank(x).recon
    torch.testing.assert_close(before[:, [0, 2]], after[:, [0, 2]])
    assert not torch.allclose(before[:, 1], after[:, 1])


@BOTH
def test_top_k_keeps_at_most_k_and_the_largest(cls):
    dictionary = make(cls)
    x = inputs(11, 3, 8)
    code = dictionary.encode(x)
    assert int(code.l0().max()) <= 5
    grouped = dictionary.grouped()
    x_BGN = x.reshape(11, *grouped.center_GN.shape) - grouped.center_GN
    z = torch.einsum("bgn,gfn->bgf", x_BGN, grouped.encoder_GFN) + grouped.encoder_bias_GF
    smallest_kept = code.to_dense().reshape(z.shape)
    dropped = torch.where(smallest_kept > 0, -torch.inf, z).amax(-1)
    kept = torch.where(smallest_kept > 0, z, torch.inf).amin(-1)
    assert (kept >= dropped).all()


def test_batch_top_k_keeps_k_a_token_on_average_and_then_a_threshold():
    cc = make(Crosscoder, sparsity=BatchTopK(k=5))
    x = inputs(200, 3, 8)
    code = cc(x).code
    assert code.n_pairs == 1000
    assert code.l0().unique().numel() > 1
    assert cc.threshold.item() == pytest.approx(code.values.min().item())
    cc.eval()
    assert cc.encode(x).n_pairs == 999  # the cut itself is not above the threshold
    whole, alone = cc.encode(x), cc.encode(x[:1])  # no longer a matter of who else is in the batch
    torch.testing.assert_close(alone.values, whole.values[: alone.n_pairs])
    assert torch.equal(alone.features, whole.features[: int(whole.offsets[1])])


def test_evaluation_in_training_mode_leaves_the_threshold_alone():
    cc = make(Crosscoder, sparsity=BatchTopK(k=5))
    cc(inputs(50, 3, 8))
    before = cc.threshold.clone()
    with torch.no_grad():
        cc.encode(10 * inputs(50, 3, 8))
    assert torch.equal(cc.threshold, before)


def test_batch_top_k_without_a_threshold_says_so():
    with pytest.raises(ValueError, match="no inference threshold yet: train it first"):
        Crosscoder(n_layers=1, d_model=4, n_features=8, sparsity=BatchTopK(k=2)).eval().encode(torch.randn(3, 1, 4))


@BOTH
@RULES
def test_every_parameter_gets_a_gradient(cls, sparsity):
    dictionary = make(cls, sparsity=sparsity)
    x = inputs(64, 3, 8)
    sum(loss_terms(dictionary, x).terms.values()).backward()
    for name, parameter in dictionary.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@BOTH
def test_auxiliary_gradient_reaches_encoder_and_decoder_of_dead_features_only(cls):
    dictionary = make(cls, n_features=40)
    groups = dictionary.grouped().center_GN.shape[0]
    dead = torch.zeros(groups, 40, dtype=torch.bool)
    dead[:, :6] = True
    x = inputs(64, 3, 8)
    loss_terms(dictionary, x, dead_GF=dead).terms["aux_k"].backward()
    for parameter in (dictionary.encoder, dictionary.decoder, dictionary.encoder_bias):
        grad = parameter.grad.reshape(groups, 40, -1)
        assert grad[:, :6].abs().sum(-1).gt(0).any(1).all()
        assert grad[:, 6:].eq(0).all()
    assert dictionary.decoder_bias.grad is None or dictionary.decoder_bias.grad.eq(0).all()


def test_auxiliary_loss_is_absent_without_dead_features():
    cc = make(Crosscoder)
    x = inputs(8, 3, 8)
    none_dead = torch.zeros(1, 40, dtype=torch.bool)
    assert loss_terms(cc, x, dead_GF=none_dead).terms.keys() == {"recon"}
    off = make(Crosscoder, aux_k=0)
    assert loss_terms(off, x, dead_GF=~none_dead).terms.keys() == {"recon"}


def test_encoder_starts_as_the_transposed_decoder_with_unit_rows():
    cc = Crosscoder(n_layers=3, d_model=8, n_features=40, seed=3)
    assert torch.equal(cc.encoder, cc.decoder)
    torch.testing.assert_close(cc.decoder.flatten(1).norm(dim=1), torch.ones(40))
    assert not torch.equal(cc.decoder, Crosscoder(n_layers=3, d_model=8, n_features=40, seed=4).decoder)


def test_geometric_median_resists_outliers():
    points = inputs(100, 5)
    spoiled = points.clone()
    spoiled[:20] = 1e4
    assert (geometric_median(points) - points.mean(0)).norm() < 0.5
    assert geometric_median(spoiled).norm() < 2
    assert spoiled.mean(0).norm() > 1e3


@pytest.mark.parametrize("method", ["geometric_median", "mean", "zero"])
@BOTH
def test_bias_starts_at_the_centre(cls, method):
    dictionary = make(cls)
    x = inputs(50, 3, 8) + 3
    initialize_bias(dictionary, x, method=method)
    expected = {"zero": 0.0}.get(method, 3.0)
    assert np.isclose(dictionary.decoder_bias.mean().item(), expected, atol=0.2)


@BOTH
def test_autocast_changes_the_choice_alone(cls):
    dictionary = make(cls, dtype=torch.float32)
    x = inputs(64, 3, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        code = dictionary.encode(x)
        recon = dictionary.decode(code)
    assert code.values.dtype == recon.dtype == torch.float32
    plain = dictionary.encode(x).to_dense()
    both = (code.to_dense() > 0) & (plain > 0)
    assert both.sum() > 0.9 * (plain > 0).sum()
    torch.testing.assert_close(code.to_dense()[both], plain[both], rtol=1e-5, atol=1e-5)


def test_explained_variance_of_known_cases():
    x = inputs(100, 2, 4)
    assert explained_variance(x, x).tolist() == [1, 1]
    mean = x.mean(0).expand_as(x)
    torch.testing.assert_close(explained_variance(x, mean), torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"layers \[0, 1\] are constant"):
        explained_variance(torch.ones(5, 2, 4), torch.ones(5, 2, 4))


@BOTH
def test_wrong_inputs_are_refused_with_the_mend(cls):
    dictionary = cls(n_layers=3, d_model=8, n_features=16, sparsity=TopK(k=2))
    with pytest.raises(ValueError, match=r"shape \(5, 8, 3\).*look swapped"):
        dictionary.encode(torch.randn(5, 8, 3))
    with pytest.raises(ValueError, match=r"shape \(5, 8\).*All layers of a token"):
        dictionary.encode(torch.randn(5, 8))
    with pytest.raises(ValueError, match=r"shape \(5, 2, 8\)"):
        dictionary(torch.randn(5, 2, 8))
    with pytest.raises(ValueError, match="not token ids"):
        dictionary.encode(torch.zeros(5, 3, 8, dtype=torch.int64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": TopK(k=41)}, "k = 41 active features cannot come from n_features = 40"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"decoder": "tied"}, "decoder is 'tied'"),
        ({"selection_weight": "l3"}, "selection_weight is 'l3'"),
        ({"prefixes": (0.5, 0.25)}, r"which are \(20, 10\) of 40 features; expected a tuple of rising fractions"),
        ({"prefixes": (0.25, 1.0)}, "rising fractions"),
        ({"prefixes": (0.001,)}, r"which are \(0,\) of 40"),
        ({"prefixes": [0.5]}, "expected a valid tuple"),
        ({"sparsity": JumpReLU(), "selection_weight": "l2"}, "JumpReLU does not rank features; use 'none'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Crosscoder(**{"n_layers": 3, "d_model": 8, "n_features": 40, **settings})


def test_inputs_of_any_float_dtype_are_taken():
    cc = Crosscoder(n_layers=3, d_model=8, n_features=16, sparsity=TopK(k=2))
    x = inputs(5, 3, 8, dtype=torch.float32)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert cc(x.to(dtype)).recon.dtype == torch.float32
    with pytest.raises(ValueError, match="input is a ndarray"):
        cc.encode(x.numpy())


def test_not_a_number_is_not_taken_for_inactivity():
    cc = make(Crosscoder, sparsity=BatchTopK(k=3))
    x = inputs(50, 3, 8)
    cc(x)
    x[4, 1, 2] = torch.nan
    with pytest.raises(ValueError, match="first at token 4, layer 1"):
        cc.eval().encode(x)
