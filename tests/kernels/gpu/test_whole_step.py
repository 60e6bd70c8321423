"""A training step through the kernels, under the interpreter, beside the same step on the CPU's own operators."""

import inspect

import pytest
import torch

import triton_kernels
from crosscoder import BatchTopK, Crosscoder, JumpReLU, LayerwiseSAE, TopK
from crosscoder.dictionary.sparsity import TargetL0Penalty
from crosscoder.training.state import StackState, TrainState
from crosscoder.training.step import TrainConfig, take_step
from triton_kernels import cpu, gpu, ops

DIRECT = {"reconstruct"}  # calls the forms of either device


def test_both_devices_offer_the_same_functions():
    for name in set(triton_kernels.__all__) - {"cpu_form"} - DIRECT:
        ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (cpu, gpu))
        assert list(ours) == list(theirs), name


def on_each_device(monkeypatch, run):
    """What `run` returns by the forms of the CPU, and by the kernels."""
    for place in ("ops", "direct"):
        monkeypatch.setattr(f"triton_kernels.{place}.form_for", lambda tensor, *sizes: ops.implementation(tensor))
    for module in (cpu, gpu):
        for place in ("ops", "encoders", "direct"):
            monkeypatch.setattr(f"triton_kernels.{place}.implementation", lambda tensor, module=module: module)
        yield run()


def assert_close(results):
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # a hundredth of a step of Adam


CONFIG = TrainConfig(warmup_steps=0, learning_rate=1e-2, grad_clip=0.05)


def batch(seed):
    return torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cls", [Crosscoder, LayerwiseSAE])
@pytest.mark.parametrize("sparsity", [TopK(k=3), BatchTopK(k=3), JumpReLU(0.5, penalty=TargetL0Penalty(3))])
def test_three_steps_equal_those_of_the_cpu(cls, sparsity, monkeypatch):
    def run():
        dictionary = cls(n_layers=2, d_model=5, n_features=37, sparsity=sparsity, aux_k=0)
        state = TrainState.start(dictionary, learning_rate=1e-2)
        for seed in range(3):
            (entry,) = take_step(state, batch(seed), CONFIG, None)()
        return entry["loss"], entry["gradient_norm"], *dictionary.parameters()

    assert_close(list(on_each_device(monkeypatch, run)))


@pytest.mark.parametrize("cls", [Crosscoder, LayerwiseSAE])
@pytest.mark.parametrize("rule", [TopK, BatchTopK, lambda k: JumpReLU(0.5, penalty=TargetL0Penalty(k))])
def test_steps_side_by_side_equal_those_of_the_cpu(cls, rule, monkeypatch):
    def run():
        sizes = (37, 37) if cls is LayerwiseSAE else (37, 20)
        settings = {"n_layers": 2, "d_model": 5, "aux_k": 0}
        both = [cls(n_features=n, sparsity=rule(k), seed=k, **settings) for n, k in zip(sizes, (3, 5), strict=True)]
        state = StackState([TrainState.start(one, learning_rate=1e-2) for one in both])
        for seed in range(2):
            entries = take_step(state, batch(seed), CONFIG, None)()
        losses = [entry["loss"] for entry in entries]
        return *losses, *(parameter for one in both for parameter in one.parameters())

    assert_close(list(on_each_device(monkeypatch, run)))
