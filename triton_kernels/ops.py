"""The operators that dictionaries call: shapes, devices and derivatives stated once, in `torch.library`.

Three primitives are closed under differentiation (see `reference`), and three encoders choose which pairs exist. An
encoder's choice is not differentiated; its values are: where a kept value is positive, the gradient passes to the
chosen rows only. The device of the tensors picks the implementation. Both devices run the stock forms now; a
Triton kernel takes over a device with `register_kernel`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels import selection, stock

DEVICES = ("cpu", "cuda")


@torch.library.custom_op("crosscoder::gather_sum", mutates_args=(), device_types=DEVICES)
def gather_sum(values_P: Tensor, features_P: Tensor, offsets: Tensor, table_FN: Tensor) -> Tensor:
    """`out[r] = sum over pairs p of row r of values[p] * table[features[p]]`, as `[R, N]`."""
    return stock.gather_sum(values_P, features_P, offsets, table_FN)


@torch.library.custom_op("crosscoder::gather_dot", mutates_args=(), device_types=DEVICES)
def gather_dot(x_RN: Tensor, features_P: Tensor, offsets: Tensor, table_FN: Tensor) -> Tensor:
    """`out[p] = <x[row of p], table[features[p]]>`, as `[P]`."""
    return stock.gather_dot(x_RN, features_P, offsets, table_FN)


@torch.library.custom_op("crosscoder::scatter_outer", mutates_args=(), device_types=DEVICES)
def scatter_outer(values_P: Tensor, features_P: Tensor, offsets: Tensor, x_RN: Tensor, n_features: int) -> Tensor:
    """`out[f] = sum over pairs p with features[p] = f of values[p] * x[row of p]`, as `[F, N]`."""
    return stock.scatter_outer(values_P, features_P, offsets, x_RN, n_features)


@torch.library.custom_op("crosscoder::encode_top_k", mutates_args=(), device_types=DEVICES)
def encode_top_k(
    x_BGN: Tensor, center_GN: Tensor, encoder_GFN: Tensor, bias_GF: Tensor, scale_GF: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """Values and global features, `[B * G * k]` each, of the k best scores of each row and dictionary."""
    return selection.select_top_k(x_BGN, center_GN, encoder_GFN, bias_GF, scale_GF, k)


@torch.library.custom_op("crosscoder::encode_batch_top_k", mutates_args=(), device_types=DEVICES)
def encode_batch_top_k(
    x_BGN: Tensor, center_GN: Tensor, encoder_GFN: Tensor, bias_GF: Tensor, scale_GF: Tensor | None, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, global features, offsets and cut `[G]` of the B * k largest positive scores of each dictionary."""
    return selection.select_batch_top_k(x_BGN, center_GN, encoder_GFN, bias_GF, scale_GF, k)


@torch.library.custom_op("crosscoder::encode_threshold", mutates_args=(), device_types=DEVICES)
def encode_threshold(
    x_BGN: Tensor,
    center_GN: Tensor,
    encoder_GFN: Tensor,
    bias_GF: Tensor,
    scale_GF: Tensor | None,
    threshold_G: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, global features and offsets of every positive score above its dictionary's threshold."""
    return selection.select_threshold(x_BGN, center_GN, encoder_GFN, bias_GF, scale_GF, threshold_G)


@gather_sum.register_fake
def _(values_P, features_P, offsets, table_FN):
    return table_FN.new_empty(offsets.shape[0] - 1, table_FN.shape[1])


@gather_dot.register_fake
def _(x_RN, features_P, offsets, table_FN):
    return x_RN.new_empty(features_P.shape[0])


@scatter_outer.register_fake
def _(values_P, features_P, offsets, x_RN, n_features):
    return x_RN.new_empty(n_features, x_RN.shape[1])


@encode_top_k.register_fake
def _(x_BGN, center_GN, encoder_GFN, bias_GF, scale_GF, k):
    n_pairs = x_BGN.shape[0] * x_BGN.shape[1] * k
    return encoder_GFN.new_empty(n_pairs), x_BGN.new_empty(n_pairs, dtype=torch.int32)


@encode_batch_top_k.register_fake
def _(x_BGN, center_GN, encoder_GFN, bias_GF, scale_GF, k):
    n_pairs = torch.library.get_ctx().new_dynamic_size()
    offsets = x_BGN.new_empty(x_BGN.shape[0] * x_BGN.shape[1] + 1, dtype=torch.int64)
    features = x_BGN.new_empty(n_pairs, dtype=torch.int32)
    return encoder_GFN.new_empty(n_pairs), features, offsets, encoder_GFN.new_empty(x_BGN.shape[1])


@encode_threshold.register_fake
def _(x_BGN, center_GN, encoder_GFN, bias_GF, scale_GF, threshold_G):
    n_pairs = torch.library.get_ctx().new_dynamic_size()
    offsets = x_BGN.new_empty(x_BGN.shape[0] * x_BGN.shape[1] + 1, dtype=torch.int64)
    return encoder_GFN.new_empty(n_pairs), x_BGN.new_empty(n_pairs, dtype=torch.int32), offsets


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gather_sum_backward(ctx, grad_RN):
    values_P, features_P, offsets, table_FN = ctx.saved_tensors
    d_values = d_table = None
    if ctx.needs_input_grad[0]:
        d_values = gather_dot(grad_RN, features_P, offsets, table_FN)
    if ctx.needs_input_grad[3]:
        d_table = scatter_outer(values_P, features_P, offsets, grad_RN, table_FN.shape[0])
    return d_values, None, None, d_table


def _gather_dot_backward(ctx, grad_P):
    x_RN, features_P, offsets, table_FN = ctx.saved_tensors
    d_x = d_table = None
    if ctx.needs_input_grad[0]:
        d_x = gather_sum(grad_P, features_P, offsets, table_FN)
    if ctx.needs_input_grad[3]:
        d_table = scatter_outer(grad_P, features_P, offsets, x_RN, table_FN.shape[0])
    return d_x, None, None, d_table


def _save_scatter_outer(ctx, inputs, output):
    values_P, features_P, offsets, x_RN, _ = inputs
    ctx.save_for_backward(values_P, features_P, offsets, x_RN)


def _scatter_outer_backward(ctx, grad_FN):
    values_P, features_P, offsets, x_RN = ctx.saved_tensors
    d_values = d_x = None
    if ctx.needs_input_grad[0]:
        d_values = gather_dot(x_RN, features_P, offsets, grad_FN)
    if ctx.needs_input_grad[3]:
        d_x = gather_sum(values_P, features_P, offsets, grad_FN)
    return d_values, None, None, d_x, None


def _save_encode_top_k(ctx, inputs, output):
    x_BGN, center_GN, encoder_GFN, _, _, k = inputs
    values_P, features_P = output
    offsets = torch.arange(0, values_P.numel() + 1, k, device=values_P.device)
    ctx.save_for_backward(x_BGN, center_GN, encoder_GFN, values_P, features_P, offsets)


def _save_encode_ragged(ctx, inputs, output):
    x_BGN, center_GN, encoder_GFN = inputs[:3]
    values_P, features_P, offsets = output[:3]
    ctx.save_for_backward(x_BGN, center_GN, encoder_GFN, values_P, features_P, offsets)


def _encode_backward(ctx, grad_values_P, *_):
    x_BGN, center_GN, encoder_GFN, values_P, features_P, offsets = ctx.saved_tensors
    n_groups, n_features, width = encoder_GFN.shape
    n_rows = n_groups * n_features
    d_z = torch.where(values_P > 0, grad_values_P, 0)  # relu: a clipped value passes nothing back
    d_x = d_center = d_encoder = d_bias = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
        ones = encoder_GFN.new_ones(offsets.numel() - 1, 1)
        d_bias = scatter_outer(d_z, features_P, offsets, ones, n_rows).view(n_groups, n_features)
    if ctx.needs_input_grad[0]:
        table = encoder_GFN.reshape(n_rows, width)
        d_x = gather_sum(d_z, features_P, offsets, table).view(x_BGN.shape).to(x_BGN.dtype)
    if ctx.needs_input_grad[1]:
        assert d_bias is not None
        d_center = -torch.einsum("gf,gfn->gn", d_bias, encoder_GFN).to(center_GN.dtype)
    if ctx.needs_input_grad[2]:
        x_RN = (x_BGN - center_GN).reshape(-1, width).to(encoder_GFN.dtype)
        d_encoder = scatter_outer(d_z, features_P, offsets, x_RN, n_rows).view(encoder_GFN.shape)
    return d_x, d_center, d_encoder, d_bias, None, None


gather_sum.register_autograd(_gather_sum_backward, setup_context=_save_inputs)
gather_dot.register_autograd(_gather_dot_backward, setup_context=_save_inputs)
scatter_outer.register_autograd(_scatter_outer_backward, setup_context=_save_scatter_outer)
encode_top_k.register_autograd(_encode_backward, setup_context=_save_encode_top_k)
encode_batch_top_k.register_autograd(_encode_backward, setup_context=_save_encode_ragged)
encode_threshold.register_autograd(_encode_backward, setup_context=_save_encode_ragged)
