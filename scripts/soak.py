"""Kill it at any moment: runs that are killed again and again end with the bytes of one that nobody touched.

Every cell of {crosscoder, bank} x {TopK, BatchTopK} x {live, store} trains a small dictionary, from a store that it
harvests first or from a stream. A cell is run once undisturbed; then it is killed (SIGKILL, every fourth time SIGTERM)
at random moments and started again until it ends, and again from nothing, until it has been killed `--kills` times.
Weights, moments, state and metrics must be equal to the bit, and nothing may be left over. With `--failpoints` a run is
also killed once at every named point of `foundation/failpoints.py`. Processes are forked from one that has imported
everything; on a system without fork this does not run.

$ python scripts/soak.py --kills 50 --out benchmarks/soak
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from crosscoder.data import shard_files
from crosscoder.data.prepare import prepare_tokens
from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.shards import ActivationShards, write_shards
from crosscoder.data.sources import SiteSource
from crosscoder.data.stream import ActivationStream
from crosscoder.data.subject import build_subject
from crosscoder.data.subject_training import SubjectConfig, train_subject
from crosscoder.data.tokens import TokenBlocks
from crosscoder.foundation import signals
from crosscoder.foundation.failpoints import POINTS, arm
from crosscoder.foundation.provenance import describe_run
from crosscoder.measure.health import watch
from crosscoder.measure.reading import read_dictionary
from crosscoder.studies.budget import DictionaryBudget
from crosscoder.studies.cells import Cell, new_dictionary
from crosscoder.studies.folder import _keep
from crosscoder.studies.stores import Stores
from crosscoder.training import TrainConfig, train

S, VOCABULARY, STEPS = 16, 32, 24
CONFIG = TrainConfig(steps=STEPS, warmup_steps=4, log_every=1, checkpoint_every=4, dead_after_tokens=128)
SUBJECT = SubjectConfig(n_layers=1, d_model=16, context=S, head_dim=8, batch=8, tokens=12 * 8 * S, n_checkpoints=2)
TERM_EVERY = 4
Work = Callable[[Path], None]


def blocks(n: int, seed: int) -> TokenBlocks:
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return TokenBlocks(torch.randint(VOCABULARY, (n, S), generator=generator), vocab_size=VOCABULARY)


def harvester() -> ResidualHarvester:
    """A small model that is read at all sites."""
    model = build_subject(2, 16, vocab_size=VOCABULARY, context=S, head_dim=8, seed=0)
    return ResidualHarvester(model.eval().requires_grad_(False))


def train_cell(arm_name: Any, selection: Any, where: str, folder: Path) -> None:
    """One run of a cell in a folder, from where it is."""
    read, splits = harvester(), {"train": blocks(96, 1), "held_out": blocks(24, 2)}
    if where == "store":
        stores = [write_shards(read, one, folder / name, tokens_per_shard=512) for name, one in splits.items()]
        assert all(isinstance(store, ActivationShards) for store in stores)
        source = SiteSource(*stores, "residual")
    else:
        ahead = ActivationStream(read, splits["train"], window_tokens=256)
        source = SiteSource(ahead, ActivationStream(read, splits["held_out"], ahead=False), "residual")
    budget = DictionaryBudget(n_features=24, k_crosscoder=4, k_layerwise=3, selection=selection)
    dictionary = new_dictionary(arm_name, source, budget, seed=0)
    train(
        dictionary,
        source.batches(64, seed=0, steps=STEPS),
        config=CONFIG,
        folder=folder / "run",
        resume=True,
        data_fingerprint=source.fingerprint,
        monitor=partial(watch, batches=source.marked),
        monitor_every=5,
        quiet=True,
    )
    read_dictionary(dictionary, source.marked())


def train_results(folder: Path) -> dict[str, bytes]:
    """What must be equal of a run."""
    newest = max((folder / "run" / "checkpoints").iterdir())
    names = ("model.safetensors", "optimizer.safetensors", "state.json", "config.json")
    files = [*(newest / name for name in names), folder / "run" / "metrics.jsonl"]
    files.append(folder / "run" / "dictionary" / "model.safetensors")
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files}


def prepare_work(folder: Path) -> None:
    """Tokens of some text, with a tokenizer that is trained on it."""
    text = folder.parent / "text"
    text.mkdir(exist_ok=True)
    for number in range(30):
        words = [f"w{(number * 7 + i * i) % 97}" for i in range(200)]
        (text / f"{number:02}.txt").write_text(" ".join(words))
    prepare_tokens(str(text), vocab_size=270, sequence_length=S, folder=folder)


def prepare_results(folder: Path) -> dict[str, bytes]:
    """What must be equal of prepared tokens."""
    found = (path for path in folder.rglob("*") if path.is_file() and "MANIFEST" not in path.name)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def subject_work(folder: Path) -> None:
    """A subject, trained."""
    train_subject(SUBJECT, blocks(96, 1), blocks(24, 2), folder=folder, quiet=True)


def subject_results(folder: Path) -> dict[str, bytes]:
    """What must be equal of a subject: weights of every checkpoint, and losses."""
    found = {path.parent.name: path.read_bytes() for path in folder.rglob("model.safetensors")}
    return found | {"losses": json.dumps(json.loads((folder / "run.json").read_text())["checkpoints"]).encode()}


def cell_work(folder: Path) -> None:
    """A cell of a study, measured on a store."""
    for name, one in (("train", blocks(96, 1)), ("held_out", blocks(80, 2))):
        write_shards(harvester(), one, folder / name)
    budget = DictionaryBudget(n_features=24, k_crosscoder=4, k_layerwise=3, steps=STEPS, batch=64)
    cell = Cell(subject="S", state="trained", site="residual", arm="crosscoder", role="main", budget=budget)
    measure = partial(cell.measure, Stores(folder / "train", folder / "held_out"), folder)
    (folder / "cells").mkdir(exist_ok=True)
    if not (folder / "cells" / "one.json").is_file():
        _keep(measure, folder / "cells" / "one.json", folder / "unfinished" / cell.name)


def cell_results(folder: Path) -> dict[str, bytes]:
    """What must be equal of a cell: its rows."""
    return {"rows": (folder / "cells" / "one.json").read_bytes()}


ARMS, SELECTIONS, SOURCES = ("crosscoder", "layerwise"), ("topk", "batch_topk"), ("live", "store")
CELLS = {" ".join(parts): partial(train_cell, *parts) for parts in itertools.product(ARMS, SELECTIONS, SOURCES)}
SCENARIOS = {
    "refill": (CELLS["crosscoder batch_topk live"], train_results),
    "shard": (CELLS["crosscoder batch_topk store"], train_results),
    "prepare": (prepare_work, prepare_results),
    "subject": (subject_work, subject_results),
    "cell": (cell_work, cell_results),
}
"""By the first word of a point that it reaches; any other is reached by the first."""


def begin(work: Work, folder: Path, *, failpoint: str = "") -> int:
    """The process id of a child that does the work; it ends with status 0, 75 where it was stopped, or 1."""
    if pid := os.fork():
        return pid
    status = 1
    with (folder.parent / "log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            with signals.watching(exits=True):
                arm(failpoint)
                work(folder)
            status = 0
        except signals.Stopped:
            status = signals.STOPPED
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)


def status_of(pid: int) -> int:
    """How a child ended; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def whole(work: Work, folder: Path) -> float:
    """Runs undisturbed; the seconds that took."""
    started = time.monotonic()
    status = status_of(begin(work, folder))
    if status != 0:
        raise RuntimeError(f"{folder.name} ended with status {status}; its log:\n{(folder.parent / 'log').read_text()}")
    return time.monotonic() - started


def leftovers(folder: Path) -> list[str]:
    """What a run that ended must not leave."""
    names = (".tmp-", ".old-", ".part-", ".lock", "unfinished")
    return [path.name for path in folder.rglob("*") if path.name.startswith(names) and any_file(path)]


def any_file(path: Path) -> bool:
    """A file, or a folder that holds one."""
    return path.is_file() or any(one.is_file() for one in path.rglob("*"))


def differences(folder: Path, expected: dict[str, bytes], results: Callable[[Path], dict[str, bytes]]) -> list[str]:
    """What a run that ended has otherwise than the undisturbed one."""
    found = results(folder)
    names = sorted(found.keys() | expected.keys())
    return [name for name in names if found.get(name) != expected.get(name)] + leftovers(folder)


def soak(name: str, work: Work, home: Path, n_kills: int, seed: int) -> dict[str, Any]:
    """One cell, killed so many times."""
    rng = random.Random(f"{seed} {name}")
    seconds = whole(work, home / "whole")
    expected = train_results(home / "whole")
    found: dict[str, Any] = {"cell": name, "kills": 0, "stops": 0, "runs": 0, "resumed_at": [], "different": []}
    while found["kills"] + found["stops"] < n_kills:
        folder = home / f"run-{found['runs']}"
        while True:
            pid = begin(work, folder)
            time.sleep(rng.random() * seconds)
            is_term = (found["kills"] + found["stops"]) % TERM_EVERY == TERM_EVERY - 1
            os.kill(pid, signal.SIGTERM if is_term else signal.SIGKILL)
            status = status_of(pid)
            found["kills"] += status in (-signal.SIGKILL, -signal.SIGTERM)  # the latter before it watches
            found["stops"] += status == signals.STOPPED
            if status == 0:
                break
            if status not in (-signal.SIGKILL, -signal.SIGTERM, signals.STOPPED):
                raise RuntimeError(f"{name} ended with {status}; its log:\n{(home / 'log').read_text()[-3000:]}")
            steps = [int(path.name[5:]) for path in folder.glob("run/checkpoints/step-*")]
            found["resumed_at"].append(max(steps, default=0))
            if found["kills"] + found["stops"] >= n_kills:
                whole(work, folder)
                break
        found["runs"] += 1
        found["different"] += differences(folder, expected, train_results)
        shutil.rmtree(folder)
    return found


def at_failpoints(home: Path) -> dict[str, Any]:
    """What differed after a run that was killed at a named point went on, by point; those not reached are missing."""
    found: dict[str, Any] = {}
    for kind, (work, results) in SCENARIOS.items():
        place = home / kind
        place.mkdir(parents=True)
        whole(work, place / "whole")
        expected = results(place / "whole")
        for point in (name for name in POINTS if kind_of(name) == kind):
            folder = place / point
            if point == "save.replace":  # something has to be there
                whole(work, folder)
            status = status_of(begin(work, folder, failpoint=point))
            if status == 0:
                continue
            if status != -signal.SIGKILL:
                raise RuntimeError(f"{point} in {kind}: status {status}\n{(place / 'log').read_text()[-3000:]}")
            whole(work, folder)
            found[point] = {"in": kind, "different": differences(folder, expected, results)}
    return found


def kind_of(point: str) -> str:
    """The scenario that reaches a point."""
    first = point.split(".")[0]
    return first if first in SCENARIOS else next(iter(SCENARIOS))


def warm() -> None:
    """Import what is imported late, so that no child has to."""
    shard_files.KEEP_SECONDS = 0.0  # a part of a shard is kept after each call of the model
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("shard", "prepare", "subject", "cell"):
            SCENARIOS[kind][0](Path(folder) / kind)


def main() -> int:
    """Runs what is asked for, writes it down, and fails if anything was different."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each cell; 0 leaves the cells out")
    parser.add_argument("--cells", nargs="*", default=list(CELLS), help="by default all eight")
    parser.add_argument("--failpoints", action="store_true", help="also kill once at every named point")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warm()
    found: dict[str, Any] = {"kills": given.kills, "seed": given.seed, "cells": [], "failpoints": {}}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        for name in given.cells if given.kills else ():
            home = Path(root) / name.replace(" ", "-")
            home.mkdir()
            found["cells"].append(soak(name, CELLS[name], home, given.kills, given.seed))
            print(json.dumps(found["cells"][-1]), flush=True)
            write(found, given.out, started)
        if given.failpoints:
            found["failpoints"] = at_failpoints(Path(root) / "failpoints")
    write(found, given.out, started)
    print(json.dumps(found["failpoints"]))
    bad = [one for one in (*found["cells"], *found["failpoints"].values()) if one["different"]]
    missing = set(POINTS) - set(found["failpoints"]) if given.failpoints else set()
    print(f"{len(bad)} different, {len(missing)} points not reached {sorted(missing)}")
    return int(bool(bad or missing))


def write(found: dict[str, Any], out: Path | None, started: float) -> None:
    """Keep what is known so far."""
    run = describe_run()
    found |= {"seconds": round(time.monotonic() - started), "device": run["device"], "versions": run["versions"]}
    if out is not None:
        out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        out.with_suffix(".md").write_text(page(found))


def page(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["# Killed at random moments", "", str(__doc__).split("\n\n")[1].replace("\n", " "), ""]
    lines += table(["cell", "SIGKILL", "SIGTERM", "runs compared", "median step gone on from", "different"])
    for one in found["cells"]:
        at = sorted(one["resumed_at"]) or ["-"]
        cells = [one["cell"], one["kills"], one["stops"], one["runs"], at[len(at) // 2]]
        lines += row([*cells, ", ".join(one["different"]) or "nothing"])
    if found["failpoints"]:
        lines += ["", "Killed once at each named point:", "", *table(["point", "what had happened", "different"])]
        for name, one in found["failpoints"].items():
            lines += row([name, POINTS[name], ", ".join(one["different"]) or "nothing"])
    return "\n".join([*lines, "", f"{found['seconds']} s on {found['device']['cpu']}, one thread.", ""])


def table(heads: list[str]) -> list[str]:
    """The first lines of a table."""
    return [*row(heads), "|---" * len(heads) + "|"]


def row(cells: list[Any]) -> list[str]:
    """One line of a table."""
    return [f"| {' | '.join(map(str, cells))} |"]


if __name__ == "__main__":
    sys.exit(main())
