"""Up to which row width a product that finds its groups' maxima beats the library's GEMM and `group_max` after it.

Both fill a slab of bf16 scores and return its maxima, taking turns; then the whole `encode_top_k` either way.
The one kernel belongs in the library for widths at which the last column stays above 1, and stays here until it has
won on a GPU. It saves one read of the slab, R * F * 2 bytes, beside a product of 2 * R * F * N operations: less the
wider the rows.

    python scripts/bench_epilogue.py [--out benchmarks]      # needs a GPU; half a minute
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
import triton.language as tl
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
from torch import Tensor

from triton_kernels import gpu
from triton_kernels.arguments import Encoding
from triton_kernels.gpu import select_topk, tiles
from triton_kernels.gpu.group_max import GROUP, group_max, key_bits, raw_key

WIDTHS = (128, 256, 512, 768, 1024, 2048)
PREDICTED = (
    "Predicted before any measurement, for an H200: ratios of .9 to 1.1 at N = 768, "
    "above 1 up to 256, under .95 at 2,048."
)

ROWS, COLUMNS, DEPTH = 128, 128, 64  # one program of eight warps, 64 sums a thread


@tiles.jit
def score_slab_kernel(
    x_ptr, encoder_ptr, bias_ptr, scale_ptr, z_ptr, maxima_ptr, n_rows, n_features, width, n_groups, n_row_tiles,
    SCALED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # Rows run fast: a slab's x stays in the L2 cache, and the encoder is fetched once.
    row = (tl.program_id(0) % n_row_tiles) * ROWS + tl.arange(0, ROWS)
    first = (tl.program_id(0) // n_row_tiles) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    x_row, encoder_row = row.to(tl.int64)[:, None] * width, column.to(tl.int64)[:, None] * width
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for start in range(0, width, DEPTH):
        depth = start + tl.arange(0, DEPTH)[None, :]
        x = tl.load(x_ptr + x_row + depth, mask=(row < n_rows)[:, None] & (depth < width), other=0.0)
        encoder = tl.load(
            encoder_ptr + encoder_row + depth, mask=(column < n_features)[:, None] & (depth < width), other=0.0
        )
        total = tl.dot(x, tl.trans(encoder), total)
    inside = column < n_features
    total += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    z = total.to(z_ptr.dtype.element_ty)  # keys are of the rounded scores, as `group_max` would read them
    place = row.to(tl.int64)[:, None] * n_features + column[None, :]
    tl.store(z_ptr + place, z, mask=(row < n_rows)[:, None] & inside[None, :])
    z = tl.where(inside[None, :], z, float("-inf")).to(z_ptr.dtype.element_ty)
    if SCALED:
        key = raw_key(z.to(tl.float32) * tl.load(scale_ptr + column, mask=inside, other=1.0).to(tl.float32)[None, :])
    else:
        key = raw_key(z)
    best = tl.max(tl.reshape(key, [ROWS, COLUMNS // 32, 32]), axis=2)
    best = tl.where(best == -1, 0, best)  # -0 has the key -1
    group = first // 32 + tl.arange(0, COLUMNS // 32)
    place = row.to(tl.int64)[:, None] * n_groups + group[None, :]
    kept = (row < n_rows)[:, None] & (group < n_groups)[None, :]
    tl.store(maxima_ptr + place, best.to(maxima_ptr.dtype.element_ty), mask=kept)


def score_slab(x_RN: Tensor, encoder_FN: Tensor, bias_F: Tensor, scale_F: Tensor | None, z_RF: Tensor) -> Tensor:
    """Fill `z_RF` with <x, encoder row> + bias and return what `group_max` returns of it.

    x, encoder and z are of one 16-bit dtype; sums are in fp32, rounded once.
    """
    n_rows, n_features = z_RF.shape
    dtype = torch.int16 if key_bits(z_RF, scale_F) == 16 else torch.int32
    maxima = torch.empty(n_rows, tiles.tile_count(n_features, GROUP), dtype=dtype, device=z_RF.device)
    n_row_tiles = tiles.tile_count(n_rows, ROWS)
    score_slab_kernel[(n_row_tiles * tiles.tile_count(n_features, COLUMNS),)](
        x_RN.contiguous(), encoder_FN.contiguous(), bias_F, bias_F if scale_F is None else scale_F, z_RF, maxima,
        n_rows, n_features, x_RN.shape[1], tiles.tile_count(n_features, GROUP), n_row_tiles,
        SCALED=scale_F is not None, ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH, num_warps=8, num_stages=3,
    )  # fmt: skip
    return maxima


def medians(forms: dict[str, Step], device: str, repeats: int) -> dict[str, float]:
    """Median milliseconds of each form, the forms taking turns."""
    return {name: statistics.median(times) for name, times in alternate(forms, repeats, device).items()}


def slab_forms(x_RN: Tensor, encoder_FN: Tensor, bias_F: Tensor) -> dict[str, Step]:
    """One slab and its maxima, both ways."""
    z_RF = torch.empty(x_RN.shape[0], encoder_FN.shape[0], dtype=x_RN.dtype, device=x_RN.device)

    def apart() -> Tensor:
        torch.addmm(bias_F, x_RN, encoder_FN.t(), out=z_RF)
        return group_max(z_RF, None)

    return {"apart": apart, "one kernel": lambda: score_slab(x_RN, encoder_FN, bias_F, None, z_RF)}


def errors(x_RN: Tensor, encoder_FN: Tensor, bias_F: Tensor) -> dict[str, float]:
    """Largest error of 64 rows' scores against float64, both ways, and how many groups' maxima are wrong."""
    x_RN = x_RN[:64]
    truth = x_RN.double() @ encoder_FN.double().t() + bias_F.double()
    z_RF = torch.empty(truth.shape, dtype=x_RN.dtype, device=x_RN.device)
    maxima = score_slab(x_RN, encoder_FN, bias_F, None, z_RF)
    theirs = torch.addmm(bias_F, x_RN, encoder_FN.t())
    found = {name: float((z.double() - truth).abs().max()) for name, z in (("one kernel", z_RF), ("apart", theirs))}
    return {**found, "wrong maxima": int((maxima != group_max(z_RF, None)).sum())}


def encode_forms(shape: Shape, device: str) -> dict[str, Step]:
    """The whole encoder of a bank, both ways."""
    problem = make_problem(shape, bank=True, dtype="bf16", device=device)
    weights = (problem.x_BGN, problem.center_GN, problem.encoder_GFN, problem.bias_GF)
    encoding = Encoding(*weights, scale_GF=None, product=torch.bfloat16, working_GFN=None)
    n_rows, n_groups, _ = problem.x_BGN.shape
    z_RF = torch.empty(n_rows, shape.n_features, dtype=torch.bfloat16, device=device)
    values = torch.empty(n_rows, n_groups, shape.k, dtype=torch.bfloat16, device=device)
    features = torch.empty(n_rows, n_groups, shape.k, dtype=torch.int32, device=device)

    def one_kernel() -> None:
        for group in range(n_groups):
            x_RN = problem.x_BGN[:, group] - problem.center_GN[group]
            maxima = score_slab(x_RN, problem.encoder_GFN[group], problem.bias_GF[group], None, z_RF)
            chosen = (values[:, group], features[:, group])
            with mock.patch.object(select_topk, "group_max", return_value=maxima):
                select_topk.select_top_k(z_RF, None, shape.k, group * shape.n_features, *chosen)

    return {
        "apart": lambda: gpu.encode_top_k(encoding, [shape.k] * len(encoding.encoder_GFN)),
        "one kernel": one_kernel,
    }


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
