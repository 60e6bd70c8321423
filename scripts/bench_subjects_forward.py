"""A subject's loss by a short forward of our own: the same weights as `transformers`' Llama, equal to rounding.

What a norm multiplies is folded into the weights that read it, so that it is one pass over weights instead of one over
tokens; a rotation is one complex product of neighbouring numbers, to which rows of the weights are brought; the width
of a SwiGLU is filled up with zeros to whole vectors; and what can be computed again is not kept for the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

VECTOR = 16
"""Numbers of a row that the CPU's widest registers take at once."""


def own_loss(model: Any, ids_BS: Tensor) -> Tensor:
    """Mean cross-entropy of each next token, in nats, as `subject_training.next_token_loss` gives it."""
    (n_sequences, length), eps = ids_BS.shape, model.config.rms_norm_eps
    angles_SP = torch.outer(torch.arange(length, device=ids_BS.device), model.model.rotary_emb.inv_freq)
    rotation_SP = torch.polar(torch.ones_like(angles_SP), angles_SP)[:, None]

    def heads(x_TD: Tensor, *, rotated: bool) -> Tensor:
        x_BSHP2 = x_TD.view(n_sequences, length, -1, angles_SP.shape[1], 2)
        if rotated:
            x_BSHP2 = torch.view_as_real(torch.view_as_complex(x_BSHP2) * rotation_SP)
        return x_BSHP2.flatten(3).transpose(1, 2)

    x_TD = model.model.embed_tokens(ids_BS.flatten())
    for q, k, v, out, gate, up, down in _weights(model):
        q_TD, k_TD, v_TD = _Read.apply(x_TD, eps, q, k, v)
        attended = heads(q_TD, rotated=True), heads(k_TD, rotated=True), heads(v_TD, rotated=False)
        mixed_BHSd = F.scaled_dot_product_attention(*attended, is_causal=True)
        x_TD = torch.addmm(x_TD, mixed_BHSd.transpose(1, 2).reshape(x_TD.shape), out.T)
        x_TD = torch.addmm(x_TD, _SwiGLU.apply(*_Read.apply(x_TD, eps, gate, up)), down.T)
    (logits_TV,) = _Read.apply(x_TD, eps, model.lm_head.weight * model.model.norm.weight)
    return F.cross_entropy(logits_TV, F.pad(ids_BS[:, 1:], (0, 1), value=-100).flatten())


def _weights(model: Any) -> list[Sequence[Tensor]]:
    """What each block multiplies with: queries, keys, values, their output, gate, up, down."""
    layers, head_dim = model.model.layers, model.config.head_dim

    def stacked(name: str, norm: str | None = None) -> Tensor:
        weight_LOI = torch.stack([layer.get_parameter(f"{name}.weight") for layer in layers])
        norms = () if norm is None else [layer.get_parameter(f"{norm}.weight") for layer in layers]
        return weight_LOI * torch.stack(norms)[:, None] if norms else weight_LOI

    q, k, v = (stacked(f"self_attn.{name}_proj", "input_layernorm") for name in "qkv")
    gate, up = (stacked(f"mlp.{name}_proj", "post_attention_layernorm") for name in ("gate", "up"))
    pairs = torch.arange(q.shape[1], device=q.device).view(-1, 2, head_dim // 2).mT.flatten()
    more = -gate.shape[1] % VECTOR
    wide = [F.pad(weight, (0, 0, 0, more)) for weight in (gate, up)]
    down = F.pad(stacked("mlp.down_proj"), (0, more))
    return list(zip(*(q[:, pairs], k[:, pairs], v, stacked("self_attn.o_proj"), *wide, down), strict=True))


class _Read(Function):
    """The RMS norm of each row, times each of the weights."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, eps: float, *weights: Tensor) -> tuple[Tensor, ...]:
        scale_T1 = torch.linalg.vector_norm(x_TD, dim=1, keepdim=True).square().div_(x_TD.shape[1]).add_(eps).rsqrt_()
        normed_TD = x_TD * scale_T1
        ctx.save_for_backward(normed_TD, scale_T1, *weights)
        return tuple(normed_TD @ weight.T for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        normed_TD, scale_T1, *weights = ctx.saved_tensors
        grad_TD = grads[0] @ weights[0]
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            grad_TD.addmm_(grad, weight)
        along_T = torch.linalg.vecdot(normed_TD, grad_TD) / -normed_TD.shape[1]
        grad_TD.addcmul_(normed_TD, along_T[:, None]).mul_(scale_T1)
        return grad_TD, None, *(grad.T @ normed_TD for grad in grads)


class _SwiGLU(Function):
    """`silu(gate) * up`, of which the backward keeps the two factors alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,), (gate, up) = grads, ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
