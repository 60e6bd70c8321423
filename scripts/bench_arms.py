"""The arms: ways of taking one whole training step of the same dictionary on the same x, their times and memory.

A dense dictionary under autograd, this library's steps by sparsity rule and dtype, and the peers' (`bench_peers`).
`crosscoder` arms train one dictionary of width L * D, `bank` arms L of width D; an arm is compared with those of its
family.
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bench_common as common
import bench_peers
import torch
from bench_common import Shape, Step, UnavailableError

from crosscoder import BatchTopK, Crosscoder, JumpReLU, LayerwiseSAE, TopK
from crosscoder.dictionary import Dictionary
from crosscoder.dictionary.sparsity import TargetL0Penalty

KINDS: dict[str, type[Dictionary]] = {"crosscoder": Crosscoder, "bank": LayerwiseSAE}
SAMPLED_SCORES = 2**20
"""Scores of x that say where JumpReLU's threshold starts."""


def dense_step(shape: Shape, x_BLD: torch.Tensor, dtype: str, *, bank: bool = False, compiled: bool = False) -> Step:
    """The dictionary written densely, with autograd and the default Adam; compiled, with the fused one."""
    groups = shape.n_layers if bank else 1
    width, device = shape.width // groups, x_BLD.device
    x_GBN = x_BLD.flatten(1).view(shape.batch, groups, width).transpose(0, 1).contiguous()
    generator = torch.Generator(device).manual_seed(0)
    table = torch.randn(groups, shape.n_features, width, device=device, generator=generator) / width**0.5
    encoder, decoder = torch.nn.Parameter(table), torch.nn.Parameter(table.clone())
    encoder_bias = torch.nn.Parameter(torch.zeros(groups, 1, shape.n_features, device=device))
    decoder_bias = torch.nn.Parameter(torch.zeros(groups, 1, width, device=device))
    parameters = [encoder, decoder, encoder_bias, decoder_bias]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True if compiled else None)

    def loss_of(x_GBN: torch.Tensor) -> torch.Tensor:
        z = torch.baddbmm(encoder_bias, x_GBN - decoder_bias, encoder.transpose(1, 2)).relu()
        top = z.topk(shape.k, dim=2, sorted=False)
        code = torch.zeros_like(z).scatter(2, top.indices, top.values)
        return torch.nn.functional.mse_loss(torch.baddbmm(decoder_bias, code, decoder).float(), x_GBN)

    if compiled and device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        raise UnavailableError("torch.compile finds no C++ compiler")
    forward: Callable[[torch.Tensor], torch.Tensor] = torch.compile(loss_of, dynamic=False) if compiled else loss_of

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
            loss = forward(x_GBN)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def start_dictionary(
    shape: Shape, x_BLD: torch.Tensor, *, family: str = "crosscoder", rule: type = TopK, decoder: str = "free"
) -> Dictionary:
    """The dictionary that the library's steps train.

    JumpReLU's threshold is the score that K of F reach: of the untrained encoder on centred x, as many tokens as
    `SAMPLED_SCORES` allows, in a bank over all layers. Its penalty's target is an L0 of K.
    """
    sparsity = JumpReLU(penalty=TargetL0Penalty(target=shape.k)) if rule is JumpReLU else rule(k=shape.k)
    settings: dict[str, Any] = {"n_layers": shape.n_layers, "d_model": shape.d_model, "n_features": shape.n_features}
    settings |= {"aux_k": 0, "decoder": decoder}
    dictionary = KINDS[family](**settings, sparsity=sparsity).to(x_BLD.device)
    if dictionary.log_threshold is not None:
        with torch.no_grad():
            grouped = dictionary.grouped()
            x_BGN = grouped.split(x_BLD - x_BLD.mean(0))[: max(1, SAMPLED_SCORES // grouped.encoder_bias_GF.numel())]
            z_P = torch.einsum("bgn,gfn->bgf", x_BGN, grouped.encoder_GFN).flatten()
            n_kept = max(1, z_P.numel() * shape.k // shape.n_features)
            dictionary.log_threshold.fill_(z_P.topk(n_kept, sorted=False).values.amin().log())
    return dictionary


def library_step(dictionary: Dictionary, x_BLD: torch.Tensor, dtype: str) -> Step:
    """One step as the trainer takes it, without logging and without dead features.

    JumpReLU learns a thousandth as fast: on a random x its values shrink, at the usual rate below their thresholds
    within ten steps, and then there is little left to do.
    """
    from crosscoder.training.state import TrainState
    from crosscoder.training.step import TrainConfig, take_step

    rate = 1e-6 if dictionary.log_threshold is not None else 1e-3
    config = TrainConfig(learning_rate=rate, dead_after_tokens=10**12, precision=dtype)  # ty: ignore[invalid-argument-type]
    state = TrainState.start(dictionary, learning_rate=config.learning_rate, precision=dtype)

    def step() -> None:
        take_step(state, x_BLD, config, None)

    return step


def together_step(shape: Shape, x_BLD: torch.Tensor, dtype: str, *, family: str, n_together: int) -> Step:
    """One step of several dictionaries of BatchTopK that differ in their seed, side by side."""
    from crosscoder.training.state import StackState, TrainState
    from crosscoder.training.step import TrainConfig, take_step

    settings: dict[str, Any] = {"n_layers": shape.n_layers, "d_model": shape.d_model, "n_features": shape.n_features}
    config = TrainConfig(dead_after_tokens=10**12, precision=dtype)  # ty: ignore[invalid-argument-type]
    states = []
    for seed in range(n_together):
        dictionary = KINDS[family](**settings, aux_k=0, decoder="free", sparsity=BatchTopK(k=shape.k), seed=seed)
        states.append(TrainState.start(dictionary.to(x_BLD.device), precision=dtype))
    stack = StackState(states)

    def step() -> None:
        take_step(stack, x_BLD, config, None)

    return step


@dataclass(frozen=True)
class Arm:
    """One way of doing the job. `family` is the arms that are compared with one another; `rule` is the library's."""

    family: str
    dtype: str
    make: Callable[[Shape, torch.Tensor], Step]
    by_default: bool = True
    rule: type | None = None
    n_together: int = 1
    """Dictionaries that a step trains; its time is divided by them."""


def _peer(name: str, dtype: str, *, by_default: bool = True) -> Arm:
    return Arm("crosscoder", dtype, lambda s, x: bench_peers.STEPS[name](s, x.flatten(1), dtype), by_default)


def _dense(family: str, dtype: str, *, compiled: bool = False, by_default: bool = True) -> Arm:
    bank = family == "bank"
    return Arm(family, dtype, lambda s, x: dense_step(s, x, dtype, bank=bank, compiled=compiled), by_default)


def _ours(family: str, dtype: str, rule: type = TopK, *, decoder: str = "free", by_default: bool = True) -> Arm:
    def make(shape: Shape, x_BLD: torch.Tensor) -> Step:
        return library_step(start_dictionary(shape, x_BLD, family=family, rule=rule, decoder=decoder), x_BLD, dtype)

    return Arm(family, dtype, make, by_default, rule)


def _together(family: str, dtype: str, n_together: int) -> Arm:
    def make(shape: Shape, x_BLD: torch.Tensor) -> Step:
        return together_step(shape, x_BLD, dtype, family=family, n_together=n_together)

    return Arm(family, dtype, make, by_default=False, n_together=n_together)


ARMS = {
    "dense eager": _dense("crosscoder", "fp32"),
    "dense torch.compile": _dense("crosscoder", "fp32", compiled=True),
    "dense eager bf16": _dense("crosscoder", "bf16", by_default=False),
    "dense torch.compile bf16": _dense("crosscoder", "bf16", compiled=True, by_default=False),
    "library fp32": _ours("crosscoder", "fp32"),
    "library bf16": _ours("crosscoder", "bf16"),
    "library, unit decoder": _ours("crosscoder", "fp32", decoder="unit"),
    "library, BatchTopK": _ours("crosscoder", "fp32", BatchTopK),
    "library, BatchTopK bf16": _ours("crosscoder", "bf16", BatchTopK, by_default=False),
    "library, JumpReLU": _ours("crosscoder", "fp32", JumpReLU, by_default=False),
    "library, JumpReLU bf16": _ours("crosscoder", "bf16", JumpReLU, by_default=False),
    "library, 4 together": _together("crosscoder", "fp32", 4),
    "library, 4 together bf16": _together("crosscoder", "bf16", 4),
    "sparsify": _peer("sparsify", "fp32"),
    "dictionary_learning": _peer("dictionary_learning", "fp32"),
    "SAELens": _peer("SAELens", "fp32"),
    "sparsify bf16": _peer("sparsify", "bf16", by_default=False),
    "SAELens bf16": _peer("SAELens", "bf16", by_default=False),
    "whole-row kernels": _peer("whole-row kernels", "fp32", by_default=False),
    "whole-row kernels bf16": _peer("whole-row kernels", "bf16", by_default=False),
    "bank, dense eager": _dense("bank", "fp32"),
    "bank, dense torch.compile": _dense("bank", "fp32", compiled=True),
    "bank, dense eager bf16": _dense("bank", "bf16", by_default=False),
    "bank, dense torch.compile bf16": _dense("bank", "bf16", compiled=True, by_default=False),
    "bank, library fp32": _ours("bank", "fp32"),
    "bank, library bf16": _ours("bank", "bf16"),
    "bank, library, BatchTopK": _ours("bank", "fp32", BatchTopK, by_default=False),
    "bank, library, BatchTopK bf16": _ours("bank", "bf16", BatchTopK, by_default=False),
    "bank, library, JumpReLU": _ours("bank", "fp32", JumpReLU, by_default=False),
    "bank, library, JumpReLU bf16": _ours("bank", "bf16", JumpReLU, by_default=False),
    "bank, library, 4 together": _together("bank", "fp32", 4),
    "bank, library, 4 together bf16": _together("bank", "bf16", 4),
}


def time_arms(shape: Shape, names: Sequence[str], repeats: int, device: str) -> tuple[dict[str, list[float]], dict]:
    """Milliseconds of each arm's steps, family by family, and the reasons of the arms that cannot run.

    Peers come last: what dictionary-learning imports changes torch so that nothing can be compiled after it.
    """
    times: dict[str, list[float]] = {}
    reasons: dict[str, str] = {}
    x_BLD = common.random_x(shape, device)
    for family in ("bank", "crosscoder"):
        steps: dict[str, Step] = {}
        for name in (name for name in ARMS if name in names and ARMS[name].family == family):
            step, reason = common.attempt(lambda name=name: _checked(ARMS[name].make(shape, x_BLD)))
            if step is None:
                reasons[name] = reason
                print(f"{name}: skipped, {reason}", flush=True)
            else:
                steps[name] = step
        times |= common.alternate(steps, repeats, device)
    return {name: [ms / ARMS[name].n_together for ms in times[name]] for name in ARMS if name in times}, reasons


def _checked(step: Step) -> Step:
    """The step, after one: what cannot run fails here and not among the arms' turns."""
    step()
    return step


def peak_extra_bytes(shape: Shape, name: str, device: str) -> int:
    """Peak memory of three steps, above the process with its parameters, gradients and moments."""
    step = ARMS[name].make(shape, common.random_x(shape, device))
    tables = 2 * shape.n_features * shape.width * 4
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what making the arm took and freed is no part of its steps
        before = _status_kib("VmRSS:") * 1024
    for _ in range(3):
        step()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _status_kib("VmHWM:") * 1024
    return peak - before - 3 * tables


def _status_kib(field_name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field_name))


def memory_in_fresh_process(shape: Shape, name: str, given: argparse.Namespace) -> int | None:
    """What `peak_extra_bytes` finds; None for compiled arms on the CPU, where the compiler shares the process."""
    if given.no_memory or ("compile" in name and given.device == "cpu"):
        return None
    letters = [f"--{key.replace('_', '-')}={value}" for key, value in asdict(shape).items()]
    script = str(Path(__file__).with_name("bench_step.py"))
    command = [sys.executable, script, *letters, f"--threads={given.threads}", f"--device={given.device}"]
    done = subprocess.run([*command, f"--memory-of={name}"], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name}: memory not measured, {done.stderr.strip().splitlines()[-1:]}")
        return None
    return int(done.stdout.split()[-1])
