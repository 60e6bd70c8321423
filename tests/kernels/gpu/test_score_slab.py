"""The product that finds the maxima of its groups, against a product in plain torch and `group_max` of it."""

import pytest
import torch

from triton_kernels.gpu import encode, group_max, score_slab

pytestmark = pytest.mark.usefixtures("nan_empty")


def draw(shape, seed, device, dtype):
    """Small integers: products are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).to(dtype).to(device)


SHAPES = [(1, 1, 1), (5, 37, 3), (3, 32, 65), (130, 130, 64), (2, 300, 130), (0, 40, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_and_maxima_of_any_shape(shape, scaled, dtype, device):
    n_rows, n_features, width = shape
    x, encoder = draw((n_rows, width), 0, device, dtype), draw((n_features, width), 1, device, dtype)
    bias = draw((n_features,), 2, device, dtype)
    scale = draw((n_features,), 3, device, torch.float32) + 2.5 if scaled else None
    z = torch.empty(n_rows, n_features, dtype=dtype, device=device)
    maxima = score_slab.score_slab(x, encoder, bias, scale, z)
    expected = (x.double() @ encoder.double().t() + bias.double()).to(dtype)
    assert torch.equal(z, expected)
    assert maxima.dtype == group_max.group_max(expected, scale).dtype
    assert torch.equal(maxima, group_max.group_max(expected, scale))


def test_sums_are_rounded_once(device):
    """A sum kept in bf16 would lose every 1 after 256, and the bias as well."""
    x, encoder = (torch.ones(1, n, dtype=torch.bfloat16, device=device) for n in (513, 513))
    bias = torch.full((1,), -512.0, dtype=torch.bfloat16, device=device)
    z = torch.empty(1, 1, dtype=torch.bfloat16, device=device)
    score_slab.score_slab(x, encoder, bias, None, z)
    assert z.item() == 1.0


def test_zeros_of_both_signs_have_one_key(device):
    x = torch.ones(2, 1, dtype=torch.bfloat16, device=device)
    encoder = torch.full((64, 1), -1.0, dtype=torch.bfloat16, device=device)
    encoder[:32] = -0.0
    bias = torch.where(torch.arange(64) < 32, -0.0, 0.0).bfloat16().to(device)
    z = torch.empty(2, 64, dtype=torch.bfloat16, device=device)
    maxima = score_slab.score_slab(x, encoder, bias, None, z)
    assert maxima[:, 0].tolist() == [0, 0]
    assert (maxima[:, 1] < 0).all()


def every_code(seed, device, scaled):
    x, center = draw((5, 2, 7), seed, device, torch.float32), draw((2, 7), seed + 1, device, torch.float32)
    encoder, bias = draw((2, 199, 7), seed + 2, device, torch.float32), draw((2, 199), seed + 3, device, torch.float32)
    scale = draw((2, 199), seed + 4, device, torch.float32) + 3 if scaled else None
    problem = (x, center, encoder, bias, scale)
    product = (torch.bfloat16, None)
    yield encode.encode_top_k(*problem, 3, *product)
    yield encode.encode_batch_top_k(*problem, 3, *product)
    yield encode.encode_threshold(*problem, torch.full_like(bias, 4.0), 1.0, *product)


@pytest.mark.parametrize("scaled", [False, True])
def test_encoders_give_the_same_codes_either_way(scaled, device, monkeypatch, shuffled_programs):
    calls, kernel = [], encode.score_slab
    monkeypatch.setattr(encode, "score_slab", lambda *arguments: (calls.append(1), kernel(*arguments))[1])
    usual = list(every_code(0, device, scaled))
    assert not calls
    monkeypatch.setattr(score_slab, "WIDEST", 7)
    with shuffled_programs(seed=3):
        found = list(every_code(0, device, scaled))
    assert len(calls) == 6  # two dictionaries, three encoders
    for one, other in zip(usual, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_wider_rows_and_wider_numbers_are_left_to_the_library(monkeypatch):
    monkeypatch.setattr(score_slab, "WIDEST", 7)
    assert score_slab.pays(7, torch.bfloat16)
    assert not score_slab.pays(8, torch.bfloat16)
    assert not score_slab.pays(7, torch.float32)
