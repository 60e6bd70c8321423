"""The operators as Triton kernels, one family a file, under the names that `triton_kernels.cpu` has."""
# ruff: noqa: F401

from triton_kernels.gpu.adam_rows import adam_rows, row_squares
from triton_kernels.gpu.backward_decoder import backward_decoder
from triton_kernels.gpu.decode_loss import decode_loss
from triton_kernels.gpu.encode import encode_batch_top_k, encode_threshold, encode_top_k
from triton_kernels.gpu.gather_dot import gather_dot
from triton_kernels.gpu.gather_sum import gather_sum
from triton_kernels.gpu.scatter_outer import backward_encoder, scatter_outer
