"""Inputs that once broke an operator: each test fails where its guard is taken away."""

import threading

import pytest
import torch

import triton_kernels as ops
from tests.kernels.codes import random_code
from triton_kernels import dense, reference
from triton_kernels.cpu import prefilter, sparse, workspace

F32 = torch.float32


def top_features(x, encoder, bias, k):
    """The chosen features of each row, by way of candidates."""
    center = torch.zeros(1, x.shape[1])
    return ops.encode_top_k(x[:, None], center, encoder[None], bias[None], None, k, F32, None)[1].view(-1, k).long()


@pytest.fixture(autouse=True)
def candidates_first(monkeypatch):
    monkeypatch.setattr(prefilter, "pays", lambda encoder, k: encoder.dtype == F32)
    monkeypatch.setattr(prefilter, "MOST_CANDIDATES", 1)
    monkeypatch.setattr(prefilter, "MOST_AT_FIRST", 1)


def test_a_bias_beyond_bf16_does_not_choose_a_feature_twice():
    generator = torch.Generator().manual_seed(0)
    x, encoder = torch.randn(16, 128, generator=generator), torch.randn(512, 128, generator=generator)
    bias = torch.zeros(512)
    bias[5] = torch.finfo(F32).max
    chosen = top_features(x, encoder, bias, 8)
    assert all(len(set(row.tolist())) == 8 for row in chosen)
    assert (chosen == 5).any(1).all()


@pytest.mark.parametrize("scale", [1e-26, 1e-20, 1e-8, 1.0, 1e15])
def test_the_certificate_holds_at_every_magnitude(scale):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 128, generator=generator)
    x[:, :64] = 100 * x[:, :64].abs()
    x[:, 64:] = x[:, :64] + 0.05 * x[:, 64:]
    encoder = torch.randn(512, 128, generator=generator)
    encoder[:, 64:] = 0.01 * encoder[:, 64:] - encoder[:, :64]
    chosen = top_features(x, encoder * scale, torch.zeros(512), 8)
    exact = x.double() @ (encoder * scale).double().T
    kth = exact.topk(8, dim=1).values[:, -1]
    assert (exact.gather(1, chosen).amin(1) >= kth - 1e-5 * exact.abs().amax(1)).all()


def test_nan_in_the_encoder_comes_out():
    x, encoder = torch.randn(4, 1, 128), torch.randn(1, 512, 128)
    encoder[0, 7] = torch.nan
    values, _, _ = ops.encode_top_k(x, torch.zeros(1, 128), encoder, torch.zeros(1, 512), None, 8, F32, None)
    assert values.isnan().any()


def test_a_permuted_gradient_of_the_error_is_taken(monkeypatch):
    monkeypatch.setitem(dense.FEATURES_PER_ACTIVE, "cpu", 0)
    values, features, offsets = random_code(8, 9, n_groups=2)
    decoder = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    bias, x = torch.randn(2, 6, dtype=torch.float64), torch.randn(4, 2, 6, dtype=torch.float64)
    weight = torch.randn(2, 4, 6, dtype=torch.float64)
    grads = []
    for form in (ops.decode_loss, reference.decode_loss):
        error, _ = form(values, features, offsets, decoder, bias, x, 1)
        grads.append(torch.autograd.grad((error.transpose(0, 1).contiguous() * weight).sum(), decoder)[0])
    torch.testing.assert_close(*grads)


def test_repeated_features_add_up_in_both_forms(monkeypatch):
    code = (torch.ones(3), torch.tensor([1, 1, 4], dtype=torch.int32), torch.tensor([0, 3]))
    arguments = (*code, torch.randn(1, 6, 5), torch.zeros(1, 5), torch.zeros(1, 1, 5), 1)
    results = []
    for most in (0, 10**9):
        monkeypatch.setitem(dense.FEATURES_PER_ACTIVE, "cpu", most)
        results.append(ops.decode_loss(*arguments)[0])
    torch.testing.assert_close(*results)


def test_wide_indices_are_taken():
    values, features, offsets = random_code(6, 9)
    table = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    out = ops.gather_sum(values, features.long(), offsets, table)
    out.sum().backward()
    torch.testing.assert_close(out, reference.gather_sum(values, features, offsets, table))


def test_autocast_rounds_nothing_inside_an_operator(monkeypatch):
    for most in (0, 10**9):
        monkeypatch.setitem(dense.FEATURES_PER_ACTIVE, "cpu", most)
        values, features, offsets = random_code(6, 9, dtype=F32)
        decoder = torch.randn(1, 9, 5, requires_grad=True)
        results = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                error, squares = ops.decode_loss(
                    values, features, offsets, decoder, torch.zeros(1, 5), torch.ones(6, 1, 5), 1
                )
                results.append((error, *torch.autograd.grad(squares.sum(), decoder)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_cached_transpose_is_not_taken_for_other_numbers_in_the_same_memory():
    _, features, offsets = random_code(20, 9)
    buffer, x, table = features.numpy().copy(), torch.randn(20, 4), torch.randn(9, 4)
    for seed in range(3):
        buffer[:] = random_code(20, 9, seed=seed)[1].numpy()[: len(buffer)].repeat(2)[: len(buffer)]
        given = torch.from_numpy(buffer)
        expected = reference.gather_dot(x, given, offsets, table)
        torch.testing.assert_close(sparse.gather_dot(x, given, offsets, table), expected)


def test_what_cannot_be_differentiated_says_so():
    x, encoder = torch.randn(4, 1, 8), torch.randn(1, 9, 8, requires_grad=True)
    arguments = (x, torch.zeros(1, 8), encoder, torch.zeros(1, 9), None)
    *_, cut = ops.encode_batch_top_k(*arguments, 2, F32, None)
    *_, z = ops.encode_threshold(*arguments, torch.zeros(1, 9), 0.0, F32, None)
    assert not cut.requires_grad
    assert not z.requires_grad


def test_strided_gradients_are_taken_and_strided_parameters_refused():
    results = []
    for gradient in (torch.arange(24.0).view(6, 4).t(), torch.arange(24.0).view(6, 4).t().contiguous()):
        parameter = torch.ones(4, 6)
        ops.adam_rows(parameter, gradient, torch.zeros(4, 6), torch.zeros(4, 6), step=1, rate=0.1)
        results.append(parameter)
    assert torch.equal(*results)
    with pytest.raises(ValueError, match="contiguous"):
        ops.adam_rows(torch.ones(6, 4).t(), parameter, torch.zeros(4, 6), torch.zeros(4, 6), step=1, rate=0.1)


@pytest.fixture
def recycling(monkeypatch):
    monkeypatch.setattr(workspace, "RECYCLED_BYTES", 0)
    monkeypatch.setattr(workspace, "_blocks", [])


def test_a_held_storage_is_held(recycling):
    storage = workspace.empty((3, 4), dtype=F32).untyped_storage()
    assert workspace.empty((3, 4), dtype=F32).data_ptr() != storage.data_ptr()


def test_threads_never_share_a_block(recycling):
    shared = []

    def work(mark):
        for _ in range(300):
            block = workspace.empty((64,), dtype=F32).fill_(mark)
            if not bool((block == mark).all()):
                shared.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not shared
