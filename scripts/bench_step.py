"""Time and peak memory of one whole training step (forward, backward, optimiser), beside other ways of taking it.

The arms do the same job on the same x, and take turns in one process, so that a busy neighbour slows all of them
alike; quote the ratios. Peak memory is measured in a fresh process per arm, above parameters, gradients and moments.
An arm that cannot run here has its reason in the table. fp32 is true fp32 on both devices.

    python scripts/bench_step.py                     # the shape of the README's claim
    python scripts/bench_step.py --sweep F           # scaling, with the passes' own times beside the step
    python scripts/bench_step.py --arms "dense eager" "library fp32" --threads 1
    python scripts/bench_step.py --device cuda --batch 8192 --n-layers 12 --d-model 768 --n-features 32768 --targets
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import bench_common as common
import bench_kernels
import bench_peers
import bench_plots
import torch
from bench_common import Shape, Step, UnavailableError, number

from crosscoder import BatchTopK, Crosscoder, LayerwiseSAE, TopK

SLAB_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}
"""Scores that the library holds at once."""
SWEEP_FACTORS = {"B": (0.25, 0.5, 1, 2), "F": (0.125, 0.25, 0.5, 1, 2, 4), "K": (0.25, 0.5, 1, 2, 4), "L": (0.5, 1, 2)}
SWEEP_ARMS = ("dense eager", "library fp32", "library bf16")
FLOOR_MS = 13.3
"""Floor of a step at `bench_peers.PREDICTED_SHAPE` on an H200, bf16, by arithmetic."""


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


def library_step(
    x_BLD: torch.Tensor,
    dtype: str,
    shape: Shape,
    kind: type = Crosscoder,
    *,
    rule: type = TopK,
    decoder: str = "free",
    keep: list[torch.nn.Module] | None = None,
) -> Step:
    """One step as the trainer takes it, without logging and without dead features; `keep` receives the dictionary."""
    from crosscoder.training.state import TrainState
    from crosscoder.training.step import TrainConfig, take_step

    settings = {"n_layers": shape.n_layers, "d_model": shape.d_model, "n_features": shape.n_features}
    dictionary = kind(**settings, aux_k=0, decoder=decoder, sparsity=rule(k=shape.k)).to(x_BLD.device)
    config = TrainConfig(dead_after_tokens=10**12, precision=dtype)  # ty: ignore[invalid-argument-type]
    state = TrainState.start(dictionary, learning_rate=config.learning_rate, precision=dtype)
    if keep is not None:
        keep.append(dictionary)

    def step() -> None:
        take_step(state, x_BLD, config, None)

    return step


@dataclass(frozen=True)
class Arm:
    """One way of doing the job. `family` is the arms that are compared with one another."""

    family: str
    dtype: str
    make: Callable[[Shape, torch.Tensor], Step]
    by_default: bool = True


def _peer(name: str, dtype: str, *, by_default: bool = True) -> Arm:
    return Arm("crosscoder", dtype, lambda s, x: bench_peers.STEPS[name](s, x.flatten(1), dtype), by_default)


def _dense(family: str, dtype: str, *, compiled: bool = False, by_default: bool = True) -> Arm:
    bank = family == "bank"
    return Arm(family, dtype, lambda s, x: dense_step(s, x, dtype, bank=bank, compiled=compiled), by_default)


ARMS = {
    "dense eager": _dense("crosscoder", "fp32"),
    "dense torch.compile": _dense("crosscoder", "fp32", compiled=True),
    "dense eager bf16": _dense("crosscoder", "bf16", by_default=False),
    "dense torch.compile bf16": _dense("crosscoder", "bf16", compiled=True, by_default=False),
    "library fp32": Arm("crosscoder", "fp32", lambda s, x: library_step(x, "fp32", s)),
    "library bf16": Arm("crosscoder", "bf16", lambda s, x: library_step(x, "bf16", s)),
    "library, unit decoder": Arm("crosscoder", "fp32", lambda s, x: library_step(x, "fp32", s, decoder="unit")),
    "library, BatchTopK": Arm("crosscoder", "fp32", lambda s, x: library_step(x, "fp32", s, rule=BatchTopK)),
    "sparsify": _peer("sparsify", "fp32"),
    "dictionary_learning": _peer("dictionary_learning", "fp32"),
    "SAELens": _peer("SAELens", "fp32"),
    "sparsify bf16": _peer("sparsify", "bf16", by_default=False),
    "SAELens bf16": _peer("SAELens", "bf16", by_default=False),
    "whole-row kernels": _peer("whole-row kernels", "fp32", by_default=False),
    "whole-row kernels bf16": _peer("whole-row kernels", "bf16", by_default=False),
    "bank, dense eager": _dense("bank", "fp32"),
    "bank, dense torch.compile": _dense("bank", "fp32", compiled=True),
    "bank, library fp32": Arm("bank", "fp32", lambda s, x: library_step(x, "fp32", s, LayerwiseSAE)),
    "bank, library bf16": Arm("bank", "bf16", lambda s, x: library_step(x, "bf16", s, LayerwiseSAE)),
}
TARGET_ARMS = ("dense torch.compile bf16", "library bf16", "sparsify bf16", "whole-row kernels bf16")


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
    return {name: times[name] for name in ARMS if name in times}, reasons


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
    command = [sys.executable, __file__, *letters, f"--threads={given.threads}", f"--device={given.device}"]
    done = subprocess.run([*command, f"--memory-of={name}"], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name}: memory not measured, {done.stderr.strip().splitlines()[-1:]}")
        return None
    return int(done.stdout.split()[-1])


def memory_columns(shape: Shape, family: str, extra: int | None, device: str) -> list[str]:
    """MiB, in `[B, F]` of fp32, and the c of `slab + 4 c (P + B N)` bytes: bounded where nothing `[B, F]` is held."""
    if extra is None:
        return ["-"] * 3
    slab = min(SLAB_BYTES[device], shape.batch * shape.n_features * 4)
    pairs = shape.k * (shape.n_layers if family == "bank" else 1)
    per_token = 4 * shape.batch * (pairs + shape.width)
    in_grids = extra / (4 * shape.batch * shape.n_features)
    return [f"{extra / 2**20:.0f}", f"{in_grids:.2f}", f"{(extra - slab) / per_token:.1f}"]


def step_table(
    shape: Shape,
    times: Mapping[str, list[float]],
    reasons: Mapping[str, str],
    memory: Mapping[str, int | None],
    device: str,
) -> list[str]:
    """The table of arms, each family against its own dense eager step."""
    header = ["arm", "dtype", "ms a step", "min - max", "dense eager / this", "sparsify / this"]
    header += ["peak MiB above parameters, gradients, moments", "the same in [B, F]", "c of slab + 4c(P + BN)"]
    median = {name: statistics.median(ms) for name, ms in times.items()}
    rows = []
    for name, ms in median.items():
        dense = median.get("bank, dense eager" if ARMS[name].family == "bank" else "dense eager")
        ratios = [dense, median.get("sparsify") if ARMS[name].family == "crosscoder" else None]
        span = f"{min(times[name]):.1f} - {max(times[name]):.1f}"
        cells = [f"{ms:.1f}", span, *(number(base and base / ms, ".2f") for base in ratios)]
        rows.append(
            [name, ARMS[name].dtype, *cells, *memory_columns(shape, ARMS[name].family, memory.get(name), device)]
        )
    rows += [[name, ARMS[name].dtype, f"skipped: {reason}", *["-"] * 6] for name, reason in reasons.items()]
    return common.markdown_table(header, rows)


def sweep(letter: str, shape: Shape, given: argparse.Namespace) -> int:
    """Time against one letter of the shape; against F also the sum of the passes, each measured by itself."""
    start = getattr(shape, common.LETTERS[letter])
    values = given.values or sorted({max(1, round(start * factor)) for factor in SWEEP_FACTORS[letter]})
    jobs = {value: shape.with_letter(letter, value) for value in values}
    jobs = {value: job for value, job in jobs.items() if job.k <= job.n_features}
    names = given.arms or list(SWEEP_ARMS)
    curves: dict[str, list[float | None]] = {name: [] for name in names}
    passes: dict[str, list[dict[str, float | None]]] = {"fp32": [], "bf16": []} if letter == "F" else {}
    reasons: dict[str, str] = {}
    for job in jobs.values():
        times, skipped = time_arms(job, names, given.repeats, given.device)
        reasons |= skipped
        for name in names:
            curves[name].append(statistics.median(times[name]) if name in times else None)
        for product, found in passes.items():
            found.append(bench_kernels.pass_times(job, product, given.device, given.repeats))
    sums = {f"sum of passes, {product}": [_sum(one) for one in found] for product, found in passes.items()}
    header = [letter, *(f"{name}, ms" for name in [*curves, *sums])]
    columns = [*curves.values(), *sums.values()]
    for product in passes:
        if f"library {product}" in curves:
            header.append(f"step / sum, {product}")
            pairs = zip(curves[f"library {product}"], sums[f"sum of passes, {product}"], strict=True)
            columns.append([None if a is None or b is None else a / b for a, b in pairs])
    rows = [[str(value), *(number(column[i]) for column in columns)] for i, value in enumerate(jobs)]
    machine = common.describe_machine(given.device, given.threads)
    title = f"{letter} from {shape}"
    lines = [f"{title}; median of {given.repeats} alternating steps", "", common.machine_line(machine), ""]
    lines += common.markdown_table(header, rows)
    stem = f"step_{common.device_label(given.device, given.threads)}_sweep_{letter}"
    record = {"shape": asdict(shape), "letter": letter, "values": list(jobs), "ms": curves, "passes": passes}
    common.write_report(
        given.out, stem, lines, {**record, "sums_of_passes": sums, "skipped": reasons, "machine": machine}
    )
    bench_plots.draw_sweep(given.out / f"{stem}.svg", letter, list(jobs), {**curves, **sums}, title)
    return _exit_status(reasons)


def _sum(one: Mapping[str, float | None]) -> float | None:
    found = [ms for ms in one.values() if ms is not None]
    return sum(found) if len(found) == len(one) else None


def target_table(shape: Shape, times: Mapping[str, list[float]]) -> list[str]:
    """What a step on an H200 must reach, what it reached, and whether that is enough."""
    median = {name: statistics.median(ms) for name, ms in times.items()}
    mine = median.get("library bf16")
    rows = []
    if shape == bench_peers.PREDICTED_SHAPE:
        limit = 1.4 * FLOOR_MS
        rows.append([f"whole step <= 1.4 x {FLOOR_MS} ms", number(mine, ".1f"), _met(mine and mine <= limit)])
    wanted = {"dense torch.compile bf16": 2.5, "whole-row kernels bf16": 1.5, "sparsify bf16": 1.5}
    for name, least in wanted.items():
        other = median.get(name)
        ratio = other / mine if other and mine else None
        rows.append([f">= {least} times faster than {name}", number(ratio, ".2f"), _met(ratio and ratio >= least)])
    return common.markdown_table(["target", "measured", "met?"], rows)


def _met(verdict: object) -> str:
    return "not measured" if verdict is None else "yes" if verdict else "no"


def digest(shape: Shape, dtype: str, device: str, *, rule: type = TopK, decoder: str = "free") -> str:
    """sha256 of the library's dictionary after three steps from its start."""
    kept: list[torch.nn.Module] = []
    step = library_step(common.random_x(shape, device), dtype, shape, rule=rule, decoder=decoder, keep=kept)
    for _ in range(3):
        step()
    parts = [tensor.cpu().contiguous().numpy().tobytes() for tensor in kept[0].state_dict().values()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def repetitions(device: str, times: int) -> list[str]:
    """Complaints about library steps that do not give the same bits each time."""
    settings: list[tuple[str, type, str]] = [("fp32", TopK, "free"), ("bf16", TopK, "free"), ("fp32", TopK, "unit")]
    complaints = []
    for dtype, rule, decoder in [*settings, ("bf16", BatchTopK, "unit")]:

        def once(dtype: str = dtype, rule: type = rule, decoder: str = decoder) -> str:
            return digest(Shape(64, 2, 32, 512, 8), dtype, device, rule=rule, decoder=decoder)

        seen, reason = common.attempt(lambda once=once: {once() for _ in range(times)})
        if seen is None or len(seen) > 1:
            complaints.append(f"{dtype}, {rule.__name__}, {decoder}: {reason or f'{len(seen)} different results'}")
    return complaints


def grids_held(shape: Shape, device: str) -> list[str]:
    """Complaints about library steps whose peak memory could hold a quarter of a bf16 `[B, F]`."""
    limit = shape.batch * shape.n_features * 2 // 4
    complaints = []
    for name in ("library fp32", "library bf16", "library, BatchTopK"):
        extra, reason = common.attempt(lambda name=name: peak_extra_bytes(shape, name, device))
        if extra is None or extra > limit:
            complaints.append(f"{name}, {shape}: {reason or f'{extra} bytes above parameters, {limit} allowed'}")
    return complaints


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write it with its JSON under `--out`; 1 where a library arm could not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--sweep", choices=list(SWEEP_FACTORS), help="time against this letter")
    parser.add_argument("--values", type=int, nargs="+", help="the letter's values")
    parser.add_argument("--targets", action="store_true", help="bf16 arms, and what a step must reach on an H200")
    parser.add_argument("--no-memory", action="store_true", help="time alone")
    parser.add_argument("--memory-of", default="", help=argparse.SUPPRESS)
    shape, given = common.parse_shape(parser, arguments)
    if given.memory_of:
        print(peak_extra_bytes(shape, given.memory_of, given.device))
        return 0
    if given.sweep:
        return sweep(given.sweep, shape, given)
    names = given.arms or (
        list(TARGET_ARMS) if given.targets else [name for name, arm in ARMS.items() if arm.by_default]
    )
    times, reasons = time_arms(shape, names, given.repeats, given.device)
    if given.device == "cuda":
        torch.cuda.empty_cache()
    memory = {name: memory_in_fresh_process(shape, name, given) for name in times}
    machine = common.describe_machine(given.device, given.threads)
    lines = [f"{shape}; median of {given.repeats} alternating steps", "", common.machine_line(machine), ""]
    lines += step_table(shape, times, reasons, memory, given.device)
    if given.targets:
        lines += ["", *target_table(shape, times)]
    stem = f"step_{common.device_label(given.device, given.threads)}_F{shape.n_features}"
    record = {"shape": asdict(shape), "ms": times, "skipped": reasons, "peak_extra_bytes": memory, "machine": machine}
    common.write_report(given.out, stem, lines, record)
    return _exit_status(reasons)


def _exit_status(reasons: Mapping[str, str]) -> int:
    return int(any("library" in name for name in reasons))


if __name__ == "__main__":
    sys.exit(main())
