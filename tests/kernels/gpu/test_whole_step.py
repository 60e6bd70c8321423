"""A training step through the kernels, under the interpreter, beside the same step on the CPU's own operators."""

import inspect

import pytest
import torch

import triton_kernels
from crosscoder import BatchTopK, Crosscoder, LayerwiseSAE, TopK
from crosscoder.training.optimizer import RowAdam
from crosscoder.training.state import FiringTracker, TrainState
from crosscoder.training.step import TrainConfig, take_step
from triton_kernels import cpu, gpu, ops


def test_both_devices_offer_the_same_functions():
    for name in set(triton_kernels.__all__) - {"cpu_form"}:
        ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (cpu, gpu))
        assert list(ours) == list(theirs), name


@pytest.mark.parametrize("cls", [Crosscoder, LayerwiseSAE])
@pytest.mark.parametrize("sparsity", [TopK(k=3), BatchTopK(k=3)])
def test_three_steps_equal_those_of_the_cpu(cls, sparsity, monkeypatch):
    monkeypatch.setattr(ops, "form_for", lambda tensor, *sizes: ops.implementation(tensor))
    results = []
    for module in (cpu, gpu):
        monkeypatch.setattr(ops, "implementation", lambda tensor, module=module: module)
        monkeypatch.setattr("triton_kernels.encoders.implementation", lambda tensor, module=module: module)
        dictionary = cls(n_layers=2, d_model=5, n_features=37, sparsity=sparsity, aux_k=0)
        groups = dictionary.grouped().center_GN.shape[0]
        state = TrainState(dictionary, RowAdam(dictionary, lr=1e-2), FiringTracker(groups, 37))
        config = TrainConfig(warmup_steps=0, learning_rate=1e-2, grad_clip=0.05)
        for seed in range(3):
            x = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(seed))
            entry = take_step(state, x, config, None)()
        results.append((entry["loss"], entry["gradient_norm"], *dictionary.parameters()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # a hundredth of a step of Adam
