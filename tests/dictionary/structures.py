"""Crosscoders of every layer structure, which several tests look at."""

import pytest
import torch

from crosscoder import Crosscoder, TopK
from crosscoder.dictionary import Acausal, Diffing, LocalWindow, StrictlyCausal, Transcoder, WeaklyCausal

L, D, F = 4, 6, 24
MASKED = [
    WeaklyCausal(),
    StrictlyCausal(),
    LocalWindow(2),
    LocalWindow(1),
    Transcoder(),
    Diffing(n_layers=(3, 1), d_models=(6, 4), dedicated=(0.25, 0.125)),
]
FIRST_WRITTEN = {StrictlyCausal(): 1, Transcoder(): 2}
EVERY = pytest.mark.parametrize("structure", [Acausal(), *MASKED], ids=str)
EVERY_MASK = pytest.mark.parametrize("structure", MASKED, ids=str)


def make(structure, *, sparsity=None, seed=0, **settings):
    """A float64 crosscoder whose parameters all differ, also outside its masks."""
    shape = {"n_layers": L, "d_model": D, "n_features": F}
    cc = Crosscoder(**{**shape, "sparsity": sparsity or TopK(k=5), "structure": structure, "seed": seed, **settings})
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in cc.double().parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return cc


def inputs(n, *, seed=5, n_layers=L, d_model=D):
    return torch.randn(n, n_layers, d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masks(cc):
    """Read and write masks in full, `[F, L, D]`."""
    found = cc.config.masks()
    shape = cc.encoder.shape
    return [torch.ones(shape, dtype=torch.bool)] * 2 if found is None else [mask.expand(shape) for mask in found]


def batches_of(structure, n, *, size=64):
    """Sparse combinations of fixed directions, with zeros where the structure has padding."""
    directions = torch.randn(16, L, D, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(3)
    widths = (
        torch.tensor(structure.d_models).repeat_interleave(torch.tensor(structure.n_layers))
        if isinstance(structure, Diffing)
        else torch.full((L,), D)
    )
    directions *= torch.arange(D) < widths[:, None]
    active = [torch.rand(size, 16, generator=generator) for _ in range(n)]
    return [torch.einsum("bf,fld->bld", (a > 0.85) * a, directions) for a in active]
