"""Weights that training leaves where they began: the baselines of dictionaries whose features are not learnt.

Korznikov et al. 2026, "Sanity checks for sparse autoencoders: do SAEs beat random baselines?", arXiv 2602.14111.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from crosscoder.dictionary import Dictionary

Frozen = Literal["none", "encoder", "decoder", "soft_decoder"]
LEAST_COSINE = 0.8
"""Of a soft-frozen decoder row with its start (Korznikov et al. 2026, figure 1); it holds to rounding, 1e-6."""


@contextlib.contextmanager
def frozen_parts(dictionaries: Iterable[Dictionary], frozen: Frozen) -> Generator[None]:
    """While it lasts, the encoder or the decoder of all dictionaries takes no gradient; afterwards as before."""
    held = [getattr(one, frozen) for one in dictionaries] if frozen in ("encoder", "decoder") else []
    took_gradient = [weight.requires_grad for weight in held]
    try:
        for weight in held:
            weight.requires_grad_(False)
        yield
    finally:
        for weight, before in zip(held, took_gradient, strict=True):
            weight.requires_grad_(before)


def require_resampling(dictionary: Dictionary) -> None:
    """Refuse to resample the features of a dictionary whose weights do not all train.

    Raises:
        ValueError: names the weight: a dead feature starts again in all of its weights, and this one must stay.
    """
    for name, parameter in dictionary.named_parameters():
        if not parameter.requires_grad and name != "decoder_bias":
            raise ValueError(f"resample_every would write new rows into {name}, which is frozen; set it to 0")


def decoder_start(dictionary: Dictionary) -> Tensor:
    """The direction of every decoder row over all its layers, `[G * F, N]` of norm 1.

    Raises:
        ValueError: a row is 0 and has none.
    """
    rows_RN = dictionary.grouped().decoder_GFN.detach().flatten(0, 1)
    norm_R1 = rows_RN.norm(dim=1, keepdim=True)
    if not bool((norm_R1 > 0).all()):
        raise ValueError(f"{int((norm_R1 == 0).sum())} decoder rows are 0 and have no direction to be held near to")
    return rows_RN / norm_R1


@torch.no_grad()
def hold_near(rows_RN: Tensor, start_RN: Tensor) -> None:
    """Turns rows whose cosine with their start is below .8 to the nearest direction at .8, in place; norms stay."""
    norm_R1 = rows_RN.norm(dim=1, keepdim=True)
    along_R1 = torch.linalg.vecdot(rows_RN, start_RN)[:, None]
    far_R = (along_R1 < LEAST_COSINE * norm_R1).squeeze(1).nonzero().squeeze(1)
    if len(far_R):
        across_RN = F.normalize(rows_RN[far_R] - along_R1[far_R] * start_RN[far_R], dim=1)
        sine = math.sqrt(1 - LEAST_COSINE**2)
        rows_RN[far_R] = norm_R1[far_R] * (LEAST_COSINE * start_RN[far_R] + sine * across_RN)
