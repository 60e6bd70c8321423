"""The three sparse primitives against their definitions, in value, derivative and bits."""

import pytest
import torch

import triton_kernels as ops
from tests.kernels.codes import random_code
from triton_kernels import reference
from triton_kernels.arguments import Code
from triton_kernels.cpu import sparse, workspace

SHAPES = [(7, 13, 5), (1, 1, 1), (16, 3, 31), (9, 101, 2), (31, 37, 53)]


@pytest.mark.parametrize(("n_rows", "n_features", "width"), SHAPES)
def test_primitives_equal_their_definitions(n_rows, n_features, width):
    values, features, offsets = random_code(n_rows, n_features)
    table = torch.randn(n_features, width, dtype=torch.float64)
    x = torch.randn(n_rows, width, dtype=torch.float64)
    for name, arguments in (
        ("gather_sum", (values, features, offsets, table)),
        ("gather_dot", (x, features, offsets, table)),
        ("scatter_outer", (values, features, offsets, x, n_features)),
    ):
        torch.testing.assert_close(getattr(ops, name)(*arguments), getattr(reference, name)(*arguments))


def within_twice_torch(fast, plain, truth):
    """Whether `fast` errs at most twice as much as torch's own form does in the same dtype."""
    return (fast.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_primitives_err_at_most_twice_as_much_as_torch(dtype):
    values, features, offsets = random_code(64, 200, most=40)
    table, x = torch.randn(200, 96, dtype=torch.float64), torch.randn(64, 96, dtype=torch.float64)
    v, t, y = (tensor.to(dtype) for tensor in (values, table, x))
    for name, arguments in (
        ("gather_sum", (v, features, offsets, t)),
        ("gather_dot", (y, features, offsets, t)),
        ("scatter_outer", (v, features, offsets, y, 200)),
    ):
        wide = tuple(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments)
        truth, plain = getattr(reference, name)(*wide), getattr(reference, name)(*arguments)
        fast = getattr(ops, name)(*arguments)
        assert within_twice_torch(fast, plain, truth)
        wrong = fast.clone()
        wrong.view(-1)[wrong.numel() // 2] += 4 * (plain.double() - truth).abs().max().to(dtype)
        assert not within_twice_torch(wrong, plain, truth)


def test_an_empty_code_gives_zeros():
    values, features, offsets = torch.zeros(0), torch.zeros(0, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
    table, x = torch.ones(5, 2), torch.ones(3, 2)
    assert ops.gather_sum(values, features, offsets, table).eq(0).all()
    assert ops.gather_dot(x, features, offsets, table).shape == (0,)
    assert ops.scatter_outer(values, features, offsets, x, 5).eq(0).all()
    assert ops.gather_sum(values, features, offsets[:1], table).shape == (0, 2)  # an empty batch
    assert ops.gather_dot(x[:0], features, offsets[:1], table).shape == (0,)


def test_one_feature_in_every_row_and_features_in_none():
    features = torch.full((40,), 3, dtype=torch.int32)
    offsets, values, x = torch.arange(41), torch.randn(40), torch.randn(40, 7)
    out = ops.scatter_outer(values, features, offsets, x, 5)
    torch.testing.assert_close(out[3], values @ x)
    assert out[[0, 1, 2, 4]].eq(0).all()


def test_gradients_may_be_expanded_or_transposed():
    values, features, offsets = random_code(6, 9)
    table = torch.randn(9, 4, dtype=torch.float64)
    values.requires_grad_(True)
    out = ops.gather_sum(values, features, offsets, table)
    plain = reference.gather_sum(values, features, offsets, table)
    for grad in (torch.ones((), dtype=torch.float64).expand(6, 4), torch.randn(4, 6, dtype=torch.float64).T):
        (ours,) = torch.autograd.grad(out, values, grad, retain_graph=True)
        (theirs,) = torch.autograd.grad(plain, values, grad, retain_graph=True)
        torch.testing.assert_close(ours, theirs)


def test_first_and_second_derivatives():
    values, features, offsets = random_code(4, 6, most=4)
    table = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    values.requires_grad_(True)
    for function, inputs in (
        (lambda v, t: ops.gather_sum(v, features, offsets, t), (values, table)),
        (lambda y, t: ops.gather_dot(y, features, offsets, t), (x, table)),
        (lambda v, y: ops.scatter_outer(v, features, offsets, y, 6), (values, x)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_primitives_pass_opcheck():
    values, features, offsets = random_code(4, 6)
    table, x = torch.randn(6, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    values.requires_grad_(True)
    torch.library.opcheck(ops.gather_sum, (values, features, offsets, table))
    torch.library.opcheck(ops.gather_dot, (x.requires_grad_(True), features, offsets, table))
    torch.library.opcheck(ops.scatter_outer, (values, features, offsets, x, 6))


def test_large_results_are_recycled_only_when_nobody_holds_them(monkeypatch):
    monkeypatch.setattr(workspace, "RECYCLED_BYTES", 0)
    monkeypatch.setattr(workspace, "_blocks", [])
    first = workspace.empty((3, 4), dtype=torch.float32)
    view = first[1:]
    second = workspace.empty((3, 4), dtype=torch.float32)
    assert first.data_ptr() != second.data_ptr()
    address = first.data_ptr()
    del first
    assert workspace.empty((3, 4), dtype=torch.float32).data_ptr() != address  # the view still holds it
    del view
    assert workspace.empty((3, 4), dtype=torch.float32).data_ptr() == address


def test_few_unused_blocks_are_kept(monkeypatch):
    monkeypatch.setattr(workspace, "RECYCLED_BYTES", 0)
    monkeypatch.setattr(workspace, "_blocks", [])
    for size in range(1, 20):  # every result is dropped at once, and no later one fits its block
        workspace.empty((size,), dtype=torch.float32)
    assert len(workspace._blocks) <= workspace.KEPT_BLOCKS
    held = [workspace.empty((7,), dtype=torch.float32) for _ in range(9)]
    assert len({tensor.data_ptr() for tensor in held}) == 9


def test_recycled_scatter_equals_the_plain_one(monkeypatch):
    values, features, offsets = random_code(50, 40, most=9, dtype=torch.float32)
    code, x = Code(values, features, offsets), torch.randn(50, 8)
    plain = sparse.scatter_outer(code, x, 40)
    monkeypatch.setattr(workspace, "RECYCLED_BYTES", 0)
    monkeypatch.setattr(workspace, "_blocks", [])
    recycled = [sparse.scatter_outer(code, x, 40) for _ in range(3)]
    torch.testing.assert_close(recycled[0], plain)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    recycled.append(sparse.scatter_outer(code, x, 40))
    torch.set_num_threads(threads)
    assert all(torch.equal(recycled[0], other) for other in recycled[1:])
