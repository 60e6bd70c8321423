"""Operating points of the rule: planted pairs of known truth through a study's instruments, and through the rule.

Parts that are in the work folder are not run again, so it may be stopped; give it again with the same settings. A study
of five trainings takes about two minutes of a core, the simulated studies of a plant a quarter of one.

    python scripts/operating_points.py --short
    python scripts/operating_points.py --only H0 --only H1a
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_common import describe_machine
from operating_plants import PLANTS, TRAINED
from operating_points_page import write_page
from operating_record import calibration_rows, study_record
from operating_rule import RuleConfig, instruments_of, measure_rule, pooled_spread
from operating_studies import InstrumentConfig, measure_study
from operating_worlds import Plant, WorldSizes, as_trained

from crosscoder.foundation.artifact import write_json
from crosscoder.foundation.config import to_mapping
from crosscoder.results.file import read_rows, write_rows
from crosscoder.results.table import LongTable, Place, Row

GAMMAS = (0.5, 0.0, 1.0)
"""Of calibration pairs; the first is a study's own, and its errors are the gates'."""
SHORT = RuleConfig(
    instruments=InstrumentConfig(sizes=WorldSizes(d_model=16), trainings=3, steps=60, batch=256, held_out=4096),
    studies=20,
    draws=4,
)


def file_stem(name: str) -> str:
    """A part's name as files have it."""
    return name.replace(" ", "_").replace(",", "")


def part(work: Path, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """A part's result, made once and kept in the work folder with the seconds of a core that it took."""
    path = work / f"{file_stem(name)}.json"
    if not path.is_file():
        start = time.process_time()
        found = dict(make())
        found["cpu_seconds"] = round(time.process_time() - start, 1)
        work.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
        print(f"{name}: {found.get('label_of_legs', '')} {found['cpu_seconds']} s of a core", flush=True)
    return json.loads(path.read_text())


def calibrate(config: InstrumentConfig, gamma: float) -> dict[str, Any]:
    """The errors of one calibration pair."""
    return {"rows": [[row.key, row.value] for row in calibration_rows(config, gamma, world=100)]}


def train(plants: Sequence[Plant], config: InstrumentConfig, work: Path) -> dict[str, dict[str, Any]]:
    """The record of a study with trained dictionaries of each plant, by name.

    Its rows are kept, so that a rule that has moved judges them again; truths are drawn again too.
    """
    first = part(work, f"calibration-{GAMMAS[0]}", lambda: calibrate(config, GAMMAS[0]))
    calibration = [Row(Place(role="calibration", seed=100), key, value) for key, value in first["rows"]]
    found = {}
    for plant in plants:
        own = replace(config, trainings=min(config.trainings, plant.trainings))
        path, start = work / f"rows-{file_stem(plant.name)}.json", time.process_time()
        if not path.is_file():
            work.mkdir(parents=True, exist_ok=True)
            write_rows(path, measure_study(as_trained(plant), own, world=0))
            write_json(path.with_suffix(".seconds"), round(time.process_time() - start, 1))
        found[plant.name] = study_record(plant, own, LongTable((*read_rows(path), *calibration)), world=0)
        found[plant.name]["cpu_seconds"] = json.loads(path.with_suffix(".seconds").read_text())
        print(f"{plant.name}: {found[plant.name]['label_of_legs']}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts that are not there yet, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        help="name of a plant; may be given again; the other calibration pairs are then left out",
    )
    parser.add_argument("--studies", type=int, default=RuleConfig().studies, help="simulated studies of a plant")
    parser.add_argument("--work", type=Path, default=Path("runs/operating-points"), help="folder of the parts")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/operating-points"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config = SHORT if given.short else replace(RuleConfig(), studies=given.studies)
    plants = [plant for plant in PLANTS if not given.only or plant.name in given.only]
    if unknown := set(given.only) - {plant.name for plant in PLANTS}:
        parser.error(f"no plant is called {', '.join(sorted(unknown))}")
    needed = {instruments_of(plant) for plant in plants}
    work = given.work / ("short" if given.short else "full")
    records = train([plant for plant in TRAINED if plant.name in needed], config.instruments, work)
    gammas = GAMMAS[:1] if given.only else GAMMAS
    calibration = {f"{g:g}": part(work, f"calibration-{g}", lambda g=g: calibrate(config.instruments, g))["rows"]
                   for g in gammas}  # fmt: skip
    spread = pooled_spread(list(records.values()))
    rules = [measure_rule(plant, records[instruments_of(plant)], spread, config) for plant in plants]
    record = {
        "machine": {**describe_machine("cpu", 1), "command": None},  # it names places here
        "config": to_mapping(config),
        "plants": [to_mapping(plant) for plant in plants],
        "calibration": calibration,
        "studies": list(records.values()),
        "rule": rules,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    write_json(given.out / "results.json", record)
    write_page(given.out, record)


if __name__ == "__main__":
    main()
