"""The `crosscoder` command: prepare, train-subject, harvest, train, evaluate, compare, synthetic, report.

Every command takes `--help`, `--print-config` (the resolved settings as JSON, then stop) and `--dry-run` (what it
would need, then stop). Wiring only: the work is done by the library.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from crosscoder.foundation.console import say
from crosscoder.studies.budget import Bank, DictionaryBudget, WholeStructure

EXIT_BAD_INPUT = 2


@dataclass(frozen=True, kw_only=True)
class Common:
    """Flags that every command has."""

    print_config: bool = False
    """Print the resolved settings as JSON and stop."""
    dry_run: bool = False
    """Print parameters, bytes of weights, optimiser, buffers and disk, and stop before any work."""


@dataclass(frozen=True, kw_only=True)
class Prepare(Common):
    """Text to token blocks: split by document, tokenise, pack, and keep as Arrow with a fingerprint.

    Example: crosscoder prepare --text sotu --vocab-size 512 --out runs/tokens
    """

    out: Path
    """Folder to write: train/, held_out/, tokenizer/."""
    text: str = "sotu"
    """`sotu`, a .txt file, a folder of them, a folder made by save_to_disk, or a data set on the Hub."""
    subject: str | None = None
    """Use this model's own tokenizer instead of training one."""
    vocab_size: int = 512
    """Vocabulary of the trained tokenizer."""
    context: int = 128
    """Tokens in a block."""
    held_out_fraction: float = 0.05
    """Share of documents never trained on."""
    max_documents: int | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainSubject(Common):
    """Train a small Llama-style subject from scratch and keep its checkpoints as Hugging Face folders.

    Example: crosscoder train-subject --tokens-folder runs/tokens --n-layers 8 --d-model 64 --out runs/A
    """

    tokens_folder: Path
    """What `crosscoder prepare` wrote."""
    out: Path
    n_layers: int = 8
    d_model: int = 64
    tokens: int = 1_000_000
    """Training tokens."""
    batch: int = 16
    """Sequences a step."""
    learning_rate: float = 3e-3
    n_checkpoints: int = 20
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Harvest(Common):
    """Store a subject's residual stream: every chosen layer of every token, in hashed safetensors shards.

    Example: crosscoder harvest --subject runs/A/step-439 --tokens-folder runs/tokens --out runs/acts
    Example: crosscoder harvest --subject runs/A/step-439 --tokens-folder runs/tokens --reads mlp --out runs/mlps
    """

    subject: str
    """A Hugging Face folder, a name on the Hub, a .gguf file, or package:NAME for one inside a Python package."""
    tokens_folder: Path
    """What `crosscoder prepare` wrote, with the subject's own tokenizer."""
    out: Path
    """Folder to write: train/ and held_out/."""
    layers: tuple[int, ...] | None = None
    """Sites to read: 0 is the embedding, l the output of block l. Default: all."""
    reads: Literal["residual", "mlp"] = "residual"
    """The residual stream, or what the MLPs of these blocks are given and what they return, for a transcoder."""
    blocks_path: str | None = None
    """Where the decoder blocks are in the model, if they are not found by themselves, for example model.layers."""
    max_tokens: int = 250_000
    max_held_out_tokens: int = 50_000
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Train(Common):
    """Train one dictionary on stored activations; a killed run continues with --resume to the same bits.

    Example: crosscoder train --activations runs/acts --arm crosscoder --out runs/cc
    Example: crosscoder train --activations runs/acts --out runs/jump --budget.selection jumprelu
    Example: crosscoder train --activations runs/acts --out runs/nested --budget.prefixes 0.125 0.25 0.5
    Example: crosscoder train --activations runs/acts --out runs/causal --budget.structure weakly_causal
    Example: crosscoder train --activations runs/acts --out runs/mlsae --arm layerwise --budget.bank shared
    Example: crosscoder train --activations runs/mlps --out runs/clt --budget.structure transcoder
    """

    activations: Path
    """What `crosscoder harvest` wrote."""
    out: Path
    """Folder for metrics.jsonl, checkpoints/ and the finished dictionary/."""
    arm: Literal["crosscoder", "layerwise"] = "crosscoder"
    site: Literal["residual", "write"] = "residual"
    """The residual stream after each block, or what each block adds to it."""
    budget: DictionaryBudget = field(default_factory=DictionaryBudget)
    seed: int = 0
    checkpoint_every: int = 200
    resume: bool = False
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Evaluate(Common):
    """Measure a trained dictionary on held-out activations: explained variance, both L0, dead share, counts.

    Example: crosscoder evaluate --dictionary runs/cc/dictionary --activations runs/acts
    """

    dictionary: Path
    activations: Path
    site: Literal["residual", "write"] = "residual"
    out: Path | None = None
    """Write the numbers as JSON here too."""
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Compare(Common):
    """The main job: per-layer and cross-layer feature counts compared, with a report.

    Without --subject: small transformers of equal parameters and unequal shape are trained, matched by loss, and
    compared, trained and untrained; the report opens with the verdict of a rule that was fixed beforehand. With
    --subject: the two kinds of dictionary are compared on that model alone, beside the same model untrained
    and, on neighbouring layers, with its layers shuffled apart.

    Example: crosscoder compare --preset smoke
    Example: crosscoder compare --subject HuggingFaceTB/SmolLM2-135M --text my_texts/ --layers 10 11 12 13
    """

    preset: Literal["smoke", "quick", "full"] = "quick"
    """smoke: a minute, to see that all works. quick: under ten minutes on two cores. full: for one GPU."""
    subject: str | None = None
    """A Hugging Face folder, a name on the Hub, a .gguf file, or package:NAME for one inside a Python package."""
    text: str | None = None
    """`sotu` (the default), a text file or folder, a saved data set, or the name of one on the Hub."""
    layers: tuple[int, ...] | None = None
    """With --subject: neighbouring layers to read, 1 being the output of the first block. Default: all."""
    blocks_path: str | None = None
    """With --subject: where the decoder blocks are, if they are not found by themselves."""
    tokens: int | None = None
    """With --subject: tokens to train the dictionaries on."""
    seeds: tuple[int, ...] | None = None
    """Dictionary seeds. The debiased dimension compares two; stable features need three."""
    training_seeds: tuple[int, ...] | None = None
    """Without --subject: training seeds of every shape. With one there is no ceiling, and so no verdict."""
    joint: bool = False
    """Without --subject: also train crosscoders over two subjects at once, to see which features are one's alone."""
    steps: int | None = None
    """Training steps of each dictionary."""
    n_features: int | None = None
    """Features of the crosscoder and of each layer's SAE."""
    structure: WholeStructure | None = None
    """Which layers the crosscoder's features read and write: all, one and from it on, or `window` neighbours."""
    window: int | None = None
    """Layers of a window."""
    bank: Bank | None = None
    """How the bank's SAEs begin: independent, all alike, each from the trained one before it, or one shared by all."""
    part: tuple[int, int] = (0, 1)
    """Without --subject: `I N` does share I (from 0) of N of the work, for N machines on one disk. Every machine runs
    it twice, first for the subjects and then for the dictionaries; then one runs it without --part."""
    out: Path = Path("runs")
    """Studies go to a folder in here, named by preset and settings; the same study is continued, not repeated."""
    workers: int | None = None
    """Processes. Default: one a core on a CPU, one on a GPU."""
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Synthetic(Common):
    """The instruments against planted truth: every estimator on worlds whose features are known.

    Writes report.md, results.json and pictures.

    Example: crosscoder synthetic --preset ci
    """

    preset: Literal["ci", "quick", "full"] = "quick"
    """ci: under a minute, 64 features. quick: a few minutes on two cores, 256. full: five worlds, more sizes."""
    verdicts: int = 0
    """Seeds on which planted answers (R of 2, 1 and 1/2) go through the whole chain to the verdict; a few minutes each
    on one core."""
    out: Path = Path("runs")
    """The study goes to a folder in here, named by preset and settings."""
    workers: int | None = None
    """Processes. Default: one a core on a CPU, one on a GPU."""
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Report(Common):
    """Write a study's report again from its results.json.

    Example: crosscoder report runs/quick-0123456789
    """

    folder: tyro.conf.Positional[Path]
    """The study's folder."""


Command = Prepare | TrainSubject | Harvest | Train | Evaluate | Compare | Synthetic | Report


def run(command: Command) -> None:
    """Do one command."""
    from crosscoder import commands

    if command.print_config:
        print(json.dumps(commands.resolved_config(command), indent=2, sort_keys=True, default=str))
        return
    if command.dry_run:
        from crosscoder.needs import needs

        for label, value in needs(command):
            print(f"{label:<44} {value}")
        return
    commands.ACTIONS[type(command)](command)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the console command; bad input ends with one clear line and status 2."""
    command = tyro.cli(Command, args=arguments, prog="crosscoder", description=__doc__)
    try:
        run(command)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("CROSSCODER_TRACEBACK"):
            raise
        say(f"crosscoder: {error}")
        say("(CROSSCODER_TRACEBACK=1 shows where)")
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
