"""Which pairs the kernels choose, against stable sorts and boolean masks in plain torch."""

import pytest
import torch

import triton_kernels as ops
from triton_kernels import reference
from triton_kernels.gpu import batch_threshold, encode, group_max, select_threshold, select_topk
from triton_kernels.pairs import Pairs

pytestmark = pytest.mark.usefixtures("nan_empty")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scores_of(kind, n_rows, n_features, seed=0):
    z = torch.randn(n_rows, n_features, generator=generator(seed))
    if kind == "many equal":
        return (z * 2).round() / 2
    if kind == "all equal":
        return torch.full_like(z, 0.25)
    if kind == "negative":
        return -z.abs() - 0.5
    if kind == "zeros of both signs":
        return torch.where(z > 1.5, z, torch.where(z > 0, 0.0, -0.0))
    if kind == "close together":
        return 1 + (z * 4).round() / 2**20
    if kind == "one best":
        z[:, n_features // 2] = 9.0
    return z


def top_k(z, scale, k, first_feature=100):
    values = torch.empty(z.shape[0], k, dtype=z.dtype, device=z.device)
    features = torch.empty(z.shape[0], k, dtype=torch.int32, device=z.device)
    select_topk.select_top_k(z, scale, k, first_feature, values, features)
    return values, features


def check_top_k(z, scale, k):
    values, features = top_k(z, scale, k)
    score = z if scale is None else z.to(torch.promote_types(z.dtype, torch.float32)) * scale
    expected = reference.first_largest(score, k)
    assert torch.equal(features.long(), expected + 100)
    assert torch.equal(values, z.gather(1, expected))


KINDS = ["normal", "many equal", "all equal", "negative", "zeros of both signs", "one best"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_is_the_first_largest(kind, dtype, device):
    z = scores_of(kind, 2, 257).to(dtype).to(device)
    for k in (1, 3, 40):
        check_top_k(z, None, k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n_rows", "n_features", "k"), [(1, 1, 1), (1, 64, 1), (2, 1009, 7), (2, 37, 37), (1, 2048, 32), (3, 31, 30)]
)
def test_top_k_of_any_shape_with_a_scale(dtype, n_rows, n_features, k, device):
    z = scores_of("many equal", n_rows, n_features).to(dtype).to(device)
    scale = (torch.rand(n_features, generator=generator(1)).mul(4).round() + 1).to(device)
    check_top_k(z, None, k)
    check_top_k(z, scale, k)


@pytest.mark.parametrize(("n_features", "k"), [(16411, 512), (16411, 300), (8209, 400), (17000, 513)])
def test_top_k_of_long_rows(n_features, k, device):
    check_top_k(scores_of("many equal", 1, n_features).to(device), None, k)


def test_a_wrong_choice_is_noticed(device, monkeypatch):
    monkeypatch.setattr(reference, "first_largest", lambda z, k: z.topk(k + 1).indices[:, 1:].sort(dim=1).values)
    with pytest.raises(AssertionError):
        check_top_k(scores_of("normal", 2, 257).to(device), None, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n_features", [40, 257])
def test_not_a_number_surfaces_and_never_leaves_a_slot_unwritten(dtype, n_features, device):
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    z = torch.tensor([torch.iinfo(bits).max, -1], dtype=bits).view(dtype)[:, None].repeat(1, n_features)
    z[0, 7:] = 0.5
    values, features = top_k(z.to(device), None, 3)
    assert values.isnan().any(1).all()
    assert features.tolist() == [[100, 101, 102]] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_group_maxima(dtype, device):
    z = scores_of("zeros of both signs", 3, 101).to(dtype).to(device)
    z[0, 32:64], z[1, 96:], z[2, 32:64] = -0.0, 0.0, -1.0
    maxima = group_max.group_max(z, None).cpu()
    best = torch.nn.functional.pad(z.float().cpu(), (0, 27), value=float("-inf")).view(3, 4, 32).amax(2)
    order = torch.sort(best.flatten(), stable=True).indices
    assert maxima.flatten()[order].long().diff().ge(0).all()
    assert torch.equal(maxima == 0, best == 0)


def mask_pairs(keep, z, score):
    return Pairs(z[keep], score[keep], keep.nonzero()[:, 1].int(), reference.starts(keep.sum(1)))


def assert_same_pairs(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scaled", [False, True])
def test_pairs_above_thresholds(dtype, scaled, device):
    z = scores_of("many equal", 3, 4201).to(dtype).to(device)
    scale = (torch.rand(4201, generator=generator(1)) + 0.5).to(device) if scaled else None
    score = z.float() if scale is None else z.float() * scale
    lower = (torch.rand(4201, generator=generator(2)).mul(6).round() / 2 - 0.5).to(device)
    found = select_threshold.kept_pairs(
        z, scale, group_max.group_max(z, scale), lower_F=lower, bound=select_threshold.group_bounds(lower)
    )
    assert_same_pairs(found, mask_pairs((score > lower) & (z > 0), z, score))
    found.features[-1] += 1
    with pytest.raises(AssertionError):
        assert_same_pairs(found, mask_pairs((score > lower) & (z > 0), z, score))


@pytest.mark.parametrize("cut", [1.0, 1e-40, 50.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pairs_of_at_least_a_key(dtype, cut, device):
    z = scores_of("many equal", 3, 201).to(dtype).to(device)
    z[0, 0] = 1e-38
    bound = torch.tensor([cut]).view(torch.int32).to(device)
    found = select_threshold.kept_pairs(z, None, group_max.group_max(z, None), lower_F=None, bound=bound)
    assert_same_pairs(found, mask_pairs(z.float() >= cut, z, z.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_the_running_bound_stays_under_the_cut(dtype, kind, device):
    slabs = [scores_of(kind, 4, 200, seed).to(dtype) for seed in range(3)]
    running = batch_threshold.RunningBound(12, torch.device(device))
    bounds = [float(running.add(group_max.group_max(z.to(device), None)).view(torch.float32)) for z in slabs]
    cut = torch.cat(slabs).float().flatten().topk(12).values[-1].clamp(min=0)
    assert bounds == sorted(bounds)
    assert all(bound > 0 for bound in bounds)
    if cut > 0:
        assert bounds[-1] <= cut
    if kind in ("normal", "many equal"):
        assert bounds[-1] > 0.5 * cut


@pytest.mark.parametrize("wanted", [0, 1, 50, 99, 100, 101])
@pytest.mark.parametrize("kind", ["normal", "many equal", "close together", "all equal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_pairs_are_those_of_a_stable_sort(wanted, kind, dtype, device):
    score = (scores_of(kind, 1, 100)[0].abs() + 0.1).to(dtype).to(device)
    place = torch.arange(100, dtype=torch.int32, device=device)
    offsets = torch.tensor([0, 30, 30, 100], device=device)
    best, cut = batch_threshold.largest_pairs(Pairs(-score, score, place, offsets), wanted)
    expected = torch.sort(score, descending=True, stable=True).indices[:wanted].sort().values
    assert torch.equal(best.features.long(), expected)
    assert torch.equal(best.score, score[expected])
    assert best.offsets.tolist() == [0, *[int((expected < 30).sum())] * 2, len(expected)]
    assert float(cut) == (float(score[expected].min()) if wanted else 0.0)


# Small integers: products are exact in every dtype and chunking, and equal scores are common.
def problem(n_rows, n_groups, n_features, width, *, dtype=torch.float32, scaled=False, device="cpu", seed=0):
    g = generator(seed)
    whole = [
        torch.randint(-2, 3, shape, generator=g).to(dtype).to(device)
        for shape in (
            (n_rows, n_groups, width),
            (n_groups, width),
            (n_groups, n_features, width),
            (n_groups, n_features),
        )
    ]
    scale = torch.randint(1, 4, (n_groups, n_features), generator=g).to(dtype).to(device) if scaled else None
    return (*whole, scale)


def exact_scores(*arguments):
    return reference.scores(*(None if tensor is None else tensor.double() for tensor in arguments))


def global_features(columns_BGK, n_features):
    n_groups = columns_BGK.shape[1]
    return columns_BGK + n_features * torch.arange(n_groups, device=columns_BGK.device)[:, None]


def assert_same_code(values, features, offsets, expected):
    assert torch.equal(offsets, expected[2])
    assert torch.equal(features, expected[1])
    assert torch.equal(values.double(), expected[0])


SHAPES = [(1, 1, 67, 5, 4), (5, 3, 37, 3, 2), (4, 2, 101, 7, 1), (0, 2, 40, 3, 2), (2, 1, 7, 3, 7)]
PRECISIONS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float64),
]


@pytest.mark.parametrize(("dtype", "product"), PRECISIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_encoders_choose_what_plain_torch_chooses(shape, dtype, product, device):
    n_rows, n_groups, n_features, width, k = shape
    scaled = n_rows % 2 == 1
    arguments = problem(n_rows, n_groups, n_features, width, dtype=dtype, scaled=scaled, device=device)
    z, score = exact_scores(*arguments)

    values, features, _ = ops.encode_top_k(*arguments, k, product, None)
    columns = reference.first_largest(score.flatten(0, 1), k).view(n_rows, n_groups, k)
    assert torch.equal(features.view(columns.shape).long(), global_features(columns, n_features))
    assert torch.equal(values.view(columns.shape).double(), z.gather(2, columns).relu())
    assert values.dtype == dtype

    values, features, offsets, cut = ops.encode_batch_top_k(*arguments, k, product, None)
    keep = reference.kept_by_batch(score, k)
    assert_same_code(values, features, offsets, reference.code_of(keep, z))
    least = (
        torch.where(keep, score, torch.inf).flatten(2).amin((0, 2)) if n_rows else torch.full((n_groups,), torch.inf)
    )
    assert torch.equal(cut.double().cpu(), torch.where(least.isinf(), 0.0, least).cpu().double())

    threshold = torch.randint(-1, 6, (n_groups, n_features), generator=generator(3)).to(dtype).to(device)
    values, features, offsets, pre = ops.encode_threshold(*arguments, threshold, 2.5, product, None)
    keep = (score > threshold.double() - 1.25) & (z > 0)
    assert_same_code(values, features, offsets, reference.code_of(keep, torch.where(score > threshold, z, 0)))
    assert torch.equal(pre.double(), z[keep])


@pytest.mark.parametrize("scaled", [False, True])
def test_only_the_choice_is_in_low_precision(scaled, device):
    """Kept values err no more than twice as much as torch's own, against float64; a bf16 value would not pass."""
    x, center, encoder, bias, scale = (
        None if t is None else t + 0.3 * torch.rand(t.shape, generator=generator(4)).to(device)
        for t in problem(4, 2, 70, 33, scaled=scaled, device=device)
    )
    arguments = (x, center, encoder, bias, scale)
    z, _ = exact_scores(*arguments)
    low = torch.stack(
        [
            torch.addmm(bias[g].bfloat16(), (x[:, g] - center[g]).bfloat16(), encoder[g].bfloat16().t())
            for g in range(2)
        ],
        dim=1,
    )
    score = low.float() if scale is None else low.float() * scale
    columns = reference.first_largest(score.flatten(0, 1), 5).view(4, 2, 5)
    values, features, _ = ops.encode_top_k(*arguments, 5, torch.bfloat16, encoder.bfloat16())
    assert torch.equal(features.view(4, 2, 5).long(), global_features(columns, 70))
    truth = z.gather(2, columns).relu().flatten()
    plain = torch.einsum("bgn,gfn->bgf", x - center, encoder) + bias
    allowed = 2 * (plain - z).abs().max()
    assert (values - truth).abs().max() <= allowed
    assert (values.bfloat16() - truth).abs().max() > allowed
    values[3] += 1e-3
    assert (values - truth).abs().max() > allowed

    keep = reference.kept_by_batch(score, 5)
    values, features, offsets, cut = ops.encode_batch_top_k(*arguments, 5, torch.bfloat16, None)
    expected = reference.code_of(keep, z)
    assert torch.equal(offsets, expected[2])
    assert torch.equal(features, expected[1])
    assert (values - expected[0]).abs().max() <= allowed
    assert torch.equal(cut, torch.where(keep, score, torch.inf).amin((0, 2)).float())

    keep = (score > 1.5) & (low > 0)
    values, features, _, pre = ops.encode_threshold(*arguments, bias * 0 + 2, 1.0, torch.bfloat16, None)
    assert torch.equal(features, reference.code_of(keep, z)[1])
    assert (pre - z[keep]).abs().max() <= allowed
    assert torch.equal(values, torch.where(score[keep] > 2, pre, 0))


def every_encoder(arguments, product):
    threshold = torch.full_like(arguments[3], 1.5)
    return (
        *ops.encode_top_k(*arguments, 3, product, None),
        *ops.encode_batch_top_k(*arguments, 3, product, None),
        *ops.encode_threshold(*arguments, threshold, 1.0, product, None),
    )


@pytest.mark.parametrize("product", [torch.float32, torch.bfloat16])
def test_neither_chunks_nor_the_order_of_programs_change_a_bit(product, device, monkeypatch, shuffled_programs):
    arguments = problem(5, 2, 67, 4, scaled=True, device=device)
    once = every_encoder(arguments, product)
    with shuffled_programs(seed=3):
        shuffled = every_encoder(arguments, product)
    monkeypatch.setattr(encode, "SLAB_BYTES", 2 * 67 * product.itemsize)
    chunked = every_encoder(arguments, product)
    for one, other, third in zip(once, shuffled, chunked, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


def test_one_hot_feature_and_no_positive_score(device):
    x, center, encoder, bias, _ = problem(4, 1, 50, 3, device=device)
    bias[0] = -100.0
    values, _, _ = ops.encode_top_k(x, center, encoder, bias, None, 2, torch.float32, None)
    assert values.eq(0).all()
    for code in (
        ops.encode_batch_top_k(x, center, encoder, bias, None, 2, torch.float32, None),
        ops.encode_threshold(x, center, encoder, bias, None, bias * 0, 0.5, torch.float32, None),
    ):
        assert code[0].numel() == 0
        assert code[2].eq(0).all()
    bias[0, 9] = 100.0
    values, features, offsets, cut = ops.encode_batch_top_k(x, center, encoder, bias, None, 2, torch.float32, None)
    assert features.tolist() == [9] * 4
    assert offsets.tolist() == [0, 1, 2, 3, 4]
    assert float(cut) == float(values.min())


def test_expanded_and_strided_inputs(device):
    x, center, encoder, bias, scale = problem(4, 2, 40, 3, scaled=True, device=device)
    strided = (
        x.transpose(0, 1).contiguous().transpose(0, 1), center[:1].expand(2, -1),
        encoder.transpose(1, 2).contiguous().transpose(1, 2), bias, scale[:1].expand(2, -1),
    )  # fmt: skip
    for one, other in zip(
        every_encoder(strided, torch.bfloat16), every_encoder(tuple(t.contiguous() for t in strided), torch.bfloat16)
    ):
        assert torch.equal(one, other)


def test_more_groups_than_can_be_counted_are_sorted(monkeypatch, device):
    monkeypatch.setattr(select_topk, "MOST_COUNTED", 1)
    monkeypatch.setattr(select_topk, "MOST_DIRECT", 8)
    called = []
    monkeypatch.setattr(select_topk, "first_largest", lambda z, k: called.append(1) or reference.first_largest(z, k))
    assert top_k(torch.zeros(2, 128, device=device), None, 3)[1].tolist() == [[100, 101, 102]] * 2
    assert called
