"""The commands between activations and a measured dictionary: harvest, train, evaluate, export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from crosscoder import training
from crosscoder.commands.base import LOADING, NO_WINDOW, NULL, RAW, SUBJECT, Command, Idle, ReadsModel
from crosscoder.data.nulls import make_null
from crosscoder.data.shards import ActivationShards, StoredDtype, stored_source, write_shards
from crosscoder.data.sources import WINDOW_TOKENS, Activations, Marked, SiteKind, SiteSource, select_site_numbers
from crosscoder.data.stream import ActivationStream
from crosscoder.data.subject import require_own_tokens
from crosscoder.data.tokens import TokenBlocks
from crosscoder.dictionary import load_dictionary
from crosscoder.formats.saelens import n_flat_dictionaries, save_saelens
from crosscoder.foundation.artifact import write_json
from crosscoder.foundation.console import say
from crosscoder.foundation.origin import Null
from crosscoder.needs import Needs, dictionary_needs, gaussian_needs, harvest_needs, stream_needs
from crosscoder.results.table import Place
from crosscoder.studies.budget import Arm, DictionaryBudget

HELD_OUT_BATCHES = 2
"""Batches of 4,096 tokens that are measured while training goes on."""


@dataclass(frozen=True, kw_only=True)
class Harvest(ReadsModel):
    """Store a subject's residual stream: every chosen layer of every token, in hashed safetensors shards.

    $ crosscoder harvest --subject runs/A/step-488 --tokens-folder runs/tokens --out runs/acts
    $ crosscoder harvest --subject runs/A/step-488 --tokens-folder runs/tokens --reads mlp --out runs/mlps
    """

    subject: Annotated[str, SUBJECT]
    tokens_folder: Path  # What `crosscoder prepare` wrote, with the subject's own tokenizer
    out: Path  # Folder to write: train/ and held_out/
    max_tokens: int = 250_000  # Training tokens to store, in whole blocks
    max_held_out_tokens: int = 50_000  # Held-out tokens to store, in whole blocks
    tokens_per_shard: int | None = None  # Tokens in a file. None: as many as fill 256 MiB; one file is held in memory
    stored_dtype: StoredDtype | None = None  # Of the stored activations. None: bfloat16 where the model is, or float32

    def needs(self) -> Needs:
        tokens, itemsize = self.max_tokens + self.max_held_out_tokens, 2 if self.stored_dtype == "bfloat16" else 4
        return harvest_needs(self.subject, self.layers, self.reads, tokens, itemsize, self.loading.revision)

    def run(self) -> None:
        for name in ("max_tokens", "max_held_out_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        harvester = self.harvester(self.subject)
        select_site_numbers(harvester.sites, "residual")  # the embedding alone is of no use
        for split, most in (("train", self.max_tokens), ("held_out", self.max_held_out_tokens)):
            blocks = TokenBlocks.load(self.tokens_folder / split)
            require_own_tokens(self.subject, blocks, revision=self.loading.revision)
            kept: dict[str, Any] = {"dtype": self.stored_dtype, "tokens_per_shard": self.tokens_per_shard}
            store = write_shards(harvester, blocks, self.out / split, **kept, max_tokens=most, quiet=False)
            shape = f"{store.n_tokens:,} tokens x {len(store.sites)} sites x {store.d_model}"
            say(f"{split}: {shape}; dropped {store.index.dropped}")
        print(self.out)


@dataclass(frozen=True, kw_only=True)
class Reading(ReadsModel):
    """Flags of commands that read activations: of a store, or of a model as they go."""

    activations: Path | None = None  # What `crosscoder harvest` wrote
    subject: Annotated[str | None, SUBJECT] = None
    tokens_folder: Path | None = None  # What `crosscoder prepare` wrote, with the subject's own tokenizer
    window_tokens: int = WINDOW_TOKENS  # Tokens that batches mix; they are held in memory where there is no store
    max_held_out_tokens: int = 50_000  # Held-out tokens to harvest where there is no store
    null: Annotated[Null | None, NULL] = None

    def idle(self) -> Idle:
        if self.activations is None:
            return super().idle()
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
            return [ActivationShards.load(self.activations / n, window_tokens=self.window_tokens) for n in names]
        subject, folder = self.streamed()
        tokens = {name: TokenBlocks.load(folder / name) for name in names}
        require_own_tokens(subject, tokens[names[0]], revision=self.loading.revision)
        harvester = self.harvester(subject)
        return [
            ActivationStream(
                harvester,
                tokens[name],
                window_tokens=self.window_tokens,
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

    Nulls, to see what a number is where there is nothing to find: --null takes what is read, --budget.frozen what is
    learnt.

    $ crosscoder train --activations runs/acts --out runs/gaussian --null gaussian
    $ crosscoder train --activations runs/acts --out runs/random --budget.frozen decoder
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
            if self.budget.bank == "warm_chain":
                found["a chain trains one layer at a time"] = ("held_out_every",)
            found["that is of a crosscoder; leave out --arm"] = ("budget.k_crosscoder",)
            if self.null == "shuffled":
                found["each SAE of a bank reads one layer, and in any order the same tokens"] = ("null",)
            return {**found, "a bank's SAEs each have one layer": ("budget.structure", "budget.window")}
        found["only a bank has that; it is --arm layerwise"] = ("budget.bank", "budget.k_layerwise")
        return found if self.budget.structure == "window" else {**found, NO_WINDOW: ("budget.window",)}

    def needs(self) -> Needs:
        rows: Needs = []
        if self.activations is not None:
            source = stored_source(self.activations / "train", None, self.site, verify=False)
            n_layers, width = source.n_layers, source.d_model
        else:
            subject, folder = self.streamed()
            tokens = TokenBlocks.load(folder / "train")
            rows, n_sites, width = stream_needs(
                subject, self.layers, self.reads, tokens, self.window_tokens, self.loading.revision
            )
            n_layers = n_sites - (self.site == "write")
        rows += gaussian_needs(n_layers, width) if self.null == "gaussian" else []
        return rows + dictionary_needs(self.arm, n_layers, width, self.budget)

    def run(self) -> None:
        from crosscoder.measure.health import describe, watch
        from crosscoder.measure.reading import read_dictionary
        from crosscoder.studies.cells import marked, new_dictionary

        train, held_out = self.splits("train", "held_out")
        source, budget = make_null(self.null, SiteSource(train, held_out, self.site)), self.budget
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
        for line in describe(result.dictionary, read_dictionary(result.dictionary, marked(source, self.device))):
            say(line)
        print(self.out / "dictionary")


@dataclass(frozen=True, kw_only=True)
class Evaluate(Reading):
    """Measure a trained dictionary on held-out activations: explained variance, both L0, dead share, counts.

    $ crosscoder evaluate --dictionary runs/cc/dictionary --activations runs/acts
    $ crosscoder evaluate --dictionary runs/cc/dictionary --subject runs/A/step-488 --tokens-folder runs/tokens
    $ crosscoder evaluate --dictionary runs/gaussian/dictionary --activations runs/acts --null gaussian
    """

    dictionary: Path  # What `crosscoder train` wrote: a folder with config.json and model.safetensors
    site: SiteKind | None = None  # What is read of each block. None: what the dictionary reads
    raw_inputs: Annotated[bool, RAW] = False
    out: Path | None = None  # Write the numbers as JSON here too

    def idle(self) -> Idle:
        return {**super().idle(), "held-out tokens are read in order": ("window_tokens",)}

    def run(self) -> None:
        from crosscoder.measure.health import describe
        from crosscoder.studies.cells import dictionary_rows, evaluate_dictionary

        dictionary = load_dictionary(self.dictionary).to(self.device)
        dictionary.require_input_scale("evaluation", raw_inputs=self.raw_inputs)
        site = self.site or (
            "write" if dictionary.reads is not None and dictionary.reads.site == "write" else "residual"
        )
        # A Gaussian's mean and covariance are those of the training tokens.
        *others, held_out = self.splits(*(["train"] if self.null == "gaussian" else []), "held_out")
        for record, owner in ((dictionary.reads, "the dictionary"), (held_out.harvested, "the store")):
            if record is None:
                say(f"warning: {owner} keeps no record of what it reads, so nobody checks that both belong together")
        source = SiteSource((others or [held_out])[0], held_out, site, scale_L=dictionary.input_scale)
        reading = evaluate_dictionary(dictionary, make_null(self.null, source), device=self.device)
        for line in describe(dictionary, reading):
            say(line)
        numbers = {row.key: row.value for row in dictionary_rows(Place(site=site), dictionary, reading)}
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
        n_flat = n_flat_dictionaries(dictionary)
        for group in range(n_flat):
            folder = self.out if n_flat == 1 else self.out / f"layer-{group}"
            save_saelens(dictionary, folder, group=group, raw_inputs=self.raw_inputs)
        print(self.out)
