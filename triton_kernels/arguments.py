"""The arguments of each family of operators as one value: what `ops` hands to the forms for a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Code(NamedTuple):
    """A sparse code as CSR: row r owns the pairs `offsets[r] : offsets[r + 1]`."""

    values_P: Tensor
    features_P: Tensor  # int32, counted over all dictionaries
    offsets: Tensor  # [R + 1], int64


class Encoding(NamedTuple):
    """The encoders of G dictionaries and the batch that they encode.

    x may have fewer inputs than there are dictionaries: sets of as many dictionaries as inputs share it then, and the
    code is that of one set after the other. Within a set row b of dictionary g is row `b * inputs + g`.
    """

    x_BGN: Tensor
    center_GN: Tensor
    encoder_GFN: Tensor
    bias_GF: Tensor
    scale_GF: Tensor | None  # what pre-activations are multiplied by to give scores
    product: torch.dtype  # in which scores are computed
    working_GFN: Tensor | None  # the encoder, already rounded to `product`

    @property
    def is_rounded(self) -> bool:
        """Whether the choice is made on scores rounded to another dtype than the encoder's."""
        return self.product != self.encoder_GFN.dtype


class Largest(NamedTuple):
    """The choice of the k largest scores of a row, or of k a row over the batch (`by_batch`), k of each dictionary."""

    k_G: Sequence[int]
    by_batch: bool = False


class Above(NamedTuple):
    """The choice of scores above each feature's threshold, with a straight-through gradient: see `encode_threshold`."""

    threshold_GF: Tensor
    window: float


class AdamRows(NamedTuple):
    """A parameter with its gradient and moments, one row a feature; all but the gradient are changed in place."""

    parameter_RN: Tensor
    gradient_RN: Tensor
    first_RN: Tensor
    second_RN: Tensor
    working_RN: Tensor | None  # receives the new rows, rounded to its dtype


class AdamSettings(NamedTuple):
    """What a step of AdamW does to every row."""

    step: int  # counted from 1
    rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    scale_G: Tensor | None  # what gradients are multiplied by, one number for each of G equal runs of rows
    unit: bool  # rows keep norm 1
