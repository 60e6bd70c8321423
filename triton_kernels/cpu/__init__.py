"""The operators on the CPU, out of stock torch operators and oneDNN."""

from triton_kernels.cpu.adam import adam_rows, row_squares
from triton_kernels.cpu.encode import encode_batch_top_k, encode_threshold, encode_top_k
from triton_kernels.cpu.fused import backward_decoder, backward_encoder, decode_loss
from triton_kernels.cpu.sparse import gather_dot, gather_sum, scatter_outer

__all__ = [
    "adam_rows",
    "backward_decoder",
    "backward_encoder",
    "decode_loss",
    "encode_batch_top_k",
    "encode_threshold",
    "encode_top_k",
    "gather_dot",
    "gather_sum",
    "row_squares",
    "scatter_outer",
]
