"""What guards, locks and safe points add to a step: one process, two arms in turn, step by step.

`guarded` is a step as it ships: finite checks of the batch, of what the encoder reads, of loss and gradient,
failpoints, and the look at whether to stop. `bare` is the same step with all of these taken out. The machine may be
busy, so it is the thread's own CPU time that counts, both take turns after every step, which of them is first changes
too, and least, quartile and median are told, several times over. Locks and the probe for room are taken once a run, and
timed by themselves.

$ python scripts/bench_guards.py --out benchmarks/guards
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from crosscoder.dictionary import BatchTopK, Crosscoder
from crosscoder.foundation import signals
from crosscoder.foundation.failpoints import failpoint
from crosscoder.foundation.lock import locked
from crosscoder.foundation.provenance import describe_run
from crosscoder.training import step as step_module
from crosscoder.training.checkpoint import checkpoint_bytes, require_room
from crosscoder.training.state import TrainState
from crosscoder.training.step import TrainConfig, take_step
from triton_kernels.cpu import problem

SIZES = {"small": (4, 64, 512, 16, 512), "medium": (8, 128, 2048, 32, 1024)}
"""Layers, width, features, k and tokens of a batch."""


def guarded(state: TrainState, x_BLD: torch.Tensor, config: TrainConfig) -> None:
    """A step of the trainer's loop."""
    take_step(state, x_BLD, config, None)
    failpoint("train.step")
    signals.safe_point()


def bare(state: TrainState, x_BLD: torch.Tensor, config: TrainConfig) -> None:
    """The step alone, nothing checked."""
    before = [(module, name, getattr(module, name)) for module, name, _ in CHECKS]
    for check in CHECKS:
        setattr(*check)
    try:
        take_step(state, x_BLD, config, None)
    finally:
        for check in before:
            setattr(*check)


CHECKS: list[tuple[Any, str, Callable[..., Any]]] = [
    (step_module, "non_finite", lambda _: ""),
    (step_module, "_are_finite", lambda *_: True),
    (problem, "_require_finite", lambda _: None),
]
"""Where they are, and what stands in their place."""
PREDICTED = (
    "Predicted before it was measured, from each check by itself (a sum of the batch 7 and 146 us, another of what",
    "the encoder reads, 2 us for loss and gradient): 17 us of 3 ms and 300 us of 50 ms, 0.6 % of both. Before that a",
    "batch was looked at by its least and largest number, 38 and 281 us, and `bare` kept the sum of what the encoder",
    "reads: it was 3.3 to 5.4 % of 3.9 ms and 1.1 to 1.4 % of 57 ms on an idle machine, and 2.5 to 4.7 % of a small",
    "step in three runs on the machine below.",
)
ARMS: dict[str, Callable[..., None]] = {"guarded": guarded, "bare": bare}


def alternate(size: tuple[int, ...], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every step of each arm, each on a dictionary of its own."""
    n_layers, d_model, n_features, k, n_tokens = size
    config, generator = TrainConfig(dead_after_tokens=10**9), torch.Generator().manual_seed(0)
    shape: dict[str, Any] = {"n_layers": n_layers, "d_model": d_model, "n_features": n_features}
    shape |= {"sparsity": BatchTopK(k=k)}
    states = {name: TrainState.start(Crosscoder(**shape).train()) for name in ARMS}
    x_BLD = torch.randn(n_tokens, n_layers, d_model, generator=generator)
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    for number in range(rounds + 5):
        names = list(ARMS) if number % 2 else list(ARMS)[::-1]
        for name in names:
            started = time.thread_time()
            ARMS[name](states[name], x_BLD, config)
            if number >= 5:
                seconds[name].append(time.thread_time() - started)
    return seconds


def added(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """What the guards add, by least, quartile and median of the steps, and by the median of pairs in turn."""
    least = {arm: min(values) for arm, values in seconds.items()}
    pairs = [a / b - 1 for a, b in zip(seconds["guarded"], seconds["bare"], strict=True)]
    middle = {arm: statistics.median(values) for arm, values in seconds.items()}
    quarter = {arm: statistics.quantiles(values)[0] for arm, values in seconds.items()}
    return {
        "ms_least": {arm: 1e3 * value for arm, value in least.items()},
        "ms_median": {arm: 1e3 * value for arm, value in middle.items()},
        "added_by_least": least["guarded"] / least["bare"] - 1,
        "added_by_quartile": quarter["guarded"] / quarter["bare"] - 1,
        "added_by_median": middle["guarded"] / middle["bare"] - 1,
        "added_by_median_of_pairs": statistics.median(pairs),
    }


def once(state: TrainState) -> dict[str, float]:
    """Milliseconds of what is done once a run."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        for _ in range(20):
            with locked(folder):
                pass
        found["lock taken and given back"] = (time.perf_counter() - started) / 20
        started = time.perf_counter()
        require_room(Path(folder), checkpoint_bytes(state), copies=3, what="checkpoint")
        found["room for checkpoints reserved and freed"] = time.perf_counter() - started
    return {name: 1e3 * value for name, value in found.items()}


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300, help="steps of each arm")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES))
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"rounds": given.rounds, "sizes": {}, "device": describe_run()["device"]}
    found["date"] = time.strftime("%Y-%m-%d", time.gmtime())
    for name in given.sizes:
        found["sizes"][name] = [added(alternate(SIZES[name], given.rounds)) for _ in range(given.repeats)]
        print(name, json.dumps(found["sizes"][name]), flush=True)
    shape: dict[str, Any] = dict(zip(("n_layers", "d_model", "n_features"), SIZES["medium"], strict=False))
    found["once_ms"] = once(TrainState.start(Crosscoder(**shape, sparsity=BatchTopK(k=4))))
    print(json.dumps(found["once_ms"]))
    if given.out is not None:
        given.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        given.out.with_suffix(".md").write_text(page(found))


def page(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["# What guards add to a step", "", *str(__doc__).split("\n\n")[1].splitlines(), "", *PREDICTED, ""]
    lines += [
        "| size | bare, least | guarded, least | added | added, quartiles | added, medians | added, median of pairs |"
    ]
    lines += ["|---" * 7 + "|"]
    for name, one in [(name, one) for name, every in found["sizes"].items() for one in every]:
        least, added = (
            one["ms_least"],
            [one[f"added_by_{how}"] for how in ("least", "quartile", "median", "median_of_pairs")],
        )
        shown = " | ".join(f"{100 * value:+.2f} %" for value in added)
        lines.append(f"| {name} | {least['bare']:.3f} ms | {least['guarded']:.3f} ms | {shown} |")
    lines += ["", *(f"{name}: {value:.2f} ms, once a run.  " for name, value in found["once_ms"].items()), ""]
    lines += [
        f"{found['rounds']} steps of each arm on {found['device']['cpu']}, one thread, which others used too; "
        f"{found['date']}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
