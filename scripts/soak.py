"""Kill it at any moment: runs that are killed again and again end with the bytes of one that nobody touched.

Every cell of {crosscoder, bank} x {TopK, BatchTopK} x {live, store} x {1, 2 ranks} trains a small dictionary, from a
store or from a stream. A cell is run once undisturbed; then it is killed (SIGKILL, every fourth time SIGTERM) at random
moments and started again until it ends, and again from nothing, until it has been killed `--kills` times. Weights,
moments, state and metrics must be equal to the bit, and nothing may be left over. One rank harvests its store first,
and is killed there too. Of two ranks (`--ranks 2`; crosscoders divided by features, banks by layers) one is killed,
every other time both; one that is left must end by itself, for it lost the other. SIGTERM goes to one of them, and both
must stop after the same step, with one checkpoint and status 75. With `--failpoints` a run is also killed once at every
named point of `foundation/failpoints.py`, in each rank. Processes are forked from one that has imported everything; on
a system without fork this does not run.

$ python scripts/soak.py --kills 50 --failpoints --out benchmarks/soak
$ python scripts/soak.py --kills 50 --failpoints --ranks 2 --merge --out benchmarks/soak
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from soak_work import CELLS, DONE, SCENARIOS, TRAINING, Work, kind_of, train_results

from crosscoder.data import shard_files
from crosscoder.foundation import ranks, signals
from crosscoder.foundation.failpoints import POINTS, arm
from crosscoder.foundation.provenance import describe_run

TERM_EVERY, BOTH_EVERY = 4, 2
LOST = 3
"""How a rank ends that lost the other."""
BOUND_S = 90.0
"""How long a rank may stay when the other is gone; by itself it would wait for `ranks.TIMEOUT`."""
JOINED, STOPPED = "joined", "stopped"
KILLED = (-signal.SIGKILL, -signal.SIGTERM)  # the latter before it watches
_FORK, _NUMBER = multiprocessing.get_context("fork"), itertools.count()


@contextlib.contextmanager
def joined(home: Path, rank: int, size: int) -> Generator[ranks.Ranks]:
    """As `ranks.joined`, by way of a file, as nobody here is torchrun, whose store outlives every rank."""
    if size == 1:
        yield ranks.Ranks()
        return
    dist.init_process_group(
        "gloo", init_method=f"file://{home}/init", rank=rank, world_size=size, timeout=ranks.TIMEOUT
    )
    (home / f"{JOINED}-{rank}").touch()
    yield ranks.Ranks(dist.group.WORLD)
    dist.destroy_process_group()


def process(work: Work, folder: Path, rank: int, size: int, failpoint: str) -> None:
    """What a process does; it ends with status 0, 75 where it was stopped, 3 where it lost the other, or 1."""
    status = 1
    with (folder.parent / "log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        faulthandler.dump_traceback_later(BOUND_S - 5)  # where it stands
        try:
            with signals.watching(exits=True), joined(folder.parent, rank, size) as job:
                arm(failpoint)
                work(folder, job)
            status = 0
        except signals.Stopped as stop:
            (folder.parent / f"{STOPPED}-{rank}").write_text(str(stop))
            status = signals.STOPPED
        except ranks.LostRankError:
            status = LOST
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
    sys.exit(status)  # after its threads


class Run:
    """One start of a work: a process for each rank. Marks of an earlier one beside its folder are removed."""

    def __init__(self, work: Work, folder: Path, size: int = 1, *, failpoint: str = "", at: int = 0) -> None:
        self.folder, self.home, self.size = folder, folder.parent, size
        for name in ("init", TRAINING, f"{JOINED}-*", f"{DONE}-*", f"{STOPPED}-*"):
            for mark in self.home.glob(name):
                mark.unlink()
        points = [failpoint if rank == at else "" for rank in range(size)]
        given = [(work, folder, rank, size, point) for rank, point in enumerate(points)]
        self.processes = [_FORK.Process(target=process, args=one) for one in given]
        for one in self.processes:
            one.start()

    def marked(self, name: str) -> int:
        """How many ranks have made a mark."""
        return len(list(self.home.glob(f"{name}-*")))

    def await_joined(self) -> float:
        """When all ranks are one job; before that it is torchrun who ends those that are left."""
        while self.size > 1 and self.marked(JOINED) < self.size and all(one.is_alive() for one in self.processes):
            time.sleep(0.002)
        return time.monotonic()

    def ended(self) -> list[int]:
        """How each rank ended, minus the signal that ended it; a RuntimeError where one stays, or failed."""
        deadline = time.monotonic() + BOUND_S
        for one in self.processes:
            one.join(max(0.0, deadline - time.monotonic()))
        stay = [rank for rank, one in enumerate(self.processes) if one.exitcode is None]
        for one in self.processes:
            one.kill()
            one.join()
        found = [int(one.exitcode or 0) for one in self.processes]
        if stay or not set(found) <= {0, LOST, signals.STOPPED, *KILLED}:
            said = f"ranks {stay} of {self.size} stay" if stay else f"ended with {found}"
            raise RuntimeError(f"{self.folder}: {said}; the log:\n{(self.home / 'log').read_text()[-9000:]}")
        return found

    def fault(self, found: list[int], *, is_stop: bool) -> str:
        """What is wrong with how the ranks ended; empty if nothing is.

        is_stop: all were among their steps when one was asked to stop.
        """
        gone = [one for one in found if one in (*KILLED, signals.STOPPED)]
        if LOST in found and not gone:
            return f"ended with {found}, and none was gone"
        if is_stop and not self.marked(DONE):
            said = [path.read_text() for path in sorted(self.home.glob(f"{STOPPED}-*"))]
            steps = {int(step) for one in said for step in re.findall(r"(?:after |/step-)(\d+)\b", one)}
            if found != [signals.STOPPED] * self.size or steps != {newest(self.folder)}:
                return f"SIGTERM: ended with {found}, said {said}"
        return ""


def newest(folder: Path) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    return max((int(path.name[5:]) for path in folder.glob("run/checkpoints/step-*")), default=0)


def whole(work: Work, folder: Path, size: int = 1) -> float:
    """Runs undisturbed; the seconds that took."""
    run = Run(work, folder, size)
    started = run.await_joined()
    if any(found := run.ended()):
        raise RuntimeError(f"{folder.name} ended with {found}; its log:\n{(folder.parent / 'log').read_text()}")
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


def soak(name: str, size: int, home: Path, n_kills: int, seed: int) -> dict[str, Any]:
    """One cell, killed so many times."""
    work, rng = CELLS[name], random.Random(f"{seed} {name}" if size == 1 else f"{seed} {name} {size}")
    seconds = whole(work, home / "whole", size)
    expected = train_results(home / "whole")
    found: dict[str, Any] = {"cell": name, "ranks": size, "kills": 0, "stops": 0, "runs": 0, "lost": 0, "lost_s": 0.0}
    found |= {"resumed_at": [], "different": []}
    while (number := found["kills"] + found["stops"]) < n_kills:
        folder = home / f"run-{found['runs']}"
        while True:
            run = Run(work, folder, size)
            run.await_joined()
            time.sleep(rng.random() * seconds)
            ended = hit(run, number, rng, found)
            if not any(ended):
                break
            found["kills"] += any(one in KILLED for one in ended)
            found["stops"] += signals.STOPPED in ended
            found["resumed_at"].append(newest(folder))
            if (number := found["kills"] + found["stops"]) >= n_kills:
                whole(work, folder, size)
                break
        found["runs"] += 1
        found["different"] += differences(folder, expected, train_results)
        shutil.rmtree(folder)
    return found


def hit(run: Run, number: int, rng: random.Random, found: dict[str, Any]) -> list[int]:
    """Kill or stop a run for the so manieth time; how its ranks ended, and in `found` what is wrong with that."""
    is_term = number % TERM_EVERY == TERM_EVERY - 1
    is_both = not is_term and number % BOTH_EVERY == BOTH_EVERY - 1
    chosen = run.processes if run.size == 1 or is_both else [rng.choice(run.processes)]
    is_stop = is_term and run.size > 1 and (run.home / TRAINING).exists()
    at = time.monotonic()
    for one in chosen:
        os.kill(int(one.pid or 0), signal.SIGTERM if is_term else signal.SIGKILL)
    ended = run.ended()
    if LOST in ended:
        found["lost"] += 1
        found["lost_s"] = max(found["lost_s"], round(time.monotonic() - at, 2))
    if fault := run.fault(ended, is_stop=is_stop):
        found["different"].append(fault)
    return ended


def at_failpoints(home: Path, size: int, points: Sequence[str]) -> dict[str, Any]:
    """What differed after a run that was killed at a named point went on, by point; those not reached are missing.

    Of ranks each is killed, in what they do together.
    """
    found: dict[str, Any] = {}
    for kind, (work, results) in list(SCENARIOS.items())[: None if size == 1 else 1]:
        place = home / kind
        place.mkdir(parents=True)
        whole(work, place / "whole", size)
        expected = results(place / "whole")
        for rank, point in itertools.product(range(size), (name for name in points if kind_of(name) == kind)):
            name = point if size == 1 else f"{point} in rank {rank} of {size}"
            folder = place / name.replace(" ", "-")
            if point == "save.replace":  # something has to be there
                whole(work, folder, size)
            run = Run(work, folder, size, failpoint=point, at=rank)
            if not any(ended := run.ended()):
                continue
            fault = run.fault(ended, is_stop=False) or ("" if ended[rank] == -signal.SIGKILL else f"ended with {ended}")
            whole(work, folder, size)
            different = differences(folder, expected, results) + [fault] * bool(fault)
            found[name] = {"in": kind, "different": different}
    return found


def warm(kinds: Sequence[str]) -> None:
    """Import what is imported late, so that no child has to."""
    shard_files.KEEP_SECONDS = 0.0  # a part of a shard is kept after each call of the model
    ranks.JOIN_TIMEOUT = timedelta(seconds=10)  # instead of a minute; the ranks of one machine are made at once
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            (Path(folder) / kind).mkdir()
            SCENARIOS[kind][0](Path(folder) / kind / "run", ranks.Ranks())


def main() -> int:
    """Runs what is asked for, writes it down, and fails if anything was different."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each cell; 0 leaves the cells out")
    parser.add_argument("--cells", nargs="*", default=list(CELLS), help="by default all eight")
    parser.add_argument("--ranks", type=int, default=1, help="processes that divide each dictionary")
    parser.add_argument("--failpoints", nargs="*", help="also kill once at these named points, by default at every one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    parser.add_argument("--merge", action="store_true", help="keep what OUT.json holds, but for what is done again")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warm(("shard", "prepare", "subject", "cell") if given.ranks == 1 else ("shard",))
    before: dict[str, Any] = {"cells": [], "failpoints": {}, "made": []}
    if given.merge and given.out.with_suffix(".json").is_file():
        before = json.loads(given.out.with_suffix(".json").read_text())
    cells, points, started = list[dict[str, Any]](), dict[str, Any](), time.monotonic()

    def keep() -> None:
        if given.out is not None:
            made = made_by(given.ranks, given.kills, given.seed, time.monotonic() - started)
            found = merged(before, cells, points, made)
            given.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
            given.out.with_suffix(".md").write_text(page(found))

    with tempfile.TemporaryDirectory() as root:
        for name in given.cells if given.kills else ():
            home = Path(root) / name.replace(" ", "-")
            home.mkdir()
            cells.append(soak(name, given.ranks, home, given.kills, given.seed))
            print(json.dumps(cells[-1]), flush=True)
            keep()
        if asked := given.failpoints is not None and (given.failpoints or list(POINTS)):
            points = at_failpoints(Path(root) / "failpoints", given.ranks, asked)
    keep()
    print(json.dumps(points))
    bad = [one for one in (*cells, *points.values()) if one["different"]]
    missing = set(asked or ()) - {name.split()[0] for name in points} if given.ranks == 1 else set()
    print(f"{len(bad)} different, {len(missing)} points not reached {sorted(missing)}")
    return int(bool(bad or missing))


def made_by(size: int, kills: int, seed: int, seconds: float) -> dict[str, Any]:
    """How and where something was found."""
    run = describe_run()
    made = {"ranks": size, "kills": kills, "seed": seed, "device": run["device"], "versions": run["versions"]}
    return {**made, "seconds": round(seconds)}


def merged(before: dict[str, Any], cells: Sequence[Any], points: dict[str, Any], made: Any) -> dict[str, Any]:
    """What was known and what was found, in the place of what was known of the same."""
    own = {(one["cell"], one["ranks"]) for one in cells}
    kept = [one for one in before["cells"] if (one["cell"], one["ranks"]) not in own]
    others = [one for one in before["made"] if {**one, "seconds": made["seconds"]} != made]
    seconds = made["seconds"] + sum(one["seconds"] for one in before["made"] if one not in others)
    made = [*others, {**made, "seconds": seconds}]
    return {"cells": [*kept, *cells], "failpoints": before["failpoints"] | points, "made": made}


def page(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["# Killed at random moments", "", str(__doc__).split("\n\n")[1].replace("\n", " "), ""]
    heads = ["cell", "ranks", "SIGKILL", "SIGTERM", "runs compared", "median step gone on from", "different"]
    lines += table([*heads[:4], "ended, the other gone", "within at most", *heads[4:]])
    for one in found["cells"]:
        at, lost = sorted(one["resumed_at"]) or ["-"], ["", ""]
        if one["ranks"] > 1:
            lost = [one["lost"], f"{one['lost_s']} s"]
        cells = [one["cell"], one["ranks"], one["kills"], one["stops"], *lost, one["runs"], at[len(at) // 2]]
        lines += row([*cells, ", ".join(one["different"]) or "nothing"])
    if found["failpoints"]:
        lines += ["", "Killed once at each named point:", "", *table(["point", "what had happened", "different"])]
        for name, one in found["failpoints"].items():
            lines += row([name, POINTS[name.split()[0]], ", ".join(one["different"]) or "nothing"])
    for one in found["made"]:
        of = "1 rank" if one["ranks"] == 1 else f"{one['ranks']} ranks"
        lines += [
            "",
            f"{of}: {one['seconds']} s on {one['device']['cpu']}, one thread each. {one.get('note', '')}".strip(),
        ]
    return "\n".join([*lines, ""])


def table(heads: list[str]) -> list[str]:
    """The first lines of a table."""
    return [*row(heads), "|---" * len(heads) + "|"]


def row(cells: list[Any]) -> list[str]:
    """One line of a table."""
    return [f"| {' | '.join(map(str, cells))} |"]


if __name__ == "__main__":
    sys.exit(main())
