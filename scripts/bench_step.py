"""Time of one whole training step (forward, backward, optimiser): this library against dense autograd.

The arms alternate in one process on the same data, so that a busy neighbour slows all of them alike; quote the
ratios. Peak memory is measured in a fresh process per arm, above parameters, gradients and moments.

    python scripts/bench_step.py                     # the shape of the README's claim
    python scripts/bench_step.py --threads 1 --n-features 2048
    python scripts/bench_step.py --device cuda --batch 8192 --n-layers 12 --d-model 768 --n-features 32768
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from crosscoder import BatchTopK, Crosscoder, LayerwiseSAE, TopK
from crosscoder.foundation.artifact import write_json
from crosscoder.foundation.provenance import describe_run

# Arms that take turns: each family with its own dense baseline.
FAMILIES = [
    ["dense crosscoder", "crosscoder", "crosscoder, unit decoder", "crosscoder, BatchTopK"],
    ["dense bank", "bank"],
]


@dataclass(frozen=True)
class Shape:
    """The job: B tokens of L layers of D numbers, F features, K kept."""

    batch: int = 1024
    n_layers: int = 6
    d_model: int = 256
    n_features: int = 8192
    k: int = 32


@dataclass(frozen=True)
class Config:
    shape: Shape = field(default_factory=Shape)
    threads: int = 2
    repeats: int = 9
    """Timed steps of each arm, after two that are not counted."""
    device: str = "cpu"
    out: Path = Path("benchmarks")
    memory_of: str = ""
    """Internal: measure the peak memory of one arm and print it."""


def dense_step(shape: Shape, x_BN: torch.Tensor, *, bank: bool = False) -> Callable[[], None]:
    """The same dictionary written densely, with autograd and the default Adam."""
    groups = shape.n_layers if bank else 1
    width = x_BN.shape[1] // groups
    x_GBN = x_BN.view(shape.batch, groups, width).transpose(0, 1).contiguous()
    device = x_BN.device
    encoder = torch.nn.Parameter(torch.randn(groups, shape.n_features, width, device=device) / width**0.5)
    decoder = torch.nn.Parameter(encoder.detach().clone())
    encoder_bias = torch.nn.Parameter(torch.zeros(groups, 1, shape.n_features, device=device))
    decoder_bias = torch.nn.Parameter(torch.zeros(groups, 1, width, device=device))
    optimizer = torch.optim.Adam([encoder, decoder, encoder_bias, decoder_bias], lr=1e-3)

    def step() -> None:
        z = torch.baddbmm(encoder_bias, x_GBN - decoder_bias, encoder.transpose(1, 2)).relu()
        top = z.topk(shape.k, dim=2, sorted=False)
        code = torch.zeros_like(z).scatter(2, top.indices, top.values)
        loss = torch.nn.functional.mse_loss(torch.baddbmm(decoder_bias, code, decoder), x_GBN)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def library_step(dictionary: torch.nn.Module, x_BLD: torch.Tensor) -> Callable[[], None]:
    """One step as the trainer takes it, without logging."""
    from crosscoder.training.checkpoint import TrainState
    from crosscoder.training.firing import FiringTracker
    from crosscoder.training.step import TrainConfig, take_step

    dictionary.to(x_BLD.device)
    groups = dictionary.grouped().center_GN.shape[0]  # ty: ignore[not-callable]
    state = TrainState(
        dictionary,  # ty: ignore[invalid-argument-type]
        torch.optim.Adam(dictionary.parameters(), lr=1e-3, fused=True),
        FiringTracker(groups, dictionary.config.n_features, device=x_BLD.device),  # ty: ignore
    )
    config = TrainConfig(dead_after_tokens=10**12)
    return lambda: (take_step(state, x_BLD, config, None), None)[1]


def arms(shape: Shape, names: list[str] | None = None, *, device: str = "cpu") -> dict[str, Callable[[], None]]:
    """Every way of doing the job, by name; each holds its own parameters."""
    x_BLD = torch.randn(shape.batch, shape.n_layers, shape.d_model, generator=torch.Generator().manual_seed(0)).to(
        device
    )
    x_BN = x_BLD.flatten(1)
    common = {
        "n_layers": shape.n_layers,
        "d_model": shape.d_model,
        "n_features": shape.n_features,
        "aux_k": 0,
    }
    makers: dict[str, Callable[[], Callable[[], None]]] = {
        "dense crosscoder": lambda: dense_step(shape, x_BN),
        "crosscoder": lambda: library_step(Crosscoder(**common, decoder="free", sparsity=TopK(k=shape.k)), x_BLD),
        "crosscoder, unit decoder": lambda: library_step(Crosscoder(**common, sparsity=TopK(k=shape.k)), x_BLD),
        "crosscoder, BatchTopK": lambda: library_step(
            Crosscoder(**common, decoder="free", sparsity=BatchTopK(k=shape.k)), x_BLD
        ),
        "dense bank": lambda: dense_step(shape, x_BN, bank=True),
        "bank": lambda: library_step(LayerwiseSAE(**common, decoder="free", sparsity=TopK(k=shape.k)), x_BLD),
    }
    return {name: make() for name, make in makers.items() if names is None or name in names}


def alternate(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each arm's steps, the arms taking turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def peak_extra_bytes(shape: Shape, name: str) -> int:
    """Peak resident memory of three steps, above the process with its parameters, gradients and moments."""
    step = arms(shape, [name])[name]
    before = _status_kib("VmRSS:")
    parameters = 2 * shape.n_features * shape.n_layers * shape.d_model * 4
    for _ in range(3):
        step()
    return (_status_kib("VmHWM:") - before) * 1024 - 3 * parameters


def _status_kib(field_name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field_name))


def main(config: Config) -> None:
    """Measure, print the table, and write it with its JSON under `out`."""
    torch.set_num_threads(config.threads)
    shape = config.shape
    if config.memory_of:
        print(peak_extra_bytes(shape, config.memory_of))
        return
    times: dict[str, list[float]] = {}
    for family in FAMILIES:
        times |= alternate(arms(shape, family, device=config.device), config.repeats)
    median = {name: statistics.median(values) for name, values in times.items()}
    on_cpu = config.device == "cpu"
    memory = {name: _memory_in_fresh_process(config, name) if on_cpu else None for name in median}
    slab = shape.batch * shape.n_features * 4
    lines = [
        f"B={shape.batch} L={shape.n_layers} D={shape.d_model} F={shape.n_features} K={shape.k}, fp32, "
        f"{config.threads} threads, median of {config.repeats} alternating steps; {platform.platform()}",
        "",
        "| arm | ms a step | min - max | dense time / this | peak memory above "
        "parameters, gradients and moments, in [B, F] |",
        "|---|---|---|---|---|",
    ]
    for name, ms in median.items():
        base = median["dense bank" if "bank" in name else "dense crosscoder"]
        extra = memory[name]
        peak = "not measured" if extra is None else f"{extra / slab:.2f}"
        span = f"{min(times[name]):.1f} - {max(times[name]):.1f}"
        lines.append(f"| {name} | {ms:.1f} | {span} | {base / ms:.2f} | {peak} |")
    print("\n".join(lines))
    config.out.mkdir(parents=True, exist_ok=True)
    device = f"cpu{config.threads}" if config.device == "cpu" else config.device
    stem = f"step_{device}_F{shape.n_features}"
    (config.out / f"{stem}.md").write_text("\n".join(lines) + "\n")
    record = {"shape": asdict(shape), "ms": times, "peak_extra_bytes": memory, "provenance": describe_run()}
    write_json(config.out / f"{stem}.json", json.loads(json.dumps(record, default=str)))


def _memory_in_fresh_process(config: Config, name: str) -> int:
    shape = [f"--{key.replace('_', '-')}={value}" for key, value in asdict(config.shape).items()]
    command = [sys.executable, __file__, *shape, f"--threads={config.threads}", f"--memory-of={name}"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def parse_arguments() -> Config:
    """The settings, by the standard library alone, so that the script runs where the console's needs are absent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key, value in {**asdict(Shape()), "threads": 2, "repeats": 9}.items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--memory-of", default="", help=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    shape = Shape(**{key: given.pop(key) for key in asdict(Shape())})
    return Config(shape=shape, **given)


if __name__ == "__main__":
    main(parse_arguments())
