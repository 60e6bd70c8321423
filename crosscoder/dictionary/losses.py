"""Loss terms of a training step, each already multiplied by its coefficient, as one dict.

What is summed for the backward pass is what is logged: a term cannot be shown without being optimised.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

import triton_kernels
from crosscoder.dictionary import codec
from crosscoder.dictionary.choice import keep_top_k
from crosscoder.dictionary.codec import Grouped, SparseCode
from crosscoder.dictionary.config import DictionaryConfig
from crosscoder.dictionary.dictionary import Dictionary
from crosscoder.dictionary.shard import RECONSTRUCTION, Shard
from crosscoder.dictionary.sparsity import JumpReLU, L0Penalty, NormPenalty, ReLU, TanhPenalty, TargetL0Penalty

AUX_COEFFICIENT = 1 / 32  # Gao et al. 2024, section A.2
MAX_DEFAULT_AUX_K = 512


class LossOutput(NamedTuple):
    """What a training step needs of a forward pass."""

    terms: dict[str, Tensor]
    code: SparseCode
    error_BLD: Tensor
    """Reconstruction minus input, without gradient."""


def loss_terms(
    dictionary: Dictionary,
    x_BLD: Tensor,
    *,
    dead_GF: Tensor | None = None,
    penalty_factor: float = 1.0,
    working_GFN: Tensor | None = None,
) -> LossOutput:
    """`recon`, the mean squared error per number that is reconstructed, and what the config asks for beside it.

    Of a bank that ranks divide by layers the terms are these layers' part of the whole, which sums them. In a mesh they
    are those of the whole batch, of which `x_BLD` is this rank's tokens (`DataRanks.part`), and gradients are theirs.

    `recon_prefixes`: errors of `config.prefixes` alone. With the whole dictionary they are M nested ones, each counts
    1 / M, and `recon` holds the whole one's share (Bussmann et al. 2025, arXiv 2503.17547, section 3, as a mean).
    `penalty`: what the sparsity rule charges. `aux_k`: where features are dead, see `auxiliary_term`.

    Decoding and error are one operator, so the reconstruction itself is never stored. The sum of the terms is the loss;
    in a loop of your own call `dictionary.project_()` after each step (`docs/training.md`).

    dead_GF: True for features that the auxiliary term should revive; None or all False leaves the term out.
    penalty_factor: what the penalty is multiplied by, for its warm-up.
    working_GFN: the encoder rounded for its product, where an optimiser keeps one.
    """
    config, grouped = dictionary.config, dictionary.grouped()._replace(working_GFN=working_GFN)
    x_BGN, shard = grouped.split(x_BLD), dictionary.others
    reading = grouped if shard is None else grouped._replace(center_GN=shard.of_all(grouped.center_GN))
    code = dictionary.encode_checked(x_BLD, reading, batch_shape=x_BLD.shape[:1])
    error_BGN, square = _written_error(x_BGN, code, grouped, config, shard)
    error_BLD = error_BGN.detach().view(x_BLD.shape)
    n_tokens = dictionary.data.of_all(x_BLD.shape[0])
    n_written = n_tokens * config.n_written()
    n_nested = 1 + len(config.prefixes)
    terms = {"recon": square / (n_written * n_nested)}
    if config.prefixes:
        first = 0 if shard is None else shard.start
        nested = [code.prefix(size - first) for size in config.prefix_sizes()]
        squares = [_written_error(x_BGN, part, grouped, config, shard)[1] for part in nested]
        terms["recon_prefixes"] = torch.stack(squares).sum() / (n_written * n_nested)
    if isinstance(config.sparsity, ReLU | JumpReLU):
        terms["penalty"] = penalty_factor * _penalty(code, grouped, dictionary, n_tokens)
    if dead_GF is not None and config.aux_k != 0 and dictionary.on_any(dead_GF.any()):
        terms["aux_k"] = auxiliary_term(dictionary, x_BLD, error_BLD, dead_GF)
    return LossOutput(terms, code, error_BLD)


def _written_error(
    x_BGN: Tensor, code: SparseCode, grouped: Grouped, config: DictionaryConfig, shard: Shard | None
) -> tuple[Tensor, Tensor]:
    """Error of a code's reconstruction `[B, G, N]`, and the sum of its squares over the layers that are written."""
    decoder_GFN, center_GN = grouped.decoder_GFN, grouped.center_GN
    values, features = code.values.to(decoder_GFN.dtype), codec.to_global(code, len(center_GN))
    n_parts = x_BGN.shape[2] // config.d_model
    if shard is not None:
        part_RN = triton_kernels.gather_sum(values, features, code.offsets, decoder_GFN.flatten(0, 1))
        error_BGN = shard.total(part_RN, RECONSTRUCTION).view(x_BGN.shape) + center_GN - x_BGN
        squares_GL = error_BGN.unflatten(2, (n_parts, -1)).square().sum((0, 3), dtype=torch.float64)
        return error_BGN, shard.over_tokens(squares_GL.flatten()[config.written()].sum()).to(error_BGN.dtype)
    error_BGN, squares_GL = triton_kernels.decode_loss(
        values, features, code.offsets, decoder_GFN, center_GN, x_BGN, n_parts
    )
    return error_BGN, squares_GL.flatten()[config.written()].sum()


def _penalty(code: SparseCode, grouped: Grouped, dictionary: Dictionary, n_tokens: int) -> Tensor:
    """What the rule's penalty charges for a code of `n_tokens` tokens on all ranks, coefficient included: the mean over
    rows, or these layers' part of it."""
    config, shard, n_groups = dictionary.config, dictionary.others, dictionary.n_groups_of_all
    sparsity, d_model = config.sparsity, config.d_model
    n_rows, n_written = max(1, n_tokens * dictionary.rows_of_token), n_tokens * config.n_written()
    assert isinstance(sparsity, ReLU | JumpReLU)
    penalty = sparsity.penalty
    features = codec.to_global(code, grouped.center_GN.shape[0])
    match penalty:
        case NormPenalty(norm=norm):
            norms_GF = codec.decoder_norms(grouped.decoder_GFN, norm, d_model=d_model)
            charge = _of_all((code.values * norms_GF.flatten()[features]).sum(), shard) / max(1, n_written)
        case TanhPenalty(scale=scale):
            norms_GF = codec.decoder_norms(grouped.decoder_GFN, "l2", d_model=d_model)
            charge = _of_all((scale * code.values * norms_GF.flatten()[features]).tanh().sum(), shard) / n_rows
        case L0Penalty():
            active_G = _active_per_token(code, features, grouped, sparsity, n_rows / n_groups)
            charge = _of_all(active_G, shard).sum() / n_groups
        case TargetL0Penalty(target=target):
            active_G = _of_all(_active_per_token(code, features, grouped, sparsity, n_rows / n_groups), shard)
            charge = (active_G / target - 1).square().sum() / n_groups
    return penalty.coefficient * charge


def add_threshold_penalty(dictionary: Dictionary, code: SparseCode, penalty_factor: float) -> Tensor:
    """The `penalty` of a JumpReLU dictionary that thresholds alone pay, of a code of all its tokens; its gradient is
    added to what their `grad` holds: the same bits as by autograd."""
    grouped, parameter = dictionary.grouped(), dictionary.log_threshold
    assert parameter is not None
    n_tokens = code.n_rows // dictionary.rows_of_token
    with torch.enable_grad():
        log_GF = parameter.detach().view(dictionary.n_groups, -1).requires_grad_()
        own = grouped._replace(log_threshold_GF=log_GF)
        term = penalty_factor * _penalty(code, own, dictionary, n_tokens)
        (gradient_GF,) = torch.autograd.grad(term, log_GF)
    if parameter.grad is not None:
        parameter.grad += gradient_GF.view(parameter.shape)
    return term.detach()


def _of_all(part: Tensor, shard: Shard | None) -> Tensor:
    return part if shard is None else shard.total(shard.over_tokens(part))


def _active_per_token(
    code: SparseCode, features: Tensor, grouped: Grouped, sparsity: ReLU | JumpReLU, n_rows: float
) -> Tensor:
    """The mean number of active features, `[G]`, with JumpReLU's pseudo-derivative `-1 / window` to the threshold.

    A pair with value 0 is there because its score lies in the lower half of the window.
    """
    assert isinstance(sparsity, JumpReLU)
    assert grouped.log_threshold_GF is not None
    n_groups, n_features = grouped.log_threshold_GF.shape
    theta_P = grouped.log_threshold_GF.exp().flatten()[features]
    inside_P = code.values.detach() < theta_P.detach() + sparsity.window / 2
    pull_P = torch.where(inside_P, (theta_P.detach() - theta_P) / sparsity.window, 0)
    active_P = (code.values > 0).to(pull_P.dtype) + pull_P
    totals_G = active_P.new_zeros(n_groups).index_add(0, features.long() // n_features, active_P)
    return totals_G / n_rows


class _Revival(NamedTuple):
    """What dead features alone make of the error that a batch was left with."""

    term: Tensor
    features_GD: Tensor
    is_dead_GD: Tensor
    x_GBN: Tensor
    decoder_GDN: Tensor
    code_GDB: Tensor
    left_GBN: Tensor
    """Their reconstruction less the residual, which is the negative error."""
    factor_G: Tensor
    """Of the squares of what is left, in the term."""


def auxiliary_term(dictionary: Dictionary, x_BLD: Tensor, error_BLD: Tensor, dead_GF: Tensor) -> Tensor:
    """Error of the residual's reconstruction by dead features alone, relative to the residual's own size, times 1 / 32.

    The residual, input minus reconstruction, already excludes the decoder bias, so none is added. Gradient reaches
    encoder, encoder bias and decoder of the dead features that were chosen (Gao et al. 2024, section A.2).

    error_BLD: the reconstruction minus the input, without gradient.
    """
    return _revive(dictionary, x_BLD, error_BLD, dead_GF).term


@torch.no_grad()
def add_auxiliary_gradients(dictionary: Dictionary, x_BLD: Tensor, error_BLD: Tensor, dead_GF: Tensor) -> Tensor:
    """`auxiliary_term`, whose gradients are added to what the parameters' `grad` holds: the same bits as by autograd.

    Autograd would make a table of zeros to put a few rows of gradients into, and add all of it.
    """
    found = _revive(dictionary, x_BLD, error_BLD, dead_GF)
    d_recon_GBN = found.left_GBN.mul_((2 * found.factor_G)[:, None, None])
    d_decoder_GDN = torch.bmm(found.code_GDB, d_recon_GBN)
    d_code_GDB = torch.bmm(d_recon_GBN, found.decoder_GDN.transpose(1, 2)).transpose(1, 2)
    d_z_GDB = torch.where(found.code_GDB > 0, d_code_GDB, 0)
    d_encoder_GDN = torch.bmm(d_z_GDB, found.x_GBN)
    n_features = dead_GF.shape[1]
    groups_G1 = torch.arange(len(dead_GF), device=dead_GF.device)[:, None]
    rows_R = (found.features_GD + n_features * groups_G1)[found.is_dead_GD]
    for parameter, gradient_GDN, mask in (
        (dictionary.encoder, d_encoder_GDN, dictionary.read_mask),
        (dictionary.decoder, d_decoder_GDN, dictionary.write_mask),
        (dictionary.encoder_bias, d_z_GDB.sum(2, keepdim=True), None),
    ):
        if parameter.grad is not None:
            table_RN = parameter.grad.view(dead_GF.numel(), -1)
            new_RN = gradient_GDN[found.is_dead_GD]
            if mask is not None:
                new_RN = new_RN * mask.expand_as(parameter).reshape(table_RN.shape)[rows_R]
            table_RN[rows_R] += new_RN
    return found.term


def _revive(dictionary: Dictionary, x_BLD: Tensor, error_BLD: Tensor, dead_GF: Tensor) -> _Revival:
    grouped = dictionary.grouped()
    encoder_GFN, decoder_GFN, bias_GF, center_GN = grouped[:4]
    x_GBN = rearrange(grouped.split(x_BLD) - center_GN.detach(), "b g n -> g b n")
    if (start := dictionary.config.written().start) > 0:
        error_BLD = error_BLD.clone()
        error_BLD[:, :start] = 0
    error_GBN = rearrange(grouped.split(error_BLD), "b g n -> g b n")
    k_aux = dictionary.config.aux_k
    if k_aux is None:
        n_read = min(center_GN.shape[1], dictionary.config.n_read())
        k_aux = min(MAX_DEFAULT_AUX_K, max(1, n_read // 2))
    shard, most = dictionary.others, max(k_aux, dictionary.config.n_features // 4)
    if shard is None:
        features_GD, is_dead_GD = _dead_features(dead_GF, limit=most)
        n_dead, any_G = features_GD.shape[1], is_dead_GD.any(1)
    else:
        features_GD, is_dead_GD, n_dead, any_G = _dead_features_of_shard(dead_GF, shard, limit=most)
    rows = torch.arange(len(dead_GF), device=dead_GF.device)[:, None], features_GD
    # Dense on purpose: a sparse gather is slower than a product once k_aux > F / 181.
    encoder_GDN, decoder_GDN = encoder_GFN[rows], decoder_GFN[rows]
    z_GDB = torch.baddbmm(bias_GF[rows][..., None], encoder_GDN, x_GBN.transpose(1, 2))
    code_GDB = z_GDB.relu() * is_dead_GD[..., None]
    if k_aux < n_dead and shard is not None:
        code_GDB = code_GDB * _chosen_of_all(code_GDB.detach(), k_aux, shard)
    elif k_aux < n_dead:
        chosen = code_GDB.topk(k_aux, dim=1, sorted=False)
        code_GDB = torch.zeros_like(code_GDB).scatter(1, chosen.indices, chosen.values)
    left_GBN = torch.bmm(code_GDB.transpose(1, 2), decoder_GDN)
    left_GBN = (left_GBN if shard is None else shard.total(left_GBN, "auxiliary reconstruction")) + error_GBN
    size_G = dictionary.of_tokens(torch.linalg.vector_norm(error_GBN, dim=(1, 2)).square())
    size_G = size_G.clamp_min(torch.finfo(x_BLD.dtype).tiny)
    relative_G = (dictionary.of_tokens(left_GBN.square().sum((1, 2))) / size_G).masked_fill(~any_G, 0)
    n_groups = dictionary.n_groups_of_all
    term = AUX_COEFFICIENT * (relative_G.sum() / n_groups)
    factor_G = (torch.full_like(size_G, AUX_COEFFICIENT) / n_groups).masked_fill(~any_G, 0) / size_G
    return _Revival(term, features_GD, is_dead_GD, x_GBN, decoder_GDN, code_GDB, left_GBN, factor_G)


def _dead_features(dead_GF: Tensor, *, limit: int) -> tuple[Tensor, Tensor]:
    """Dead features of each dictionary, `[G, D]`, and which of them are no padding.

    Of more than `limit` as many, evenly spread: the dense term stays below a quarter of `[B, F]`.
    """
    lists = [dead_F.nonzero().squeeze(1) for dead_F in dead_GF]
    spread = torch.arange(limit, device=dead_GF.device)
    lists = [one if len(one) <= limit else one[spread * len(one) // limit] for one in lists]
    if len(lists) == 1:
        return lists[0][None], torch.ones_like(lists[0][None], dtype=torch.bool)
    padded_GD = torch.nn.utils.rnn.pad_sequence(lists, batch_first=True)
    counts_G = torch.tensor([len(one) for one in lists], device=dead_GF.device)
    return padded_GD, torch.arange(padded_GD.shape[1], device=dead_GF.device) < counts_G[:, None]


def _dead_features_of_shard(dead_GF: Tensor, shard: Shard, *, limit: int) -> tuple[Tensor, Tensor, int, Tensor]:
    """This rank's part of `_dead_features` of all ranks, how long that list is, and which dictionaries have any."""
    padded_GS = torch.nn.functional.pad(dead_GF, (0, shard.widest - dead_GF.shape[1]))
    all_WGS = shard.ranks.gather(padded_GS.to(torch.uint8), "dead features").bool()
    sizes = [stop - start for start, stop in map(shard.bounds, range(shard.ranks.size))]
    all_GF = torch.cat([one_GS[:, :size] for one_GS, size in zip(all_WGS, sizes, strict=True)], dim=1)
    features_GD, is_dead_GD = _dead_features(all_GF, limit=limit)
    chosen_GF = torch.zeros_like(all_GF, dtype=torch.int64).scatter_add_(1, features_GD, is_dead_GD.long()) > 0
    own_GD, is_own_GD = _dead_features(chosen_GF[:, shard.start : shard.stop], limit=limit)
    return own_GD, is_own_GD, features_GD.shape[1], is_dead_GD.any(1)


def _chosen_of_all(code_GDB: Tensor, k: int, shard: Shard) -> Tensor:
    """True for the k largest of each token and dictionary over the dead features of all ranks."""
    n_own = code_GDB.shape[1]
    best = rearrange(code_GDB, "g d b -> (g b) d").topk(min(k, n_own), dim=1)
    kept_RC = keep_top_k(best.values, k, k, shard.ranks)
    kept_RD = torch.zeros(len(kept_RC), n_own, dtype=torch.bool, device=kept_RC.device)
    return rearrange(kept_RD.scatter(1, best.indices, kept_RC), "(g b) d -> g d b", g=len(code_GDB))


def explained_variance(x_BLD: Tensor, recon_BLD: Tensor) -> Tensor:
    """Fraction of each layer's variance that the reconstruction accounts for, as `ev_L` in float64.

    1 is perfect, 0 is no better than the batch mean, below 0 is worse. Both sums run over batch and width before the
    ratio is taken: a mean of per-token ratios would let tokens with tiny norms dominate.

    Raises:
        ValueError: a layer of `x_BLD` is constant, so the ratio is undefined.
    """
    return explained(x_BLD, (x_BLD - recon_BLD).double().square().sum((0, 2)))


def explained(x_BLD: Tensor, square_L: Tensor) -> Tensor:
    """`explained_variance` from the sums of each layer's squared errors."""
    variance_L = (x_BLD - x_BLD.mean(0)).double().square().sum((0, 2))
    if not bool((variance_L > 0).all()):
        layers = (~(variance_L > 0)).nonzero().flatten().tolist()
        raise ValueError(f"layers {layers} are constant over the {x_BLD.shape[0]} tokens: no variance to explain")
    return 1 - square_L / variance_L
