"""The commands that show a dictionary to others: its run's curves, its card, and its upload to the Hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from crosscoder.commands.base import Command
from crosscoder.dictionary import Dictionary, ModelCard, load_dictionary
from crosscoder.dictionary.card import is_own_card, is_stale_card
from crosscoder.foundation.artifact import read_json, replace_file
from crosscoder.foundation.config import to_mapping
from crosscoder.foundation.console import give, human_bytes, say
from crosscoder.foundation.hub import CARD
from crosscoder.foundation.origin import MismatchError
from crosscoder.needs import Needs
from crosscoder.results.evaluation import Evaluation
from crosscoder.training.curves import find_runs, plot_runs, read_run

FOLDER = tyro.conf.arg(help="What `crosscoder train` wrote: the folder dictionary/.")


@dataclass(frozen=True, kw_only=True)
class Plot(Command):
    """Draw runs' curves on one page: loss, explained variance, L0 and dead share over tokens.

    A folder of runs, such as a chain's or that of `train_many`, stands for all of them.

    $ crosscoder plot runs/cc
    $ crosscoder plot runs/cc runs/gaussian --out runs/both.png
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]  # What `crosscoder train` wrote: folders with metrics.jsonl
    out: Path | None = None  # The picture to write. None: of one run its own curves.png, of several one here

    def run(self) -> None:
        folders = find_runs(self.runs)
        out = self.out or (folders[0] if len(folders) == 1 else Path()) / "curves.png"
        names = [folder.resolve().name for folder in folders]
        shown = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, plot_runs([read_run(*one) for one in zip(folders, shown, strict=True)]))
        give(out)


@dataclass(frozen=True, kw_only=True)
class Carded(Command):
    """Flags of the commands that write a card."""

    dictionary: tyro.conf.Positional[Annotated[Path, FOLDER]]
    evaluation: Path | None = None  # What `crosscoder evaluate --out` wrote of it; without it the card has no numbers
    nulls: tuple[Path, ...] = ()  # The same of dictionaries of nulls, to be printed beside it
    license: str | None = None  # As the Hub names it: apache-2.0, mit, cc-by-4.0, ...
    about: Path | None = None  # A Markdown file of your own, put under the title

    def card(self, dictionary: Dictionary) -> ModelCard:
        """The card, with the command that trained the dictionary where its run's folder is still around it."""
        trained = _trained_by(self.dictionary, dictionary)
        return ModelCard(
            evaluation=None if self.evaluation is None else Evaluation.load(self.evaluation),
            nulls=[Evaluation.load(path) for path in self.nulls],
            license=self.license,
            about="" if self.about is None else self.about.read_text(encoding="utf-8"),
            **trained,
        )


@dataclass(frozen=True, kw_only=True)
class Card(Carded):
    """Write a dictionary's card, README.md, from what was measured of it; what nobody measured is said to be so.

    $ crosscoder evaluate --dictionary runs/cc/dictionary --activations runs/acts --out runs/cc/evaluation.json
    $ crosscoder card runs/cc/dictionary --evaluation runs/cc/evaluation.json --license apache-2.0
    """

    replace: bool = False  # Put it in the place of a README.md that somebody else wrote

    def run(self) -> None:
        dictionary, path = load_dictionary(self.dictionary), self.dictionary / CARD
        if not self.dictionary.is_dir():
            raise ValueError(f"{self.dictionary} is on the Hub; save it to a folder, or write its card by push")
        if path.exists() and not self.replace and not is_own_card(path.read_text(encoding="utf-8", errors="replace")):
            raise FileExistsError(f"{path} was not written by crosscoder; --replace puts the card in its place")
        replace_file(path, self.card(dictionary).text(dictionary.facts()).encode())
        give(path)


@dataclass(frozen=True, kw_only=True)
class Push(Carded):
    """Upload a dictionary and its card to the Hugging Face Hub, as one commit.

    The account is that of `hf auth login`, or of the token in HF_TOKEN. A README.md in the folder is the card, unless
    --evaluation or another flag of it is given.

    $ crosscoder push runs/cc/dictionary lab/my-crosscoder --evaluation runs/cc/evaluation.json --license mit
    $ crosscoder push runs/cc/dictionary lab/my-crosscoder --private --revision v2 --subfolder layers-1-8
    """

    repo: tyro.conf.Positional[str]  # organisation/repository, or user/repository; made if there is none
    private: bool = False  # For a new repository; one that is there and public is then refused
    revision: str | None = None  # A branch, made if there is none. None: main
    subfolder: str = ""  # Inside the repository, for several dictionaries in one
    replace_card: bool = False  # Put the card in the place of a README.md that others wrote there
    message: str = "A dictionary by crosscoder"  # Of the commit

    def needs(self) -> Needs:
        files = [path for path in sorted(self.dictionary.iterdir()) if path.is_file()]
        sizes: Needs = [(path.name, human_bytes(path.stat().st_size)) for path in files]
        return [*sizes, ("uploaded to", f"{self.repo}/{self.subfolder} at {self.revision or 'main'}")]

    def run(self) -> None:
        dictionary = load_dictionary(self.dictionary)
        address = dictionary.push_to_hub(
            self.repo,
            card=self.text(dictionary),
            private=self.private or None,
            revision=self.revision,
            subfolder=self.subfolder,
            replace_card=self.replace_card,
            message=self.message,
        )
        give(address)

    def text(self, dictionary: Dictionary) -> str:
        """The card: the folder's own, or what the flags say."""
        path = self.dictionary / CARD
        asked = (self.evaluation, self.nulls, self.license, self.about) != (None, (), None, None)
        if asked or not path.is_file():
            return self.card(dictionary).text(dictionary.facts(), repo=self.repo, subfolder=self.subfolder)
        if is_stale_card(path, lambda: dictionary.facts().weights):
            raise MismatchError(f"{path} is the card of other weights; write it again by `crosscoder card`")
        say(f"the card is {path}")
        return path.read_text(encoding="utf-8")


def _trained_by(folder: Path, dictionary: Dictionary) -> dict[str, Any]:
    """What the run that a dictionary lies in says of its training; nothing where there is none, or it is another's."""
    run, metrics = folder.resolve().parent / "run.json", folder.resolve().parent / "metrics.jsonl"
    if not run.is_file():
        return {}
    found = read_json(run)
    if found.get("config", {}).get("dictionary") != json.loads(json.dumps(to_mapping(dictionary.config))):
        return {}
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    tokens = json.loads(lines[-1]).get("tokens") if lines else None
    return {"command": tuple(map(str, found.get("command", ()))), "trained_tokens": tokens}
