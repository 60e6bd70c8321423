"""Sparse linear algebra for dictionaries: CSR codes against row-major tables.

Letters: B batch, G dictionaries side by side, F features of one dictionary, N width of a row, R = B * G rows,
P kept (row, feature) pairs. `reference` defines each primitive, `stock` and `selection` are the fast forms made of
stock torch operators, `ops` registers them with their derivatives. Triton kernels move in here as one file each.
"""

from triton_kernels.ops import (
    encode_batch_top_k,
    encode_threshold,
    encode_top_k,
    gather_dot,
    gather_sum,
    scatter_outer,
)

__all__ = [
    "encode_batch_top_k",
    "encode_threshold",
    "encode_top_k",
    "gather_dot",
    "gather_sum",
    "scatter_outer",
]
