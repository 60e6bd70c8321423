"""The operators on the CPU, out of C, stock torch operators and oneDNN: the names that this file imports."""
# ruff: noqa: F401

from triton_kernels.cpu.adam import adam_rows, row_squares
from triton_kernels.cpu.encode import encode_batch_top_k, encode_threshold, encode_top_k
from triton_kernels.cpu.fused import backward_decoder, backward_encoder, decode_loss
from triton_kernels.cpu.sparse import gather_dot, gather_sum, scatter_outer
