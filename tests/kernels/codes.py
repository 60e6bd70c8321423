"""Codes and encoder inputs that the tests of the operators share."""

import torch

from triton_kernels.reference import row_of_pair


def random_code(n_rows, n_features, *, n_groups=1, seed=0, most=5, dtype=torch.float64):
    """A ragged CSR code over `n_groups` dictionaries: rows may be empty, features ascend within a row.

    Row r belongs to dictionary `r % n_groups`, and features are global.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, min(most, n_features + 1), (n_rows,), generator=generator)
    rows = [
        torch.randperm(n_features, generator=generator)[:length].sort().values + row % n_groups * n_features
        for row, length in enumerate(lengths.tolist())
    ]
    features = torch.cat([*rows, torch.empty(0, dtype=torch.int64)]).to(torch.int32)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    values = torch.randn(features.numel(), generator=generator, dtype=dtype)
    return values, features, offsets


def encoder_inputs(n_rows=5, n_groups=2, n_features=9, width=4, *, seed=0, dtype=torch.float64, grad=True):
    """x, center, encoder and bias."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n_rows, n_groups, width), (n_groups, width), (n_groups, n_features, width), (n_groups, n_features))
    return tuple(torch.randn(shape, generator=generator, dtype=dtype, requires_grad=grad) for shape in shapes)


def rows_of(candidates):
    """The row of each candidate."""
    return row_of_pair(candidates.offsets, candidates.features.numel())
