"""Encoding and decoding, once, for every dictionary that can be seen as G dictionaries side by side."""

from __future__ import annotations

import torch
from torch import Tensor

import triton_kernels
from crosscoder.dictionary.interface import DictionaryConfig, Grouped, SparseCode
from crosscoder.dictionary.sparsity import BatchTopK, TopK


def selection_scale(grouped: Grouped, config: DictionaryConfig) -> Tensor | None:
    """What each feature's score is multiplied by in selection, `[G, F]`, without gradient; None for no scaling."""
    if config.selection_weight == "none":
        return None
    decoder_GFN = grouped.decoder_GFN.detach()
    if config.selection_weight == "l2":
        return decoder_GFN.norm(dim=-1)
    return decoder_GFN.unflatten(-1, (-1, config.d_model)).norm(dim=-1).sum(-1)


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
            values, features = triton_kernels.encode_top_k(*arguments, k, product, working_GFN)
            offsets = torch.arange(0, values.numel() + 1, k, device=values.device)
            return values, features, offsets, None
        case BatchTopK(k=k) if training:
            return triton_kernels.encode_batch_top_k(*arguments, k, product, working_GFN)
        case BatchTopK():
            if not bool(torch.isfinite(threshold_G).all()):
                raise ValueError(
                    "this BatchTopK dictionary has no inference threshold yet: train it first, or call .train() "
                    "to select by the batch"
                )
            threshold_GF = threshold_G[:, None].expand(bias_GF.shape)
            out = triton_kernels.encode_threshold(*arguments, threshold_GF, 0.0, product, working_GFN)
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
    table_FN = decoder_GFN.reshape(-1, decoder_GFN.shape[-1])
    return triton_kernels.gather_sum(values.to(table_FN.dtype), features, offsets, table_FN)


def to_local(features: Tensor, n_features: int, n_groups: int) -> Tensor:
    """Features counted within their own dictionary."""
    return features if n_groups == 1 else features % n_features


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
            score_GX = score_BGF.transpose(0, 1).flatten(1)
            order = score_GX.sort(dim=-1, descending=True, stable=True).indices[:, : k * x_BGN.shape[0]]
            kept_GX = torch.zeros_like(score_GX, dtype=torch.bool).scatter(-1, order, True)
            kept_BGF = kept_GX.view(-1, x_BGN.shape[0], config.n_features).transpose(0, 1)
        case _:
            kept_BGF = score_BGF > threshold_G[:, None]
    return torch.where(kept_BGF, z_BGF.relu(), 0)
