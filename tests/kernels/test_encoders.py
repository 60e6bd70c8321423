"""The encoders: exact choices, lowest-index ties, candidates from a bf16 product, derivatives of what is kept."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import triton_kernels as ops
from tests.kernels.codes import encoder_inputs, rows_of
from triton_kernels import reference
from triton_kernels.cpu import encode, native, prefilter, problem, rounded, selection
from triton_kernels.cpu.problem import Problem

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def plain_inputs(**shape):
    return encoder_inputs(**{"grad": False, **shape})


@pytest.fixture(autouse=True)
def however_many_candidates(monkeypatch):
    """Of few features most are candidates."""
    monkeypatch.setattr(prefilter, "MOST_CANDIDATES", 1)
    monkeypatch.setattr(prefilter, "MOST_AT_FIRST", 1)


@pytest.fixture(params=["slabs", "candidates"])
def way(request, monkeypatch, cpu_form):
    """Makes fp32 encoders look at every score in fp32, or at candidates from a bf16 product first."""
    if request.param == "candidates" and cpu_form == "stock":
        pytest.skip("certified candidates are found in C alone")
    monkeypatch.setattr(prefilter, "pays", lambda encoder, k: request.param == "candidates" and encoder.dtype == F32)
    return request.param


def dense_code(values, features, offsets, shape_BGF):
    """The code as `[B, G, F]`."""
    out = torch.zeros(shape_BGF[0] * shape_BGF[1], shape_BGF[1] * shape_BGF[2], dtype=values.dtype)
    out[reference.row_of_pair(offsets, values.numel()), features.long()] = values
    out = out.view(shape_BGF[0], shape_BGF[1], shape_BGF[1], shape_BGF[2])
    return torch.stack([out[:, group, group] for group in range(shape_BGF[1])], 1)


def expected_top_k(inputs, scale, k):
    z, score = reference.scores(*inputs, scale)
    columns = reference.first_largest(score.flatten(0, 1), k).view(*score.shape[:2], k)
    return columns, z.gather(2, columns).relu()


SHAPES = [
    {"n_rows": 5, "n_groups": 2, "n_features": 9, "k": 3},
    {"n_rows": 1, "n_groups": 1, "n_features": 1, "k": 1},
    {"n_rows": 4, "n_groups": 1, "n_features": 7, "k": 7},
    {"n_rows": 3, "n_groups": 3, "n_features": 101, "k": 1},
    {"n_rows": 33, "n_groups": 1, "n_features": 600, "width": 37, "k": 9},
    {"n_rows": 0, "n_groups": 2, "n_features": 9, "k": 3},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_top_k_keeps_the_best_of_each_row(way, shape, scaled):
    shape = dict(shape)
    k = shape.pop("k")
    inputs = plain_inputs(**shape, dtype=F32)
    scale = torch.rand(inputs[3].shape) + 0.5 if scaled else None
    values, features, _ = ops.encode_top_k(*inputs, scale, k, F32, None)
    columns, expected = expected_top_k(inputs, scale, k)
    n_groups, n_features = inputs[3].shape
    found = features.view(-1, n_groups, k).long() - torch.arange(n_groups)[:, None] * n_features
    assert torch.equal(found, columns)
    torch.testing.assert_close(values.view(expected.shape), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inputs", ["equal", "coarse", "negative", "one best", "huge row"])
def test_hard_scores_are_chosen_as_the_definition_says(way, inputs):
    x, center, encoder, bias = plain_inputs(n_rows=17, n_groups=1, n_features=300, width=8, dtype=F32)
    match inputs:
        case "equal":
            encoder[:] = 1.0
            bias[:] = 0.0
        case "coarse":  # every product and sum is a small whole number, so no rounding decides
            x, center, encoder, bias = (t.round() for t in (x, center, encoder, bias))
        case "negative":
            bias[:] = -100.0
            x, center, encoder = (t.round() for t in (x, center, encoder))
        case "one best":
            bias[0, 123] = 1000.0
        case "huge row":
            x[3] *= 1e6
    values, features, _ = ops.encode_top_k(x, center, encoder, bias, None, 5, F32, None)
    columns, expected = expected_top_k((x, center, encoder, bias), None, 5)
    assert torch.equal(features.view(-1, 1, 5).long(), columns)
    torch.testing.assert_close(values.view(expected.shape), expected, rtol=1e-5, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1e-4, 1e-3, 1e-2, 1.0]), st.integers(1, 40), st.booleans())
def test_certified_candidates_hold_the_exact_choice_whatever_the_data(seed, spread, k, uneven):
    """Scores closer together than bf16 can tell apart: the certificate must still let the right ones through."""
    if not native.serves():
        pytest.skip("certified candidates are found in C alone")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 64, generator=generator)
    encoder = torch.randn(1, 64, generator=generator) + spread * torch.randn(512, 64, generator=generator)
    if uneven:
        encoder *= torch.rand(512, 1, generator=generator) * 5
    bias = torch.randn(512, generator=generator) * spread
    found = prefilter.top_k(Problem(x, encoder, bias, None, F32), k)
    candidates = torch.zeros(6, 512, dtype=torch.bool)
    candidates[rows_of(found), found.features] = True
    exact = x.double() @ encoder.double().T + bias.double()
    kth = exact.topk(k, dim=1).values[:, -1:]
    resolution = 1e-6 * x.norm(dim=1, keepdim=True) * encoder.norm(dim=1).amax()  # of fp32 itself; bf16's is 0.004
    assert candidates[exact >= kth + resolution].all()


def test_without_its_margin_the_certificate_would_be_wrong():
    """The data of the test above needs the margin: rounded scores alone lose members of the exact choice."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 64, generator=generator)
    encoder = torch.randn(1, 64, generator=generator) + 1e-2 * torch.randn(512, 64, generator=generator)
    bias = torch.zeros(512)
    finder = prefilter if native.serves() else rounded
    found = finder.top_k(Problem(x, encoder, bias, None, BF16), 8)
    candidates = torch.zeros(64, 512, dtype=torch.bool)
    candidates[rows_of(found), found.features] = True
    exact = x.double() @ encoder.double().T
    assert not candidates[exact >= exact.topk(8, dim=1).values[:, -1:]].all()


def test_certified_and_plain_choices_are_the_same_code(monkeypatch):
    inputs = plain_inputs(n_rows=64, n_groups=2, n_features=4096, width=128, dtype=F32)
    results = []
    for pays in (False, True):
        monkeypatch.setattr(prefilter, "pays", lambda encoder, k, pays=pays: pays)
        top = ops.encode_top_k(*inputs, None, 16, F32, None)
        batch = ops.encode_batch_top_k(*inputs, None, 16, F32, None)
        threshold = torch.full((2, 4096), 25.0)
        above = ops.encode_threshold(*inputs, None, threshold, 0.0, F32, None)
        results.append((top, batch, above))
    for plain, certified in zip(*results, strict=True):
        assert torch.equal(plain[1], certified[1])  # features
        torch.testing.assert_close(plain[0], certified[0], rtol=1e-5, atol=1e-4)
    assert results[0][2][0].numel() > 100


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("spread", [1.0, 1e-2])
def test_machines_with_and_without_a_compiler_find_the_same_candidates(scaled, spread):
    if not native.serves():
        pytest.skip("no library to compare with")
    x, _, encoder, bias = plain_inputs(n_rows=40, n_groups=1, n_features=600, width=64, dtype=F32)
    encoder = encoder[0, :1] + spread * encoder[0]  # scores that bf16 can hardly tell apart, and ties
    scale = torch.rand(600) + 0.5 if scaled else None
    given = Problem(x[:, 0], encoder, bias[0], scale, BF16)
    for name, argument in (("top_k", 9), ("batch", 360), ("above", 4.001)):
        for ours, theirs in zip(getattr(prefilter, name)(given, argument), getattr(rounded, name)(given, argument)):
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("at", ["MOST_AT_FIRST", "MOST_CANDIDATES"])
def test_too_many_candidates_are_given_up_for_the_same_code(at, monkeypatch):
    """A common part that no encoder row reads makes margins wider than scores, so that all features are candidates."""
    if not native.serves():
        pytest.skip("certified candidates are found in C alone")
    generator = torch.Generator().manual_seed(0)
    x, encoder = torch.randn(16, 1, 128, generator=generator), torch.randn(1, 2048, 128, generator=generator)
    x[..., -1], encoder[..., -1] = 1e4, 0
    inputs = (x, torch.zeros(1, 128), encoder, torch.zeros(1, 2048))
    results, threshold = [], torch.full((1, 2048), 20.0)

    def again(*given):
        pytest.fail("the candidates were scored again")

    for pays in (False, True):
        monkeypatch.setattr(prefilter, "pays", lambda encoder, k, pays=pays: pays)
        if pays:
            monkeypatch.setattr(prefilter, at, 1 / 4)
            monkeypatch.setattr(encode, "_scored_again", again)
        top = ops.encode_top_k(*inputs, None, 8, F32, None)
        above = ops.encode_threshold(*inputs, None, threshold, 0.0, F32, None)
        results.append((*top[:2], *ops.encode_batch_top_k(*inputs, None, 8, F32, None), *above[:3]))
    for plain, given_up in zip(*results, strict=True):
        assert torch.equal(plain, given_up)
    monkeypatch.setattr(prefilter, "MOST_CANDIDATES", 1)
    monkeypatch.setattr(prefilter, "MOST_AT_FIRST", 1)
    with pytest.raises(pytest.fail.Exception, match="scored again"):
        ops.encode_top_k(*inputs, None, 8, F32, None)


@pytest.mark.parametrize("width", [1, 4, 9])
def test_a_center_of_another_width_is_broadcast_or_refused(width):
    x, _, encoder, bias = plain_inputs(n_rows=4, n_groups=1, n_features=16, width=8, dtype=F32)
    center = torch.full((1, width), 2.0)
    if width == 1:
        both = [ops.encode_top_k(x, one, encoder, bias, None, 3, F32, None)[0] for one in (center, center.expand(1, 8))]
        torch.testing.assert_close(*both)
        return
    with pytest.raises(RuntimeError, match="8"):
        ops.encode_top_k(x, center, encoder, bias, None, 3, F32, None)


def test_bf16_products_choose_and_fp32_scores_again():
    inputs = plain_inputs(n_rows=32, n_groups=1, n_features=512, width=64, dtype=F32)
    values, features, _ = ops.encode_top_k(*inputs, None, 8, BF16, None)
    z, _ = reference.scores(*inputs, None)
    torch.testing.assert_close(values, z[:, 0].gather(1, features.view(32, 8).long()).flatten(), rtol=1e-5, atol=1e-5)
    columns, _ = expected_top_k(inputs, None, 8)
    agreement = (features.view(32, 1, 8).long()[..., None] == columns[..., None, :]).any(-1).float().mean()
    assert agreement > 0.97
    _, batch_features, offsets, cut = ops.encode_batch_top_k(*inputs, None, 8, BF16, None)
    assert batch_features.numel() == 32 * 8 == offsets[-1]
    assert cut > 0


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 40) | st.just(4096), st.integers(1, 12), st.integers(0, 10**6),
    st.sampled_from([1.0, 8.0, 1e9]),
)  # fmt: skip
def test_row_top_k_is_exact_and_prefers_the_lowest_column(n_rows, n_columns, k, seed, fineness):
    score = torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(seed))
    score = (score * fineness).round()  # from almost all equal to all different
    k = min(k, n_columns)
    assert torch.equal(selection.row_top_k(score, k), reference.first_largest(score, k))


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("slab", [encode.SLAB_ELEMENTS, 64])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_batch_top_k_keeps_exactly_the_largest_of_each_dictionary(way, coarse, slab, dtype, monkeypatch):
    monkeypatch.setattr(encode, "SLAB_ELEMENTS", slab)
    monkeypatch.setattr(prefilter, "SLAB_ELEMENTS", slab)
    x, center, encoder, bias = plain_inputs(n_rows=17, n_features=31, dtype=dtype)
    if coarse:
        x, center, encoder, bias = (t.round() for t in (x, center, encoder, bias))
    values, features, offsets, cut = ops.encode_batch_top_k(x, center, encoder, bias, None, 3, dtype, None)
    z, _ = reference.scores(x, center, encoder, bias, None)
    kept = reference.kept_by_batch(z, 3)
    found = dense_code(values, features, offsets, (17, 2, 31))
    torch.testing.assert_close(found, torch.where(kept, z, 0), rtol=1e-5, atol=1e-5)
    assert torch.equal(found > 0, kept)
    smallest = torch.stack([z[:, group][kept[:, group]].amin() for group in range(2)])
    torch.testing.assert_close(cut, smallest, rtol=1e-5, atol=1e-5)


def test_batch_top_k_of_scores_of_which_few_are_positive(way):
    x, center, encoder, bias = plain_inputs(n_rows=9, n_features=31, dtype=F32)
    z, _ = reference.scores(x, center, encoder, bias - 5, None)
    values, _, _, cut = ops.encode_batch_top_k(x, center, encoder, bias - 5, None, 6, F32, None)
    assert values.numel() == int((z > 0).sum()) < 9 * 6 * 2
    assert (values > 0).all()
    values, _, offsets, cut = ops.encode_batch_top_k(x, center, encoder, bias - 500, None, 6, F32, None)
    assert values.numel() == 0
    assert offsets.tolist() == [0] * 19
    assert cut.tolist() == [0, 0]


def test_batch_top_k_recovers_from_a_bound_that_is_too_high(way, monkeypatch):
    inputs = plain_inputs(n_rows=17, n_features=31, dtype=F32)
    expected = ops.encode_batch_top_k(*inputs, None, 3, F32, None)
    monkeypatch.setattr(selection, "sampled_bound", lambda z, scale, fraction: 1e9)
    for a, b in zip(expected, ops.encode_batch_top_k(*inputs, None, 3, F32, None), strict=True):
        torch.testing.assert_close(a, b)


def test_chunking_does_not_change_the_selection(way, monkeypatch):
    inputs = plain_inputs(n_rows=33, n_features=20, dtype=F32)
    whole = ops.encode_top_k(*inputs, None, 4, F32, None)
    monkeypatch.setattr(encode, "SLAB_ELEMENTS", 40)
    monkeypatch.setattr(prefilter, "SLAB_ELEMENTS", 40)
    for a, b in zip(whole, ops.encode_top_k(*inputs, None, 4, F32, None), strict=True):
        torch.testing.assert_close(a, b)


def test_only_one_slab_of_scores_exists(way, monkeypatch):
    sizes = []
    plain = problem.affine

    def spy(x, weight, bias):
        out = plain(x, weight, bias)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(problem, "affine", spy)
    monkeypatch.setattr(prefilter, "affine", spy)
    monkeypatch.setattr(encode, "SLAB_ELEMENTS", 100)
    monkeypatch.setattr(prefilter, "SLAB_ELEMENTS", 100)
    ops.encode_top_k(*plain_inputs(n_rows=64, n_features=25, dtype=F32), None, 2, F32, None)
    assert max(sizes) <= 100
    assert sum(sizes) >= 64 * 2 * 25


def test_threshold_keeps_what_is_above_and_marks_the_window(way):
    inputs = plain_inputs(n_rows=40, n_groups=2, n_features=50, width=16, dtype=F32)
    threshold = torch.rand(2, 50) * 4 + 1
    z, _ = reference.scores(*inputs, None)
    values, features, offsets, kept_z = ops.encode_threshold(*inputs, None, threshold, 1.0, F32, None)
    present = dense_code(torch.ones_like(values), features, offsets, (40, 2, 50)) > 0
    assert torch.equal(present, (z > threshold - 0.5) & (z > 0))
    torch.testing.assert_close(
        dense_code(values, features, offsets, (40, 2, 50)), torch.where(z > threshold, z, 0), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(kept_z, z[present], rtol=1e-5, atol=1e-5)
    assert 0 < int((values == 0).sum()) < values.numel()


ENCODERS = (("encode_top_k", (3,)), ("encode_batch_top_k", (3,)), ("encode_threshold", ("threshold", 0.7)))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("name", "rest"), ENCODERS, ids=[name for name, _ in ENCODERS])
def test_encoders_and_their_derivatives_equal_their_definitions(name, rest, scaled):
    inputs = encoder_inputs(n_rows=30, n_features=23)
    threshold = (torch.rand(2, 23, dtype=F64) + 0.5).requires_grad_(True)
    scale = torch.rand(2, 23, dtype=F64) + 0.5 if scaled else None
    arguments = (*inputs, scale, *(threshold if one == "threshold" else one for one in rest))
    ours, theirs = getattr(ops, name)(*arguments, F64, None), getattr(reference, name)(*arguments)
    torch.testing.assert_close(ours, theirs)
    weight, leaves = torch.randn(ours[0].shape, dtype=F64), (*inputs, threshold)
    for one, other in zip(
        torch.autograd.grad(ours[0], leaves, weight, materialize_grads=True, allow_unused=True),
        torch.autograd.grad(theirs[0], leaves, weight, materialize_grads=True, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shift", [0.0, -4.0])  # many positive scores, and fewer than k a row
def test_shards_of_the_features_choose_together_what_the_whole_chooses(shift):
    """Each shard's kept pairs come with z, so their scores can be cut once more."""
    x, center, encoder, bias = plain_inputs(n_rows=11, n_groups=1, n_features=40)
    bias, scale = bias + shift, torch.rand(1, 40, dtype=F64) + 0.5
    whole, features, z = ops.encode_top_k(x, center, encoder, bias, scale, 4, F64, None)
    assert torch.equal(whole, z.relu())
    found = torch.full((11, 40), -torch.inf, dtype=F64)
    for shard in (slice(0, 25), slice(25, 40)):
        part = (x, center, encoder[:, shard], bias[:, shard], scale[:, shard])
        _, columns, part_z = ops.encode_top_k(*part, 4, F64, None)
        columns = columns.view(11, 4).long() + shard.start
        found.scatter_(1, columns, part_z.view(11, 4) * scale[0, columns])
    assert torch.equal(reference.first_largest(found, 4), features.view(11, 4).long())


def test_encoders_differentiate_their_values():
    inputs = encoder_inputs()
    threshold = torch.zeros(2, 9, dtype=F64)
    assert torch.autograd.gradcheck(lambda *a: ops.encode_top_k(*a, None, 3, F64, None)[0], inputs)
    assert torch.autograd.gradcheck(lambda *a: ops.encode_batch_top_k(*a, None, 3, F64, None)[0], inputs)
    assert torch.autograd.gradcheck(lambda *a: ops.encode_threshold(*a, None, threshold, 0.0, F64, None)[0], inputs)


def test_encoders_pass_opcheck():
    threshold = torch.zeros(2, 9, dtype=F64)
    torch.library.opcheck(ops.encode_top_k, (*encoder_inputs(), None, 3, F64, None))
    torch.library.opcheck(ops.encode_batch_top_k, (*encoder_inputs(), None, 3, F64, None))
    torch.library.opcheck(ops.encode_threshold, (*encoder_inputs(), None, threshold, 0.5, F64, None))


def test_compiled_code_takes_the_operators_whole():
    inputs = encoder_inputs(dtype=F32)

    def loss(x, center, encoder, bias):
        values, features, _ = ops.encode_top_k(x, center, encoder, bias, None, 3, F32, None)
        offsets = torch.arange(0, values.shape[0] + 1, 3)
        return ops.decode_loss(values, features, offsets, encoder, center, x, 2)[1].sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_refused(way, bad):
    x, center, encoder, bias = plain_inputs(n_rows=6, n_features=300, dtype=F32)
    x[2, 0, 1] = bad
    for call in (
        lambda: ops.encode_top_k(x, center, encoder, bias, None, 3, F32, None),
        lambda: ops.encode_batch_top_k(x, center, encoder, bias, None, 3, F32, None),
        lambda: ops.encode_threshold(x, center, encoder, bias, None, torch.ones(2, 300), 0.0, F32, None),
    ):
        with pytest.raises(ValueError, match="not finite"):
            call()


def test_affine_is_true_fp32():
    x, weight, bias = torch.randn(40, 70), torch.randn(90, 70), torch.randn(90)
    truth = torch.addmm(bias.double(), x.double(), weight.double().T)
    plain = torch.addmm(bias, x, weight.T)
    error = (problem.affine(x, weight, bias).double() - truth).abs().max()
    assert error <= 4 * (plain.double() - truth).abs().max()
    assert error < 1e-4  # bf16 products would err by about 0.05 here
