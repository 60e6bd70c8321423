"""Sparse linear algebra for dictionaries: CSR codes against row-major tables.

Letters: B batch, G dictionaries side by side, F features of one dictionary, N width of a row, R = B * G rows,
P kept (row, feature) pairs. `reference` defines each operator in plain torch, `cpu` and `gpu` are its fast forms for a
device, and `ops` and `encoders` are what the packages above call.
"""

from triton_kernels.cpu.native.build import form as cpu_form
from triton_kernels.direct import reconstruct
from triton_kernels.encoders import encode_batch_top_k, encode_threshold, encode_top_k
from triton_kernels.ops import (
    adam_rows,
    backward_decoder,
    backward_encoder,
    decode_loss,
    gather_dot,
    gather_sum,
    row_squares,
    scatter_outer,
)

__all__ = [
    "adam_rows",
    "backward_decoder",
    "backward_encoder",
    "cpu_form",
    "decode_loss",
    "encode_batch_top_k",
    "encode_threshold",
    "encode_top_k",
    "gather_dot",
    "gather_sum",
    "reconstruct",
    "row_squares",
    "scatter_outer",
]
