"""Sparse dictionaries of a language model's residual stream, per layer and across layers, trained and counted.

Start with `crosscoder compare --preset smoke`, the whole study small, in a minute. Whole studies: compare, synthetic,
report. Step by step, each from what those before it wrote: prepare, train-subject, harvest, train, evaluate. Of what is
trained: features (what they mean), effects (what the model does without them), compare-dictionaries (whose features are
whose). To show and to share it: plot, card, push, convert. Whether all is well: verify (what was written), doctor (this
machine).

Every command takes `--help`, `--print-config` and `--dry-run` (what it would take; no work is done). A setting that
would change nothing is refused. `crosscoder --version` prints the version. Printed on stdout is the result alone: the
path of what was written or, by evaluate, effects, verify and doctor, a table, with `--json` the same as JSON. All that
is said on the way goes to stderr.

`torchrun --nproc-per-node R -m crosscoder train ...` divides the work over R processes (docs/scale.md); the other
commands run in one.

Ctrl-C or SIGTERM stops a command at its next safe point, keeps its work and prints the command that goes on; twice
stops at once. Status: 0 done, 2 refused or failed, 3 verify found damage, 75 stopped and can be gone
on with, 130 stopped at once.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import operator
import os
import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from crosscoder.commands import STEPS
from crosscoder.commands.base import BLOCKS_PATH, LOADING, NO_WINDOW, SUBJECT, TEXT, Command, Device, Idle
from crosscoder.commands.doctor import Doctor
from crosscoder.commands.verify import DamagedError, Verify
from crosscoder.data.subject import USUAL_LOADING, Loading
from crosscoder.foundation import console, ranks, signals
from crosscoder.foundation.config import to_mapping
from crosscoder.foundation.console import aligned, give, say
from crosscoder.needs import Needs, planted_needs, single_needs, study_needs
from crosscoder.results.table import State
from crosscoder.studies.budget import Bank, WholeStructure


@dataclass(frozen=True, kw_only=True)
class Study(Command):
    """Flags of the commands that run a whole study."""

    out: Path = Path("runs")
    """Studies go to a folder in here, named by preset and settings; the same study is continued, not repeated."""
    workers: int | None = None  # Processes. None: one a core on a CPU, one on a GPU
    device: Device = "cpu"

    def study(self) -> Any:
        """The config of the study: a preset, or the usual settings, with the command's own put in."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        return {"command": asdict(self), "study": to_mapping(self.study())}

    def where(self, prefix: str) -> dict[str, Any]:
        """Where the study runs: its folder, device and number of processes."""
        from crosscoder.studies.folder import default_workers, study_folder

        folder = study_folder(self.study(), prefix, self.out)
        say(f"study folder: {folder}")
        return {"folder": folder, "device": self.device, "workers": self.workers or default_workers(self.device)}


@dataclass(frozen=True, kw_only=True)
class Compare(Study):
    """Compare a crosscoder with per-layer SAEs, on one model or on small ones of several shapes.

    Without --subject: small transformers of equal parameters and unequal shape are trained, matched by loss, and
    compared, beside nulls that have nothing to find; the report opens with what the rule says (`verdict/rule.py`).

    With a subject: the two kinds of dictionary are compared on that model alone, beside the same model untrained and,
    on neighbouring layers, beside further nulls.

    $ crosscoder compare --preset smoke
    $ crosscoder compare --subject HuggingFaceTB/SmolLM2-135M --text my_texts/ --layers 10 11 12 13

    A setting that is None is the preset's.
    """

    preset: Literal["smoke", "quick", "controls", "standard", "large", "full"] = "quick"
    """smoke: a minute, to see that all works. quick: a pilot, nine minutes on two cores. controls: the pilot beside
    every null, and a grid. standard: enough trainings for an answer, hours on two cores. large: the same at four times
    the parameters. full: for one GPU."""
    subject: Annotated[str | None, SUBJECT] = None
    text: Annotated[str | None, TEXT] = None
    layers: tuple[int, ...] | None = None
    """With --subject: neighbouring layers to read, 1 being the output of the first block. None: all."""
    blocks_path: Annotated[str | None, BLOCKS_PATH] = None
    loading: tyro.conf.OmitArgPrefixes[Loading] = USUAL_LOADING
    tokens: int | None = None  # With --subject: tokens to train the dictionaries on
    context: int | None = None  # With --subject: tokens in a block, at most the model's positions
    keep_outliers: bool = False
    """With --subject: keep first tokens of blocks, special tokens, and tokens of huge norm (sinks)."""
    stream: bool = False  # Harvest activations as dictionaries train, again for each, and store none
    browser: bool = True  # With --subject: write what the crosscoder's features mean, and link it from the report
    seeds: tuple[int, ...] | None = None
    """Dictionary seeds. The debiased dimension compares two; stable features need three."""
    training_seeds: tuple[int, ...] | None = None
    """Without --subject: training seeds of every shape. With one there is no ceiling, and so no verdict."""
    nulls: tuple[State, ...] | None = None
    """What else dictionaries are trained on, to see what is found where there is nothing of the kind: untrained,
    shuffled, gaussian; frozen_encoder, frozen_decoder, soft_decoder: on the model, but with that part not learnt."""
    causal_features: int | None = None
    """Features that are taken off layer by layer, to see on which they act; 0 leaves that out. Each costs some rows of
    text times layers through the model."""
    steps: int | None = None  # Training steps of each dictionary
    n_features: int | None = None  # Features of the crosscoder and of each layer's SAE
    structure: WholeStructure | None = None
    """Layers that the crosscoder's features read and write: all, one and from it on, or --window neighbours."""
    window: int | None = None  # Layers of a window
    bank: Bank | None = None
    """How the bank's SAEs begin: independent, all alike, each from the trained one before it, or one shared by all."""
    part: tuple[int, int] = (0, 1)
    """`I N`: share I (from 0) of N of the work. Each runs twice (subjects, dictionaries); then one without --part."""

    def idle(self) -> Idle:
        if self.subject is None:
            mode = "only a single model has that; name one with --subject"
            names = ("layers", "blocks_path", "tokens", "context", "keep_outliers", "browser", *LOADING)
        else:
            mode = "only the study of several shapes has that; leave out --subject"
            names = ("preset", "training_seeds", "part")
        return {mode: names} if self.structure == "window" else {mode: names, NO_WINDOW: ("window",)}

    def study(self) -> Any:
        from crosscoder.studies.presets import PRESETS
        from crosscoder.studies.single import SubjectStudyConfig

        config = PRESETS[self.preset] if self.subject is None else SubjectStudyConfig(subject=self.subject)
        names = ("steps", "n_features", "structure", "window", "bank")
        budget = _replace_given(config.dictionaries, **{name: getattr(self, name) for name in names})
        config = _replace_given(config, dictionaries=budget, seeds=self.seeds, nulls=self.nulls)
        config = _replace_given(config, causal_features=self.causal_features)
        config = replace(config, stream=self.stream)
        if self.subject is not None:
            read: dict[str, Any] = {"layers": self.layers, "blocks_path": self.blocks_path, "loading": self.loading}
            read |= {"tokens_train": self.tokens, "context": self.context, "keep_outliers": self.keep_outliers}
            return _replace_given(config, text=self.text, browser=self.browser, **read)
        subjects = _replace_given(config.subjects, text=self.text, seeds=self.training_seeds)
        return _replace_given(config, subjects=subjects)

    def needs(self) -> Needs:
        from crosscoder.studies.folder import default_workers

        needs_of = study_needs if self.subject is None else single_needs
        return needs_of(self.study(), self.workers or default_workers(self.device), self.device)

    def run(self) -> None:
        from crosscoder.report.answer import answer
        from crosscoder.report.page import render_report
        from crosscoder.studies.shapes import OtherPartsError, Part, run_study
        from crosscoder.studies.single import run_subject_study

        stem = "" if self.subject is None else re.sub(r"[^A-Za-z0-9._-]+", "-", Path(self.subject).stem)
        config, where = self.study(), self.where(f"subject-{stem}" if stem else self.preset)
        try:
            if self.subject is not None:
                results = run_subject_study(config, **where)
            else:
                results = run_study(config, preset=self.preset, part=Part(*self.part), **where)
        except OtherPartsError as left:
            say(f"{left}; when all are done, run once more without --part")
            give(where["folder"])
            return
        signals.safe_point()
        path = render_report(results, where["folder"])
        for sentence in answer(results):
            say(sentence)
        give(path)


@dataclass(frozen=True, kw_only=True)
class Synthetic(Study):
    """Check every estimator on synthetic worlds whose features are known.

    $ crosscoder synthetic --preset ci
    """

    preset: Literal["ci", "quick", "full"] = "quick"
    """ci: under a minute, 64 features. quick: a few minutes on two cores, 256. full: five worlds, more sizes."""

    def study(self) -> Any:
        from crosscoder.studies.planted import PRESETS

        return PRESETS[self.preset]

    def needs(self) -> Needs:
        return [*planted_needs(self.study()), ("writes", f"report.md, results.json and pictures in {self.out}")]

    def run(self) -> None:
        from crosscoder.studies.planted import run_planted

        where = self.where(f"synthetic-{self.preset}")
        run_planted(self.study(), preset=self.preset, **where)
        give(where["folder"] / "report.md")


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Write a study's report again from its results.json.

    $ crosscoder report runs/quick-0123456789
    """

    folder: tyro.conf.Positional[Path]  # The study's folder

    def run(self) -> None:
        from crosscoder.report.page import render_report
        from crosscoder.results.file import load_results

        give(render_report(load_results(self.folder), self.folder))


COMMANDS = (*STEPS, Compare, Synthetic, Report, Verify, Doctor)


def _replace_given(config: Any, **settings: Any) -> Any:
    return replace(config, **{name: value for name, value in settings.items() if value is not None})


def _differs(settings: Any, name: str) -> bool:
    """Whether a setting has another value than its default; `budget.bank` is `bank` of the settings in `budget`."""
    first, _, rest = name.partition(".")
    value = getattr(settings, first)
    return _differs(value, rest) if rest else value != getattr(type(settings), first)


def _do(command: Command, job: ranks.Ranks) -> None:
    if job.size > 1 and not (command.divides or command.print_config or command.dry_run):
        name = type(command).__name__.lower()
        raise ValueError(f"{name} runs in one process, and torchrun started {job.size}; `train` alone divides its work")
    for reason, names in command.idle().items():
        # The fields of `shape` and `loading` are flags without a prefix.
        flags = [
            name.removeprefix("shape.").removeprefix("loading.").replace("_", "-")
            for name in names
            if _differs(command, name)
        ]
        if flags:
            raise ValueError(f"--{', --'.join(flags)} would change nothing here: {reason}")
    require_device(getattr(command, "device", "cpu"))
    if not job.is_first and (command.print_config or command.dry_run):
        return
    if command.print_config:
        give(json.dumps(command.settings(), indent=2, sort_keys=True, default=str))
    elif command.dry_run:
        give(aligned(command.needs()))
    else:
        command.run()


def require_device(device: str) -> None:
    """Refuse a device that is not here before any work is done."""
    import torch

    kind, _, number = device.partition(":")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {device!r}, and this machine shows torch {torch.cuda.device_count()} GPUs")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; expected cpu, cuda or cuda:N")


def _parsed(arguments: list[str]) -> Command:
    """The command that was asked for; the list of all shows the first line of each."""
    brief = not arguments or arguments[0].startswith("-")
    first_lines = [tyro.conf.subcommand(description=str(one.__doc__).splitlines()[0]) for one in COMMANDS]
    shown = [Annotated[one, line] for one, line in zip(COMMANDS, first_lines, strict=True)] if brief else COMMANDS
    settings = (tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName)
    any_of: Any = functools.reduce(operator.or_, shown)
    return tyro.cli(any_of, args=arguments, prog="crosscoder", description=__doc__, config=settings)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; bad input ends with one clear line and status 2, damage that `verify` finds with 3, a signal as
    `--help` says."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        give(f"crosscoder {importlib.metadata.version('crosscoder')}")
        return 0
    if arguments[:1] == ["export"]:  # what the command was called when it wrote one format
        arguments = ["convert", "--format", "saelens", *arguments[1:]]
    command = _parsed(arguments)
    try:
        with signals.watching(exits=True):
            signals.safe_point()
            with ranks.joined(getattr(command, "device", "cpu")) as job:
                if not job.is_first:
                    console.mute()
                _do(command, job)
    except signals.Stopped as stop:
        given = [*arguments, "--resume"] if getattr(command, "resume", None) is False else arguments
        say(f"crosscoder: {stop}\n{signals.going_on(given)}")
        return signals.STOPPED
    except KeyboardInterrupt:
        say("crosscoder: stopped at once")
        return signals.STOPPED_AT_ONCE
    except Exception as error:
        if os.environ.get("CROSSCODER_TRACEBACK") or (isinstance(error, BrokenPipeError) and console.reader_is_gone()):
            raise
        known = isinstance(error, ValueError | OSError | ImportError | RuntimeError | ArithmeticError)
        if ranks.is_first_to_fail(error):
            say(f"crosscoder: {'' if known else f'{type(error).__name__}: '}{error}", always=True)
            say("(CROSSCODER_TRACEBACK=1 shows where)", always=True)
        return 3 if isinstance(error, DamagedError) else 2
    return 0
