"""What an update would gain that follows its gradient block by block of a table, instead of after the whole of it.

Today the backward pass writes a table of gradients and Adam reads it again. The fused form makes the gradient of a
block of features, small enough for a cache, and updates the block at once; both call the same kernels and leave the
same bits. It needs the clip factor before the gradient is known: that of the step before, which changes training.
Beside it stand what a step costs in all, and an update without any moments, `p -= rate * g`: it moves 12 bytes a
number, Adam 28, and moments of half the size would save half of the difference at most.

The auxiliary term of dead features, a tenth of all, is timed by autograd and as the trainer takes it.

    python scripts/bench_update.py [--out benchmarks]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from bench_arms import library_step, start_dictionary
from bench_common import (
    ADAM,
    Shape,
    Step,
    alternate,
    describe_machine,
    machine_line,
    make_problem,
    markdown_table,
    number,
    random_x,
    write_report,
)

import triton_kernels
from crosscoder.dictionary.losses import add_auxiliary_gradients, auxiliary_term
from triton_kernels.arguments import Code
from triton_kernels.cpu import native, sparse

SHAPES = ("6,256,8192,1024,32", "1,768,24576,1024,32", "12,768,4096,512,32", "8,64,1024,512,8")
BLOCK_BYTES = 2**19
"""Of a block's gradient; with its weights and moments it takes four times as much of a cache."""
LEAST_BLOCK = 128
"""Features: threads take 64 at a time."""
PREDICTED = """\
Predicted before the runs, by bytes: apart, a decoder's number is read and its gradient written (8), then weight,
gradient and moments are read and all but the gradient written (28); fused 28 of these 36 are left, 1.25 times fewer.
At 12 x 768 update and gradients are a third of a step, so that the step would gain 5 to 8 %; at one layer of 768 4 to
6 %; where the tables fit the cache (8 x 64) nothing, or less than nothing for the calls. Moments in bf16 would save 8
of the 28 bytes of an update: 5 to 8 % of a step at 12 x 768. The auxiliary term without autograd: 1.5 times faster."""


class Table:
    """The decoder's gradient and update at one shape, in both forms, each with weights and moments of its own."""

    def __init__(self, shape: Shape) -> None:
        problem = make_problem(shape, bank=False, dtype="fp32", device="cpu")
        self.code = Code(problem.values_P, problem.features_P, problem.offsets)
        self.error_BGN, self.weight_GL = problem.x_BGN, problem.weight_GL
        self.tables = [problem.decoder_GFN.clone(), *(torch.zeros_like(problem.decoder_GFN) for _ in range(2))]
        self.scale_G = torch.ones(1)

    def update(self, tables: Sequence[torch.Tensor], gradient_RN: torch.Tensor) -> None:
        parameter, first, second = (table.view(gradient_RN.shape) for table in tables)
        triton_kernels.adam_rows(parameter, gradient_RN, first, second, scale_G=self.scale_G, **ADAM)

    def apart(self) -> None:
        """The gradient of the whole table, then its update."""
        _, gradient_GFN = triton_kernels.cpu.backward_decoder(self.code, self.error_BGN, self.weight_GL, self.tables[0])
        self.update(self.tables, gradient_GFN[0])

    def fused(self) -> None:
        """The same, block by block."""
        _, n_features, width = self.tables[0].shape
        starts, rows, order = sparse.feature_major(self.code.features_P, self.code.offsets, n_features)
        d_values, n_block = torch.empty_like(self.code.values_P), max(LEAST_BLOCK, BLOCK_BYTES // (4 * width))
        gradient, squares = torch.empty(n_block, width), torch.empty(n_block)
        given = (self.code.values_P, self.error_BGN, self.weight_GL)
        for first in range(0, n_features, n_block):
            blocks = [table[0, first : first + n_block] for table in self.tables]
            n_own, parts = len(blocks[0]), self.weight_GL.shape[1]
            own = (starts[first : first + n_own + 1], rows, order, *given, blocks[0])
            native.call("backward_decoder", n_own, 1, width, parts, *own, d_values, gradient, squares)
            self.update(blocks, gradient[:n_own])

    def without_moments(self) -> None:
        """The cheapest update there is."""
        self.tables[0].add_(self.tables[1], alpha=-1e-9)


def measure(shape: Shape, repeats: int) -> dict[str, float]:
    """Medians in ms of the decoder's gradient and update in both forms, of Adam alone, and of a whole step."""
    table, other = Table(shape), Table(shape)
    other.fused()
    table.apart()
    if not all(torch.equal(one, two) for one, two in zip(table.tables, other.tables, strict=True)):
        raise AssertionError(f"{shape}: the two forms leave other numbers")
    dictionary = start_dictionary(shape, random_x(shape, "cpu"))
    dead_GF = torch.arange(shape.n_features)[None] % 10 == 0
    for parameter in dictionary.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x_BLD, gradient_RN = random_x(shape, "cpu"), torch.randn(table.tables[0].shape[1:])
    arms: dict[str, Step] = {
        "apart": table.apart,
        "fused": table.fused,
        "adam": lambda: table.update(table.tables, gradient_RN),
        "without moments": table.without_moments,
        "aux_k by autograd": lambda: auxiliary_term(dictionary, x_BLD, -x_BLD, dead_GF).backward(),
        "aux_k": lambda: add_auxiliary_gradients(dictionary, x_BLD, -x_BLD, dead_GF),
        "step": library_step(start_dictionary(shape, x_BLD), x_BLD, "fp32"),
    }
    return {name: statistics.median(times) for name, times in alternate(arms, repeats, "cpu").items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write it with its JSON under `out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="L,D,F,B,K")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    rows, record = [], []
    for named in given.shapes:
        layers, width, features, batch, k = map(int, named.split(","))
        found = measure(Shape(batch, layers, width, features, k), given.repeats)
        fused, moments = (2 * (found["apart"] - found["fused"]), found["adam"] - found["without moments"])
        gains = (found["apart"] / found["fused"], fused / found["step"], moments / found["step"])
        rows.append([named, *(number(found[name]) for name in found), *map(number, gains)])
        record.append({"shape": named, "ms": found, "of a step": {"fused": gains[1], "half moments": gains[2]}})
    header = ["L,D,F,B,K", "apart, ms", "fused", "Adam alone", "without moments", "auxiliary term by autograd"]
    header += ["auxiliary term", "whole step", "apart / fused"]
    header += ["a step's gain, both tables fused", "both tables' moments halved, at most"]
    machine = describe_machine("cpu", given.threads)
    lines = ["# An update fused with its gradient", "", PREDICTED, "", *markdown_table(header, rows), ""]
    write_report(given.out, "update_cpu", [*lines, machine_line(machine)], {"shapes": record, "machine": machine})
    return 0


if __name__ == "__main__":
    sys.exit(main())
