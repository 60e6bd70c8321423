"""The operators that dictionaries call: shapes, devices and derivatives stated once, in `torch.library`.

Three primitives are closed under differentiation (see `reference`). Three encoders choose which pairs exist: the
choice is not differentiated, the values are, and where a kept value is positive the gradient passes to the chosen rows
only. `decode_loss` fuses decoding with the squared error. The device of the tensors picks the implementation:
`triton_kernels.cpu` or `triton_kernels.gpu`, which offer the same names; codes that are not very sparse go to `dense`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from types import ModuleType

import torch
from torch import Tensor

from triton_kernels import dense
from triton_kernels.reference import sum_dtype

DEVICES = ("cpu", "cuda")


def implementation(tensor: Tensor) -> ModuleType:
    """The module whose functions run on the tensor's device."""
    if tensor.is_cuda:
        from triton_kernels import gpu

        return gpu
    from triton_kernels import cpu

    return cpu


@contextlib.contextmanager
def on_device_of(tensor: Tensor) -> Generator[None]:
    """Runs an operator as it is told to: autocast rounds nothing in it, and kernels start on the tensor's own GPU."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(tensor.device.type, enabled=False))
        if tensor.is_cuda:
            stack.enter_context(torch.cuda.device(tensor.device))
        yield


def form_for(tensor: Tensor, n_pairs: int, n_rows: int, n_features: int) -> ModuleType:
    """`dense` where a code of that shape is better written out, else the device's own module."""
    return dense if dense.pays(tensor.device, n_pairs, n_rows, n_features) else implementation(tensor)


@torch.library.custom_op("crosscoder::gather_sum", mutates_args=(), device_types=DEVICES)
def gather_sum(values_P: Tensor, features_P: Tensor, offsets: Tensor, table_FN: Tensor) -> Tensor:
    """`out[r] = sum over pairs p of row r of values[p] * table[features[p]]`, as `[R, N]`."""
    with on_device_of(table_FN):
        return implementation(table_FN).gather_sum(values_P, features_P.to(torch.int32), offsets, table_FN)


@torch.library.custom_op("crosscoder::gather_dot", mutates_args=(), device_types=DEVICES)
def gather_dot(x_RN: Tensor, features_P: Tensor, offsets: Tensor, table_FN: Tensor) -> Tensor:
    """`out[p] = <x[row of p], table[features[p]]>`, as `[P]`."""
    with on_device_of(x_RN):
        return implementation(x_RN).gather_dot(x_RN, features_P.to(torch.int32), offsets, table_FN)


@torch.library.custom_op("crosscoder::scatter_outer", mutates_args=(), device_types=DEVICES)
def scatter_outer(values_P: Tensor, features_P: Tensor, offsets: Tensor, x_RN: Tensor, n_features: int) -> Tensor:
    """`out[f] = sum over pairs p with features[p] = f of values[p] * x[row of p]`, as `[F, N]`."""
    with on_device_of(x_RN):
        return implementation(x_RN).scatter_outer(values_P, features_P.to(torch.int32), offsets, x_RN, n_features)


@torch.library.custom_op("crosscoder::decode_loss", mutates_args=(), device_types=DEVICES)
def decode_loss(
    values_P: Tensor,
    features_P: Tensor,
    offsets: Tensor,
    decoder_GFN: Tensor,
    bias_GN: Tensor,
    x_BGN: Tensor,
    n_parts: int,
) -> tuple[Tensor, Tensor]:
    """Error of the reconstruction `[B, G, N]`, and its squares summed by part of N, `[G, n_parts]`.

    `error = decoded + bias - x`; both are differentiable, once.
    """
    form = form_for(x_BGN, values_P.numel(), offsets.numel() - 1, decoder_GFN.shape[1])
    features_P = features_P.to(torch.int32)
    with on_device_of(x_BGN):
        return form.decode_loss(values_P, features_P, offsets, decoder_GFN, bias_GN, x_BGN, n_parts)


@torch.library.custom_op("crosscoder::backward_decoder", mutates_args=(), device_types=DEVICES)
def backward_decoder(
    values_P: Tensor,
    features_P: Tensor,
    offsets: Tensor,
    error_BGN: Tensor,
    weight_GL: Tensor,
    decoder_GFN: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of `sum(weight * squares)` of `decode_loss` to its values `[P]` and decoder `[G, F, N]`."""
    form = form_for(error_BGN, values_P.numel(), offsets.numel() - 1, decoder_GFN.shape[1])
    features_P = features_P.to(torch.int32)
    with on_device_of(error_BGN):
        return form.backward_decoder(values_P, features_P, offsets, error_BGN, weight_GL, decoder_GFN)


@torch.library.custom_op("crosscoder::backward_encoder", mutates_args=(), device_types=DEVICES)
def backward_encoder(
    d_z_P: Tensor, features_P: Tensor, offsets: Tensor, x_BGN: Tensor, center_GN: Tensor, n_features: int
) -> tuple[Tensor, Tensor]:
    """Gradients to the encoder `[G, F, N]` and its bias `[G, F]`, from those to the pairs' pre-activations."""
    form = form_for(x_BGN, d_z_P.numel(), offsets.numel() - 1, n_features)
    features_P = features_P.to(torch.int32)
    with on_device_of(x_BGN):
        return form.backward_encoder(d_z_P, features_P, offsets, x_BGN, center_GN, n_features)


@gather_sum.register_fake
def _(values_P, features_P, offsets, table_FN):
    return table_FN.new_empty(offsets.shape[0] - 1, table_FN.shape[1])


@gather_dot.register_fake
def _(x_RN, features_P, offsets, table_FN):
    return x_RN.new_empty(features_P.shape[0])


@scatter_outer.register_fake
def _(values_P, features_P, offsets, x_RN, n_features):
    return x_RN.new_empty(n_features, x_RN.shape[1])


@decode_loss.register_fake
def _(values_P, features_P, offsets, decoder_GFN, bias_GN, x_BGN, n_parts):
    squares_GL = decoder_GFN.new_empty(x_BGN.shape[1], n_parts, dtype=sum_dtype(decoder_GFN.dtype))
    return decoder_GFN.new_empty(x_BGN.shape), squares_GL


@backward_decoder.register_fake
def _(values_P, features_P, offsets, error_BGN, weight_GL, decoder_GFN):
    return torch.empty_like(values_P), torch.empty_like(decoder_GFN)


@backward_encoder.register_fake
def _(d_z_P, features_P, offsets, x_BGN, center_GN, n_features):
    n_groups, width = center_GN.shape
    return d_z_P.new_empty(n_groups, n_features, width), d_z_P.new_empty(n_groups, n_features)


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


def _save_decode_loss(ctx, inputs, output):
    values_P, features_P, offsets, decoder_GFN, *_ = inputs
    ctx.save_for_backward(values_P, features_P, offsets, decoder_GFN, output[0])
    ctx.set_materialize_grads(False)


def _spread(weight_GL: Tensor, width: int) -> Tensor:
    """What each column's error is multiplied by to give its gradient, `[G, N]`."""
    return weight_GL.mul(2).repeat_interleave(width // weight_GL.shape[1], dim=1)


def _decode_loss_backward(ctx, grad_error, grad_squares):
    values_P, features_P, offsets, decoder_GFN, error_BGN = ctx.saved_tensors
    width = decoder_GFN.shape[2]
    if grad_error is not None:  # the error itself was used: one gradient for both, under a weight that leaves it as is
        if grad_squares is not None:
            grad_error = grad_error + _spread(grad_squares, width) * error_BGN
        error_BGN = grad_error
        grad_squares = grad_error.new_full((decoder_GFN.shape[0], 1), 0.5)
    if grad_squares is None:
        return (None,) * 7
    d_values = d_decoder = d_bias = d_x = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
        arguments = (values_P, features_P, offsets, error_BGN, grad_squares, decoder_GFN)
        d_values, d_decoder = backward_decoder(*arguments)
    spread_GN = _spread(grad_squares, width)
    if ctx.needs_input_grad[4]:
        d_bias = spread_GN * error_BGN.sum(0)
    if ctx.needs_input_grad[5]:
        d_x = -spread_GN * error_BGN
    return d_values, None, None, d_decoder, d_bias, d_x, None


gather_sum.register_autograd(_gather_sum_backward, setup_context=_save_inputs)
gather_dot.register_autograd(_gather_dot_backward, setup_context=_save_inputs)
scatter_outer.register_autograd(_scatter_outer_backward, setup_context=_save_scatter_outer)
decode_loss.register_autograd(_decode_loss_backward, setup_context=_save_decode_loss)
