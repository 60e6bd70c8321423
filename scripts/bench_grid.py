"""One training step over a grid of shapes: `bench_step.py --grid`.

A shape is `L,D,F,B,K`: a crosscoder of L layers of D numbers, F features, a batch of B tokens, K active. `+bank` asks
for L SAEs of F features each as well, `+planted` for an x that has features (`bench_common.Shape`). Each shape is
measured in a process of its own, where all arms take turns, and written at once: a run that is killed keeps what it
has. A run adds its case, `before` or `after`, to the JSON, and the table shows both.

Dense arms and peers keep the K largest scores. Ratios compare arms of one dtype, by medians. A step of this library is
also held against the sum of its passes, each timed by itself in turns with the step, for a code of as many pairs as
the rule stores on x (with JumpReLU also those in the lower half of its window). Where the CPU multiplies bf16, the sum
of an fp32 step is the lesser of those with an fp32 product and with a bf16 product and its rescoring, which the library
takes and certifies. Dense over that sum is what a step with nothing between its passes would reach; a goal above it
asks for faster passes.

    python scripts/bench_step.py --grid --label before
    python scripts/bench_step.py --grid --label after --shapes 1 5 2,16,256,64,8+bank
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import bench_common as common
import bench_kernels
import torch
from bench_arms import ARMS, library_step, memory_in_fresh_process, start_dictionary, time_arms
from bench_common import Shape, met, number

from crosscoder.foundation.artifact import read_json
from triton_kernels.cpu.problem import onednn_dtypes

SHAPES = (
    "6,256,8192,1024,32",
    "1,768,24576,1024,32+bank",
    "12,768,4096,512,32",
    "12,768,4096,512,32+planted",
    "4,640,16384,1024,64",
    "7,576,2048,512,64+bank",
    "1,2048,16384,512,64",
    "8,64,160,512,5+bank",
    "8,64,1024,512,8+bank",
)
LABELS = ("before", "after")
PEERS = ("sparsify", "SAELens", "dictionary_learning")
ENCODERS = {"TopK": "encode_top_k", "BatchTopK": "encode_batch_top_k", "JumpReLU": "encode_threshold"}
LARGE, DENSE_GOAL, SMALL_DENSE_GOAL, SPARSIFY_GOAL, PASSES_GOAL = 2048, 8, 3, 3, 1.3
"""From LARGE features on a step must be so many times faster than dense and than sparsify; below, than dense alone."""
PREDICTION: str = """\
Written before the runs, for a CPU without bf16 units. A dense step makes five products of one size (scores,
reconstruction, and the gradients of code, decoder and encoder), ours makes one: where the product is most of a step
the ratio cannot pass 5 plus what dense loses elsewhere, so 8x dense is out of reach here, and 3x sparsify (two or
three products) nearly so; with bf16 units our product costs half, and dense's does not.

- F >= 8,192: 4.5 to 5.5x dense, step / sum at most 1.15. K = 64 of 2,048 (7 x 576): 3 to 4x.
- 8 x 64: 2x dense alone and 3x four together for the crosscoder, 1.5x and 2x for the bank, whose eight products are
  small; step / sum 1.5 alone.
- Before / after (sixteen floats as registers instead of memory where there is no AVX-512; gradients without autograd;
  one call for a choice over a batch): 1.1 to 1.2 from F = 8,192 on, 1.4 at 7 x 576, 1.8 for the small crosscoder, 2
  for the small bank.

Written before the runs on a CPU with bf16 units: 8 to 10x dense and 3 to 4x sparsify at 6 x 256 and 4 x 640, 7x and
2.7x at one layer of 768 and of 2,048, 6x and 2.7x at 12 x 768 (Adam and the tables of gradients are a third of the
step), 5x at 7 x 576, 2x alone and 4x four together at 8 x 64; step / sum at most 1.15 from F = 2,048 on.
Before / after: 1.0 to 1.05 from F = 8,192 on, 1.1 at 7 x 576, 1.6 for the small crosscoders, 2 for the small banks.

Written before 12 x 768, 7 x 576 and 8 x 64 were run again (candidates that are too many are given up; JumpReLU without
autograd; less Python): 12 x 768 6.5x for TopK and BatchTopK, whose steps had scored up to 1,700 candidates a row again
(x is noise, which a dictionary learns by heart: margins of bf16 then hide what is best); 7 x 576 as before; 8 x 64 with
F = 160: 2.1x alone (BatchTopK), 1.6x JumpReLU, 3.2x four together. Dense over the sum of passes at 7 x 576: 5.5x, so
that no step can reach 8x there without a faster product; at F = 160 alone 3 to 3.5x.

Written before 12 x 768 with planted x was run, after the first of these had come out as 6.0 to 6.2x on noise, with
steps 1.6 times their passes: 9 to 10x dense, 4 to 5x sparsify, step / sum at most 1.2."""
"""What was expected, written before the runs."""
HEADER = ["shape", "arm", "dtype", "run", "ms a step", "least", "dense eager / this", "sparsify / this"]
HEADER += [
    "sum of passes, ms (dense eager / sum)",
    "step / sum",
    "active (stored) a row",
    "peak MiB above parameters, gradients, moments",
]
HEADER += ["before / after"]


def read_shape(text: str) -> tuple[Shape, tuple[str, ...]]:
    """The shape of `L,D,F,B,K` and the families to measure, with `+bank` two; `+planted`: x is no noise (`Shape`)."""
    letters, *further = text.split("+")
    sizes = [int(size) for size in letters.split(",")]
    if len(sizes) != 5 or min(sizes) < 1 or sizes[4] > sizes[2] or not {*further} <= {"bank", "planted"}:
        raise ValueError(f"{text!r}: expected L,D,F,B,K, with K at most F, and nothing, +bank or +planted after it")
    n_layers, d_model, n_features, batch, k = sizes
    shape = Shape(batch, n_layers, d_model, n_features, k, int("planted" in further))
    return shape, ("crosscoder", *(["bank"] if "bank" in further else []))


def listed(text: str) -> str:
    """The shape of a number of the list, counted from 1, or of the letters themselves."""
    if text.isdigit() and not 1 <= int(text) <= len(SHAPES):
        raise argparse.ArgumentTypeError(f"{text}: the list has shapes 1 to {len(SHAPES)}")
    chosen = SHAPES[int(text) - 1] if text.isdigit() else text
    try:
        read_shape(chosen)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return chosen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The grid's options."""
    numbered = ", ".join(f"{number}: {text}" for number, text in enumerate(SHAPES, 1))
    parser.add_argument("--grid", action="store_true", help="many shapes, every sparsity rule")
    parser.add_argument(
        "--shapes", nargs="+", type=listed, default=list(SHAPES), help=f"L,D,F,B,K[+bank], or {numbered}"
    )
    parser.add_argument("--label", choices=LABELS, default=LABELS[-1], help="the case that a grid adds to its table")


def grid_arms(families: Sequence[str], device: str, *, is_small: bool) -> list[str]:
    """Dense, the library by rule, small dictionaries also side by side, and the peers; on a GPU in bf16 too."""
    ends = ("", " bf16") if device == "cuda" else ("",)
    names = []
    for family in families:
        start = "bank, " if family == "bank" else ""
        plain = [f"{start}dense eager", f"{start}dense torch.compile", f"{start}library, BatchTopK"]
        plain += [f"{start}library, JumpReLU", *(PEERS if family == "crosscoder" else [])]
        if is_small:
            plain.append(f"{start}library, 4 together")
        names += [f"{start}library {dtype}" for dtype in ("fp32", "bf16")[: len(ends)]]
        names += [name + end for name in plain for end in ends]
    return [name for name in ARMS if name in names]


def beside_passes(shape: Shape, name: str, repeats: int, device: str) -> dict[str, Any]:
    """A step of the library and each of its passes, in turns: median ms, the sum of the passes, the code's size."""
    arm = ARMS[name]
    assert arm.rule is not None
    x_BLD = common.random_x(shape, device)
    dictionary = start_dictionary(shape, x_BLD, family=arm.family, rule=arm.rule)
    step = library_step(dictionary, x_BLD, arm.dtype)
    step()  # the first one centres
    with torch.no_grad():
        code = dictionary.encode(x_BLD)
    stored, active = code.n_pairs / code.n_rows, float(code.l0().float().mean())
    k = min(shape.n_features, max(1, round(stored)))
    problem = common.make_problem(replace(shape, k=k), bank=arm.family == "bank", dtype="fp32", device=device)
    is_certified = device == "cpu" and torch.bfloat16 in onednn_dtypes()
    products = dict.fromkeys((arm.dtype, "bf16") if is_certified else (arm.dtype,))
    calls = {"step": step}
    for product in products:
        found = bench_kernels.passes(problem, product, k, ENCODERS[arm.rule.__name__])
        calls |= {f"{product} {one.name}": one.call for one in found}
    median = {key: statistics.median(ms) for key, ms in common.alternate(calls, repeats, device).items()}
    step_ms = median.pop("step")
    sums = {product: sum(ms for key, ms in median.items() if key.startswith(product)) for product in products}
    sizes = {"active": active, "stored": stored}
    return {"step_ms": step_ms, "sum_ms": min(sums.values()), "sums_ms": sums, "passes_ms": median, **sizes}


def measure_shape(text: str, given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """One record for each family of a shape; an arm that cannot run has its reason there."""
    shape, families = read_shape(text)
    asked = given.arms or grid_arms(families, given.device, is_small=shape.n_features < LARGE)
    names = [name for name in ARMS if name in asked and ARMS[name].family in families]
    machine = {**common.describe_machine(given.device, given.threads), "command": None}  # it names places here
    load = os.getloadavg()[0]
    # Before the arms' turns, since what the peers import changes torch.
    passes: dict[str, dict[str, Any]] = {}
    for name in (name for name in names if ARMS[name].rule is not None):
        found, reason = common.attempt(lambda name=name: beside_passes(shape, name, given.repeats, given.device))
        passes[name] = {"failed": reason} if reason else found
    times, reasons = time_arms(shape, names, given.repeats, given.device)
    if given.device == "cuda":
        torch.cuda.empty_cache()
    memory = {name: memory_in_fresh_process(shape, name, given) for name in passes if name in times}
    records = {}
    for family in families:
        parts = {"ms": times, "skipped": reasons, "passes": passes, "peak_extra_bytes": memory}
        own = {part: {n: one for n, one in found.items() if ARMS[n].family == family} for part, found in parts.items()}
        records[key_of(family, shape)] = {"shape": asdict(shape), **own, "load": load, "machine": machine}
    return records


def key_of(family: str, shape: Shape) -> str:
    """How the table calls one dictionary."""
    return f"{family}, {shape}"


def measure_grid(given: argparse.Namespace) -> int:
    """Measure the shapes, each in a process of its own, and write the table after each; 1 where the library failed."""
    if len(given.shapes) == 1:
        text = given.shapes[0]
        records, reason = common.attempt(lambda: measure_shape(text, given))
        shape, families = read_shape(text)
        if records is None:
            records = {key_of(family, shape): {"shape": asdict(shape), "failed": reason} for family in families}
        write_cases(given, records)
        lost = [name for one in records.values() for name in one.get("skipped", {}) if ARMS[name].rule is not None]
        return int(bool(lost) or bool(reason))
    status = 0
    script = str(Path(__file__).with_name("bench_step.py"))
    kept = {name: getattr(given, name) for name in ("label", "threads", "repeats", "device", "out")}
    options = [f"--{name}={value}" for name, value in kept.items()] + (["--no-memory"] if given.no_memory else [])
    options += ["--arms", *given.arms] if given.arms else []
    for text in given.shapes:
        done = subprocess.run([sys.executable, script, "--grid", *options, "--shapes", text], check=False)
        if done.returncode not in (0, 1):
            shape, families = read_shape(text)
            failed = {"shape": asdict(shape), "failed": f"the process ended with status {done.returncode}"}
            write_cases(given, {key_of(family, shape): failed for family in families})
        status |= done.returncode != 0
    return int(status)


def write_cases(given: argparse.Namespace, records: dict[str, dict[str, Any]]) -> None:
    """Add records to the case of this run, and write the table of all."""
    stem = f"step_grid_{common.device_label(given.device, given.threads)}"
    path = given.out / f"{stem}.json"
    cases: dict[str, dict[str, Any]] = read_json(path)["cases"] if path.is_file() else {}
    plain = json.loads(json.dumps(records, sort_keys=True))  # as it is read again
    cases[given.label] = {**cases.get(given.label, {}), **plain}
    common.write_report(given.out, stem, report(cases), {"prediction": PREDICTION, "cases": cases})


def report(cases: dict[str, dict[str, Any]]) -> list[str]:
    """The lines of the table, with the goals and where each case was measured."""
    of_list = [key_of(family, shape) for shape, families in map(read_shape, SHAPES) for family in families]
    found = dict.fromkeys(key for records in cases.values() for key in records)
    keys = sorted(found, key=lambda key: of_list.index(key) if key in of_list else len(of_list))
    labels = [label for label in LABELS if label in cases]
    rows = []
    for key in keys:
        mine = {label: cases[label][key] for label in labels if key in cases[label]}
        rows += [[key, "-", "-", label, one["failed"], *["-"] * 8] for label, one in mine.items() if "failed" in one]
        for name in ARMS:
            rows += [[key, *row] for label in mine if (row := arm_row(name, label, mine))]
    goals = (
        f"Goals of a step of this library: >= {DENSE_GOAL}x dense and >= {SPARSIFY_GOAL}x sparsify from F = {LARGE} "
    )
    goals += f"on, >= {SMALL_DENSE_GOAL}x dense below; <= {PASSES_GOAL} times the sum of its passes, "
    goals += "where step and passes take turns of their own."
    lines = ["# One training step over a grid of shapes", ""]
    lines += [PREDICTION, ""] if PREDICTION else []
    lines += [goals, "", *common.markdown_table(HEADER, rows), ""]
    for label in labels:
        measured = [one for one in cases[label].values() if "machine" in one]
        loads = ", ".join(dict.fromkeys(f"{one['load']:.1f}" for one in measured))
        places = dict.fromkeys(common.machine_line(one["machine"]) for one in measured)
        lines += [f"{label}: {place}" for place in places]
        lines += [f"{label}: load average before each shape: {loads}", ""] if loads else []
    return lines


def arm_row(name: str, label: str, by_label: dict[str, dict[str, Any]]) -> list[str] | None:
    """The cells of one arm of one dictionary in one case, after its name; None where the arm was not asked for."""
    record, arm = by_label[label], ARMS[name]
    start = [name, arm.dtype, label]
    if name in record.get("skipped", {}):
        return [*start, f"skipped: {record['skipped'][name]}", *["-"] * 8]
    if name not in record.get("ms", {}):
        return None
    median = {other: statistics.median(ms) for other, ms in record["ms"].items()}
    end = " bf16" if arm.dtype == "bf16" else ""
    dense = median.get(("bank, " if arm.family == "bank" else "") + f"dense eager{end}")
    sparsify = median.get(f"sparsify{end}")
    ratios = [base and base / median[name] for base in (dense, sparsify)]
    cells = [number(ratio, ".2f") for ratio in ratios]
    passes = record["passes"].get(name, {})
    total = passes.get("sum_ms")
    in_passes = total and passes["step_ms"] / total
    sizes = f"{passes['active']:.1f} ({passes['stored']:.1f})" if total else passes.get("failed", "-")
    if "library" in name:
        is_large = record["shape"]["n_features"] >= LARGE
        cells[0] += against(ratios[0], DENSE_GOAL if is_large else SMALL_DENSE_GOAL)
        if is_large and arm.family == "crosscoder":
            cells[1] += against(ratios[1], SPARSIFY_GOAL)
    cells += [
        number(total) + (f" ({dense / total:.1f}x)" if total and dense else ""),
        number(in_passes, ".2f") + (against(in_passes, PASSES_GOAL, most=True) if arm.rule else ""),
    ]
    extra = record["peak_extra_bytes"].get(name)
    cells += [sizes, number(extra and extra / 2**20, ".0f")]
    before = by_label.get("before", {}).get("ms", {}).get(name)
    change = statistics.median(before) / median[name] if before and label != "before" else None
    return [*start, number(median[name]), number(min(record["ms"][name])), *cells, number(change, ".2f")]


def against(found: float | None, goal: float, *, most: bool = False) -> str:
    """The goal, and whether it is met."""
    is_met = None if found is None else found <= goal if most else found >= goal
    return f" ({'<=' if most else '>='} {goal}: {met(is_met)})"
