"""Encoding and decoding, once, for every dictionary that can be seen as G dictionaries side by side."""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

import triton_kernels
from crosscoder.dictionary.code import Grouped, SparseCode
from crosscoder.dictionary.config import DictionaryConfig
from crosscoder.dictionary.sparsity import BatchTopK, JumpReLU, ReLU, TopK


def selection_scale(grouped: Grouped, config: DictionaryConfig) -> Tensor | None:
    """What each feature's score is multiplied by in selection, `[G, F]`, without gradient; None for no scaling."""
    if config.selection_weight == "none":
        return None
    return decoder_norms(grouped.decoder_GFN.detach(), config.selection_weight, d_model=config.d_model)


def decoder_norms(decoder_GFN: Tensor, norm: Literal["l1", "l2"], *, d_model: int) -> Tensor:
    """The norm of each feature's decoder row, `[G, F]`: of all layers together (`l2`), or summed over layers (`l1`)."""
    if norm == "l2":
        return decoder_GFN.norm(dim=-1)
    return rearrange(decoder_GFN, "g f (l d) -> g f l d", d=d_model).norm(dim=-1).sum(-1)


def thresholds(grouped: Grouped, config: DictionaryConfig, threshold_G: Tensor) -> Tensor:
    """The score above which each feature is active, `[G, F]`, for rules and modes that have one.

    Raises:
        ValueError: a BatchTopK dictionary in evaluation mode has no threshold yet.
    """
    bias_GF = grouped.encoder_bias_GF
    match config.sparsity:
        case ReLU():
            return torch.zeros_like(bias_GF)
        case JumpReLU():
            assert grouped.log_threshold_GF is not None
            return grouped.log_threshold_GF.exp()
        case _:
            if not bool(torch.isfinite(threshold_G).all()):
                raise ValueError(
                    "this BatchTopK dictionary has no inference threshold yet: train it first, or call .train() "
                    "to select by the batch"
                )
            return threshold_G[:, None].expand(bias_GF.shape)


def encode_grouped(
    x_BGN: Tensor,
    grouped: Grouped,
    config: DictionaryConfig,
    *,
    threshold_G: Tensor,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Values `[P]`, global features `[P]`, offsets `[B * G + 1]` and, for a BatchTopK training batch, the cut `[G]`.

    Raises:
        ValueError: a BatchTopK dictionary in evaluation mode has no threshold yet.
    """
    encoder_GFN, bias_GF, scale_GF = grouped.encoder_GFN, grouped.encoder_bias_GF, selection_scale(grouped, config)
    arguments = (x_BGN, grouped.center_GN, encoder_GFN, bias_GF, scale_GF)
    product = _product_dtype(encoder_GFN)
    working_GFN = grouped.working_GFN if scale_GF is None else None
    match config.sparsity:
        case TopK(k=k):
            values, features, _ = triton_kernels.encode_top_k(*arguments, k, product, working_GFN)
            offsets = torch.arange(0, values.numel() + 1, k, device=values.device)
            return values, features, offsets, None
        case BatchTopK(k=k) if training:
            return triton_kernels.encode_batch_top_k(*arguments, k, product, working_GFN)
        case rule:
            threshold_GF = thresholds(grouped, config, threshold_G)
            window = rule.window if training and isinstance(rule, JumpReLU) else 0.0
            out = triton_kernels.encode_threshold(*arguments, threshold_GF, window, product, working_GFN)
            return (*out[:3], None)


def _product_dtype(encoder: Tensor) -> torch.dtype:
    """The dtype of the encoder's product: autocast's where that is on, and the values are exact all the same."""
    device = encoder.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else encoder.dtype


def squared_error(x_BGN: Tensor, code: SparseCode, grouped: Grouped, *, n_parts: int) -> tuple[Tensor, Tensor]:
    """Error of a code's reconstruction `[B, G, N]`, and its squares summed by part of N, `[G, n_parts]`."""
    decoder_GFN, center_GN = grouped.decoder_GFN, grouped.center_GN
    features = to_global(code, decoder_GFN.shape[0])
    values = code.values.to(decoder_GFN.dtype)
    return triton_kernels.decode_loss(values, features, code.offsets, decoder_GFN, center_GN, x_BGN, n_parts)


def decode_grouped(values: Tensor, features: Tensor, offsets: Tensor, decoder_GFN: Tensor) -> Tensor:
    """Weighted sums of decoder rows, `[B * G, N]`, without the bias; `features` are global."""
    table_FN = rearrange(decoder_GFN, "g f n -> (g f) n")
    return triton_kernels.gather_sum(values.to(table_FN.dtype), features, offsets, table_FN)


def to_global(code: SparseCode, n_groups: int) -> Tensor:
    """Features of `code` counted over all G dictionaries, as the operators want them."""
    if n_groups == 1:
        return code.features
    if code.global_features is not None:
        return code.global_features
    return code.features + (code.rows() % n_groups * code.n_features).to(torch.int32)


def encode_dense_grouped(
    x_BGN: Tensor, grouped: Grouped, config: DictionaryConfig, *, threshold_G: Tensor, training: bool
) -> Tensor:
    """The same code by dense torch operators, `[B, G, F]`: the slow, obvious form, differentiated by autograd."""
    z_BGF = torch.einsum("bgn,gfn->bgf", x_BGN - grouped.center_GN, grouped.encoder_GFN) + grouped.encoder_bias_GF
    scale_GF = selection_scale(grouped, config)
    score_BGF = z_BGF.detach() if scale_GF is None else z_BGF.detach() * scale_GF
    match config.sparsity:
        case TopK(k=k):
            order = score_BGF.sort(dim=-1, descending=True, stable=True).indices
            kept_BGF = torch.zeros_like(score_BGF, dtype=torch.bool).scatter(-1, order[..., :k], True)
        case BatchTopK(k=k) if training:
            score_GX = rearrange(score_BGF, "b g f -> g (b f)")
            order = score_GX.sort(dim=-1, descending=True, stable=True).indices[:, : k * x_BGN.shape[0]]
            kept_GX = torch.zeros_like(score_GX, dtype=torch.bool).scatter(-1, order, True)
            kept_BGF = rearrange(kept_GX, "g (b f) -> b g f", b=x_BGN.shape[0])
        case JumpReLU(window=window) if training:
            theta_GF = thresholds(grouped, config, threshold_G)
            inside_BGF = (z_BGF > 0) & ((z_BGF - theta_GF).abs() < window / 2)
            pull_BGF = torch.where(inside_BGF, -theta_GF / window, 0).detach()
            # Zero, but with the pseudo-derivative to theta (Rajamanoharan et al. 2024, section 3).
            return torch.where(score_BGF > theta_GF, z_BGF.relu(), 0) + pull_BGF * (theta_GF - theta_GF.detach())
        case _:
            kept_BGF = score_BGF > thresholds(grouped, config, threshold_G)
    return torch.where(kept_BGF, z_BGF.relu(), 0)
