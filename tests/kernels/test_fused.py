"""Decoding with its loss, and both backward passes, in their sparse and their dense form."""

import pytest
import torch

import triton_kernels as ops
from tests.kernels.codes import random_code
from triton_kernels import dense, reference


@pytest.fixture(params=["sparse", "dense"])
def form(request, monkeypatch):
    """Makes the operators take one form or the other, whatever is faster."""
    monkeypatch.setitem(dense.FEATURES_PER_ACTIVE, "cpu", 0 if request.param == "sparse" else 10**9)
    return request.param


def inputs(n_rows=6, n_groups=2, n_features=9, n_parts=3, width=6, *, dtype=torch.float64, seed=0, most=5):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    values, features, offsets = random_code(
        n_rows * n_groups, n_features, n_groups=n_groups, dtype=dtype, most=most, seed=seed
    )
    decoder, bias = draw(n_groups, n_features, width), draw(n_groups, width)
    return values, features, offsets, decoder, bias, draw(n_rows, n_groups, width), n_parts


CASES = [
    {},
    {"n_rows": 1},
    {"n_groups": 1, "n_parts": 1},
    {"n_features": 101, "width": 21},
    {"most": 2, "n_features": 3},
    {"n_rows": 0},
]


@pytest.mark.parametrize("case", CASES)
def test_decode_loss_and_its_backward_equal_their_definitions(form, case):
    values, features, offsets, decoder, bias, x, n_parts = inputs(**case)
    error, squares = ops.decode_loss(values, features, offsets, decoder, bias, x, n_parts)
    expected = reference.decode_loss(values, features, offsets, decoder, bias, x, n_parts)
    torch.testing.assert_close((error, squares), expected)
    weight = torch.rand(squares.shape, dtype=torch.float64)
    arguments = (values, features, offsets, error, weight, decoder)
    torch.testing.assert_close(ops.backward_decoder(*arguments), reference.backward_decoder(*arguments))
    arguments = (values, features, offsets, x, bias, decoder.shape[1])
    torch.testing.assert_close(ops.backward_encoder(*arguments), reference.backward_encoder(*arguments))


def test_every_form_errs_at_most_twice_as_much_as_torch(form):
    arguments = inputs(n_rows=40, n_features=60, width=48, dtype=torch.float32, most=30)
    wide = tuple(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments)
    truth, plain = reference.decode_loss(*wide), reference.decode_loss(*arguments)
    for ours, theirs, exact in zip(ops.decode_loss(*arguments), plain, truth, strict=True):
        allowed = 2 * (theirs.double() - exact).abs().max()
        assert (ours.double() - exact).abs().max() <= allowed
        wrong = ours.clone()
        wrong.view(-1)[0] += 4 * allowed.float()
        assert (wrong.double() - exact).abs().max() > allowed


def test_loss_and_error_are_differentiable(form):
    values, features, offsets, decoder, bias, x, n_parts = inputs(n_rows=3, n_features=5)
    tensors = tuple(tensor.requires_grad_(True) for tensor in (values, decoder, bias, x))

    def run(v, d, b, y):
        return ops.decode_loss(v, features, offsets, d, b, y, n_parts)

    assert torch.autograd.gradcheck(lambda *a: run(*a)[1], tensors)
    assert torch.autograd.gradcheck(lambda *a: run(*a)[0], tensors)
    assert torch.autograd.gradcheck(lambda *a: run(*a)[0].sin().sum() + run(*a)[1].sum(), tensors)


def test_fused_operators_pass_opcheck():
    values, features, offsets, decoder, bias, x, n_parts = inputs(n_rows=3)
    error, squares = reference.decode_loss(values, features, offsets, decoder, bias, x, n_parts)
    grads = tuple(tensor.clone().requires_grad_(True) for tensor in (decoder, bias))
    torch.library.opcheck(ops.decode_loss, (values, features, offsets, *grads, x, n_parts))
    torch.library.opcheck(ops.backward_decoder, (values, features, offsets, error, squares, decoder))
    torch.library.opcheck(ops.backward_encoder, (values, features, offsets, x, bias, decoder.shape[1]))


def test_expanded_gradients_are_taken():
    values, features, offsets, decoder, bias, x, n_parts = inputs()
    decoder.requires_grad_(True)
    _, squares = ops.decode_loss(values, features, offsets, decoder, bias, x, n_parts)
    (ours,) = torch.autograd.grad(squares, decoder, torch.ones((), dtype=torch.float64).expand(squares.shape))
    _, squares = reference.decode_loss(values, features, offsets, decoder, bias, x, n_parts)
    (theirs,) = torch.autograd.grad(squares.sum(), decoder)
    torch.testing.assert_close(ours, theirs)


def test_the_dense_form_is_taken_where_few_features_are_many_times_active():
    cpu = torch.device("cpu")
    assert dense.pays(cpu, n_pairs=512 * 260, n_rows=512, n_features=512)
    assert not dense.pays(cpu, n_pairs=512 * 26, n_rows=512, n_features=512)
    assert not dense.pays(cpu, n_pairs=1024 * 32, n_rows=1024, n_features=8192)
    assert not dense.pays(cpu, n_pairs=10**6, n_rows=10**5, n_features=100)  # it would write out 40 MB
    assert not dense.pays(cpu, n_pairs=0, n_rows=0, n_features=512)
