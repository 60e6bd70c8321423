"""Each pass of a training step and each operator: time, bandwidth, FLOP/s, fraction of its floor, error.

A pass's bytes and FLOP are the least it needs, with the rows that pairs gather counted as if each came from memory:
a fraction above 1 means that a cache served them, or that a pass moves memory faster than torch's own streaming passes,
from which the limit is taken. Floors come from limits measured in the same process. An error is
the largest relative one against float64, on a reduced problem, as a multiple of the error of torch's dense products in
the same dtype (at least one rounding); 2 is allowed.

    python scripts/bench_kernels.py                          # passes of a crosscoder, fp32
    python scripts/bench_kernels.py --product bf16 --bank    # six SAEs, scores in bf16
    python scripts/bench_kernels.py --device cuda --batch 8192 --n-layers 12 --d-model 768 --n-features 32768
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import bench_common as common
import bench_peers
import bench_plots
import torch
from bench_common import DTYPES, Limits, Problem, Shape, Step, make_problem, number
from torch import Tensor

import triton_kernels
from triton_kernels.cpu.problem import affine
from triton_kernels.encoders import sum_of_rows

NARROW = 8
"""Width at which an encoder's product costs nothing beside its selection."""


@dataclass(frozen=True)
class Operator:
    """One thing to measure. `truth` computes the same results densely, from the problem in a given dtype."""

    name: str
    call: Step
    n_bytes: float
    n_flop: float
    dtype: str
    truth: Callable[[Problem], tuple[Tensor, ...]] | None = None


def passes(problem: Problem, product: str, k: int, encoder: str = "encode_top_k") -> list[Operator]:
    """The passes of one step; together they are the step, apart from what is done per token.

    encoder: whose selection; `encode_threshold` selects by the score above which k a row lie.
    """
    (B, G, N), F = problem.x_BGN.shape, problem.bias_GF.shape[1]
    code, x, center, decoder = problem.code, problem.x_BGN, problem.center_GN, problem.decoder_GFN
    R, table, gathered = B * G, G * F * N, problem.values_P.numel() * N
    size, low, weight = x.itemsize, DTYPES[product].itemsize, problem.weight_GL
    dtype = "bf16" if size == 2 else "fp32"
    narrow = [t[..., :NARROW].to(DTYPES[product]).contiguous() for t in (x, center, problem.encoder_GFN)]
    narrow.append(problem.bias_GF.to(DTYPES[product]))
    once = min(gathered, table) * size
    # On the CPU oneDNN has no fast bf16 product this narrow, and the choice is what is measured.
    chosen_by = DTYPES[product] if x.is_cuda else torch.float32
    rule: tuple[Any, ...] = (k,)
    if encoder == "encode_threshold":
        cut_G = triton_kernels.encode_batch_top_k(*narrow, None, k, chosen_by, None)[3]
        rule = (cut_G[:, None].expand(G, F).contiguous(), 0.0)

    def select() -> Any:
        return getattr(triton_kernels, encoder)(*narrow, None, *rule, chosen_by, None)

    def decode() -> Any:
        return triton_kernels.decode_loss(*code, decoder, center, x, weight.shape[1])

    def decode_backward() -> Any:
        return triton_kernels.backward_decoder(*code, x, weight, decoder)

    def encode_backward() -> Any:
        return triton_kernels.backward_encoder(*code, x, center, F)

    def center_gradient() -> Tensor:
        return sum_of_rows(problem.bias_GF, problem.encoder_GFN)

    found = [
        Operator("encode GEMM", _product(problem, product), (R * N + table + R * F) * low, 2 * R * F * N, product),
        Operator("selection", select, R * F * low, 0, product),
        Operator("decode + loss", decode, once + 2 * R * N * size, 2 * gathered, dtype, Problem.decode_loss),
        Operator(
            "dz + dW_dec",
            decode_backward,
            (table + gathered) * size + table * 4,
            4 * gathered,
            dtype,
            Problem.backward_decoder,
        ),
        Operator(
            "dW_enc + bias", encode_backward, gathered * size + table * 4, 2 * gathered, dtype, Problem.backward_encoder
        ),
        Operator("centre's gradient", center_gradient, table * size, 2 * table, dtype),
        *_updates(problem, product),
    ]
    if product != dtype:
        x_RN, encoder_FN = x.flatten(0, 1), problem.encoder_GFN.flatten(0, 1)
        again = lambda: triton_kernels.gather_dot(x_RN, *code[1:], encoder_FN)
        found.insert(2, Operator("rescoring", again, gathered * size, 2 * gathered, dtype))
    return found


def _product(problem: Problem, product: str) -> Step:
    """The encoder's products alone, as the library's slabs of rows make them, without what is done with a slab."""
    tensors = (problem.x_BGN, problem.encoder_GFN, problem.bias_GF)
    x, encoder, bias = (tensor.to(DTYPES[product]) for tensor in tensors)
    n_features = encoder.shape[1]
    rows = max(1, (2**27 if x.is_cuda else 2**21) // n_features)
    slab = torch.empty(min(rows, x.shape[0]), n_features, dtype=x.dtype, device=x.device)

    def multiply() -> None:
        for group in range(x.shape[1]):
            for part in x[:, group].split(rows):
                if x.is_cuda:
                    torch.addmm(bias[group], part, encoder[group].t(), out=slab[: part.shape[0]])
                else:
                    affine(part, encoder[group], bias[group])

    return multiply


def _updates(problem: Problem, product: str) -> list[Operator]:
    """Gradient norms and Adam, of encoder and decoder together; a bf16 product has Adam round the encoder."""
    state = problem.update_state()
    numbers = 2 * state[0].numel()
    copy = torch.empty_like(state[0], dtype=torch.bfloat16) if product == "bf16" else None

    def norms() -> None:
        for _ in range(2):
            triton_kernels.row_squares(state[1], None)

    def adam() -> None:
        triton_kernels.adam_rows(*state, **common.ADAM, working_RN=copy)
        triton_kernels.adam_rows(*state, **common.ADAM)

    moved = 28 * numbers + (numbers if copy is not None else 0)
    return [
        Operator("gradient norms", norms, 4 * numbers, 2 * numbers, "fp32"),
        Operator("Adam", adam, moved, 20 * numbers, "fp32"),
    ]


def operators(problem: Problem, product: str, k: int) -> list[Operator]:
    """The operators that are not passes of the step measured above."""
    code, x_RN, table_FN = problem.code, problem.x_BGN.flatten(0, 1), problem.table_FN
    gathered, size = problem.values_P.numel() * x_RN.shape[1], x_RN.itemsize
    once, dtype = min(gathered, table_FN.numel()) * size, "bf16" if size == 2 else "fp32"
    weights = (problem.x_BGN, problem.center_GN, problem.encoder_GFN, problem.bias_GF, None)
    low = DTYPES[product]
    working = None if product == dtype else problem.encoder_GFN.to(low)
    moved = (x_RN.numel() + table_FN.numel()) * low.itemsize
    flop = 2 * x_RN.numel() * problem.bias_GF.shape[1]
    above = torch.full_like(problem.bias_GF, 3.0)

    def total() -> Tensor:
        return triton_kernels.gather_sum(*code, table_FN)

    def outer() -> Tensor:
        return triton_kernels.scatter_outer(*code, x_RN, table_FN.shape[0])

    def top_k() -> Any:
        return triton_kernels.encode_top_k(*weights, k, low, working)

    def batch_top_k() -> Any:
        return triton_kernels.encode_batch_top_k(*weights, k, low, working)

    def threshold() -> Any:
        return triton_kernels.encode_threshold(*weights, above, 0.0, low, working)

    def dot() -> Tensor:
        return triton_kernels.gather_dot(x_RN, *code[1:], table_FN)

    return [
        Operator("gather_sum", total, once + x_RN.numel() * size, 2 * gathered, dtype, Problem.gather_sum),
        Operator("gather_dot", dot, once + x_RN.numel() * size, 2 * gathered, dtype, Problem.gather_dot),
        Operator(
            "scatter_outer",
            outer,
            gathered * size + table_FN.numel() * size,
            2 * gathered,
            dtype,
            Problem.scatter_outer,
        ),
        Operator("encode_top_k", top_k, moved, flop, product),
        Operator("encode_batch_top_k", batch_top_k, moved, flop, product),
        Operator("encode_threshold", threshold, moved, flop, product),
    ]


def judge(found: Any, plain: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[str, Any]:
    """Largest relative error against float64, torch's own in the same dtype, and whether it is allowed."""
    found = found if isinstance(found, tuple) else (found,)
    epsilon = torch.finfo(plain[0].dtype).eps
    worst = {"error": 0.0, "torch_error": 0.0, "times_torch": 0.0}
    for mine, other, true in zip(found, plain, truth, strict=True):
        if true.numel() == 0:
            continue
        size = true.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        error, own = (float((t.double() - true).abs().max() / size) for t in (mine.view(true.shape), other))
        times = error / max(own, epsilon) if error == error else float("inf")
        if times >= worst["times_torch"]:
            worst = {"error": error, "torch_error": own, "times_torch": times}
    return {**worst, "allowed": worst["times_torch"] <= 2}


def judge_encoders(problem: Problem, product: str, k: int) -> dict[str, dict[str, Any]]:
    """The encoders' values against float64, and how far the worst choice is below the best that was left out."""
    exact = problem.to(torch.float64)
    z = torch.einsum("bgn,gfn->bgf", exact.x_BGN - exact.center_GN, exact.encoder_GFN) + exact.bias_GF
    low = problem.to(DTYPES[product])
    own = torch.einsum("bgn,gfn->bgf", low.x_BGN - low.center_GN, low.encoder_GFN) + low.bias_GF
    size = float(z.abs().max().clamp_min(1e-30))
    own_error = float((own.double() - z).abs().max()) / size
    allowed, out = max(own_error, torch.finfo(DTYPES[product]).eps), {}
    for operator in operators(problem, product, k)[3:]:
        values, features, *rest = operator.call()
        R = z.shape[0] * z.shape[1]
        by_row = operator.name == "encode_top_k"
        offsets = torch.arange(0, R * k + 1, k, device=z.device) if by_row else rest[0]
        rows = torch.repeat_interleave(offsets.diff())
        columns = features.long() - (rows % z.shape[1]) * z.shape[2]
        flat = z.flatten(0, 1)
        error = max((values.double() - flat[rows, columns].relu()).abs().tolist(), default=0.0)
        kept = torch.zeros_like(flat, dtype=torch.bool)
        kept[rows, columns] = True
        grid, chosen = (flat, kept) if by_row else (z, kept.view(z.shape))
        if operator.name == "encode_threshold":
            regret = ((grid > 3.0) != chosen).mul((grid - 3.0).abs()).max()
        else:
            left_out = grid.clamp_min(0).masked_fill(chosen, 0).amax(1 if by_row else (0, 2))
            smallest = grid.masked_fill(~chosen, torch.inf).amin(1 if by_row else (0, 2)).clamp_min(0)
            regret = (left_out - smallest).clamp_min(0).max()
        worst = max(error, float(regret)) / size
        times = worst / allowed if worst == worst else float("inf")
        out[operator.name] = {"error": worst, "torch_error": own_error, "times_torch": times, "allowed": times <= 2}
    return out


def judge_updates(problem: Problem, *_: object) -> dict[str, dict[str, Any]]:
    """Adam and the gradient norms, for free rows and for rows that keep norm 1."""
    out = {}
    for unit in (False, True):
        state = problem.update_state()
        truth = common.adam_definition([tensor.double() for tensor in state], unit=unit)
        plain = common.adam_definition(state, unit=unit)
        squares = triton_kernels.row_squares(state[1], state[0] if unit else None)
        triton_kernels.adam_rows(*state, **common.ADAM, unit=unit)
        end = ", unit rows" if unit else ""
        out["adam_rows" + end] = judge((state[0], *state[2:]), plain[:3], truth[:3])
        out["row_squares" + end] = judge(squares, plain[3:], truth[3:])
    return out


def errors(problem: Problem, product: str, k: int) -> dict[str, dict[str, Any]]:
    """The verdict of every operator on one problem; a failure has its reason in place of numbers."""
    out: dict[str, dict[str, Any]] = {}
    for operator in [*passes(problem, product, k), *operators(problem, product, k)]:
        if operator.truth is not None:
            found, reason = common.attempt(operator.call)
            truth = operator.truth(problem.to(torch.float64))
            out[operator.name] = {"failed": reason} if reason else judge(found, operator.truth(problem), truth)
    for name, several in (("encoders", judge_encoders), ("updates", judge_updates)):
        found, reason = common.attempt(lambda several=several: several(problem, product, k))
        out |= {name: {"failed": reason}} if reason else found
    return out


def pass_times(shape: Shape, product: str, device: str, repeats: int) -> dict[str, float | None]:
    """Milliseconds of each pass of a crosscoder's step by itself; None where it failed."""
    found = passes(make_problem(shape, bank=False, dtype="fp32", device=device), product, shape.k)
    return {op.name: common.attempt(lambda op=op: common.median_ms(op.call, repeats, device))[0] for op in found}


def measure(listed: Sequence[Operator], limits: Limits, repeats: int, device: str) -> list[dict[str, Any]]:
    """One record an operator: time, floor, fraction, bytes and FLOP a second, or why it failed."""
    out = []
    for op in listed:
        ms, reason = common.attempt(lambda op=op: common.median_ms(op.call, repeats, device))
        record: dict[str, Any] = {"name": op.name, "dtype": op.dtype, "bytes": op.n_bytes, "flop": op.n_flop, "ms": ms}
        record["floor_ms"] = floor = limits.floor_ms(op.n_bytes, op.n_flop, op.dtype)
        if ms is None:
            record["failed"] = reason
        else:
            record |= {"fraction": floor / ms, "GB/s": op.n_bytes / ms / 1e6, "GFLOP/s": op.n_flop / ms / 1e6}
        out.append(record)
    return out


def first_measurements(device: str, shape: Shape, repeats: int) -> list[dict[str, Any]]:
    """The comparisons that decide between designs, beside what was predicted for that shape."""
    problem = make_problem(shape, bank=False, dtype="bf16", device=device)
    found = {op.name: op.call for op in passes(problem, "bf16", shape.k)}
    calls: dict[str, Step] = {
        **bench_peers.stock_forms(problem, shape.k),
        "selection by groups, bf16": found["selection"],
    }
    calls |= {"decode_loss, bf16": found["decode + loss"], "backward_decoder, bf16": found["dz + dW_dec"]}
    calls["adam_rows"] = found["Adam"]
    out = []
    for name, predicted in bench_peers.PREDICTIONS.items():
        ms, reason = common.attempt(lambda name=name: common.median_ms(calls[name], repeats, device))
        mib = None if ms is None or device == "cpu" else common.peak_mib(calls[name])
        out.append({"name": name, "predicted": predicted, "ms": ms, "mib": mib, "failed": reason})
    return out


def report(records: Sequence[dict[str, Any]], verdicts: dict[str, dict[str, Any]]) -> list[str]:
    """The two tables."""
    header = ["pass or operator", "dtype", "ms", "floor, ms", "fraction of floor", "GB/s", "GFLOP/s"]
    rows = []
    for r in records:
        values = [r["failed"], *["-"] * 4] if r["ms"] is None else []
        values = values or [number(r[key]) for key in ("ms", "floor_ms", "fraction", "GB/s", "GFLOP/s")]
        rows.append([r["name"], r["dtype"], *values])
    lines = common.markdown_table(header, rows)
    header = ["operator", "largest relative error", "torch's", "times torch's (2 is allowed)"]
    rows = []
    for name, v in verdicts.items():
        if "failed" in v:
            rows.append([name, v["failed"], "-", "-"])
        else:
            times = number(v["times_torch"], ".2f") + ("" if v["allowed"] else " TOO LARGE")
            rows.append([name, number(v["error"]), number(v["torch_error"]), times])
    return [*lines, "", *common.markdown_table(header, rows)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 where an operator failed or erred too much."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--product", choices=list(DTYPES), default="fp32", help="dtype of the encoder's product")
    parser.add_argument("--tables", choices=list(DTYPES), default="fp32", help="dtype of tables, codes and x")
    parser.add_argument("--bank", action="store_true", help="L dictionaries of width D in place of one of width L * D")
    parser.add_argument("--tiny-limits", action="store_true", help="measure the limits on tiny arrays (for tests)")
    shape, given = common.parse_shape(parser, arguments)
    product = "bf16" if given.tables == "bf16" else given.product
    limits = common.measure_limits(given.device, tiny=given.tiny_limits)
    problem = make_problem(shape, bank=given.bank, dtype=given.tables, device=given.device)
    listed = [*passes(problem, product, shape.k), *operators(problem, product, shape.k)]
    records = measure(listed, limits, given.repeats, given.device)
    del problem, listed
    small = {"batch": 64, "d_model": 64, "n_features": 1024, "k": 1024}
    small = replace(shape, **{name: min(getattr(shape, name), most) for name, most in small.items()})
    reduced = make_problem(small, bank=given.bank, dtype=given.tables, device=given.device, ragged=True)
    verdicts = errors(reduced, product, small.k)
    machine = common.describe_machine(given.device, given.threads)
    kind = "bank" if given.bank else "crosscoder"
    title = f"{kind}, {shape}, product {product}, tables {given.tables}"
    lines = [
        f"{title}; median of {given.repeats}; errors at {small}",
        "",
        common.machine_line(machine),
        "",
        str(limits),
        "",
    ]
    lines += report(records, verdicts)
    first: list[dict[str, Any]] = []
    if given.device == "cuda":
        first = first_measurements(given.device, shape, given.repeats)
        note = (
            "predicted, ms"
            if shape == bench_peers.PREDICTED_SHAPE
            else f"predicted for {bench_peers.PREDICTED_SHAPE}, ms"
        )
        rows = [[r["name"], r["predicted"], number(r["ms"], missing=r["failed"]), number(r["mib"])] for r in first]
        lines += ["", *common.markdown_table(["first measurement", note, "ms", "peak MiB of the call"], rows)]
    stem = f"kernels_{common.device_label(given.device, given.threads)}_{kind}_{product}_F{shape.n_features}"
    record = {"shape": asdict(shape), "product": product, "tables": given.tables, "bank": given.bank}
    record |= {"limits": asdict(limits), "operators": records, "errors": verdicts, "first_measurements": first}
    common.write_report(given.out, stem, lines, {**record, "machine": machine})
    points = [(r["name"], r["flop"] / r["bytes"], 1e6 * r["GFLOP/s"] * 1e3) for r in records if r["ms"]]
    bench_plots.draw_roofline(given.out / f"{stem}_roofline.svg", limits, points, title)
    bad = [r["name"] for r in records if r["ms"] is None]
    bad += [name for name, v in verdicts.items() if not v.get("allowed")]
    print(f"failed or erred too much: {', '.join(bad)}" if bad else "every operator ran and errs as torch does")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
