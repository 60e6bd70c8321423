"""The definition of each operator in plain torch: any dtype, any device, no cleverness.

A sparse code is CSR: `values_P`, `features_P` and `offsets` of length R + 1, so that row r owns the pairs
`offsets[r] : offsets[r + 1]`. Tables are row-major, one row a feature. These forms materialise `[P, N]` and `[B, G, F]`
and are the truth that every faster form is tested against. An encoder's definition takes the operator's arguments up to
those that say how to compute (`product`, `working`).
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over a whole batch are given in: float64 for itself, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_of_pair(offsets: Tensor, n_pairs: int) -> Tensor:
    """The row that owns each pair, as int64 `[P]`."""
    rows = torch.arange(offsets.numel() - 1, device=offsets.device)
    return rows.repeat_interleave(offsets.diff().long(), output_size=n_pairs)


def starts(counts_R: Tensor) -> Tensor:
    """Where each row's pairs begin, and where the last row's end, as int64 `[R + 1]`."""
    return torch.nn.functional.pad(counts_R.cumsum(0), (1, 0))


def gather_sum(values_P: Tensor, features_P: Tensor, offsets: Tensor, table_FN: Tensor) -> Tensor:
    """`out[r] = sum over pairs p of row r of values[p] * table[features[p]]`, as `[R, N]`."""
    rows = row_of_pair(offsets, values_P.numel())
    out_RN = table_FN.new_zeros(offsets.numel() - 1, table_FN.shape[1])
    return out_RN.index_add(0, rows, values_P[:, None] * table_FN[features_P.long()])


def gather_dot(x_RN: Tensor, features_P: Tensor, offsets: Tensor, table_FN: Tensor) -> Tensor:
    """`out[p] = <x[row of p], table[features[p]]>`, as `[P]`."""
    rows = row_of_pair(offsets, features_P.numel())
    return (x_RN[rows] * table_FN[features_P.long()]).sum(1)


def scatter_outer(values_P: Tensor, features_P: Tensor, offsets: Tensor, x_RN: Tensor, n_features: int) -> Tensor:
    """`out[f] = sum over pairs p with features[p] = f of values[p] * x[row of p]`, as `[F, N]`."""
    rows = row_of_pair(offsets, values_P.numel())
    out_FN = x_RN.new_zeros(n_features, x_RN.shape[1])
    return out_FN.index_add(0, features_P.long(), values_P[:, None] * x_RN[rows])


def first_largest(scores_RF: Tensor, k: int) -> Tensor:
    """Columns of the k largest scores of each row, equal scores by lowest column, ascending, as int64 `[R, k]`."""
    order = torch.sort(scores_RF, dim=1, descending=True, stable=True).indices
    return order[:, :k].sort(dim=1).values


def decode_loss(
    values_P: Tensor, features_P: Tensor, offsets: Tensor,
    decoder_GFN: Tensor, bias_GN: Tensor, x_BGN: Tensor, n_parts: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Error of the reconstruction, `decoded + bias - x` `[B, G, N]`, and its squares summed by part, `[G, n_parts]`.

    The N columns of each dictionary are `n_parts` equal parts: the layers of a crosscoder, one part for a bank.
    """
    decoded_RN = gather_sum(values_P, features_P, offsets, decoder_GFN.flatten(0, 1))
    error_BGN = decoded_RN.view(x_BGN.shape) + bias_GN - x_BGN
    parts = error_BGN.unflatten(2, (n_parts, -1)).to(sum_dtype(error_BGN.dtype))
    return error_BGN, parts.square().sum((0, 3))


def backward_decoder(
    values_P: Tensor, features_P: Tensor, offsets: Tensor, error_BGN: Tensor, weight_GL: Tensor, decoder_GFN: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `sum(weight_GL * squares_GL)` of `decode_loss`: to the values `[P]` and the decoder `[G, F, N]`."""
    grad_BGN = 2 * weight_GL[..., None] * error_BGN.unflatten(2, (weight_GL.shape[1], -1))
    grad_RN, table_FN = grad_BGN.flatten(2).flatten(0, 1), decoder_GFN.flatten(0, 1)
    d_values = gather_dot(grad_RN, features_P, offsets, table_FN)
    return d_values, scatter_outer(values_P, features_P, offsets, grad_RN, table_FN.shape[0]).view(decoder_GFN.shape)


def backward_encoder(
    d_z_P: Tensor, features_P: Tensor, offsets: Tensor, x_BGN: Tensor, center_GN: Tensor, n_features: int
) -> tuple[Tensor, Tensor]:
    """Gradients to the encoder `[G, F, N]` and its bias `[G, F]`, from those to the pre-activations of the pairs."""
    n_groups, width = center_GN.shape
    centered_RN = (x_BGN - center_GN).to(d_z_P.dtype).flatten(0, 1)
    d_encoder = scatter_outer(d_z_P, features_P, offsets, centered_RN, n_groups * n_features)
    d_bias = d_z_P.new_zeros(n_groups * n_features).index_add(0, features_P.long(), d_z_P)
    return d_encoder.view(n_groups, n_features, width), d_bias.view(n_groups, n_features)


def row_squares(gradient_RN: Tensor, unit_RN: Tensor | None) -> Tensor:
    """Squared norm of each gradient row, `[R]`, without its part along the given row of norm 1."""
    if unit_RN is not None:
        gradient_RN = gradient_RN - (gradient_RN * unit_RN).sum(1, keepdim=True) * unit_RN
    return gradient_RN.square().sum(1, dtype=sum_dtype(gradient_RN.dtype))


def adam_rows(
    parameter_RN: Tensor, gradient_RN: Tensor, first_RN: Tensor, second_RN: Tensor, *, step: int, rate: float,
    betas: tuple[float, float], eps: float, weight_decay: float,
    scale_G: Tensor | None, unit: bool, working_RN: Tensor | None,
) -> None:  # fmt: skip
    """One step of AdamW (Loshchilov and Hutter 2019, algorithm 2) in place, with what belongs to the rows.

    Row r's gradient is first multiplied by `scale_G[r // (R / G)]`. `unit`: the gradient's part along the parameter
    row is removed and the row has norm 1 again afterwards. `working_RN` receives the new rows, rounded to its dtype.
    """
    gradient = gradient_RN
    if unit:
        gradient = gradient - (gradient * parameter_RN).sum(1, keepdim=True) * parameter_RN
    if scale_G is not None:
        gradient = gradient * scale_G.repeat_interleave(parameter_RN.shape[0] // scale_G.numel())[:, None]
    first_RN.lerp_(gradient, 1 - betas[0])
    second_RN.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    denominator = (second_RN / (1 - betas[1] ** step)).sqrt() + eps
    parameter_RN.mul_(1 - rate * weight_decay).addcdiv_(first_RN, denominator, value=-rate / (1 - betas[0] ** step))
    if unit:
        parameter_RN.div_(parameter_RN.norm(dim=1, keepdim=True).clamp_min(1e-12))
    if working_RN is not None:
        working_RN.copy_(parameter_RN)


def scores(
    x_BGN: Tensor, center_GN: Tensor, encoder_GFN: Tensor, bias_GF: Tensor, scale_GF: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Pre-activations `z = <x - center, encoder row> + bias` and scores `z * scale`, each `[B, G, F]`."""
    centered_BGN = (x_BGN - center_GN).to(encoder_GFN.dtype)
    z_BGF = torch.einsum("bgn,gfn->bgf", centered_BGN, encoder_GFN) + bias_GF
    return z_BGF, z_BGF if scale_GF is None else z_BGF * scale_GF


def kept_by_row(score_BGF: Tensor, k: int) -> Tensor:
    """True for the k largest scores of each row; equal scores by lowest feature."""
    columns = first_largest(score_BGF.flatten(0, 1), k).view(*score_BGF.shape[:2], k)
    return torch.zeros_like(score_BGF, dtype=torch.bool).scatter(2, columns, True)


def kept_by_batch(score_BGF: Tensor, k: int) -> Tensor:
    """True for the B * k largest positive scores of each dictionary; equal scores by lowest (row, feature)."""
    score_GX = rearrange(score_BGF, "b g f -> g (b f)")
    columns = first_largest(score_GX, score_BGF.shape[0] * k)
    kept_GX = torch.zeros_like(score_GX, dtype=torch.bool).scatter(1, columns, True) & (score_GX > 0)
    return rearrange(kept_GX, "g (b f) -> b g f", f=score_BGF.shape[2])


def code_of(kept_BGF: Tensor, value_BGF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values, global features (int32) and offsets of the kept pairs."""
    _, n_groups, n_features = kept_BGF.shape
    rows, features = rearrange(kept_BGF, "b g f -> (b g) f").nonzero(as_tuple=True)
    offsets = starts(kept_BGF.sum(2).flatten())
    return value_BGF[kept_BGF], (features + rows % n_groups * n_features).to(torch.int32), offsets


def encode_top_k(
    x_BGN: Tensor, center_GN: Tensor, encoder_GFN: Tensor, bias_GF: Tensor, scale_GF: Tensor | None, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Values `relu(z)`, global features and z of the k best scores of each row; autograd differentiates the values."""
    z_BGF, score_BGF = scores(x_BGN, center_GN, encoder_GFN, bias_GF, scale_GF)
    z_P, features_P, _ = code_of(kept_by_row(score_BGF.detach(), k), z_BGF)
    return z_P.relu(), features_P, z_P.detach()


def encode_batch_top_k(
    x_BGN: Tensor, center_GN: Tensor, encoder_GFN: Tensor, bias_GF: Tensor, scale_GF: Tensor | None, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, global features and offsets of `kept_by_batch`, and the smallest kept score of each dictionary or 0."""
    z_BGF, score_BGF = scores(x_BGN, center_GN, encoder_GFN, bias_GF, scale_GF)
    kept_BGF = kept_by_batch(score_BGF.detach(), k)
    cuts = [score_BF[kept_BF] for score_BF, kept_BF in zip(score_BGF.unbind(1), kept_BGF.unbind(1), strict=True)]
    cut_G = torch.stack([cut.amin() if cut.numel() else cut.new_zeros(()) for cut in cuts])
    z_P, features_P, offsets = code_of(kept_BGF, z_BGF)
    return z_P.relu(), features_P, offsets, cut_G.detach()


def encode_threshold(
    x_BGN: Tensor, center_GN: Tensor, encoder_GFN: Tensor, bias_GF: Tensor, scale_GF: Tensor | None,
    threshold_GF: Tensor, window: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Values, global features, offsets and z of every positive z with `score > threshold - window / 2`.

    The value is z above the threshold and 0 below. Its derivative to the threshold theta is `-(theta / scale / window)`
    within half a window of it (Rajamanoharan et al. 2024, arXiv 2407.14435, section 3).
    """
    z_BGF, score_BGF = scores(x_BGN, center_GN, encoder_GFN, bias_GF, scale_GF)
    kept_BGF = (score_BGF > threshold_GF - window / 2) & (z_BGF > 0)
    value_BGF = torch.where(score_BGF > threshold_GF, z_BGF, 0)
    if window > 0:
        theta_GF = threshold_GF.detach()
        pull_GF = theta_GF / window if scale_GF is None else theta_GF / scale_GF / window
        is_inside_BGF = (score_BGF - theta_GF).abs() < window / 2
        value_BGF = value_BGF + torch.where(is_inside_BGF, pull_GF, 0).detach() * (theta_GF - threshold_GF)
    values_P, features_P, offsets = code_of(kept_BGF, value_BGF)
    return values_P, features_P, offsets, z_BGF.detach()[kept_BGF]
