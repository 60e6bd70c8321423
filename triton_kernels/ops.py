"""The operators on sparse codes and on the rows of parameters: signature, fake form and derivative of each.

`reference` defines them. The device of the tensors picks the form that runs: `cpu` or `gpu`, which offer the same
functions; codes that are not very sparse go to `dense`. Three primitives (`gather_sum`, `gather_dot`, `scatter_outer`)
are closed under differentiation. The encoders, which make the codes, are in `encoders`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.library import CustomOpDef

from triton_kernels import cpu, dense
from triton_kernels.arguments import AdamRows, AdamSettings, Code
from triton_kernels.reference import sum_dtype

Gradient = Callable[..., Tensor]
operator = functools.partial(torch.library.custom_op, mutates_args=(), device_types=("cpu", "cuda"))


def implementation(tensor: Tensor) -> ModuleType:
    """The module whose functions run on the tensor's device."""
    if tensor.is_cuda:
        from triton_kernels import gpu

        return gpu
    return cpu


def form_for(tensor: Tensor, code: Code, n_features: int) -> ModuleType:
    """`dense` where a code over so many features is better written out, else the device's own module."""
    n_pairs, n_rows = code.values_P.numel(), code.offsets.numel() - 1
    return dense if dense.pays(tensor.device, n_pairs, n_rows, n_features) else implementation(tensor)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Runs an operator as it is told to: autocast rounds nothing in it, and kernels start on the tensor's own GPU."""
    if not tensor.is_cuda and not torch.is_autocast_enabled(tensor.device.type):
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    stack.enter_context(torch.autocast(tensor.device.type, enabled=False))
    if tensor.is_cuda:
        stack.enter_context(torch.cuda.device(tensor.device))
    return stack


def _code(values_P: Tensor, features_P: Tensor, offsets: Tensor) -> Code:
    return Code(values_P, features_P.to(torch.int32), offsets.to(torch.int64))


@operator("crosscoder::gather_sum")
def gather_sum(values_P: Tensor, features_P: Tensor, offsets: Tensor, table_FN: Tensor) -> Tensor:
    """`out[r] = sum over pairs p of row r of values[p] * table[features[p]]`, as `[R, N]`."""
    with on_device_of(table_FN):
        return implementation(table_FN).gather_sum(_code(values_P, features_P, offsets), table_FN)


@operator("crosscoder::gather_dot")
def gather_dot(x_RN: Tensor, features_P: Tensor, offsets: Tensor, table_FN: Tensor) -> Tensor:
    """`out[p] = <x[row of p], table[features[p]]>`, as `[P]`."""
    _, features_P, offsets = _code(x_RN, features_P, offsets)
    with on_device_of(x_RN):
        return implementation(x_RN).gather_dot(x_RN, features_P, offsets, table_FN)


@operator("crosscoder::scatter_outer")
def scatter_outer(values_P: Tensor, features_P: Tensor, offsets: Tensor, x_RN: Tensor, n_features: int) -> Tensor:
    """`out[f] = sum over pairs p with features[p] = f of values[p] * x[row of p]`, as `[F, N]`."""
    with on_device_of(x_RN):
        return implementation(x_RN).scatter_outer(_code(values_P, features_P, offsets), x_RN, n_features)


def _bilinear(primitive: CustomOpDef, fake: Gradient, d_first: Gradient, d_fourth: Gradient) -> None:
    """Registers the fake form of a primitive, and its derivatives: it is linear in its first and fourth argument.

    d_first, d_fourth: from the gradient and the first four arguments.
    """

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])

    def backward(ctx, gradient):
        d_inputs: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for place, derivative in ((0, d_first), (3, d_fourth)):
            if ctx.needs_input_grad[place]:
                d_inputs[place] = derivative(gradient, *ctx.saved_tensors)
        return tuple(d_inputs)

    primitive.register_fake(fake)
    primitive.register_autograd(backward, setup_context=save)


_bilinear(
    gather_sum,
    lambda values, features, offsets, table: table.new_empty(offsets.shape[0] - 1, table.shape[1]),
    lambda gradient, values, features, offsets, table: gather_dot(gradient, features, offsets, table),
    lambda gradient, values, features, offsets, table: scatter_outer(
        values, features, offsets, gradient, table.shape[0]
    ),
)
_bilinear(
    gather_dot,
    lambda x, features, offsets, table: x.new_empty(features.shape[0]),
    lambda gradient, x, features, offsets, table: gather_sum(gradient, features, offsets, table),
    lambda gradient, x, features, offsets, table: scatter_outer(gradient, features, offsets, x, table.shape[0]),
)
_bilinear(
    scatter_outer,
    lambda values, features, offsets, x, n_features: x.new_empty(n_features, x.shape[1]),
    lambda gradient, values, features, offsets, x: gather_dot(x, features, offsets, gradient),
    lambda gradient, values, features, offsets, x: gather_sum(values, features, offsets, gradient),
)


@operator("crosscoder::decode_loss")
def decode_loss(
    values_P: Tensor, features_P: Tensor, offsets: Tensor,
    decoder_GFN: Tensor, bias_GN: Tensor, x_BGN: Tensor, n_parts: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Error of the reconstruction `[B, G, N]`, and its squares summed by part of N, `[G, n_parts]`.

    `error = decoded + bias - x`; both are differentiable, once.
    """
    code = _code(values_P, features_P, offsets)
    with on_device_of(x_BGN):
        return form_for(x_BGN, code, decoder_GFN.shape[1]).decode_loss(code, decoder_GFN, bias_GN, x_BGN, n_parts)


@operator("crosscoder::backward_decoder")
def backward_decoder(
    values_P: Tensor, features_P: Tensor, offsets: Tensor, error_BGN: Tensor, weight_GL: Tensor, decoder_GFN: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `sum(weight * squares)` of `decode_loss` to its values `[P]` and decoder `[G, F, N]`."""
    code = _code(values_P, features_P, offsets)
    with on_device_of(error_BGN):
        form = form_for(error_BGN, code, decoder_GFN.shape[1])
        return form.backward_decoder(code, error_BGN, weight_GL, decoder_GFN)


@operator("crosscoder::backward_encoder")
def backward_encoder(
    d_z_P: Tensor, features_P: Tensor, offsets: Tensor, x_BGN: Tensor, center_GN: Tensor, n_features: int
) -> tuple[Tensor, Tensor]:
    """Gradients to the encoder `[G, F, N]` and its bias `[G, F]`, from those to the pairs' pre-activations."""
    code = _code(d_z_P, features_P, offsets)
    with on_device_of(x_BGN):
        return form_for(x_BGN, code, n_features).backward_encoder(code, x_BGN, center_GN, n_features)


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


def _save_decode_loss(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], output[0])
    ctx.set_materialize_grads(False)


def _decode_loss_backward(ctx, grad_error, grad_squares):
    *code, decoder_GFN, error_BGN = ctx.saved_tensors
    if grad_error is not None:  # the error itself was used: one gradient for both, under a weight that leaves it as is
        if grad_squares is not None:
            grad_error = grad_error + dense.reconstruction_gradient(error_BGN, grad_squares)
        error_BGN = grad_error
        grad_squares = grad_error.new_full((decoder_GFN.shape[0], 1), 0.5)
    if grad_squares is None:
        return (None,) * 7
    d_values = d_decoder = d_bias = d_x = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
        d_values, d_decoder = backward_decoder(*code, error_BGN, grad_squares, decoder_GFN)
    if ctx.needs_input_grad[4]:
        d_bias = dense.reconstruction_gradient(error_BGN.sum(0, keepdim=True), grad_squares)[0]
    if ctx.needs_input_grad[5]:
        d_x = -dense.reconstruction_gradient(error_BGN, grad_squares)
    return d_values, None, None, d_decoder, d_bias, d_x, None


decode_loss.register_autograd(_decode_loss_backward, setup_context=_save_decode_loss)


@torch.no_grad()
def adam_rows(
    parameter_RN: Tensor, gradient_RN: Tensor, first_RN: Tensor, second_RN: Tensor, *, step: int, rate: float,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
    scale_G: Tensor | None = None, unit: bool = False, working_RN: Tensor | None = None,
) -> None:  # fmt: skip
    """One step of AdamW in place on the rows of a parameter: see `reference.adam_rows`.

    step: counted from 1. scale_G: what the gradient rows are multiplied by, one number for each of G equal runs of
    rows. unit: rows have norm 1, stay so, and the gradient's part along them is removed. working_RN: receives the new
    rows in another dtype.
    """
    rows = AdamRows(parameter_RN, gradient_RN, first_RN, second_RN, working_RN)
    settings = AdamSettings(step, rate, betas, eps, weight_decay, scale_G, unit)
    with on_device_of(parameter_RN):
        implementation(parameter_RN).adam_rows(rows, settings)
    torch.autograd.graph.increment_version(parameter_RN)


@torch.no_grad()
def row_squares(gradient_RN: Tensor, unit_RN: Tensor | None = None, *, untouched: bool = False) -> Tensor:
    """Squared norm of each gradient row, `[R]`, without its part along the given row of norm 1, if one is given.

    untouched: nobody has written to the gradient since a backward pass made it, not even through `.data` or by a
        collective; norms that were noted then are given again.
    """
    with on_device_of(gradient_RN):
        return implementation(gradient_RN).row_squares(gradient_RN, unit_RN, untouched=untouched)
