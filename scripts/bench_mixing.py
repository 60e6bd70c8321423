"""How many tokens batches must mix: dictionaries of one store, trained in orders of different windows.

Reads a study's folder, as `crosscoder compare` leaves it: crosscoders on what the blocks of subject A write, untrained
and trained, at the study's own settings.

    python scripts/bench_mixing.py runs/quick-1234567890
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_common import describe_machine, machine_line, markdown_table, write_report

from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.shards import ActivationShards, write_shards
from crosscoder.data.sources import SiteSource
from crosscoder.data.subject_training import SubjectRun
from crosscoder.data.tokens import PreparedTokens
from crosscoder.measure.reading import read_dictionary
from crosscoder.results.file import load_results
from crosscoder.studies.cells import fit_many, marked
from crosscoder.studies.presets import PRESETS

PREDICTION = (
    "Written before this table, after runs in which 16,384 tokens were shuffled, used up, and followed by the next "
    "(untrained: .55 of variance explained, .51 dead; all tokens shuffled: .593 and .20): a moving window of 16,384 "
    "lies between, 98,304 within .01 of explained variance and .08 of dead share of all tokens; trained, no difference "
    "beyond that of seeds."
)


def measure(study: Path, windows: list[int], seeds: list[int], work: Path) -> list[dict[str, Any]]:
    """Explained variance and dead share of every window and seed."""
    config, tokens = PRESETS[load_results(study).provenance.preset], PreparedTokens.load(study / "tokens")
    run, found = SubjectRun.load(study / "subjects" / "A0"), []
    for state, index in (("untrained", 0), ("trained", len(run.checkpoints) - 1)):
        harvester = ResidualHarvester(run.load_model(index))
        most = {"train": config.tokens_train, "held_out": config.tokens_held_out}
        for split, blocks in (("train", tokens.train), ("held_out", tokens.held_out)):
            write_shards(harvester, blocks, work / state / split, max_tokens=most[split])
        held_out = ActivationShards.load(work / state / "held_out")
        for window in windows:
            train = ActivationShards.load(work / state / "train", window_tokens=window)
            source = SiteSource(train, held_out, "write")
            for seed in seeds:
                plan = config.subjects.a.budget(config.dictionaries), seed
                (dictionary,) = fit_many("crosscoder", source, [plan])
                reading = read_dictionary(dictionary, marked(source, "cpu"))
                one = {"state": state, "window": window, "tokens": train.n_tokens, "seed": seed}
                found.append(one | {"explained": reading.explained_variance, "dead": reading.dead_share})
                print(found[-1], flush=True)
    return found


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--windows", type=int, nargs="+", default=[16_384, 49_152, 98_304, 10**9])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        found = measure(given.study, given.windows, given.seeds, Path(work))
    rows = []
    for state in ("untrained", "trained"):
        for window in given.windows:
            here = [one for one in found if (one["state"], one["window"]) == (state, window)]
            words = "all" if window >= here[0]["tokens"] else f"{window:,}"
            row = [state, f"{words} of {here[0]['tokens']:,}"]
            for key in ("explained", "dead"):
                values = [one[key] for one in here]
                row.append(f"{statistics.mean(values):.4f} [{min(values):.4f}, {max(values):.4f}]")
            rows.append(row)
    machine = {**describe_machine("cpu", 1), "command": None}
    header = ["subject A, block writes", "tokens mixed", "explained variance", "dead share"]
    lines = ["# How many tokens batches must mix", "", PREDICTION, "", *markdown_table(header, rows), ""]
    lines += [f"Means with the range over {len(given.seeds)} seeds of the dictionary.", "", machine_line(machine)]
    write_report(given.out, "mixing", lines, {"prediction": PREDICTION, "found": found, "machine": machine})


if __name__ == "__main__":
    main()
