"""What the ahead-of-time test compiles of the sparse kernels: the crosscoder's and the bank's shapes in bf16 and fp32.

The block sizes are those that the launchers choose for 32,768 features a dictionary and a batch of 8,192.
"""

import torch
import triton.language as tl

from triton_kernels.gpu.backward_decoder import decoder_tile
from triton_kernels.gpu.gather_dot import PAIRS_TO_ADD
from triton_kernels.gpu.tiles import gather_tile

N_FEATURES, N_TOKENS = 32768, 8192
PATH = "triton_kernels.gpu."
REGISTERS = 128  # a thread: 16 one-warp programs a multiprocessor


def entry(kernel, signature, **constexprs):
    return (PATH + kernel, signature, {**constexprs, "ACCUMULATE": tl.float32}, 1, 3, REGISTERS)


def block(tile):
    return {"COLUMNS": tile.columns, "PAIRS": tile.pairs}


def specs_of(width, n_parts, data):
    """Every kernel for rows of `width`, with tables and activations of pointer type `data` and float32 sums."""
    itemsize = {"*bf16": torch.bfloat16, "*fp32": torch.float32}[data].itemsize
    table = block(gather_tile(width, itemsize, N_FEATURES))
    parts = block(gather_tile(width // n_parts, itemsize, N_FEATURES))
    rows = block(gather_tile(width, itemsize, N_TOKENS, most_row_bytes=1024))
    errors = block(decoder_tile(width, itemsize, N_TOKENS))
    scratch = gather_tile(width, 4, 1)
    code = {"values": "*fp32", "features": "*i32", "offsets": "*i64"}
    major = {"chunks": "*i32", "rows": "*i32", "values": "*fp32"}
    result = {"out": "*fp32", "scratch": "*fp32"}
    of_sums = {"sums": "*fp32", "scratch_sums": "*fp32", "n_features": "i32", "features_each": "i32", "n_own": "i32"}
    decode = {"decoder": data, "bias": "*fp32", "x": data, "error": data, "squares": "*fp32", "n_inputs": "i32"}
    decoder = {"error": data, "scales": "*fp32", "decoder": data, "d_decoder": data, "scratch": "*fp32"}
    counts = {"partials": "*fp32", "n_pairs": "i32", "n_features": "i32", "features_each": "i32"}
    dots = {"offsets": "*i64", "table": data, "partials": "*fp32", "n_pairs": "i32"}
    scatter = {**major, "x": data, "center": "*fp32", **result, **of_sums}
    return [
        entry("gather_sum:gather_sum_kernel", {**code, "table": data, "out": data}, N=width, **table),
        entry("gather_dot:gather_dot_kernel", {"x": data, "features": "*i32", **dots}, N=width, **table),
        entry("decode_loss:decode_loss_kernel", {**code, **decode}, N=width, PART=width // n_parts, **parts),
        entry("scatter_outer:scatter_outer_kernel", scatter, CENTERED=False, N=width, **rows),
        entry("scatter_outer:scatter_outer_kernel", scatter, CENTERED=True, N=width, **rows),
        entry("backward_decoder:backward_decoder_kernel", {**major, **decoder, **counts}, N=width, **errors),
        entry("feature_major:add_scratch_kernel", SPARE, N=width, COLUMNS=scratch.columns, ROWS=scratch.pairs),
    ]


SPARE = {"out": "*fp32", "scratch": "*fp32", "scratch_features": "*i32", "first_scratch": "*i32", "n_features": "i32"}
ADD_TILES = {"partials": "*fp32", "order": "*i64", "out": "*fp32", "n_pairs": "i32", "n_tiles": "i32"}
SPECS = [
    *specs_of(9216, 12, "*bf16"),
    *specs_of(9216, 12, "*fp32"),
    *specs_of(768, 1, "*bf16"),
    *specs_of(768, 1, "*fp32"),
    entry("feature_major:add_scratch_kernel", SPARE, N=1, COLUMNS=1, ROWS=16),
    (PATH + "gather_dot:add_tiles_kernel", ADD_TILES, {"ORDERED": False, "BLOCK": PAIRS_TO_ADD}, 4, 3, REGISTERS),
    (PATH + "gather_dot:add_tiles_kernel", ADD_TILES, {"ORDERED": True, "BLOCK": PAIRS_TO_ADD}, 4, 3, REGISTERS),
]
