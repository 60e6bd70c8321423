"""Time and peak memory of one whole training step (forward, backward, optimiser), beside other ways of taking it.

The arms do the same job on the same x, and take turns in one process, so that a busy neighbour slows all of them
alike; quote the ratios. Peak memory is measured in a fresh process per arm, above parameters, gradients and moments.
An arm that cannot run here has its reason in the table. fp32 is true fp32 on both devices.

    python scripts/bench_step.py                     # the shape of the README's claim
    python scripts/bench_step.py --sweep F           # scaling, with the passes' own times beside the step
    python scripts/bench_step.py --grid              # many shapes, every rule, crosscoders and banks
    python scripts/bench_step.py --arms "dense eager" "library fp32" --threads 1
    python scripts/bench_step.py --device cuda --batch 8192 --n-layers 12 --d-model 768 --n-features 32768 --targets
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import bench_common as common
import bench_grid
import bench_kernels
import bench_peers
import bench_plots
import torch
from bench_arms import ARMS, library_step, memory_in_fresh_process, peak_extra_bytes, start_dictionary, time_arms
from bench_common import Shape, met, number

from crosscoder import BatchTopK, TopK

SLAB_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}
"""Scores that the library holds at once."""
SWEEP_FACTORS = {"B": (0.25, 0.5, 1, 2), "F": (0.125, 0.25, 0.5, 1, 2, 4), "K": (0.25, 0.5, 1, 2, 4), "L": (0.5, 1, 2)}
SWEEP_ARMS = ("dense eager", "library fp32", "library bf16")
FLOOR_MS = 13.3
"""Floor of a step at `bench_peers.PREDICTED_SHAPE` on an H200, bf16, by arithmetic."""
TARGET_ARMS = ("dense torch.compile bf16", "library bf16", "sparsify bf16", "whole-row kernels bf16")


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
        rows.append([f"whole step <= 1.4 x {FLOOR_MS} ms", number(mine, ".1f"), met(mine and mine <= limit)])
    wanted = {"dense torch.compile bf16": 2.5, "whole-row kernels bf16": 1.5, "sparsify bf16": 1.5}
    for name, least in wanted.items():
        other = median.get(name)
        ratio = other / mine if other and mine else None
        rows.append([f">= {least} times faster than {name}", number(ratio, ".2f"), met(ratio and ratio >= least)])
    return common.markdown_table(["target", "measured", "met?"], rows)


def digest(shape: Shape, dtype: str, device: str, *, rule: type = TopK, decoder: str = "free") -> str:
    """sha256 of the library's dictionary after three steps from its start."""
    x_BLD = common.random_x(shape, device)
    dictionary = start_dictionary(shape, x_BLD, rule=rule, decoder=decoder)
    step = library_step(dictionary, x_BLD, dtype)
    for _ in range(3):
        step()
    parts = [tensor.cpu().contiguous().numpy().tobytes() for tensor in dictionary.state_dict().values()]
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
    bench_grid.add_arguments(parser)
    shape, given = common.parse_shape(parser, arguments)
    if given.memory_of:
        print(peak_extra_bytes(shape, given.memory_of, given.device))
        return 0
    if given.grid:
        return bench_grid.measure_grid(given)
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
