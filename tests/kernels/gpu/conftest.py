"""Triton's interpreter on the processor, or compiled kernels where there is a GPU, for every test of this folder.

Triton decides when a kernel is decorated, so the variable is set here, before any kernel module is imported.
"""

import contextlib
import os
import random
import sys

import pytest
import torch

from tests.kernels.interpreter import right_bf16

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    if "triton" in sys.modules:
        import triton.language
        from triton.runtime.jit import JITFunction

        if isinstance(triton.language.sum, JITFunction):
            raise pytest.UsageError("triton was imported before TRITON_INTERPRET was set: set it in tests/conftest.py")

UNWRITTEN = -(2**30) - 12345  # what integer results hold until a kernel writes them


def _fill(tensor):
    if tensor.dtype.is_floating_point:
        return tensor.fill_(float("nan"))
    return tensor.fill_(UNWRITTEN if tensor.dtype.itemsize >= 4 else 99)


@pytest.fixture(scope="session")
def device():
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture(scope="session", autouse=not ON_GPU)
def mended_interpreter():
    with right_bf16():
        yield


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch):
    """The operators take the kernels, wherever the tensors are and however dense a code is."""
    from triton_kernels import encoders, gpu, ops

    monkeypatch.setattr(ops, "form_for", lambda tensor, *sizes: gpu)
    for module in (ops, encoders):
        monkeypatch.setattr(module, "implementation", lambda tensor: gpu)


@pytest.fixture
def nan_empty(monkeypatch):
    """Uninitialised tensors hold NaN (integers: `UNWRITTEN`), so an element that no program writes shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, plain=plain, **kwargs: _fill(plain(*args, **kwargs)))


@pytest.fixture
def shuffled_programs():
    """A context manager, given a seed: inside it the interpreter runs the programs of a grid in a shuffled order."""

    @contextlib.contextmanager
    def shuffled(seed=0):
        if ON_GPU:  # the hardware orders the programs
            yield
            return
        from triton.runtime import interpreter

        builder, order, generator = interpreter.interpreter_builder, {}, random.Random(seed)
        set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx

        def set_grid_dim(*grid):
            places = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
            order.clear()
            order.update(zip(places, generator.sample(places, len(places))))
            set_dim(*grid)

        builder.set_grid_dim = set_grid_dim
        builder.set_grid_idx = lambda *place: set_idx(*order[place])
        try:
            yield
        finally:
            del builder.set_grid_dim, builder.set_grid_idx

    return shuffled


@pytest.fixture(scope="module", autouse=True)
def cpu_form():
    """One form is enough: these tests are of the GPU's."""
