"""Adam by rows against torch's own, and the norms that clipping needs."""

import pytest
import torch

import triton_kernels as ops
from triton_kernels import reference
from triton_kernels.cpu import adam


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("block", [adam.BLOCK_ELEMENTS, 24])
def test_five_steps_equal_adamw(weight_decay, block, monkeypatch):
    monkeypatch.setattr(adam, "BLOCK_ELEMENTS", block)
    ours = draw(13, 7)
    theirs = torch.nn.Parameter(ours.clone())
    first, second = torch.zeros_like(ours), torch.zeros_like(ours)
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=weight_decay, foreach=False, fused=False)
    for step in range(1, 6):
        theirs.grad = draw(13, 7, seed=step)
        optimizer.step()
        ops.adam_rows(ours, theirs.grad, first, second, step=step, rate=1e-2, weight_decay=weight_decay)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("groups", [None, 1, 3])
def test_rows_are_scaled_projected_and_normalised(unit, groups, monkeypatch):
    monkeypatch.setattr(adam, "BLOCK_ELEMENTS", 30)
    parameter = torch.nn.functional.normalize(draw(12, 10), dim=1)
    scale = None if groups is None else torch.rand(groups)
    options = {"rate": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "scale_G": scale, "unit": unit}
    results = []
    for update in (ops.adam_rows, reference.adam_rows):
        tensors = [parameter.clone(), torch.zeros(12, 10), torch.zeros(12, 10)]
        working = torch.zeros(12, 10, dtype=torch.bfloat16)
        for step in (1, 2, 3):
            gradient = draw(12, 10, seed=step)
            update(tensors[0], gradient, *tensors[1:], step=step, working_RN=working, **options)
            assert torch.equal(gradient, draw(12, 10, seed=step))  # the gradient is left as it was
        results.append(tensors)
        assert torch.equal(working, tensors[0].bfloat16())
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    if unit:
        torch.testing.assert_close(results[0][0].norm(dim=1), torch.ones(12))


@pytest.mark.parametrize("block", [adam.BLOCK_ELEMENTS, 24])
def test_row_squares_leave_out_the_part_along_the_row(block, monkeypatch):
    monkeypatch.setattr(adam, "BLOCK_ELEMENTS", block)
    gradient, unit = draw(11, 6), torch.nn.functional.normalize(draw(11, 6, seed=1), dim=1)
    torch.testing.assert_close(ops.row_squares(gradient), gradient.square().sum(1))
    across = gradient - (gradient * unit).sum(1, keepdim=True) * unit
    torch.testing.assert_close(ops.row_squares(gradient, unit), across.square().sum(1))
    assert (ops.row_squares(unit, unit) >= 0).all()


def test_an_update_tells_autograd_that_the_parameter_changed():
    parameter = torch.nn.Parameter(draw(3, 2))
    loss = parameter.square().sum()
    ops.adam_rows(parameter.detach(), draw(3, 2), torch.zeros(3, 2), torch.zeros(3, 2), step=1, rate=1e-2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
