"""What activations are told apart by: fingerprints, and the block, position and site of those that are not finite."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor


def combine_fingerprints(*parts: str) -> str:
    """sha256 of the parts, in order."""
    return hashlib.sha256("/".join(parts).encode()).hexdigest()


def norms_of(x_BLD: Tensor) -> Tensor:
    """The norm of each token at each layer, `[B, L]`."""
    return torch.linalg.vector_norm(x_BLD, dim=-1)


def require_finite(
    x_BLD: Tensor,
    norm_BL: Tensor,
    tokens: Callable[[], Tensor],
    document_of: Callable[[int], int],
    sites: tuple[int, ...],
    context: int,
) -> None:
    """Refuse tokens that hold NaN or infinity; norms, which are at hand, tell at almost no cost that none does.

    tokens: gives each token's block times `context`, and its position there. document_of: a token's document.
    """
    if bool(norm_BL.isfinite().all()):
        return
    bad_BL = ~torch.isfinite(x_BLD).all(2)
    if not bool(bad_BL.any()):  # the square of a large number is none
        return
    row, layer = bad_BL.nonzero()[0].tolist()
    block, position = divmod(token := int(tokens()[row]), context)
    raise ValueError(
        f"the activations hold NaN or infinity in {int(bad_BL.any(1).sum())} of {len(x_BLD)} tokens, first in "
        f"document {document_of(token)} (block {block}, position {position}) at site {sites[layer]}; harvest them "
        "again in float32 or bfloat16, and look at that text"
    )
