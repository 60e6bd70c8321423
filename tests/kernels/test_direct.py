"""`reconstruct` against its definition, sets of dictionaries with one input, and one call that chooses over a batch."""

import pytest
import torch

from triton_kernels import cpu, reference
from triton_kernels.arguments import Above, Encoding, Largest
from triton_kernels.cpu import encode, native
from triton_kernels.direct import reconstruct


def problem(n_rows=7, n_inputs=2, n_sets=3, n_features=11, width=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    n_groups = n_sets * n_inputs

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x, center, bias = draw(n_rows, n_inputs, width), draw(n_groups, width), draw(n_groups, n_features)
    encoder, decoder = draw(n_groups, n_features, width), draw(n_groups, n_features, width)
    return Encoding(x, center, encoder, bias, None, dtype, None), decoder, draw(n_groups, 2).abs()


def defined(encoding, decoder, weight, k_G, by_batch):
    """Gradients by autograd through the operators' definitions, set after set."""
    leaves = [one.detach().clone().requires_grad_() for one in (*encoding[1:4], decoder)]
    n_inputs, losses = encoding.x_BGN.shape[1], []
    for first in range(0, len(decoder), n_inputs):
        own = slice(first, first + n_inputs)
        center, encoder, bias, table = (one[own] for one in leaves)
        ks = k_G[own]
        assert len(set(ks)) == 1, "the definition has one k"
        encode_by = reference.encode_batch_top_k if by_batch else reference.encode_top_k
        values, features, *rest = encode_by(encoding.x_BGN, center, encoder, bias, None, ks[0])
        n_rows = encoding.x_BGN.shape[0] * n_inputs
        offsets = rest[0] if by_batch else torch.arange(0, n_rows * ks[0] + 1, ks[0])
        _, squares = reference.decode_loss(values, features, offsets, table, center, encoding.x_BGN, 2)
        losses.append((weight[own] * squares).sum())
    torch.stack(losses).sum().backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("by_batch", [False, True])
@pytest.mark.parametrize("n_sets", [1, 3])
@pytest.mark.parametrize("n_inputs", [1, 2])
def test_gradients_are_those_of_the_definition(n_inputs, n_sets, by_batch, dtype):
    encoding, decoder, weight = problem(n_inputs=n_inputs, n_sets=n_sets, dtype=dtype)
    k_G = [k for k in (2, 4, 3)[:n_sets] for _ in range(n_inputs)]
    found = reconstruct(encoding, decoder, weight, Largest(k_G, by_batch))
    expected = defined(encoding, decoder, weight, k_G, by_batch)
    ours = (found.d_center_GN, found.d_encoder_GFN, found.d_bias_GF, found.d_decoder_GFN)
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {}
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("n_sets", [1, 3])
def test_gradients_by_thresholds_are_those_of_the_definition(n_sets, scaled):
    encoding, decoder, weight = problem(n_sets=n_sets)
    theta = torch.linspace(0.2, 2, decoder[..., 0].numel(), dtype=torch.float64).view(decoder.shape[:2])
    scale = theta.flip(1) if scaled else None
    found = reconstruct(encoding._replace(scale_GF=scale), decoder, weight, Above(theta, 1.0))
    leaves = [one.detach().clone().requires_grad_() for one in (*encoding[1:4], decoder, theta)]
    losses = []
    for first in range(0, len(decoder), 2):
        own = slice(first, first + 2)
        center, encoder, bias, table, limit = (one[own] for one in leaves)
        by = None if scale is None else scale[own]
        code = reference.encode_threshold(encoding.x_BGN, center, encoder, bias, by, limit, 1.0)[:3]
        losses.append((weight[own] * reference.decode_loss(*code, table, center, encoding.x_BGN, 2)[1]).sum())
    torch.stack(losses).sum().backward()
    ours = (found.d_center_GN, found.d_encoder_GFN, found.d_bias_GF, found.d_decoder_GFN, found.d_threshold_GF)
    for one, leaf in zip(ours, leaves, strict=True):
        torch.testing.assert_close(one, leaf.grad)
    assert (found.d_threshold_GF != 0).sum() >= 10


@pytest.mark.parametrize("n_rows", [1, 40])
@pytest.mark.parametrize("k", [1, 3, 60])
@pytest.mark.parametrize("case", ["plain", "ties", "few positive", "none positive", "bound too high"])
def test_one_call_chooses_as_the_definition(case, k, n_rows):
    """Integer scores tie often; where most of the sample is large, its bound lets too few through."""
    if not native.serves():
        pytest.skip("needs the C kernels")
    generator = torch.Generator().manual_seed(1)
    encoding, _, _ = problem(n_rows, 1, 2, 500, 4, torch.float32)
    x, bias = encoding.x_BGN, encoding.bias_GF
    if case == "ties":
        x = torch.randint(-1, 2, x.shape, generator=generator).float()
        bias, encoding = torch.zeros_like(bias), encoding._replace(encoder_GFN=encoding.encoder_GFN.round())
    if case == "few positive":
        bias = bias - 6
    if case == "none positive":
        bias = bias - 1e4
    if case == "bound too high":  # every 5th score, as the sample takes them, is large
        bias = bias + 50 * (torch.arange(500) % 5 == 0)
    encoding = encoding._replace(x_BGN=x, bias_GF=bias, center_GN=torch.zeros_like(encoding.center_GN))
    assert encode._is_one_slab(encoding, k)
    pairs, cut = cpu.encode_batch_top_k(encoding, [k, k])
    for place, own in enumerate(range(2)):
        arguments = (one[own : own + 1] for one in (encoding.center_GN, encoding.encoder_GFN, bias))
        values, features, offsets, expected_cut = reference.encode_batch_top_k(x, *arguments, None, k)
        begin, end = pairs.offsets[place * n_rows], pairs.offsets[(place + 1) * n_rows]
        assert torch.equal(pairs.features[begin:end], features + 500 * place)
        torch.testing.assert_close(pairs.z[begin:end], values)
        torch.testing.assert_close(cut[place], expected_cut[0])
        assert torch.equal(pairs.offsets[place * n_rows :][: n_rows + 1] - begin, offsets)
