"""The sparse operators against their definitions, in value and in derivative."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import triton_kernels as ops
from triton_kernels import reference, selection, stock, workspace


def random_code(n_rows, n_features, *, seed=0, most=5, dtype=torch.float64):
    """A ragged CSR code in which some rows are empty and one feature is in every other row."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, most, (n_rows,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    n_pairs = int(offsets[-1])
    features = torch.randint(0, n_features, (n_pairs,), generator=generator, dtype=torch.int32)
    values = torch.randn(n_pairs, generator=generator, dtype=dtype)
    return values, features, offsets


@pytest.mark.parametrize(("n_rows", "n_features", "width"), [(7, 13, 5), (1, 1, 1), (16, 3, 31), (9, 101, 2)])
def test_primitives_equal_their_definitions(n_rows, n_features, width):
    values, features, offsets = random_code(n_rows, n_features)
    table = torch.randn(n_features, width, dtype=torch.float64)
    x = torch.randn(n_rows, width, dtype=torch.float64)
    torch.testing.assert_close(
        ops.gather_sum(values, features, offsets, table),
        reference.gather_sum(values, features, offsets, table),
    )
    torch.testing.assert_close(
        ops.gather_dot(x, features, offsets, table), reference.gather_dot(x, features, offsets, table)
    )
    torch.testing.assert_close(
        ops.scatter_outer(values, features, offsets, x, n_features),
        reference.scatter_outer(values, features, offsets, x, n_features),
    )


def test_a_perturbed_value_is_noticed():
    values, features, offsets = random_code(7, 13)
    table = torch.randn(13, 5, dtype=torch.float64)
    wrong = ops.gather_sum(values, features, offsets, table)
    wrong[3, 2] += 1e-6
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wrong, reference.gather_sum(values, features, offsets, table))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stock_forms_err_at_most_twice_as_much_as_torch(dtype):
    values, features, offsets = random_code(64, 200, most=40)
    table, x = torch.randn(200, 96, dtype=torch.float64), torch.randn(64, 96, dtype=torch.float64)
    v, t, y = (tensor.to(dtype) for tensor in (values, table, x))
    for fast, slow in (
        (stock.gather_sum(v, features, offsets, t), reference.gather_sum),
        (stock.scatter_outer(v, features, offsets, y, 200), reference.scatter_outer),
    ):
        last = t if slow is reference.gather_sum else y
        extra = () if slow is reference.gather_sum else (200,)
        truth = slow(v.double(), features, offsets, last.double(), *extra)
        plain = slow(v, features, offsets, last, *extra)
        allowed = 2 * (plain.double() - truth).abs().max()
        assert (fast.double() - truth).abs().max() <= allowed


def test_an_empty_code_gives_zeros():
    values, features, offsets = (
        torch.zeros(0),
        torch.zeros(0, dtype=torch.int32),
        torch.zeros(4, dtype=torch.int64),
    )
    table, x = torch.ones(5, 2), torch.ones(3, 2)
    assert ops.gather_sum(values, features, offsets, table).eq(0).all()
    assert ops.gather_dot(x, features, offsets, table).shape == (0,)
    assert ops.scatter_outer(values, features, offsets, x, 5).eq(0).all()


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


def encoder_inputs(n_rows=5, n_groups=2, n_features=9, width=4, *, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    return (
        draw(n_rows, n_groups, width),
        draw(n_groups, width),
        draw(n_groups, n_features, width),
        draw(n_groups, n_features),
    )


def test_encoders_differentiate_their_values():
    inputs = encoder_inputs()
    threshold = torch.zeros(2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *a: ops.encode_top_k(*a, None, 3)[0], inputs)
    assert torch.autograd.gradcheck(lambda *a: ops.encode_batch_top_k(*a, None, 3)[0], inputs)
    assert torch.autograd.gradcheck(lambda *a: ops.encode_threshold(*a, None, threshold)[0], inputs)


def test_operators_pass_opcheck():
    values, features, offsets = random_code(4, 6)
    table, x = torch.randn(6, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    values.requires_grad_(True)
    torch.library.opcheck(ops.gather_sum, (values, features, offsets, table))
    torch.library.opcheck(ops.gather_dot, (x.requires_grad_(True), features, offsets, table))
    torch.library.opcheck(ops.scatter_outer, (values, features, offsets, x, 6))
    torch.library.opcheck(ops.encode_top_k, (*encoder_inputs(), None, 3))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_row_top_k_is_exact_and_prefers_the_lowest_column(n_rows, n_columns, k, seed, coarse):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(n_rows, n_columns, generator=generator)
    if coarse:  # many equal scores
        score = score.round()
    k = min(k, n_columns)
    assert torch.equal(selection.row_top_k(score, k), reference.first_largest(score, k))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 10**6), st.sampled_from([1.0, 8.0, 1e9]))
def test_selection_by_groups_is_exact_too(n_rows, k, seed, fineness):
    score = torch.randn(n_rows, 4096, generator=torch.Generator().manual_seed(seed))
    score = (score * fineness).round()  # from almost all equal to all different
    assert torch.equal(selection.row_top_k(score, k), reference.first_largest(score, k))


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("slab", [selection.SLAB_ELEMENTS, 64])
def test_batch_top_k_keeps_exactly_the_largest_of_each_dictionary(coarse, slab, monkeypatch):
    monkeypatch.setattr(selection, "SLAB_ELEMENTS", slab)
    x, center, encoder, bias = (t.detach() for t in encoder_inputs(n_rows=17, n_features=31))
    if coarse:
        x, center, encoder, bias = (t.round() for t in (x, center, encoder, bias))
    k = 3
    values, features, offsets, cut = ops.encode_batch_top_k(x, center, encoder, bias, None, k)
    dense = torch.zeros(34, 62, dtype=torch.float64)
    rows = reference.row_of_pair(offsets, values.numel())
    dense[rows, features.long()] = values
    for group in range(2):
        z = (x[:, group] - center[group]) @ encoder[group].T + bias[group]
        order = torch.sort(z.flatten(), descending=True, stable=True).indices[: 17 * k]
        expected = torch.zeros(17 * 31, dtype=torch.float64)
        expected[order] = z.flatten()[order].relu()
        found = dense.view(17, 2, 62)[:, group, group * 31 : (group + 1) * 31]
        torch.testing.assert_close(found.flatten(), expected, rtol=0, atol=1e-12)
        assert cut[group] == z.flatten()[order].amin()


def test_batch_top_k_recovers_from_a_bound_that_is_too_high(monkeypatch):
    x, center, encoder, bias = (t.detach() for t in encoder_inputs(n_rows=17, n_features=31))
    expected = ops.encode_batch_top_k(x, center, encoder, bias, None, 3)
    monkeypatch.setattr(selection, "_sampled_bound", lambda score, fraction: 1e9)
    for a, b in zip(expected, ops.encode_batch_top_k(x, center, encoder, bias, None, 3), strict=True):
        assert torch.equal(a, b)


def test_chunking_does_not_change_the_selection(monkeypatch):
    x, center, encoder, bias = (t.detach() for t in encoder_inputs(n_rows=33, n_features=20))
    whole = ops.encode_top_k(x, center, encoder, bias, None, 4)
    monkeypatch.setattr(selection, "SLAB_ELEMENTS", 40)
    for a, b in zip(whole, ops.encode_top_k(x, center, encoder, bias, None, 4), strict=True):
        torch.testing.assert_close(a, b)


def test_only_one_slab_of_scores_exists(monkeypatch):
    sizes = []
    plain = selection.affine

    def spy(x, weight, bias):
        out = plain(x, weight, bias)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(selection, "affine", spy)
    monkeypatch.setattr(selection, "SLAB_ELEMENTS", 100)
    x, center, encoder, bias = (t.detach() for t in encoder_inputs(n_rows=64, n_features=25))
    ops.encode_top_k(x, center, encoder, bias, None, 2)
    assert max(sizes) <= 100
    assert sum(sizes) == 64 * 2 * 25


def test_affine_is_true_fp32():
    x, weight, bias = torch.randn(40, 70), torch.randn(90, 70), torch.randn(90)
    truth = torch.addmm(bias.double(), x.double(), weight.double().T)
    plain = torch.addmm(bias, x, weight.T)
    error = (selection.affine(x, weight, bias).double() - truth).abs().max()
    assert error <= 4 * (plain.double() - truth).abs().max()
    assert error < 1e-4  # bf16 products would err by about 0.05 here


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
    x = torch.randn(50, 8)
    plain = stock.scatter_outer(values, features, offsets, x, 40)
    monkeypatch.setattr(workspace, "RECYCLED_BYTES", 0)
    monkeypatch.setattr(workspace, "_blocks", [])
    recycled = [stock.scatter_outer(values, features, offsets, x, 40) for _ in range(3)]
    torch.testing.assert_close(recycled[0], plain)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    recycled.append(stock.scatter_outer(values, features, offsets, x, 40))
    torch.set_num_threads(threads)
    assert all(torch.equal(recycled[0], other) for other in recycled[1:])


def test_two_runs_and_other_thread_counts_give_the_same_bits():
    values, features, offsets = random_code(300, 50, most=20, dtype=torch.float32)
    table, x = torch.randn(50, 64), torch.randn(300, 64)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 1):
        torch.set_num_threads(count)
        results.append(
            (
                ops.gather_sum(values, features, offsets, table),
                ops.gather_dot(x, features, offsets, table),
                ops.scatter_outer(values, features, offsets, x, 50),
            )
        )
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
