"""How near the trainer of small subjects comes to its floor, on shapes A, B and C of the preset `standard`.

In one process with one thread, as a study trains each subject, the arms taking turns, a step each; what is counted is
processor time, since other programs may run beside. Every arm begins with the same weights and reads the same text in
the same order, so that its held-out loss after the same number of tokens stands beside today's; today's step and our
own are then taken to the end of the whole run, if that is asked for.

The floor is every matrix product of a step by itself, forward and backward, as plain `torch.mm` and `torch.bmm` of the
same shapes, which is an arm too, and the optimiser's memory traffic at the bandwidth measured here. Attention counts in
full, not its causal half.

Two threads for one subject are set beside two subjects in two processes by the clock, also in turns.

    python scripts/bench_subjects.py --steps 50 --no-whole
    python scripts/bench_subjects.py --steps 20 --arms "own forward" --turns 0 --label whole
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import bench_subjects_forward as own
import torch
from bench_common import (
    WARM_UP,
    Step,
    describe_machine,
    device_label,
    machine_line,
    markdown_table,
    measure_limits,
    write_report,
)
from torch import Tensor, nn
from torch.nn import functional as F

from crosscoder.data import subject_training
from crosscoder.data.prepare import prepare_tokens
from crosscoder.data.subject import build_subject
from crosscoder.data.subject_training import SubjectConfig, held_out_loss, next_token_loss
from crosscoder.data.tokens import PreparedTokens, TokenBlocks
from crosscoder.studies.presets import PRESETS

Loss = Callable[[Any, Tensor], Tensor]
STUDY = PRESETS["standard"].subjects
TODAY, KEPT, FLOOR = "today", "own forward", "products alone"
COMPILED, COMPILED_BLOCKS = "torch.compile", "torch.compile, each block"
OPTIMISERS = ("fused", "foreach")
OPTIMISER_BYTES = 4 * 7
"""Of a parameter: weight, gradient and both moments are read, all but the gradient written."""
HOW_TO_READ = """\
Tokens a second are of one thread's processor time, and medians; of two ratios the first is of medians and the second of
least times. Losses are of 64 held-out sequences, after the same number of tokens of the same text."""
PREDICTIONS = """\
Set down before the first run of this script. Of `torch.compile`, the fused norm, fused products, our own forward and
larger batches there had been trial runs by then; what stands here is what was expected before those, from a profile of
today's step (A: half the time in products, a fifth in attention, 22 of 75 ms in everything else). As today / arm:

- `torch.compile` of the loss: 1.1 to 1.15 by the step, 30 s or more to compile: does not pay in 400 to 540 steps.
  Each block by itself: the same by the step, 10 s to compile: pays by a little for A.
- eager attention: slower, .9: it writes the scores to memory four times.
- fused RMS norm: 1.02 to 1.03; the cross-entropy in chunks: 1.02, its logits are 2 MB and leave the cache.
- our own forward: 1.25 on A, 1.1 on B, 1.15 on C; with queries, keys and values in one product, and gate and up, a
  little better than with each by itself.
- the optimiser: fused 2 % of a step, `foreach` twice that. Nothing to win.
- larger batches: 1.05 at 16 and 32, with a loss worse by .1 and .3 after the same tokens.
- bfloat16 products: 1.5 on a CPU with such units, half without; the loss within .01.
- two processes with one thread each: 1.4 times as many tokens a second as one with two threads.
- a step of today at .55 to .65 of the floor's speed, our own at .7 to .75."""


def chunked_loss(model: Any, ids_BS: Tensor, *, rows: int = 256) -> Tensor:
    """Today's loss with the logits of some rows at a time."""
    hidden_TD = model.model(ids_BS, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    targets_T = ids_BS[:, 1:].flatten()
    parts = zip(hidden_TD.split(rows), targets_T.split(rows), strict=True)
    sums = [F.cross_entropy(F.linear(h, model.lm_head.weight), t, reduction="sum") for h, t in parts]
    return torch.stack(sums).sum() / len(targets_T)


def fused_loss(model: Any, ids_BS: Tensor) -> Tensor:
    """Our own forward, with one product for all weights that read the same."""
    apart = own._Read.apply

    def read(x_TD: Tensor, eps: float, *weights: Tensor) -> tuple[Tensor, ...]:
        return apart(x_TD, eps, torch.cat(weights))[0].split([len(weight) for weight in weights], dim=1)

    with patch.object(own._Read, "apply", read):
        return own.own_loss(model, ids_BS)


def use_fused_norms(model: Any) -> None:
    """Every norm by `torch.nn.functional.rms_norm`."""
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            shape = (len(module.weight),)
            module.forward = partial(F.rms_norm, normalized_shape=shape, weight=module.weight, eps=1e-6)


def compile_blocks(model: Any) -> None:
    """Every block by `torch.compile`, which compiles the first and takes its code for all."""
    for layer in model.model.layers:
        layer.compile(dynamic=False)


class Arm(NamedTuple):
    """One way to train: its loss, what is done to the model first, and what is not as in the study."""

    loss: Loss = next_token_loss
    prepare: Callable[[Any], None] = lambda model: None
    precision: Literal["float32", "bfloat16"] = "float32"
    batches: int = 1
    """The study's batches that one step takes."""


ARMS = {
    TODAY: Arm(),
    "eager attention": Arm(prepare=lambda model: model.set_attn_implementation("eager")),
    "fused RMS norm": Arm(prepare=use_fused_norms),
    "cross-entropy in chunks": Arm(chunked_loss),
    COMPILED: Arm(torch.compile(next_token_loss, dynamic=False)),
    COMPILED_BLOCKS: Arm(prepare=compile_blocks),
    KEPT: Arm(own.own_loss),
    "own forward, fused products": Arm(fused_loss),
    "bfloat16 products": Arm(precision="bfloat16"),
    "batch doubled": Arm(batches=2),
    "batch times four": Arm(batches=4),
}


@dataclass
class Trainer:
    """A subject in training by one arm."""

    arm: Arm
    config: SubjectConfig
    model: Any
    steps: Iterator[tuple[int, float]]

    @classmethod
    def begin(cls, arm: Arm, config: SubjectConfig, tokens: TokenBlocks) -> Trainer:
        """Before its first step."""
        batch = arm.batches * config.batch
        config = replace(config, batch=batch, precision=arm.precision, n_checkpoints=1)
        shape = {"vocab_size": tokens.vocab_size, "context": config.context, "head_dim": config.head_dim}
        model = build_subject(config.n_layers, config.d_model, **shape, seed=config.seed)
        arm.prepare(model)
        return cls(arm, config, model, subject_training._training_steps(model, config, tokens))

    def step(self) -> None:
        """The next step."""
        with patch.object(subject_training, "next_token_loss", self.arm.loss):
            next(self.steps)


def products_of(model: Any, batch: int, context: int) -> Step:
    """Every matrix product of a step, forward and backward, each by itself."""
    calls: list[Step] = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight, n_tokens = module.weight.detach(), batch * context
            x, grad = torch.randn(n_tokens, module.in_features), torch.randn(n_tokens, module.out_features)
            calls += [partial(torch.mm, x, weight.T), partial(torch.mm, grad, weight), partial(torch.mm, grad.T, x)]
    n_heads = batch * model.config.num_attention_heads
    one = torch.randn(n_heads, context, model.config.head_dim)
    scores = torch.randn(n_heads, context, context)
    to_scores, to_heads, back = ((one, one.mT), (scores, one), (scores.mT, one))
    six = [partial(torch.bmm, *pair) for pair in (to_scores, to_heads, to_scores, to_heads, back, back)]
    calls += model.config.num_hidden_layers * six
    return lambda: [call() for call in calls]


def optimisers_of(model: Any) -> dict[str, Step]:
    """What follows the backward, with both kinds of AdamW."""
    parameters = list(model.parameters())

    def update(optimizer: torch.optim.Optimizer) -> None:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    made = {"fused": torch.optim.AdamW(parameters, fused=True), "foreach": torch.optim.AdamW(parameters, foreach=True)}
    return {kind: partial(update, optimizer) for kind, optimizer in made.items()}


def processor_ms(call: Step) -> float:
    """Milliseconds of processor time of a call."""
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


def measure_shape(config: SubjectConfig, text: PreparedTokens, given: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of every arm for the tokens of one step of today's, and losses after the same tokens."""
    trainers = {name: Trainer.begin(ARMS[name], config, text.train) for name in given.arms}
    model = build_subject(config.n_layers, config.d_model, **_shape(config, text), seed=config.seed)
    calls = {FLOOR: products_of(model, config.batch, config.context), **optimisers_of(model)}
    ms: dict[str, list[float]] = {name: [] for name in (*trainers, *calls)}
    first_s = {}
    for turn in range(given.steps):
        for name, trainer in trainers.items():
            if turn % trainer.arm.batches == 0:
                start = time.perf_counter()
                ms[name].append(processor_ms(trainer.step) / trainer.arm.batches)
                first_s.setdefault(name, time.perf_counter() - start)
        for name, call in calls.items():
            ms[name].append(processor_ms(call))
    held_out = text.held_out[:: max(1, len(text.held_out) // 64)][:64]
    losses = {name: held_out_loss(trainer.model, held_out) for name, trainer in trainers.items()}
    whole = {}
    for name in (TODAY, KEPT) if given.whole else ():
        for _ in range(config.n_steps - given.steps):
            trainers[name].step()
        whole[name] = held_out_loss(trainers[name].model, held_out)
    return {
        "shape": f"{config.n_layers} x {config.d_model}, heads of {config.head_dim}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_of_step": config.batch * config.context,
        "steps": config.n_steps,
        "ms": {name: found[min(WARM_UP, len(found) - 1) :] for name, found in ms.items()},
        "first_step_s": first_s,
        "tokens_of_losses": given.steps * config.batch * config.context,
        "losses": losses,
        "losses_of_whole_run": whole,
    }


def _shape(config: SubjectConfig, text: PreparedTokens) -> dict[str, int]:
    return {"vocab_size": text.train.vocab_size, "context": config.context, "head_dim": config.head_dim}


@cache
def _begun(config: SubjectConfig, home: Path) -> Trainer:
    return Trainer.begin(ARMS[TODAY], config, PreparedTokens.load(home).train)


def _seconds_of_steps(config: SubjectConfig, home: Path, n_steps: int, n_threads: int) -> float:
    torch.set_num_threads(n_threads)
    trainer = _begun(config, home)
    start = time.perf_counter()
    for _ in range(n_steps):
        trainer.step()
    return time.perf_counter() - start


def compare_processes(config: SubjectConfig, home: Path, *, turns: int, n_steps: int = 6) -> list[float]:
    """How many times as many tokens a second two subjects in two processes make as one with two threads."""
    spawn, ratios = get_context("spawn"), []
    with ProcessPoolExecutor(1, spawn) as wide, ProcessPoolExecutor(1, spawn) as a, ProcessPoolExecutor(1, spawn) as b:
        for _ in range(turns + 1):  # the first, in which the processes start, is not counted
            both = [pool.submit(_seconds_of_steps, config, home, n_steps, 1) for pool in (a, b)]
            apart = max(one.result() for one in both)
            together = wide.submit(_seconds_of_steps, config, home, n_steps, 2).result()
            ratios.append(2 * together / apart)
    return ratios[1:]


def table_of(name: str, case: dict[str, Any]) -> list[str]:
    """The lines of one shape; where two ratios stand, the first is of medians, the second of least times."""
    both = (statistics.median, min)
    ms = {arm: [find(found) for find in both] for arm, found in case["ms"].items()}
    floor = [least + case["optimiser_floor_ms"] for least in ms[FLOOR]]

    def ratios(over: list[float], under: list[float]) -> str:
        return ", ".join(f"{a / b:.2f}" for a, b in zip(over, under, strict=True))

    rows = []
    for arm, loss in case["losses"].items():
        rate = f"{1e3 * case['tokens_of_step'] / ms[arm][0]:,.0f}"
        moved = f"{loss - case['losses'][TODAY]:+.4f}"
        rows.append([arm, rate, ratios(ms[TODAY], ms[arm]), ratios(floor, ms[arm]), f"{loss:.4f}", moved])
    after = f"{case['tokens_of_losses']:,} tokens"
    header = ["arm", "tokens/s", "today / arm", "floor / arm", f"loss after {after}", "less today's"]
    lines = [f"## {name}: {case['shape']}, {case['steps']} steps", "", *markdown_table(header, rows), ""]
    shares = [f"{kind} {ratios(ms[kind], ms[TODAY])}" for kind in OPTIMISERS]
    lines.append(f"Clipping and AdamW, share of today's step: {'; '.join(shares)}.")
    compiled = [arm for arm in case["losses"] if arm.startswith(COMPILED)]
    lines += [f"The first step of {arm} took {case['first_step_s'][arm]:.0f} s by the clock." for arm in compiled]
    if whole := case["losses_of_whole_run"]:
        lines.append(
            "Held-out loss of the whole run: " + ", ".join(f"{a} {loss:.5f}" for a, loss in whole.items()) + "."
        )
    if found := case["processes"]:
        lines.append(f"Two processes over one with two threads, tokens/s: {statistics.median(found):.2f}, by turns ")
        lines[-1] += ", ".join(f"{ratio:.2f}" for ratio in sorted(found)) + "."
    return [*lines, ""]


def main(arguments: list[str] | None = None) -> None:
    """Measure the shapes and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=STUDY.text, help="what `crosscoder prepare --text` takes")
    parser.add_argument("--shapes", nargs="+", default=["A", "B", "C"], help="of the study")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help=f"`{TODAY}` is always one")
    parser.add_argument("--steps", type=int, default=100, help="of today's batch, timed")
    parser.add_argument("--turns", type=int, default=5, help="in which processes and threads are compared")
    parser.add_argument("--whole", action=argparse.BooleanOptionalAction, default=True, help="go on to the last step")
    parser.add_argument("--tiny-limits", action="store_true", help="for tests: small arrays, whose limits mean nothing")
    parser.add_argument("--label", default="", help="what file names end with")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    given = parser.parse_args(arguments)
    given.arms = list(dict.fromkeys([TODAY, *given.arms]))
    torch.set_num_threads(1)
    torch.compiler.config.force_disable_caches = True  # or the first step would not be what it costs
    limits = measure_limits("cpu", tiny=given.tiny_limits)
    cases = {}
    with tempfile.TemporaryDirectory() as work:
        home = Path(work) / "tokens"
        sizes: dict[str, Any] = {"vocab_size": STUDY.vocab_size, "sequence_length": STUDY.context}
        text = prepare_tokens(given.text, **sizes, seed=STUDY.seed, folder=home)
        for name in given.shapes:
            config = STUDY.runs()[name, 0]
            case = measure_shape(config, text, given)
            case["optimiser_floor_ms"] = 1e3 * OPTIMISER_BYTES * case["parameters"] / limits.bandwidth
            case["processes"] = compare_processes(config, home, turns=given.turns) if given.turns else []
            cases[name] = case
            print("\n".join(table_of(name, case)), flush=True)
    cores = os.cpu_count() or 1
    machine = {**describe_machine("cpu", 1), "command": None}
    lines = ["# Training small subjects, and its floor", "", PREDICTIONS, ""]
    lines += [line for name, case in cases.items() for line in table_of(name, case)]
    lines += [HOW_TO_READ, "", str(limits), "", machine_line(machine)]
    record = {"predictions": PREDICTIONS, "cases": cases, "machine": machine, "limits": vars(limits)}
    stem = "_".join(filter(None, ("subjects", device_label("cpu", cores), given.label)))
    write_report(given.out, stem, lines, record)


if __name__ == "__main__":
    main()
