"""The load ratio of two subjects and of their Gaussian null, by how long dictionaries train.

A null is compared with a model at equal variance unexplained, both by dictionaries of as many steps. Whether that
comparison depends on the steps is asked here, of one training of A and of B of a finished study, whose folder holds
their checkpoints and tokens. Parts are kept in the work folder; stopped, it goes on where it was.

    python scripts/null_curve.py runs/controls-31c804b11a --steps 350 1000 2000
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_common import describe_machine, machine_line, markdown_table, number

from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.sources import SiteSource
from crosscoder.data.subject_training import load_checkpoint
from crosscoder.data.tokens import PreparedTokens
from crosscoder.foundation.artifact import read_json, write_json
from crosscoder.measure.counting import binary_entropy
from crosscoder.measure.fidelity import TARGETS, SweepPoint, read_at
from crosscoder.measure.reading import read_dictionary
from crosscoder.results.file import load_results
from crosscoder.studies.cells import fit_many, marked, null_source
from crosscoder.studies.folder import harvest_into
from crosscoder.studies.presets import PRESETS
from crosscoder.studies.stores import Stores

FACTORS = {"trained": (0.25, 0.5, 1.0, 2.0, 4.0), "gaussian": (2.0, 4.0, 8.0, 16.0, 30.0)}
"""k as multiples of the main one; with nothing to find a Gaussian needs more for the same fidelity."""


def checkpoint_of(study: Path, side: str, training: int) -> Path:
    """The checkpoint that the study read."""
    (wanted,) = load_results(study).rows.values("training_tokens", subject=side, training_seed=training, role=None)
    home = study / "subjects" / f"{side}{training}"
    run = read_json(home / "run.json")
    return home / next(one["folder"] for one in run["checkpoints"] if one["tokens"] == wanted)


def activations(study: Path, side: str, training: int, work: Path) -> SiteSource:
    """What the blocks of a subject write, harvested once."""
    config = PRESETS["controls"]
    stores = Stores(work / f"{side}{training}" / "train", work / f"{side}{training}" / "held_out")
    harvester = ResidualHarvester(load_checkpoint(checkpoint_of(study, side, training), device="cpu"))
    most = config.tokens_train, config.tokens_held_out
    harvest_into(stores, harvester, PreparedTokens.load(study / "tokens"), most)
    return stores.source("write", "cpu")


def sweep(source: SiteSource, side: str, state: str, steps: int) -> list[list[float]]:
    """k, variance unexplained and load of the crosscoders of one state and length of training."""
    config = PRESETS["controls"]
    shape = config.subjects.shapes()[side]
    budget = replace(shape.budget(config.dictionaries), steps=steps)
    ks = sorted({max(1, round(factor * budget.k_crosscoder)) for factor in FACTORS[state]})
    ks = [k for k in ks if k < budget.n_features]
    read = null_source(state, source)  # ty: ignore[invalid-argument-type]
    found = fit_many("crosscoder", read, [(replace(budget, k_crosscoder=k), 0) for k in ks])
    points = []
    for k, dictionary in zip(ks, found, strict=True):
        reading = read_dictionary(dictionary, marked(read, "cpu"))
        points.append([k, 1 - reading.explained_variance, float(binary_entropy(reading.probability_F).sum())])
    return points


def log_load(points: Sequence[Sequence[float]]) -> float | str:
    """ln load at the targets of variance unexplained, as a study reads it."""
    swept = [SweepPoint(k=k, fidelity=fvu, quantity=load) for k, fvu, load in points]
    found = [read_at(swept, target) for target in TARGETS["fvu"]]
    values = [one.value for one in found if not isinstance(one, str)]
    if len(values) < len(found):
        return next(one for one in found if isinstance(one, str))
    return math.fsum(map(math.log, values)) / len(values)


def page(record: dict[str, Any]) -> list[str]:
    """The table: loads of A and B and their ratio, by state and steps."""
    rows = []
    for state in FACTORS:
        for steps in record["steps"]:
            logs = {side: log_load(record["points"][f"{side}-{state}-{steps}"]) for side in "AB"}
            loads = [number(math.exp(one), ".4g") if not isinstance(one, str) else "not read" for one in logs.values()]
            known = [one for one in logs.values() if not isinstance(one, str)]
            ratio = number(math.exp(known[1] - known[0]), ".3f") if len(known) == len(logs) else "; ".join(
                one for one in logs.values() if isinstance(one, str)
            )  # fmt: skip
            rows.append([state, f"{steps:,}", *loads, ratio])
    return markdown_table(["state", "steps", "load of A, nats", "load of B, nats", "B over A"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not there yet, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of a finished study of preset `controls`, with its subjects")
    parser.add_argument("--steps", type=int, nargs="+", default=[350, 1000, 2000])
    parser.add_argument("--training", type=int, default=0, help="position of the training seed")
    parser.add_argument("--work", type=Path, default=Path("runs/null-curve"), help="folder of the parts")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/null-curve"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    work = given.work / given.study.name  # whose name tells studies of other settings apart
    points: dict[str, list[list[float]]] = {}
    for steps in given.steps:
        for side in "AB":
            source = None
            for state in FACTORS:
                path = work / f"{side}{given.training}-{state}-{steps}.json"
                if not path.is_file():
                    source = source or activations(given.study, side, given.training, work)
                    write_json(path, {"points": sweep(source, side, state, steps)})
                points[f"{side}-{state}-{steps}"] = read_json(path)["points"]
                print(path.stem, log_load(points[f"{side}-{state}-{steps}"]), flush=True)
    record = {"machine": {**describe_machine("cpu", 1), "command": None}, "steps": given.steps, "points": points}
    given.out.mkdir(parents=True, exist_ok=True)
    write_json(given.out / "results.json", record)
    lines = ["# Load ratios by how long dictionaries train", "", machine_line(record["machine"]), "", *page(record)]
    (given.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(page(record)))


if __name__ == "__main__":
    main()
