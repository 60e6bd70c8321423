"""What the benchmarks share: the job's shape, clocks, the machine's measured limits, reports and plots.

Times are medians of calls that take turns, so that a busy neighbour slows all of them alike: quote ratios. On a GPU a
call is timed between two events, on the CPU by the monotonic clock. The limits are measured in the same process as
what is held against them: the better bandwidth of `a = b + s * c` and of norms of rows, over arrays larger than any
cache (a CPU reads `a` before it writes it, which the first does not count), and the rate of a square matrix product
in fp32 and bf16.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crosscoder.foundation.artifact import write_json
from crosscoder.foundation.provenance import describe_run
from triton_kernels.cpu.native import build
from triton_kernels.cpu.problem import affine, onednn_dtypes

Step = Callable[[], Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ADAM: dict[str, Any] = {"step": 3, "rate": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
WARM_UP = 2
"""Calls of each arm that are not counted."""
PEERS = ("eai-sparsify", "dictionary-learning", "sae-lens")


def attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    """The call's result and an empty string, or None and why it failed: one arm's failure is a line of the report."""
    try:
        return call(), ""
    except Exception as error:  # noqa: BLE001
        message = " ".join(str(error).split())[:200]
        reason = message if isinstance(error, UnavailableError) else f"{type(error).__name__}: {message}"
        return None, reason


class UnavailableError(RuntimeError):
    """This machine cannot run an arm; the message says why, and the report prints it."""


@dataclass(frozen=True)
class Shape:
    """The job: B tokens of L layers of D numbers, F features, K kept.

    planted: 1 where tokens are sums of K of F random directions and a little noise, as activations are more than noise
    is; 0 where they are noise, which a dictionary that sees one batch again and again learns by heart.
    """

    batch: int = 1024
    n_layers: int = 6
    d_model: int = 256
    n_features: int = 8192
    k: int = 32
    planted: int = 0

    @property
    def width(self) -> int:
        """N, the numbers of one token."""
        return self.n_layers * self.d_model

    def with_letter(self, letter: str, value: int) -> Shape:
        """The same job with another B, F, K or L."""
        return replace(self, **{LETTERS[letter]: value})

    def __str__(self) -> str:
        return f"B={self.batch} L={self.n_layers} D={self.d_model} F={self.n_features} K={self.k}" + (
            " planted" if self.planted else ""
        )


LETTERS = {"B": "batch", "L": "n_layers", "D": "d_model", "F": "n_features", "K": "k"}


def parse_shape(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> tuple[Shape, argparse.Namespace]:
    """The shape and the other settings from the command line."""
    for field in fields(Shape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=9, help="timed calls of each arm, after two not counted")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder for the table, JSON and plot")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    torch.set_num_threads(given.threads)
    return Shape(**{field.name: getattr(given, field.name) for field in fields(Shape)}), given


def random_x(shape: Shape, device: str) -> torch.Tensor:
    """The batch of every arm, `x_BLD`, of variance 1."""
    generator = torch.Generator().manual_seed(0)
    if shape.planted:
        table_FN = torch.randn(shape.n_features, shape.width, generator=generator)
        chosen_BK = torch.rand(shape.batch, shape.n_features, generator=generator).topk(shape.k).indices
        value_BK = 0.2 + torch.rand(shape.batch, shape.k, generator=generator)
        x_BN = torch.zeros(shape.batch, shape.n_features).scatter(1, chosen_BK, value_BK) @ table_FN
        x_BN += 0.1 * torch.randn(x_BN.shape, generator=generator)
        return (x_BN / x_BN.std()).view(shape.batch, shape.n_layers, shape.d_model).to(device)
    return torch.randn(shape.batch, shape.n_layers, shape.d_model, generator=generator).to(device)


def milliseconds(call: Step, device: str) -> float:
    """Time of one call, the device's work included."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def alternate(steps: Mapping[str, Step], repeats: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each arm's calls, the arms taking turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + WARM_UP):
        for name, step in steps.items():
            elapsed = milliseconds(step, device)
            if turn >= WARM_UP:
                times[name].append(elapsed)
    return times


def median_ms(call: Step, repeats: int, device: str) -> float:
    """Median time of a call by itself."""
    return statistics.median(alternate({"": call}, repeats, device)[""])


def peak_mib(call: Step) -> float:
    """GPU memory that one call takes at its peak, above what was there before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@dataclass(frozen=True)
class Limits:
    """What this machine reached in this process: bytes a second, and FLOP a second by dtype."""

    bandwidth: float
    flop: dict[str, float]

    def floor_ms(self, n_bytes: float, n_flop: float, dtype: str) -> float:
        """The larger of the time to move the bytes and the time to do the arithmetic."""
        return 1e3 * max(n_bytes / self.bandwidth, n_flop / self.flop[dtype])

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {rate / 1e9:.4g} GFLOP/s" for name, rate in self.flop.items())
        return f"measured limits: memory {self.bandwidth / 1e9:.4g} GB/s, matrix product {rates}"


def measure_limits(device: str, *, tiny: bool = False) -> Limits:
    """The machine's limits; `tiny` takes small arrays, for tests, whose numbers mean nothing."""
    on_gpu = device == "cuda"
    n_numbers = 2**16 if tiny else 2**28 if on_gpu else 2**25
    side = 64 if tiny else 8192 if on_gpu else 1536
    repeats = 3 if tiny else 9
    triad = 12 * n_numbers / median_ms(_triad(n_numbers, device), repeats, device)
    read = 4 * n_numbers / median_ms(_read(n_numbers, device), repeats, device)
    rates = {}
    for name, dtype in DTYPES.items():
        rates[name] = 2 * side**3 / median_ms(_square_product(side, dtype, device), repeats, device) * 1e3
    return Limits(max(triad, read) * 1e3, rates)


def _triad(n_numbers: int, device: str) -> Step:
    a, b, c = (torch.ones(n_numbers, device=device) for _ in range(3))
    return lambda: torch.add(b, c, alpha=0.5, out=a)


def _read(n_numbers: int, device: str) -> Step:
    rows = torch.ones(n_numbers // 1024, 1024, device=device)
    return lambda: torch.linalg.vector_norm(rows, dim=1)


def _square_product(side: int, dtype: torch.dtype, device: str) -> Step:
    """On the CPU the product that the encoder uses."""
    left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    if device == "cpu":
        return lambda: affine(left, right, right[0])
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out)


class Problem(NamedTuple):
    """G dictionaries' tables, a batch, and a code of it; `center_GN` is the decoder's bias too."""

    x_BGN: Tensor
    center_GN: Tensor
    encoder_GFN: Tensor
    decoder_GFN: Tensor
    bias_GF: Tensor
    weight_GL: Tensor
    values_P: Tensor
    features_P: Tensor
    offsets: Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype."""
        return Problem(*(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in self))

    @property
    def code(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values, features and offsets."""
        return self.values_P, self.features_P, self.offsets

    @property
    def table_FN(self) -> Tensor:
        """The decoders as one table, features counted over all dictionaries."""
        return self.decoder_GFN.flatten(0, 1)

    def rows(self) -> Tensor:
        """The row of each pair."""
        return torch.repeat_interleave(self.offsets.diff())

    def dense(self) -> Tensor:
        """The code written out, `[R, G * F]`."""
        out = self.values_P.new_zeros(self.offsets.numel() - 1, self.table_FN.shape[0])
        out[self.rows(), self.features_P.long()] = self.values_P
        return out

    def gradient(self) -> Tensor:
        """`2 w x`: the gradient that an error equal to x would give, `[R, N]`."""
        parts = self.x_BGN.unflatten(2, (self.weight_GL.shape[1], -1))
        return (2 * self.weight_GL[..., None] * parts).flatten(2).flatten(0, 1)

    def gather_sum(self) -> tuple[Tensor, ...]:
        """What each operator computes, here and below, by torch's dense products."""
        return (self.dense() @ self.table_FN,)

    def gather_dot(self) -> tuple[Tensor, ...]:
        return ((self.x_BGN.flatten(0, 1) @ self.table_FN.T)[self.rows(), self.features_P.long()],)

    def scatter_outer(self) -> tuple[Tensor, ...]:
        return (self.dense().T @ self.x_BGN.flatten(0, 1),)

    def decode_loss(self) -> tuple[Tensor, ...]:
        error = (self.dense() @ self.table_FN).view(self.x_BGN.shape) + self.center_GN - self.x_BGN
        return error, error.unflatten(2, (self.weight_GL.shape[1], -1)).square().sum((0, 3))

    def backward_decoder(self) -> tuple[Tensor, ...]:
        gradient = self.gradient()
        d_values = (gradient @ self.table_FN.T)[self.rows(), self.features_P.long()]
        return d_values, (self.dense().T @ gradient).view(self.decoder_GFN.shape)

    def backward_encoder(self) -> tuple[Tensor, ...]:
        centred = (self.x_BGN - self.center_GN).flatten(0, 1)
        d_bias = (self.dense().T @ centred.new_ones(centred.shape[0])).view(self.bias_GF.shape)
        return (self.dense().T @ centred).view(self.encoder_GFN.shape), d_bias

    def update_state(self) -> list[Tensor]:
        """A parameter with rows of norm 1, its gradient and both moments, in fp32."""
        parameter = torch.nn.functional.normalize(self.decoder_GFN.flatten(0, 1).float(), dim=1)
        gradient = self.encoder_GFN.flatten(0, 1).float()
        return [parameter, gradient, 0.1 * gradient.roll(1, 0), 0.1 * gradient.roll(2, 0).square()]


def adam_definition(state: Sequence[Tensor], *, unit: bool) -> tuple[Tensor, ...]:
    """Parameter and moments after one step, and the gradient rows' squares, in the tensors' dtype."""
    parameter, gradient, first, second = state
    if unit:
        gradient = gradient - (gradient * parameter).sum(1, keepdim=True) * parameter
    squares = torch.einsum("rn,rn->r", gradient, gradient)
    low, high = ADAM["betas"]
    first, second = low * first + (1 - low) * gradient, high * second + (1 - high) * gradient.square()
    root = second.sqrt() / (1 - high ** ADAM["step"]) ** 0.5 + ADAM["eps"]
    parameter = parameter - ADAM["rate"] / (1 - low ** ADAM["step"]) * first / root
    if unit:
        parameter = parameter / parameter.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return parameter, first, second, squares


def make_problem(
    shape: Shape, *, bank: bool, dtype: str, device: str, ragged: bool = False, hot: bool = False
) -> Problem:
    """A random problem. `ragged` leaves some rows short or empty; `hot` makes one feature active in every row."""
    groups, width, parts = (shape.n_layers, shape.d_model, 1) if bank else (1, shape.width, shape.n_layers)
    generator = torch.Generator(device).manual_seed(1)
    draw = partial(torch.randn, generator=generator, device=device)
    n_rows, n_features = shape.batch * groups, shape.n_features
    if n_rows * n_features <= 2**22:
        columns = torch.rand(n_rows, n_features, generator=generator, device=device).topk(shape.k, dim=1).indices
    else:  # the few features drawn twice in a row are dropped below
        columns = torch.randint(n_features, (n_rows, shape.k), generator=generator, device=device)
    if hot:
        columns[:, 0] = 0
    columns = columns.sort(dim=1).values
    kept = torch.ones_like(columns, dtype=torch.bool)
    kept[:, 1:] = columns[:, 1:] != columns[:, :-1]
    if ragged:
        kept &= torch.rand(kept.shape, generator=generator, device=device) < 0.6
        kept[::3] = False
    features = (columns + n_features * (torch.arange(n_rows, device=device) % groups)[:, None])[kept]
    offsets = torch.zeros(n_rows + 1, dtype=torch.int64, device=device)
    offsets[1:] = kept.sum(1).cumsum(0)
    problem = Problem(
        draw(shape.batch, groups, width),
        0.1 * draw(groups, width),
        draw(groups, n_features, width) / width**0.5,
        draw(groups, n_features, width) / width**0.5,
        0.1 * draw(groups, n_features),
        draw(groups, parts).abs() / max(1, n_rows * width),
        draw(features.numel()).abs(),
        features.to(torch.int32),
        offsets,
    )
    return problem.to(DTYPES[dtype])


def device_label(device: str, threads: int) -> str:
    """How file names call the machine: `cpu2`, `cuda`."""
    return f"cpu{threads}" if device == "cpu" else device


def describe_machine(device: str, threads: int) -> dict[str, Any]:
    """Device, versions and date, as plain values, the compared packages' versions included."""
    run = describe_run()
    for name in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            run["versions"][name] = importlib.metadata.version(name)
    chip = torch.cuda.get_device_name() if device == "cuda" else run["device"]["cpu"]
    form = build.form()
    if device == "cpu" and torch.bfloat16 not in onednn_dtypes():
        form += "; no bf16 product of the CPU's own: bf16 arms take torch's, which is slower than fp32"
    return {**run, "chip": chip, "threads": threads, "cpu_kernels": form}


def machine_line(machine: Mapping[str, Any]) -> str:
    """The line of a table that says where and when it was measured."""
    names = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if name != "crosscoder")
    commit, _, dirty = (machine["git_commit"] or "unknown").partition("+")
    commit = commit[:10] + (" with changes" if dirty else "")
    where = f"{machine['chip']}, {machine['threads']} CPU threads, CPU operators: {machine['cpu_kernels']}"
    return f"{machine['started'][:10]}; {where}; Python {machine['python']}, {names}; commit {commit}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def number(value: float | None, form: str = ".3g", missing: str = "-") -> str:
    """A number as a table shows it."""
    return missing if value is None else format(value, form)


def met(verdict: object) -> str:
    """Whether a target was reached, as a table shows it; None where it was not measured."""
    return "not measured" if verdict is None else "yes" if verdict else "no"


def write_report(folder: Path, stem: str, lines: Sequence[str], record: Mapping[str, Any]) -> None:
    """Print the table, and write it with its JSON under `folder`."""
    print("\n".join(lines), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.md").write_text("\n".join(lines) + "\n")
    plain = json.loads(json.dumps(record, default=str))
    write_json(folder / f"{stem}.json", plain)
