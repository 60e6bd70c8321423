"""`decode_loss`: reconstruction, bias, residual and squared error by layer from one pass over the pairs.

One program owns a column tile of one token and dictionary, and leaves its squared error in a buffer that is summed
afterwards; a tile never straddles two parts. The floor in elements: `B * G * N` for each of x and the error, and one
read of the decoder's used rows. The grid is token-fast, then tile, then dictionary, so that a slice of one dictionary's
decoder stays in L2. Deterministic: what a program writes is its own, and the partials are added in one order.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from triton_kernels.arguments import Code
from triton_kernels.gpu.gather_sum import weighted_rows
from triton_kernels.gpu.tiles import accumulator, gather_tile, jit, tile_count
from triton_kernels.reference import sum_dtype


@jit
def decode_loss_kernel(
    values, features, offsets, decoder, bias, x, error, squares, n_inputs,
    N: tl.constexpr, PART: tl.constexpr, COLUMNS: tl.constexpr, PAIRS: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (PART + COLUMNS - 1) // COLUMNS
    token, tile, dictionary = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    within = (tile % TILES) * COLUMNS + tl.arange(0, COLUMNS)
    inside = within < PART
    columns = (tile // TILES) * PART + within
    given = token.to(tl.int64) * n_inputs + dictionary % n_inputs
    row = dictionary // n_inputs * tl.num_programs(0).to(tl.int64) * n_inputs + given
    wanted = tl.load(x + given * N + columns, inside, other=0, eviction_policy="evict_first").to(ACCUMULATE)
    shift = tl.load(bias + dictionary * N + columns, inside, other=0).to(ACCUMULATE)
    total = weighted_rows(values, features, offsets, row, decoder, columns, inside, N, PAIRS, ACCUMULATE)
    difference = total + shift - wanted
    tl.store(error + row * N + columns, difference.to(error.dtype.element_ty), inside, eviction_policy="evict_first")
    partial = (dictionary.to(tl.int64) * tl.num_programs(1) + tile) * tl.num_programs(0) + token
    tl.store(squares + partial, tl.sum(difference * difference, 0))


def decode_loss(code: Code, decoder_GFN: Tensor, bias_GN: Tensor, x_BGN: Tensor, n_parts: int) -> tuple[Tensor, Tensor]:
    """See `reference.decode_loss`; squares are those of the error before it is rounded to the decoder's dtype."""
    n_groups, n_features, width = decoder_GFN.shape
    (n_tokens, n_inputs, _), dtype = x_BGN.shape, decoder_GFN.dtype
    n_sets = n_groups // n_inputs
    error_BGN = torch.empty(n_sets * n_tokens, n_inputs, width, dtype=dtype, device=x_BGN.device)
    part = width // n_parts
    tile = gather_tile(part, decoder_GFN.itemsize, n_features)
    n_tiles = tile_count(part, tile.columns)
    squares = torch.empty(n_groups, n_parts, n_tiles * n_tokens, dtype=sum_dtype(dtype), device=x_BGN.device)
    if error_BGN.numel() > 0:
        decode_loss_kernel[(n_tokens, n_parts * n_tiles, n_groups)](
            *(one.contiguous() for one in code), decoder_GFN.contiguous(),
            bias_GN.contiguous(), x_BGN.contiguous(), error_BGN, squares, n_inputs,
            width, part, tile.columns, tile.pairs, accumulator(dtype), num_warps=1,
        )  # fmt: skip
    return error_BGN, squares.sum(-1)
