"""The gradients of one batch: by the operators themselves where the loss is the error of one reconstruction and what
thresholds alone pay, else by autograd.

Several dictionaries may stand side by side in one state (`side_by_side`); each has its own terms and its own error.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

import triton_kernels
from crosscoder.dictionary import BatchTopK, Crosscoder, Dictionary, JumpReLU, LayerwiseSAE, SparseCode, TopK
from crosscoder.dictionary.codec import selection_scale, thresholds
from crosscoder.dictionary.losses import add_auxiliary_gradients, add_threshold_penalty, loss_terms
from crosscoder.dictionary.shard import GRADIENTS
from crosscoder.dictionary.sparsity import L0Penalty, TargetL0Penalty
from crosscoder.foundation.ranks import Ranks
from crosscoder.training.state import StackState, State, TrainState
from triton_kernels.arguments import Above, Encoding, Largest


class Gradients(NamedTuple):
    """What a step needs to know beside the gradients, which the parameters hold."""

    terms: list[dict[str, Tensor]]
    """Of each dictionary: the terms of its loss."""
    code: SparseCode
    """Of all dictionaries."""
    errors: list[Tensor]
    """Of each dictionary: reconstruction minus input, `[B, L, D]`."""
    squares: dict[str, Tensor] | None = None
    """Of the gradients' rows (`RowAdam.row_squares`), where they were taken on the way."""

    def losses(self) -> Tensor:
        """The whole loss of each dictionary, `[S]`."""
        return torch.stack([torch.stack(list(terms.values())).sum() for terms in self.terms])


def is_direct(dictionary: Dictionary) -> bool:
    """Whether the loss is the error of one reconstruction, but for the auxiliary term and for what thresholds alone
    pay, of weights as they are.

    A subclass, a parametrised weight or a hook on a gradient may change what autograd would find.
    """
    plain = type(dictionary) in (Crosscoder, LayerwiseSAE) and not dictionary.config.prefixes
    hooked = any(p._backward_hooks or p._post_accumulate_grad_hooks for p in dictionary.parameters())
    match dictionary.config.sparsity:
        case TopK() | BatchTopK():
            return plain and not hooked
        case JumpReLU(penalty=L0Penalty() | TargetL0Penalty()):  # which thresholds alone pay
            return plain and not hooked and dictionary.shard is None
        case _:
            return False


def accumulate_gradients(
    state: State, x_BLD: Tensor, *, dead_GF: Tensor, penalty_factor: float, precision: str
) -> Gradients:
    """The gradients of a batch, in the parameters' `grad`, and the terms of the loss, summed over a bank's layers and,
    where ranks share out a batch, over all its tokens, of which `x_BLD` are this rank's (`DataRanks.part`).

    dead_GF: features for the auxiliary term. penalty_factor: of a sparsity rule's penalty. precision: as in
    `TrainConfig`.
    """
    rounded, autocast = precision == "bf16", torch.autocast(x_BLD.device.type, torch.bfloat16)
    with autocast if rounded else contextlib.nullcontext():
        if isinstance(state, StackState) or is_direct(state.dictionary):
            found = _directly(state, x_BLD, rounded=rounded)
            if state.weights.log_threshold is not None:
                _add_penalties(state, found, penalty_factor)
            found = _with_auxiliary(state, x_BLD, dead_GF, found)
        else:
            found = _by_autograd(state, x_BLD, dead_GF, penalty_factor)
    if state.weights.data.size > 1:
        _sum_over_tokens(state.members[0].dictionary)
    if state.weights.by_layer is not None:
        (terms,) = found.terms
        whole = state.weights.of_layers(torch.stack(list(terms.values())).detach())
        found = found._replace(terms=[dict(zip(terms, whole, strict=True))])
    return found


def _sum_over_tokens(dictionary: Dictionary) -> None:
    """Add the gradients of all ranks' tokens; of what every rank has whole in one sum, so that it stays the same."""
    ranks = dictionary.shard.ranks if dictionary.shard else Ranks()
    for name, parameter in dictionary.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad = parameter.grad.contiguous()
            if dictionary.axis_of(name) is not None:
                ranks.data.add(gradient, GRADIENTS)
            else:
                ranks.job.add(gradient if ranks.is_first else gradient.zero_(), GRADIENTS)


def _by_autograd(state: TrainState, x_BLD: Tensor, dead_GF: Tensor, penalty_factor: float) -> Gradients:
    out = loss_terms(
        state.dictionary,
        x_BLD,
        dead_GF=dead_GF,
        penalty_factor=penalty_factor,
        working_GFN=state.optimizer.working_GFN,
    )
    found = Gradients([out.terms], out.code, [out.error_BLD])
    found.losses().sum().backward()
    return found


@torch.no_grad()
def _directly(state: State, x_BLD: Tensor, *, rounded: bool) -> Gradients:
    """The gradients of the error, written over what `grad` holds."""
    weights, members = state.weights, state.members
    config, grouped = weights.config, weights.grouped()
    encoder_GFN, decoder_GFN, bias_GF, center_GN, *_ = grouped
    (n_groups, width), n_members = center_GN.shape, len(members)
    x_BGN = x_BLD.reshape(-1, n_groups // n_members, width)
    n_written = weights.data.of_all(x_BLD.shape[0]) * config.n_written()
    weight_GL = center_GN.new_full((n_groups, width // config.d_model), 1 / n_written)
    if (first := config.written().start) > 0:
        weight_GL.view(n_members, -1)[:, :first] = 0
    scale_GF = selection_scale(grouped, config)
    working_GFN = state.optimizer.working_GFN if scale_GF is None else None
    product = torch.bfloat16 if rounded else encoder_GFN.dtype
    choice, theta_GF = Largest(state.k_G, isinstance(config.sparsity, BatchTopK)), None
    if isinstance(config.sparsity, JumpReLU):
        theta_GF = thresholds(grouped, config, weights.threshold)
        choice = Above(theta_GF, config.sparsity.window)
    found = triton_kernels.reconstruct(
        Encoding(x_BGN, center_GN, encoder_GFN, bias_GF, scale_GF, product, working_GFN),
        decoder_GFN,
        weight_GL,
        choice,
        sizes=[one.dictionary.n_held for one in members],
        shards=weights.others,
    )
    if found.cut_G is not None:
        weights.follow(found.cut_G)
    for parameter, gradient, mask in (
        (weights.encoder, found.d_encoder_GFN, weights.read_mask),
        (weights.decoder, found.d_decoder_GFN, weights.write_mask),
        (weights.encoder_bias, found.d_bias_GF, None),
        (weights.decoder_bias, found.d_center_GN, None),
    ):
        if parameter.requires_grad:
            gradient = gradient.view(parameter.shape)
            parameter.grad = gradient if mask is None else gradient.mul_(mask)
    if theta_GF is not None and weights.log_threshold is not None and weights.log_threshold.requires_grad:
        assert found.d_threshold_GF is not None
        weights.log_threshold.grad = (found.d_threshold_GF * theta_GF).view(weights.log_threshold.shape)
    if isinstance(state, StackState):
        state.share_gradients()
    values, features, offsets = found.code
    code = SparseCode(values, features, offsets, n_groups * weights.n_held, (offsets.numel() - 1,), features)
    errors = [error_BGN.view(x_BLD.shape) for error_BGN in found.error_SBGN]
    squares = [weights.of_tokens(one.flatten()[config.written()].sum()) for one in found.squares_GL.chunk(n_members)]
    return Gradients([{"recon": square / n_written} for square in squares], code, errors)


def _add_penalties(state: State, found: Gradients, penalty_factor: float) -> None:
    """The penalty of each dictionary's thresholds, and its gradients."""
    code, n_members = found.code, len(state.members)
    n_rows, n_features = code.n_rows // n_members, code.n_features // n_members
    for place, one in enumerate(state.members):
        offsets = code.offsets[place * n_rows : (place + 1) * n_rows + 1]
        pairs = slice(int(offsets[0]), int(offsets[-1]))
        features = code.features[pairs] - place * n_features
        own = SparseCode(code.values[pairs], features, offsets - offsets[0], n_features, (n_rows,), features)
        found.terms[place]["penalty"] = add_threshold_penalty(one.dictionary, own, penalty_factor)


def _with_auxiliary(state: State, x_BLD: Tensor, dead_GF: Tensor, found: Gradients) -> Gradients:
    """With the auxiliary term of each dictionary that has dead features, its gradients added.

    The kernels noted the squares of the gradients that they wrote, which are held to be outdated once any part of them
    was written to. For the dictionaries without a term they are not, and anew they would differ in the last bit.
    """
    if state.weights.config.aux_k == 0:
        return found
    members = state.members
    dead = [
        part_GF[:, : one.dictionary.n_held] for one, part_GF in zip(members, dead_GF.chunk(len(members)), strict=True)
    ]
    places = [place for place, own_GF in enumerate(dead) if members[place].dictionary.on_any(own_GF.any())]
    if not places:
        return found
    squares: dict[str, Tensor] = {}
    if len(places) < len(members):
        squares = {name: rows.clone() for name, rows in state.optimizer.row_squares(untouched=True).items()}
    for place in places:
        one = members[place]
        term = add_auxiliary_gradients(one.dictionary, x_BLD, found.errors[place], dead[place])
        found.terms[place]["aux_k"] = term
        for name, own in one.optimizer.row_squares(untouched=True).items() if squares else ():
            part = squares[name].view(state.weights.n_groups, -1).chunk(len(members))[place]
            own = own.view(len(part), -1)
            part[:, : own.shape[1]] = own
    return found._replace(squares=squares or None)
