"""One dictionary's encoder with the rows that it encodes, and its product on the CPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from triton_kernels.arguments import Encoding
from triton_kernels.cpu import native


class Problem(NamedTuple):
    """One dictionary and its centred rows."""

    x_RN: Tensor
    encoder_FN: Tensor
    bias_F: Tensor
    scale_F: Tensor | None
    product: torch.dtype

    @property
    def is_rounded(self) -> bool:
        """Whether the choice is made on scores rounded to another dtype than the encoder's."""
        return self.product != self.encoder_FN.dtype

    def slabs(self, elements: int) -> Iterator[Tensor]:
        """z of slab after slab of rows, of so many scores each; only one slab exists at a time."""
        step = max(1, elements // self.encoder_FN.shape[0])
        for start in range(0, self.x_RN.shape[0], step):
            yield affine(self.x_RN[start : start + step], self.encoder_FN, self.bias_F)


def problems(encoding: Encoding) -> Iterator[Problem]:
    """The dictionaries one after the other, centred in the dtype of x."""
    x_BGN, center_GN, encoder_GFN, bias_GF, scale_GF, product, _ = encoding
    in_c, n_inputs = native.serves(x_BGN, center_GN, encoder_GFN), x_BGN.shape[1]
    for group in range(len(encoder_GFN)):
        place = group % n_inputs
        x_RN = (_centered_in_c if in_c else _centered)(x_BGN, center_GN[group], place).to(encoder_GFN.dtype)
        scale_F = None if scale_GF is None else scale_GF[group]
        yield Problem(x_RN, encoder_GFN[group], bias_GF[group], scale_F, product)


def _centered_in_c(x_BGN: Tensor, center_N: Tensor, place: int) -> Tensor:
    n_rows, n_inputs, width = x_BGN.shape
    x_RN, is_finite = x_BGN.new_empty(n_rows, width), torch.empty(1, dtype=torch.int64)
    given = (x_BGN, center_N.expand(width))
    native.call("centre_rows", n_rows, width, n_inputs * width, place * width, *given, x_RN, is_finite)
    if not is_finite.item():
        _refuse(x_RN)
    return x_RN


def _centered(x_BGN: Tensor, center_N: Tensor, place: int) -> Tensor:
    x_RN = x_BGN[:, place] - center_N
    if not math.isfinite(x_RN.sum().item()) and not bool(torch.isfinite(x_RN).all()):
        _refuse(x_RN)
    return x_RN


def _refuse(x_RN: Tensor) -> NoReturn:
    """NaN and infinity, which a comparison would turn into "not active" without a word."""
    row = int((~torch.isfinite(x_RN)).nonzero()[0, 0])
    raise ValueError(f"row {row} is not finite, in x or in the encoder; drop such rows")


@functools.cache
def onednn_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes that oneDNN multiplies on this CPU: bf16 only where the CPU has AVX-512 or better."""
    if not torch.backends.mkldnn.is_available():
        return ()
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if has_bf16 else (torch.float32,)


def affine(x_RN: Tensor, weight_FN: Tensor, bias_F: Tensor) -> Tensor:
    """`x @ weight.T + bias`, as `[R, F]`, in the dtype of `x`.

    On the CPU in fp32 and bf16 this goes to oneDNN, which in fp32 is true fp32 and was 1.2-1.4 times faster than the
    default product on the machines measured; the global precision flags are neither read nor changed. Where the CPU
    has no bf16 product of its own, torch's serves, several times slower than one in fp32.
    """
    if x_RN.dtype in onednn_dtypes():
        return torch.ops.mkldnn._linear_pointwise(x_RN.contiguous(), weight_FN, bias_F, "none", [], "")
    return torch.addmm(bias_F, x_RN, weight_FN.t())
