"""What dividing a dictionary costs and gains on this machine: time of a step, and bytes beside the formula.

    python scripts/bench_ranks.py [OUT.json]

The step of a whole dictionary and that of the same one as a shard of a single rank take turns in one process; then R
gloo ranks of one thread each train it together, and a bank, divided by features and by layers. Every time is the median
of its steps, beside the quartiles. Those alone are of the processor, which others on the machine lengthen less; of rank
0, both are given (its time on the processor holds that of making the batch, and some of waiting).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import torch
import torch.distributed as dist

from crosscoder import BatchTopK, Crosscoder, LayerwiseSAE
from crosscoder.dictionary import Dictionary
from crosscoder.dictionary.division import divided, shard_for
from crosscoder.dictionary.shard import Along, Shard
from crosscoder.dictionary.traffic import step_traffic
from crosscoder.foundation.provenance import describe_run
from crosscoder.foundation.ranks import Ranks
from crosscoder.training import TrainConfig
from crosscoder.training.state import TrainState
from crosscoder.training.step import take_step

L, D, F, K, B, STEPS, ROUNDS = 6, 128, 8192, 32, 1024, 12, 6
CONFIG = TrainConfig(steps=10_000, bias_init="zero")
DIVIDED: dict[str, tuple[type[Dictionary], Along]] = {
    "crosscoder": (Crosscoder, "features"), "bank by features": (LayerwiseSAE, "features"),
    "bank by layers": (LayerwiseSAE, "layers"),
}  # fmt: skip


def new(form: type[Dictionary] = Crosscoder) -> Dictionary:
    return form(n_layers=L, d_model=D, n_features=F, sparsity=BatchTopK(k=K), aux_k=0)


def batch(index: int) -> torch.Tensor:
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(index))


def seconds(state: TrainState, index: int, clock: Callable[[], float] = time.perf_counter) -> float:
    x = batch(index)
    start = clock()
    take_step(state, x, CONFIG, CONFIG.steps)
    return clock() - start


def summary(times: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(times, n=4)
    return {"milliseconds": 1e3 * middle, "quartile_low": 1e3 * low, "quartile_high": 1e3 * high}


def detour() -> dict[str, dict[str, float]]:
    """A whole dictionary and a shard of one rank, in turns, each of them as often first."""
    states = {"whole": TrainState.start(new()), "shard of one rank": TrainState.start(divided(new(), Shard.of(F)))}
    times: dict[str, list[float]] = {name: [] for name in states}
    for index in range(2 + ROUNDS * STEPS):
        for name, state in list(states.items())[:: 1 if index % 2 else -1]:
            taken = seconds(state, index, time.process_time)
            if index >= 2:
                times[name].append(taken)
    pairs = list(zip(*times.values(), strict=True))
    ratio = {"of_medians": statistics.median(b / a for a, b in pairs)}
    return {**{name: summary(one) for name, one in times.items()}, "ratio": ratio}


def rank_work(rank: int, size: int, folder: str, kind: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=size)
    ranks = Ranks(dist.group.WORLD)
    whole = new(DIVIDED[kind][0])
    state = TrainState.start(divided(whole, shard_for(type(whole), whole.config, ranks, DIVIDED[kind][1])))
    for index in range(2):
        seconds(state, index)
    ranks.traffic.clear()
    times, worked = [], []
    for index in range(STEPS):
        begun = time.process_time()
        times.append(seconds(state, index + 2))
        worked.append(time.process_time() - begun)
    sent = {name: size / STEPS for name, size in ranks.traffic.items()}
    if rank == 0:
        (Path(folder) / "found.json").write_text(
            json.dumps({"clock": summary(times), "processor": summary(worked), "bytes_of_a_step": sent})
        )
    dist.barrier()
    dist.destroy_process_group()


def together(size: int, kind: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=rank_work, args=(rank, size, folder, kind)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        found = json.loads((Path(folder) / "found.json").read_text())
    form, along = DIVIDED[kind]
    return {**found, "formula": step_traffic(form, new(form).config, B, size, along)}


def main() -> None:
    torch.set_num_threads(1)
    settings = {"layers": L, "width": D, "features": F, "k": K, "batch": B, "steps": STEPS, "threads": 1}
    load = os.getloadavg()[0]
    ranks = {kind: {str(size): together(size, kind) for size in (2, 3)} for kind in DIVIDED}
    found = {"alone": detour(), "ranks": ranks}
    result = {**describe_run(settings), "load": load, **found}
    text = json.dumps(result, indent=1)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
