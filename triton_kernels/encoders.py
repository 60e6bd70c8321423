"""The three encoders: signature, fake form and common derivative; `reference` defines them.

They take x `[B, G, N]`, center `[G, N]`, encoder `[G, F, N]`, bias `[G, F]` and scale `[G, F]` or None. The
pre-activation of a feature is `z = <x - center, encoder row> + bias`, its score `z * scale`, its value relu(z). Scores
choose the pairs; the choice is not differentiated, and gradients reach the chosen rows where the value is positive.
`product` is the dtype in which scores are computed. Where it is the encoder's own, the choice is that of exact scores;
where it is bf16 on a wider encoder, rounded scores choose and z is computed again in the encoder's dtype, so that
values and gradients are exact for the chosen pairs. A z that was positive when rounded may then be 0 or less: the pair
is kept with the value 0. `working` may hold the encoder already rounded to `product`.
Features are global, `g * F + f`, ascending within a row, and a row is `b * G + g`.

The scores of the kept pairs follow without loss from what an encoder returns, for a further cut among them (over
shards of the features): z is returned, or the value is z because only positive scores are kept (0 where z, computed
again, is not positive).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from triton_kernels.arguments import Above, Code, Encoding
from triton_kernels.ops import backward_encoder, gather_sum, implementation, on_device_of, operator

PARTS_OF_A_SUM = 8  # products into which the gradient to the center is cut


@operator("crosscoder::encode_top_k")
def encode_top_k(
    x_BGN: Tensor, center_GN: Tensor, encoder_GFN: Tensor, bias_GF: Tensor, scale_GF: Tensor | None,
    k: int, product: torch.dtype, working_GFN: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Values, features and z, `[B * G * k]` each, of the k best scores of each row; equal scores by lowest feature.

    A row with fewer than k positive z keeps some that are not: their values are 0. z is without gradient.
    """
    encoding = Encoding(x_BGN, center_GN, encoder_GFN, bias_GF, scale_GF, product, working_GFN)
    with on_device_of(x_BGN):
        z_P, features_P = implementation(x_BGN).encode_top_k(encoding, [k] * len(encoder_GFN))
        return z_P.relu(), features_P, z_P


@operator("crosscoder::encode_batch_top_k")
def encode_batch_top_k(
    x_BGN: Tensor, center_GN: Tensor, encoder_GFN: Tensor, bias_GF: Tensor, scale_GF: Tensor | None,
    k: int, product: torch.dtype, working_GFN: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Values, features, offsets `[B * G + 1]` and cut `[G]` of the B * k largest positive scores of each dictionary.

    Equal scores go to the lowest (row, feature). Fewer pairs come back only where fewer scores are positive; the cut
    is the smallest kept score, 0 where there is none. A value is its z, and value times scale the score, but for a z
    that rounded scores chose and that is not positive: its value is 0.
    """
    encoding = Encoding(x_BGN, center_GN, encoder_GFN, bias_GF, scale_GF, product, working_GFN)
    with on_device_of(x_BGN):
        pairs, cut_G = implementation(x_BGN).encode_batch_top_k(encoding, [k] * len(encoder_GFN))
        return pairs.z.relu(), pairs.features, pairs.offsets, cut_G


@operator("crosscoder::encode_threshold")
def encode_threshold(
    x_BGN: Tensor, center_GN: Tensor, encoder_GFN: Tensor, bias_GF: Tensor, scale_GF: Tensor | None,
    threshold_GF: Tensor, window: float, product: torch.dtype, working_GFN: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Values, features, offsets and z of every positive z with `score > threshold - window / 2`.

    Where rounded scores choose, they say which z is positive too. The value is relu(z) where the score is above the
    threshold and 0 in the lower half of the window, whose pairs exist for the threshold's straight-through gradient:
    `-(theta / scale / window)` for scores within half a window of theta, 0 elsewhere (JumpReLU with a rectangular
    kernel, Rajamanoharan et al. 2024, arXiv 2407.14435). z is without gradient.
    """
    encoding = Encoding(x_BGN, center_GN, encoder_GFN, bias_GF, scale_GF, product, working_GFN)
    with on_device_of(x_BGN):
        code, z_P = above_thresholds(encoding, Above(threshold_GF, window))
        return *code, z_P


def above_thresholds(encoding: Encoding, above: Above) -> tuple[Code, Tensor]:
    """The code of `encode_threshold` and its pairs' z."""
    z_P, score_P, features_P, offsets = implementation(encoding.x_BGN).encode_threshold(encoding, *above)
    theta_P = above.threshold_GF.reshape(-1)[features_P].to(score_P.dtype)
    return Code(torch.where(score_P > theta_P, z_P.relu(), 0), features_P, offsets), z_P


@encode_top_k.register_fake
def _(x_BGN, center_GN, encoder_GFN, bias_GF, scale_GF, k, product, working_GFN):
    n_pairs = x_BGN.shape[0] * x_BGN.shape[1] * k
    values = encoder_GFN.new_empty(n_pairs)
    return values, x_BGN.new_empty(n_pairs, dtype=torch.int32), torch.empty_like(values)


def _fake_code(x_BGN: Tensor, encoder_GFN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n_pairs = torch.library.get_ctx().new_dynamic_size()
    offsets = x_BGN.new_empty(x_BGN.shape[0] * x_BGN.shape[1] + 1, dtype=torch.int64)
    return encoder_GFN.new_empty(n_pairs), x_BGN.new_empty(n_pairs, dtype=torch.int32), offsets


@encode_batch_top_k.register_fake
def _(x_BGN, center_GN, encoder_GFN, bias_GF, scale_GF, k, product, working_GFN):
    return *_fake_code(x_BGN, encoder_GFN), encoder_GFN.new_empty(x_BGN.shape[1])


@encode_threshold.register_fake
def _(x_BGN, center_GN, encoder_GFN, bias_GF, scale_GF, threshold_GF, window, product, working_GFN):
    code = _fake_code(x_BGN, encoder_GFN)
    return *code, torch.empty_like(code[0])


def _save_top_k(ctx, inputs, output):
    values_P, features_P, z_P = output
    ctx.mark_non_differentiable(z_P)
    offsets = torch.arange(0, values_P.numel() + 1, inputs[5], device=values_P.device)
    ctx.save_for_backward(*inputs[:3], values_P, features_P, offsets)


def _save_batch_top_k(ctx, inputs, output):
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(*inputs[:3], *output[:3])


def _save_threshold(ctx, inputs, output):
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(*inputs[:3], *output[:3], inputs[4], inputs[5], output[3])
    ctx.window = inputs[6]


def _through_pairs(ctx, grad_values_P):
    """Gradients to x, center, encoder and bias by way of the kept pairs' z."""
    x_BGN, center_GN, encoder_GFN, values_P, features_P, offsets = ctx.saved_tensors[:6]
    n_features, width = encoder_GFN.shape[1:]
    d_z = torch.where(values_P > 0, grad_values_P, 0)  # relu: a clipped value passes nothing back
    d_x = d_center = d_encoder = d_bias = None
    if any(ctx.needs_input_grad[1:4]):
        d_encoder, d_bias = backward_encoder(d_z, features_P, offsets, x_BGN, center_GN, n_features)
    if ctx.needs_input_grad[0]:
        table_FN = encoder_GFN.reshape(-1, width)
        d_x = gather_sum(d_z, features_P, offsets, table_FN).view(x_BGN.shape).to(x_BGN.dtype)
    if ctx.needs_input_grad[1]:
        assert d_bias is not None
        with torch.autocast(d_bias.device.type, enabled=False):
            d_center = -sum_of_rows(d_bias, encoder_GFN).to(center_GN.dtype)
    return d_x, d_center, d_encoder, d_bias


def sum_of_rows(weight_GF: Tensor, table_GFN: Tensor) -> Tensor:
    """`sum over f of weight[g, f] * table[g, f]`, `[G, N]`: a few products at a time, so that no thread waits."""
    n_groups, n_features, width = table_GFN.shape
    n_parts = math.gcd(n_features, PARTS_OF_A_SUM)
    parts = torch.bmm(weight_GF.reshape(n_groups * n_parts, 1, -1), table_GFN.reshape(n_groups * n_parts, -1, width))
    return parts.view(n_groups, n_parts, width).sum(1)


def _top_k_backward(ctx, grad_values_P, *_):
    return (*_through_pairs(ctx, grad_values_P), None, None, None, None)


def _threshold_backward(ctx, grad_values_P, *_):
    d_threshold = None
    if ctx.needs_input_grad[5] and ctx.window > 0:
        features_P, (scale_GF, threshold_GF, z_P) = ctx.saved_tensors[4], ctx.saved_tensors[6:]
        d_threshold = pull_on_thresholds(Above(threshold_GF, ctx.window), z_P, features_P, scale_GF, grad_values_P)
    return (*_through_pairs(ctx, grad_values_P), None, d_threshold, None, None, None)


def pull_on_thresholds(
    above: Above, z_P: Tensor, features_P: Tensor, scale_GF: Tensor | None, grad_values_P: Tensor
) -> Tensor:
    """The straight-through gradient to the thresholds, `[G, F]`, from that to the values."""
    threshold_GF, window = above
    theta_P = threshold_GF.reshape(-1)[features_P]
    scale_P = 1.0 if scale_GF is None else scale_GF.reshape(-1)[features_P]
    inside = (z_P * scale_P - theta_P).abs() < window / 2
    pulls_P = torch.where(inside, -theta_P / scale_P / window * grad_values_P, 0)  # z is theta / scale there
    flat = torch.zeros_like(threshold_GF).reshape(-1).index_add(0, features_P, pulls_P.to(threshold_GF.dtype))
    return flat.view(threshold_GF.shape)


encode_top_k.register_autograd(_top_k_backward, setup_context=_save_top_k)
encode_batch_top_k.register_autograd(_top_k_backward, setup_context=_save_batch_top_k)
encode_threshold.register_autograd(_threshold_backward, setup_context=_save_threshold)
