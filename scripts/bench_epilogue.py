"""Up to which row width a product that finds its groups' maxima beats the library's GEMM and `group_max` after it.

Both fill a slab of bf16 scores and return its maxima, taking turns; then the whole `encode_top_k` either way.
`triton_kernels.gpu.score_slab.WIDEST` is set by it: to the widest N up to which the last column stays above 1.

    python scripts/bench_epilogue.py [--out benchmarks]      # needs a GPU; half a minute
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from bench_common import (
    Shape,
    Step,
    alternate,
    describe_machine,
    machine_line,
    make_problem,
    markdown_table,
    write_report,
)

from triton_kernels.gpu import encode, score_slab
from triton_kernels.gpu.group_max import group_max

WIDTHS = (128, 256, 512, 768, 1024, 2048)
PREDICTED = (
    "Predicted before any measurement, for an H200: ratios of .9 to 1.1 at N = 768, "
    "above 1 up to 256, under .95 at 2,048."
)


def medians(forms: dict[str, Step], device: str, repeats: int) -> dict[str, float]:
    """Median milliseconds of each form, the forms taking turns."""
    return {name: statistics.median(times) for name, times in alternate(forms, repeats, device).items()}


def slab_forms(x_RN: torch.Tensor, encoder_FN: torch.Tensor, bias_F: torch.Tensor) -> dict[str, Step]:
    """One slab and its maxima, both ways."""
    z_RF = torch.empty(x_RN.shape[0], encoder_FN.shape[0], dtype=x_RN.dtype, device=x_RN.device)

    def apart() -> torch.Tensor:
        torch.addmm(bias_F, x_RN, encoder_FN.t(), out=z_RF)
        return group_max(z_RF, None)

    return {"apart": apart, "one kernel": lambda: score_slab.score_slab(x_RN, encoder_FN, bias_F, None, z_RF)}


def errors(x_RN: torch.Tensor, encoder_FN: torch.Tensor, bias_F: torch.Tensor) -> dict[str, float]:
    """Largest error of 64 rows' scores against float64, both ways, and how many groups' maxima are wrong."""
    x_RN = x_RN[:64]
    truth = x_RN.double() @ encoder_FN.double().t() + bias_F.double()
    z_RF = torch.empty(truth.shape, dtype=x_RN.dtype, device=x_RN.device)
    maxima = score_slab.score_slab(x_RN, encoder_FN, bias_F, None, z_RF)
    theirs = torch.addmm(bias_F, x_RN, encoder_FN.t())
    found = {name: float((z.double() - truth).abs().max()) for name, z in (("one kernel", z_RF), ("apart", theirs))}
    return {**found, "wrong maxima": int((maxima != group_max(z_RF, None)).sum())}


def encode_forms(shape: Shape, device: str) -> dict[str, Step]:
    """The whole encoder of a bank, both ways."""
    problem = make_problem(shape, bank=True, dtype="bf16", device=device)
    weights = (problem.x_BGN, problem.center_GN, problem.encoder_GFN, problem.bias_GF, None)

    def choose(widest: int) -> None:
        before, score_slab.WIDEST = score_slab.WIDEST, widest
        try:
            encode.encode_top_k(*weights, shape.k, torch.bfloat16, None)
        finally:
            score_slab.WIDEST = before

    return {"apart": lambda: choose(0), "one kernel": lambda: choose(shape.d_model)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and write it with its JSON under `out`; 1 where the kernel errs too much."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu, with TRITON_INTERPRET=1, shows that the script runs")
    parser.add_argument("--rows", type=int, default=4096, help="rows of a slab, and tokens of the encoder")
    parser.add_argument("--n-features", type=int, default=32768)
    parser.add_argument("--n-layers", type=int, default=4, help="dictionaries of the bank")
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    given = parser.parse_args(arguments)
    rows, record, wrong = [], [], 0
    for width in given.widths:
        draw = [torch.randn(n, width, device=given.device).bfloat16() for n in (given.rows, given.n_features)]
        bias = torch.randn(given.n_features, device=given.device).bfloat16()
        slab = medians(slab_forms(*draw, bias), given.device, given.repeats)
        error = errors(*draw, bias)
        wrong += error["one kernel"] > 2 * error["apart"] or error["wrong maxima"] > 0
        whole_shape = Shape(given.rows, given.n_layers, width, given.n_features, 32)
        whole = medians(encode_forms(whole_shape, given.device), given.device, given.repeats)
        ratios = [times["apart"] / times["one kernel"] for times in (slab, whole)]
        numbers = [slab["apart"], slab["one kernel"], ratios[0], whole["apart"], whole["one kernel"], ratios[1]]
        numbers.append(error["one kernel"] / error["apart"])
        rows.append([str(width), *(f"{number:.3g}" for number in numbers)])
        record.append({"width": width, "slab_ms": slab, "encode_ms": whole, "errors": error})
    machine = describe_machine(given.device, torch.get_num_threads())
    columns = ["slab: apart, ms", "one kernel", "ratio", "encode_top_k: apart, ms", "one kernel", "ratio"]
    columns.append("error over torch's (2 is allowed)")
    title = f"R={given.rows} F={given.n_features}, bf16; bank of {given.n_layers}; medians of {given.repeats} turns"
    lines = [title, "", machine_line(machine), "", *markdown_table(["N", *columns], rows), "", PREDICTED]
    write_report(given.out, f"epilogue_{given.device}", lines, {"widths": record, "machine": machine})
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
