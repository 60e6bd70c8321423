"""The C kernels: every width against float64, the lists of candidates, and what is kept."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import triton_kernels as ops
from tests.kernels.codes import random_code, rows_of
from triton_kernels import cache, dense, reference
from triton_kernels.cpu import fused, lists, native, selection
from triton_kernels.cpu.native import build

pytestmark = pytest.mark.usefixtures("sparse_form")
WIDTHS = (1, 15, 16, 17, 31, 32, 63, 64, 65, 100, 129)  # around the sixteen numbers that go together


@pytest.fixture(scope="module")
def in_c(cpu_form):
    if cpu_form == "stock":
        pytest.skip("of the compiled form")


@pytest.fixture
def sparse_form(monkeypatch):
    monkeypatch.setitem(dense.FEATURES_PER_ACTIVE, "cpu", 0)


def as_fp32(*tensors):
    return tuple(tensor.float() if tensor.is_floating_point() else tensor for tensor in tensors)


def calls(width):
    """Name and float64 arguments of every fused operator, G = 2 dictionaries with rows of `width`."""
    values, features, offsets = random_code(24, 40, n_groups=2, most=20)
    draw = torch.Generator().manual_seed(width)
    decoder, error, x = (torch.randn(n, m, width, generator=draw).double() for n, m in ((2, 40), (12, 2), (12, 2)))
    bias, weight = torch.randn(2, width, generator=draw).double(), torch.rand(2, 1, generator=draw).double()
    yield "decode_loss", (values, features, offsets, decoder, bias, x, 1)
    yield "backward_decoder", (values, features, offsets, error, weight, decoder)
    yield "backward_encoder", (values, features, offsets, x, bias, 40)


def is_as_exact(found, plain, truth):
    """Whether `found` errs at most twice as much as torch's own fp32 form, but for the last bits of its scale."""
    ours, theirs = ((tensor.double() - truth).abs().max() for tensor in (found, plain))
    return bool(ours <= 2 * theirs + 2**-22 * truth.abs().max())


@pytest.mark.parametrize("width", WIDTHS)
def test_fused_operators_at_every_width(width):
    for name, arguments in calls(width):
        narrow = [as_fp32(a)[0] if isinstance(a, torch.Tensor) else a for a in arguments]
        wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in narrow]
        truth, plain = getattr(reference, name)(*wide), getattr(reference, name)(*narrow)
        for found, theirs, exact in zip(getattr(ops, name)(*narrow), plain, truth, strict=True):
            assert is_as_exact(found, theirs, exact), name
            wrong = found.clone()
            wrong.view(-1)[-1] += 8 * (theirs - exact).abs().max() + 2**-20 * exact.abs().max()  # in the ragged lanes
            assert not is_as_exact(wrong, theirs, exact), name


def test_the_decoder_may_be_longer_than_one_block_of_the_cache(monkeypatch):
    values, features, offsets = random_code(6, 700, most=300)
    decoder, x = torch.randn(1, 700, 8192), torch.randn(6, 1, 8192)  # 22 MiB, and blocks are of 12
    error, squares = ops.decode_loss(values.float(), features, offsets, decoder, torch.zeros(1, 8192), x, 4)
    expected, expected_squares = reference.decode_loss(values, features, offsets, decoder.double(), 0, x.double(), 4)
    torch.testing.assert_close(error.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(squares.double(), expected_squares, rtol=1e-5, atol=1e-4)


SPECIAL = (0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), 1e-40, -1e-40, 3e38, -3e38)


def test_keys_are_in_the_order_of_the_scores():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    score = bits.view(torch.bfloat16).float()
    bits, score = bits[~score.isnan()], score[~score.isnan()]
    keys = lists.keys_of(bits.view(torch.bfloat16))
    assert torch.equal(lists.scores_of(keys), score)
    by_key = score[keys.sort().indices]
    assert (by_key.diff() >= 0).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 200), st.integers(1, 4), st.booleans())
def test_lists_hold_what_is_not_below_the_bound(in_c, seed, n_columns, n_chunks, special):
    draw = torch.Generator().manual_seed(seed)
    n_rows, n_features = 3, n_columns * n_chunks
    score = torch.randn(n_rows, n_features, generator=draw).round(decimals=1).bfloat16()
    bound = torch.randn(n_rows, generator=draw).bfloat16().float()
    if special:
        picked = torch.randint(0, len(SPECIAL), (2, n_rows), generator=draw)
        score[:, 0] = torch.tensor(SPECIAL)[picked[0]].bfloat16()
        bound = torch.tensor(SPECIAL)[picked[1]].bfloat16().float()
    parts = [lists.not_below(score[:, c::n_chunks].contiguous(), bound) for c in range(n_chunks)]
    columns, keys, counts = (torch.cat(part) for part in zip(*parts, strict=True))
    found = lists.Lists(columns, keys, torch.nn.functional.pad(counts.cumsum(0), (1, 0)), n_rows)
    assert found.n_chunks == n_chunks
    merged = lists.merged(found, torch.full((n_rows,), -torch.inf), n_features)
    rows, features = (score.float() >= bound[:, None]).nonzero(as_tuple=True)
    near = (lists.keys_reaching(bound) != lists.keys_of(bound.bfloat16()))[rows_of(merged)]
    exact = score.float()[rows_of(merged), merged.features.long()] >= bound[rows_of(merged)]
    assert (exact | near).all()  # a bound of 0 lets -0 pass too
    assert torch.equal(rows_of(merged)[exact], rows)
    assert torch.equal(merged.features[exact].long(), features)
    k = int(counts.view(n_chunks, n_rows).sum(0).amin())
    if k:
        every = torch.full((n_rows, n_features), -torch.inf)
        every[rows_of(merged), merged.features.long()] = score.float()[rows_of(merged), merged.features.long()]
        kth = every.topk(k, dim=1).values[:, -1]
        assert torch.equal(lists.kth_score(found, k), kth)
        fewer = lists.merged(found, kth, n_features)
        assert (fewer.offsets.diff() >= k).all()
        assert (every[rows_of(fewer), fewer.features.long()] >= kth[rows_of(fewer)]).all()


@pytest.mark.parametrize("n_columns", [300, 40_000])
@pytest.mark.parametrize("slack", [0.0, 2**-8])
def test_the_sieve_lets_the_k_best_through_and_few_others(in_c, n_columns, slack):
    score = torch.randn(2, n_columns, generator=torch.Generator().manual_seed(0)).bfloat16() - 3  # mostly negative
    margin = torch.tensor([0.0, 0.01])
    for k in (1, 7, 250):
        least = torch.tensor([-torch.inf, -torch.inf])
        columns, keys, counts = lists.sieved(score, k, margin, slack, least)
        kth = score.float().topk(k, dim=1).values[:, -1]
        low = score.float() - slack * score.float().abs() - margin[:, None]  # what exact scores may be, and
        high = score.float() + slack * score.float().abs() + margin[:, None]
        assert (least <= low.topk(k, dim=1).values[:, -1] + 1e-6).all()
        assert (least >= kth - (0.5 if k < 250 else 2)).all()  # a k-th of groups' maxima is a little below
        rows = torch.arange(2).repeat_interleave(counts)
        let_through = torch.zeros_like(score, dtype=torch.bool)
        let_through[rows, columns.long()] = True
        assert let_through[high > least[:, None] + 1e-6].all()
        assert not let_through[high < least[:, None] - 0.05].any()
        assert torch.equal(lists.scores_of(keys), score[rows, columns.long()].float())
        higher = least + 1  # what is known already is not forgotten
        known = higher.clone()
        assert lists.sieved(score, k, margin, slack, known)[2].sum() < counts.sum()
        assert torch.equal(known, higher)


def test_the_kth_of_more_keys_than_sixteen_bits_can_count(in_c):
    keys = torch.arange(100_000).remainder(2**14).to(torch.int16)
    found = lists.Lists(keys.int(), keys, torch.tensor([0, keys.numel()]), 1)
    expected = lists.scores_of(keys.sort(descending=True).values[70_000 - 1 : 70_000])
    assert torch.equal(lists.kth_score(found, 70_000), expected)


def test_top_k_puts_nan_first_and_takes_zeros_for_equal(in_c):
    score = torch.tensor([[1.0, -0.0, 0.0, -1.0, float("nan"), 0.0, -float("nan"), 3.0]] * 2)
    assert selection.row_top_k(score, 5).tolist() == [[0, 1, 4, 6, 7]] * 2
    long = torch.nn.functional.pad(score, (0, 92), value=-2.0)  # the best of groups of columns are looked at first
    assert selection.row_top_k(long, 5).tolist() == [[0, 1, 4, 6, 7]] * 2
    lists_of_eight = torch.tensor([0, 8, 16])
    assert selection.list_top_k(score.flatten(), lists_of_eight, 3).tolist() == [[4, 6, 7], [12, 14, 15]]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 3), st.integers(1, 70), st.booleans(), st.sampled_from([-torch.inf, 0.0]))
def test_pairs_above_a_bound(seed, n_rows, n_columns, scaled, least):
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(n_rows, n_columns, generator=draw).round(decimals=1)
    z[:, ::9] = torch.tensor((*SPECIAL, float("nan")))[
        torch.randint(0, len(SPECIAL) + 1, z[:, ::9].shape, generator=draw)
    ]
    scale = torch.randn(n_columns, generator=draw).round(decimals=1) if scaled else None
    bound = torch.randn(n_columns, generator=draw).round(decimals=1)
    values, scores, columns, offsets = selection.above(z, scale, bound, least)
    assert columns.dtype == torch.int32
    found = [(r, c) for r in range(n_rows) for c in columns[offsets[r] : offsets[r + 1]].tolist()]
    score = z if scale is None else z * scale
    places = [(r, c) for r in range(n_rows) for c in range(n_columns)]
    expected = [(r, c) for r, c in places if score[r, c] > bound[c] and z[r, c] > least]
    assert found == expected
    assert values.tolist() == [z[r, c].item() for r, c in expected]
    assert scores.tolist() == [score[r, c].item() for r, c in expected]


def test_the_largest_of_a_list_keep_the_first_of_equals():
    score = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0, -1.0])
    for count, expected in ((1, [1]), (3, [1, 2, 3]), (4, [1, 2, 3, 4]), (7, list(range(7))), (9, list(range(7)))):
        assert selection.keep_largest(score, count).tolist() == expected


def make_gradient():
    code = [as_fp32(tensor)[0] for tensor in random_code(12, 9, most=6)]
    decoder, error = torch.randn(1, 9, 64), torch.randn(12, 1, 64)
    return ops.backward_decoder(*code, error, torch.ones(1, 4), decoder)[1].view(9, 64)


def test_squares_of_rows_are_known_until_somebody_writes(cpu_form):
    gradient = make_gradient()
    squares = gradient.square().sum(1)
    known = fused.gradient_squares.find(gradient)
    assert (known is not None) == (cpu_form == "native")
    torch.testing.assert_close(ops.row_squares(gradient, untouched=True), squares)
    torch.testing.assert_close(
        ops.row_squares(gradient.view(18, 32), untouched=True), gradient.view(18, 32).square().sum(1)
    )
    gradient.mul_(3)
    assert fused.gradient_squares.find(gradient) is None
    torch.testing.assert_close(ops.row_squares(gradient, untouched=True), 9 * squares)


def test_squares_see_writes_that_torch_does_not_count(in_c):
    """As `.data` and the collectives of `torch.distributed` write."""
    gradient = make_gradient()
    squares = gradient.square().sum(1)
    gradient.data.mul_(3)
    torch.testing.assert_close(ops.row_squares(gradient), 9 * squares)


def test_squares_are_not_taken_for_those_of_another_gradient():
    known = cache.SquaresCache(size=2)
    gradient = torch.randn(5, 3)
    known.note(gradient, gradient.square().sum(1))
    assert known.find(gradient.clone()) is None
    assert known.find(gradient[1:]) is None
    assert known.find(gradient.detach()) is not None
    where = gradient.data_ptr()
    del gradient
    another = torch.randn(5, 3)
    assert another.data_ptr() == where or known.find(another) is None
    assert known.find(another) is None
    for _ in range(3):
        known.note(another, another.square().sum(1))
    assert len(known._entries) == 2


def test_equal_offsets_find_the_kept_answer_and_others_do_not():
    made = []
    latest = cache.TransposeCache(lambda features, offsets, n_features: made.append(0) or len(made))
    features = torch.tensor([1, 2, 3, 4], dtype=torch.int32)

    def get(offsets):
        return latest(features, offsets, 5)

    first = torch.tensor([0, 2, 4])
    assert get(first) == 1
    assert get(torch.tensor([0, 2, 4])) == 1
    assert get(torch.tensor([0, 1, 4])) == 2
    assert get(first) == 3
    first[1] = 3  # what was kept was made from other numbers
    assert get(torch.tensor([0, 3, 4])) == 4


def test_a_kept_transpose_sees_writes_that_torch_does_not_count():
    values, features, offsets = torch.ones(4), torch.tensor([1, 2, 3, 4], dtype=torch.int32), torch.tensor([0, 2, 4])
    x = torch.randn(2, 8)
    for write in (lambda: None, lambda: features.data.fill_(0), lambda: offsets.data.copy_(torch.tensor([0, 3, 4]))):
        write()
        found = ops.scatter_outer(values, features, offsets, x, 5)
        torch.testing.assert_close(found, reference.scatter_outer(values, features, offsets, x, 5))


@pytest.mark.parametrize(
    ("features", "offsets", "message"),
    [
        ([0, 9], [0, 1, 2], "from 0 to 9; the table has 9 rows"),
        ([-1, 3], [0, 1, 2], "from -1 to 3"),
        ([0, 3], [0, 1, 3], "ascend from 0 to 2"),
        ([0, 3], [0, 3, 2], "ascend from 0 to 2"),
        ([0, 3], [1, 1, 2], "ascend from 0 to 2"),
    ],
)
def test_a_code_that_leads_outside_its_table_is_refused(in_c, features, offsets, message):
    values, features, offsets = torch.ones(2), torch.tensor(features, dtype=torch.int32), torch.tensor(offsets)
    with pytest.raises(IndexError, match=message):
        ops.gather_sum(values, features, offsets, torch.ones(9, 4))
    with pytest.raises(IndexError, match=message):
        ops.scatter_outer(values, features, offsets, torch.ones(2, 4), 9)
    with pytest.raises(IndexError, match=message):
        ops.decode_loss(values, features, offsets, torch.ones(1, 9, 4), torch.ones(1, 4), torch.ones(2, 1, 4), 1)


def test_c_gets_no_tensor_of_another_kind(in_c):
    gradient, out = torch.ones(3, 4), torch.empty(3)
    for wrong in (gradient.double(), gradient.bfloat16(), gradient.to("meta"), 2.0):
        with pytest.raises(TypeError, match="row_squares: gradient is"):
            native.call("row_squares", 3, 4, wrong, None, out)
    with pytest.raises(TypeError, match="out has strides"):
        native.call("row_squares", 3, 4, gradient, None, torch.empty(6)[::2])
    with pytest.raises(TypeError, match="n is tensor"):
        native.call("row_squares", 3, gradient, gradient, None, out)
    with pytest.raises(ValueError, match="shorter"):
        native.call("row_squares", 3, 4, gradient, out)
    native.call("row_squares", 3, 4, gradient.t().contiguous().t(), None, out)  # an input may have strides
    assert out.tolist() == [4.0] * 3


def test_every_c_function_has_all_its_parameters_read():
    for path in build.FOLDER.glob("*.c"):
        for name, inside in re.findall(r"^(?:void|int\w*|float) (\w+)\(([^)]*)\)", path.read_text(), re.MULTILINE):
            assert len(build.declarations()[name]) == len(inside.split(",")), name
            assert all(one.kind in native.DTYPES for one in build.declarations()[name]), name


def test_tables_of_any_dtype_find_candidates_by_bf16():
    x, encoder = torch.randn(64, 1, 8), torch.randn(1, 1024, 8)
    for dtype in (torch.bfloat16, torch.float64):
        arguments = (x.to(dtype), torch.zeros(1, 8, dtype=dtype), encoder.to(dtype), torch.zeros(1, 1024, dtype=dtype))
        product = torch.bfloat16 if dtype == torch.float64 else torch.float32
        values, features, _ = ops.encode_top_k(*arguments, None, 32, product, None)
        z = (x[:, 0] @ encoder[0].T).to(dtype)
        best = z.topk(32, dim=1).indices
        shared = (features.view(64, 32, 1).long() == best[:, None]).any(2).float().mean()
        assert shared > 0.9
        assert values.isfinite().all()


@pytest.mark.parametrize("features_per_active", [0, 10**9], ids=["sparse", "dense"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_neither_a_second_run_nor_threads_change_a_bit(threads, features_per_active, monkeypatch):
    def everything():
        values, features, offsets = random_code(64, 50, most=40)
        decoder, x = torch.linspace(-1, 1, 50 * 96).view(1, 50, 96), torch.linspace(-2, 2, 64 * 96).view(64, 1, 96)
        code = (values.float(), features, offsets)
        out = [*ops.decode_loss(*code, decoder, torch.zeros(1, 96), x, 6)]
        out += ops.backward_decoder(*code, x, torch.ones(1, 6), decoder)
        out += ops.backward_encoder(*code, x, torch.ones(1, 96), 50)
        state = [out[3][0].clone(), out[4][0], torch.zeros(50, 96), torch.zeros(50, 96)]
        ops.adam_rows(*state, step=1, rate=1e-3)
        out += [ops.gather_sum(*code, decoder[0]), ops.gather_dot(x[:, 0], *code[1:], decoder[0])]
        out.append(ops.scatter_outer(*code, x[:, 0], 50))
        weights = (torch.zeros(1, 96), decoder, torch.zeros(1, 50))
        for product in (torch.bfloat16, torch.float32):
            out += ops.encode_top_k(x, *weights, None, 5, product, None)
            out += ops.encode_batch_top_k(x, *weights, None, 5, product, None)
        return [*out, *state]

    monkeypatch.setitem(dense.FEATURES_PER_ACTIVE, "cpu", features_per_active)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything()
        torch.set_num_threads(threads)
        many = everything()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))
