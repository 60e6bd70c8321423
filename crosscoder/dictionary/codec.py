"""The sparse code of a batch, and encoding, once, for every dictionary that is G dictionaries side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

import triton_kernels
import triton_kernels.reference
from crosscoder.dictionary.config import DictionaryConfig
from crosscoder.dictionary.shard import Shard
from crosscoder.dictionary.sparsity import BatchTopK, JumpReLU, ReLU, TopK
from triton_kernels.reference import starts


@dataclass(frozen=True, eq=False)
class SparseCode:
    """The active features of a batch, as CSR.

    Row r owns pairs `offsets[r] : offsets[r + 1]`; within a row features ascend. For a crosscoder a row is a token
    and `batch_shape` is the input's leading shape; for a bank a row is a (token, layer), `batch_shape` ends in L, and
    `features` count from 0 within each layer. Values are >= 0; codes of TopK, and of JumpReLU in training, may hold
    zeros, which are not active.
    """

    values: Tensor  # [P]
    features: Tensor  # [P], int32, 0 <= feature < n_features
    offsets: Tensor  # [R + 1], int64
    n_features: int
    batch_shape: tuple[int, ...]
    global_features: Tensor | None = None
    """Features counted over all layers of a bank, `layer * F + feature`, where the encoder had them at hand."""

    def __repr__(self) -> str:
        l0 = int((self.values > 0).sum()) / max(1, self.n_rows)
        shape = " x ".join(f"{size:,}" for size in self.batch_shape)
        return f"SparseCode({shape} rows of {self.n_features:,} features, {l0:.4g} active in each, {self.values.dtype})"

    @property
    def n_pairs(self) -> int:
        """P, the stored pairs."""
        return self.values.numel()

    @property
    def n_rows(self) -> int:
        """R, the product of `batch_shape`."""
        return self.offsets.numel() - 1

    def rows(self) -> Tensor:
        """The row of each pair, as int64 `[P]`."""
        rows = torch.arange(self.n_rows, device=self.offsets.device)
        return rows.repeat_interleave(self.offsets.diff(), output_size=self.n_pairs)

    def l0(self) -> Tensor:
        """Active features of each row, as int64 in `batch_shape`."""
        counts = torch.zeros(self.n_rows, dtype=torch.int64, device=self.offsets.device)
        counts.index_add_(0, self.rows(), (self.values > 0).long())
        return counts.view(self.batch_shape)

    def prefix(self, size: int) -> SparseCode:
        """The code of the first `size` features alone, in a bank of each layer's; the same rows and `n_features`."""
        kept_P = self.features < size
        ends = torch.nn.functional.pad(kept_P.cumsum(0), (1, 0))
        return replace(
            self,
            values=self.values[kept_P],
            features=self.features[kept_P],
            offsets=ends[self.offsets],
            global_features=None if self.global_features is None else self.global_features[kept_P],
        )

    def to_dense(self) -> Tensor:
        """The code with its zeros, `[*batch_shape, F]`; differentiable in `values`. Costs R * F numbers."""
        flat = self.values.new_zeros(self.n_rows * self.n_features)
        position = self.rows() * self.n_features + self.features
        return flat.index_put((position,), self.values).view(*self.batch_shape, self.n_features)


class DictionaryOutput(NamedTuple):
    """What a forward pass gives: the reconstruction `[..., L, D]` and the code it was made from."""

    recon: Tensor
    code: SparseCode


class Grouped(NamedTuple):
    """A dictionary's parameters as G independent dictionaries side by side, each reading N numbers.

    A crosscoder is G = 1, N = L * D; a bank is G = L, N = D; an SAE that all layers share is G = 1, N = D, and has L
    rows a token. The centre is a view: writing to it writes to the dictionary; weights are views too where no structure
    masks them.
    """

    encoder_GFN: Tensor
    decoder_GFN: Tensor
    encoder_bias_GF: Tensor
    center_GN: Tensor
    log_threshold_GF: Tensor | None = None
    """Of a JumpReLU dictionary."""
    working_GFN: Tensor | None = None
    """The encoder rounded for its product, where an optimiser keeps one beside it."""

    def split(self, x_BLD: Tensor) -> Tensor:
        """What each of the G dictionaries reads of `x_BLD`: `[B, G, N]`, or for a shared SAE `[B * L, 1, D]`."""
        return x_BLD.reshape(-1, *self.center_GN.shape)


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
    """The score above which each feature is active, `[G, F]`, for rules and modes that have one."""
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
    dense: bool,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Values `[P]`, global features `[P]`, offsets `[B * G + 1]` and, for a BatchTopK training batch, the cut `[G]`.

    dense: by the operators' definitions in plain torch, which autograd differentiates: slow, and `[B, G, F]` in memory.
    shard: of whose features the weights are; the code is that of its own features and tokens, chosen among all.
    """
    encoder_GFN, bias_GF, scale_GF = grouped.encoder_GFN, grouped.encoder_bias_GF, selection_scale(grouped, config)
    arguments = (x_BGN, grouped.center_GN, encoder_GFN, bias_GF, scale_GF)
    how = () if dense else (_product_dtype(encoder_GFN), grouped.working_GFN if scale_GF is None else None)
    operators: Any = triton_kernels.reference if dense else triton_kernels
    match config.sparsity:
        case TopK(k=k) if shard is not None:
            own_k = min(k, encoder_GFN.shape[1])
            values, features, z = operators.encode_top_k(*arguments, own_k, *how)
            kept_RC = shard.keep_top_k(_scores(z, features, scale_GF).view(-1, own_k), k)
            kept = kept_RC.flatten()
            return values[kept], features[kept], starts(kept_RC.sum(1)), None
        case BatchTopK(k=k) if training and shard is not None:
            own_k = min(shard.most_of_row(k), encoder_GFN.shape[1])
            values, features, offsets, _ = operators.encode_batch_top_k(*arguments, own_k, *how)
            score = _scores(values.detach(), features, scale_GF)
            kept, cut_G = shard.keep_batch_top_k(score, offsets, len(encoder_GFN), k * len(x_BGN))
            return values[kept], features[kept], starts(kept.long())[offsets], cut_G
        case TopK(k=k):
            values, features, *_ = operators.encode_top_k(*arguments, k, *how)
            offsets = torch.arange(0, values.numel() + 1, k, device=values.device)
            return values, features, offsets, None
        case BatchTopK(k=k) if training:
            return operators.encode_batch_top_k(*arguments, k, *how)
        case rule:
            threshold_GF = thresholds(grouped, config, threshold_G)
            window = rule.window if training and isinstance(rule, JumpReLU) else 0.0
            values, features, offsets, *_ = operators.encode_threshold(*arguments, threshold_GF, window, *how)
            return values, features, offsets, None


def _scores(z: Tensor, features: Tensor, scale_GF: Tensor | None) -> Tensor:
    return z if scale_GF is None else z * scale_GF.flatten()[features]


def _product_dtype(encoder: Tensor) -> torch.dtype:
    """The dtype of the encoder's product: autocast's where that is on, and the values are exact all the same."""
    device = encoder.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else encoder.dtype


def to_global(code: SparseCode, n_groups: int) -> Tensor:
    """Features of `code` counted over all G dictionaries, as the operators want them."""
    if n_groups == 1:
        return code.features
    if code.global_features is not None:
        return code.global_features
    return code.features + (code.rows() % n_groups * code.n_features).to(torch.int32)


def checked_input(x: Tensor, config: DictionaryConfig) -> Tensor:
    """`x` flattened to `[B, L, D]`."""
    expected = (config.n_layers, config.d_model)
    if not isinstance(x, Tensor):
        raise ValueError(f"input is a {type(x).__name__}; expected a tensor, as from torch.as_tensor(x)")
    if x.is_nested or x.layout != torch.strided or x.is_meta:
        kind = "on the meta device" if x.is_meta else "nested" if x.is_nested else f"of layout {x.layout}"
        raise ValueError(f"input is {kind}; expected a plain tensor that holds its numbers")
    if x.ndim < 2 or tuple(x.shape[-2:]) != expected:
        hint = ""
        if x.ndim >= 2 and tuple(x.shape[-2:]) == expected[::-1]:
            hint = " The last two axes look swapped: use x.transpose(-1, -2)."
        elif x.ndim and x.shape[-1] == config.d_model:
            hint = " All layers of a token are needed together, stacked on the axis before the last."
        raise ValueError(
            f"input has shape {tuple(x.shape)}; expected [..., n_layers={expected[0]}, d_model={expected[1]}].{hint}"
        )
    if not x.is_floating_point():
        raise ValueError(f"input has dtype {x.dtype}; expected floating-point activations, not token ids")
    x = x.float() if x.element_size() == 1 else x  # in fp8 torch has no arithmetic
    x = x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x  # autograd keeps none of those
    return x.reshape(-1, *expected)


@torch.no_grad()
def require_scores_in_range(x_BLD: Tensor, grouped: Grouped, most_weight: float) -> None:
    """Refuse inputs whose scores could be larger than their dtype holds: NaN would count as not active.

    most_weight: the largest number of the encoder. Where it and the input's largest rule that out, rows are not looked
        at.
    """
    most = torch.finfo(grouped.encoder_GFN.dtype).max
    if not x_BLD.numel() or float(x_BLD.abs().amax()) * most_weight * x_BLD[0].numel() < most / 4:
        return
    x_BGN = (grouped.split(x_BLD).double() - grouped.center_GN.double()).abs()
    width = torch.linalg.vector_norm(grouped.encoder_GFN.double(), dim=2).amax(1)
    reach_BG = torch.linalg.vector_norm(x_BGN, dim=2) * width + grouped.encoder_bias_GF.double().abs().amax(1)
    if bool((reach_BG >= most).any()):
        token = int((reach_BG >= most).any(1).nonzero()[0]) * len(x_BLD) // len(x_BGN)
        largest, dtype = float(x_BLD[token].abs().amax()), grouped.encoder_GFN.dtype
        raise ValueError(
            f"token {token} holds {largest:.3g}, and scores up to {float(reach_BG.amax()):.3g} are more than {dtype} "
            "holds; check the scale of the inputs, or drop such tokens"
        )


def non_finite(x_BLD: Tensor) -> str:
    """Where the first NaN or infinity is and how many tokens hold one; empty where all numbers are finite."""
    # A sum is finite only where all numbers are; where it is not they are looked at, for large ones may add up to that.
    if math.isfinite(x_BLD.sum().item()) or not bool((bad_BLD := ~torch.isfinite(x_BLD)).any()):
        return ""
    token, layer, _ = bad_BLD.nonzero()[0].tolist()
    count = int(bad_BLD.flatten(1).any(1).sum())
    return f" in {count} of {x_BLD.shape[0]} tokens, first at token {token}, layer {layer}"
