"""The commands between activations and a measured dictionary: harvest, train, evaluate."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch

from crosscoder import training
from crosscoder.commands.base import LOADING, NO_WINDOW, NULL, RAW, SUBJECT, Idle, Printed, ReadsModel
from crosscoder.data.blocks import input_device
from crosscoder.data.nulls import make_null
from crosscoder.data.probe import meaningless_loss
from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.shards import ActivationShards, StoredDtype, stored_source, write_shards
from crosscoder.data.sites import kind_read
from crosscoder.data.sources import WINDOW_TOKENS, Activations, Marked, SiteKind, SiteSource, select_site_numbers
from crosscoder.data.stream import ActivationStream
from crosscoder.data.subject import require_own_tokens
from crosscoder.data.tokens import TokenBlocks
from crosscoder.dictionary import Dictionary, load_dictionary
from crosscoder.dictionary.division import divided, shard_for
from crosscoder.dictionary.saved import WEIGHTS
from crosscoder.dictionary.scale import at_usual_scale
from crosscoder.dictionary.shard import Along
from crosscoder.foundation.artifact import file_sha256
from crosscoder.foundation.console import Progress, give, say
from crosscoder.foundation.lock import locked
from crosscoder.foundation.origin import Null
from crosscoder.foundation.provenance import describe_run
from crosscoder.foundation.ranks import current
from crosscoder.needs import (
    Job,
    Needs,
    dictionary_needs,
    gaussian_needs,
    harvest_needs,
    harvest_time,
    stream_needs,
    time_needs,
)
from crosscoder.results.evaluation import Evaluation, require_nulls, terminal_table
from crosscoder.results.table import Place, Row, rows_at
from crosscoder.studies.budget import Arm, DictionaryBudget
from crosscoder.training.keeping import lengthened
from crosscoder.training.loggers import LogTo, close_logger, open_logger

LOSS_BATCH = 2048
"""Tokens that the model is given at once for its loss."""
HELD_OUT_BATCHES = 2
"""Batches of 4,096 tokens that are measured while training goes on."""


@dataclass(frozen=True, kw_only=True)
class Harvest(ReadsModel):
    """Store a model's residual stream: every chosen layer of every token, in hashed shards.

    $ crosscoder harvest --subject HuggingFaceTB/SmolLM2-135M --tokens-folder runs/tokens --layers 10 11 --out runs/acts
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
        with locked(self.out):
            self._write(harvester)
        give(self.out)

    def _write(self, harvester: ResidualHarvester) -> None:
        for split, most in (("train", self.max_tokens), ("held_out", self.max_held_out_tokens)):
            blocks = TokenBlocks.load(self.tokens_folder / split)
            require_own_tokens(self.subject, blocks, revision=self.loading.revision)
            kept: dict[str, Any] = {"dtype": self.stored_dtype, "tokens_per_shard": self.tokens_per_shard}
            store = write_shards(harvester, blocks, self.out / split, **kept, max_tokens=most, quiet=False)
            shape = f"{store.n_tokens:,} tokens x {len(store.sites)} sites x {store.d_model}"
            say(f"{split}: {shape}; dropped {store.index.dropped}")


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
        harvester, job = self.harvester(subject), current().apart()
        return [
            ActivationStream(
                harvester,
                tokens[name],
                window_tokens=self.window_tokens,
                max_tokens=None if name == "train" else self.max_held_out_tokens,
                ahead=name == "train",
                quiet=False,
                job=job if name == "train" else None,
            )
            for name in names
        ]


def counted(progress: Progress) -> Callable[[Marked, Any], None]:
    """Moves a progress by the tokens of each batch that is read."""
    return lambda batch, _: progress.advance(len(batch.token_B))


@dataclass(frozen=True, kw_only=True)
class Train(Reading):
    """Train one dictionary: a crosscoder, or a bank of SAEs, one a layer.

    A killed run goes on with --resume, to the same bits.

    With --activations they are read from a store; with --subject and --tokens-folder (and --layers, --reads,
    --blocks-path, --mlp-path) they are harvested as training goes, and nothing but the dictionary is written.

    $ crosscoder train --subject HuggingFaceTB/SmolLM2-135M --tokens-folder runs/tokens --layers 10 11 --out runs/cc
    $ crosscoder train --activations runs/acts --arm crosscoder --out runs/cc
    $ crosscoder train --activations runs/acts --out runs/jump --budget.selection jumprelu
    $ crosscoder train --activations runs/acts --out runs/mlsae --arm layerwise --budget.bank shared
    $ crosscoder train --activations runs/mlps --out runs/clt --budget.structure transcoder

    More steps for a run, finished or not: the learning rate follows the new number, and rises again over the warm-up if
    it had begun to fall. A new run from a finished dictionary, on other text of the same model if you like:

    $ crosscoder train --activations runs/acts --arm crosscoder --out runs/cc --resume --budget.steps 2000
    $ crosscoder train --activations runs/more --start-from runs/cc/dictionary --out runs/cc2 --budget.steps 500

    On R GPUs or processes, with the same files and, to rounding, the same numbers; each holds a part of the features,
    or some layers' SAEs of a bank, and each harvests a part of the text:

    $ torchrun --nproc-per-node 4 -m crosscoder train --activations runs/acts --out runs/cc --device cuda
    $ torchrun --nproc-per-node 4 -m crosscoder train --activations runs/acts --out runs/cc --data-ranks 2

    Nulls, to see what a number is where there is nothing to find: --null takes what is read, --budget.frozen what is
    learnt.

    $ crosscoder train --activations runs/acts --out runs/gaussian --null gaussian
    $ crosscoder train --activations runs/acts --out runs/random --budget.frozen decoder

    The curves are in --out as curves.png; `crosscoder plot` draws several runs on one page, --log-to sends them on.

    $ crosscoder train --activations runs/acts --out runs/logged --log-to tensorboard
    """

    divides: ClassVar[bool] = True
    out: Path  # Folder for metrics.jsonl, checkpoints/ and the finished dictionary/
    arm: Arm = "crosscoder"  # One dictionary over all layers, or a bank of one SAE a layer
    site: SiteKind = "residual"  # The residual stream after each block, or what each block adds to it
    budget: DictionaryBudget = field(default_factory=DictionaryBudget)
    seed: int = 0  # Of the initial weights
    checkpoint_every: int = 200  # Steps between two checkpoints
    held_out_every: int = 500  # Steps between two measurements on held-out tokens
    resume: bool = False  # Go on from the last checkpoint in --out
    log_to: LogTo | None = None  # Log what metrics.jsonl holds there too; each is an optional package
    log_project: str = "crosscoder"  # With --log-to trackio or wandb: the project of the run
    divide: Along | None = None  # With torchrun: what ranks share out. None: layers of a bank if even, or features
    data_ranks: int = 1
    """With torchrun: groups of ranks, each with a whole dictionary and its share of every batch's tokens. Groups send
    each other gradients, ranks within one reconstructions, so that it pays where features are few and tokens many: of
    4 ranks, 2 from a batch of as many tokens as there are features, 4 from one four times as large."""
    start_from: Path | None = None
    """A finished dictionary that training begins from, at step 0 with a fresh optimiser and schedule. None: random."""

    def idle(self) -> Idle:
        found = super().idle()
        if current().size == 1:
            found["torchrun started no other ranks"] = ("divide", "data_ranks")
        if self.log_to not in ("trackio", "wandb"):
            found["only --log-to trackio and wandb have projects"] = ("log_project",)
        if self.start_from is not None:
            names = ("n_features", "n_layerwise", "k_crosscoder", "k_layerwise", "selection", "penalty", "prefixes")
            own = tuple(f"budget.{name}" for name in (*names, "structure", "window", "bank"))
            return {**found, "the dictionary of --start-from is what it is": ("arm", "seed", *own)}
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
        rows += dictionary_needs(self.arm, n_layers, width, self.budget)
        rows += time_needs([Job(self.arm, n_layers, width, self.budget)], device=self.device)
        if self.activations is None:
            read = self.budget.steps * self.budget.batch + min(self.window_tokens, tokens.n_tokens)
            rows += harvest_time(subject, self.harvester, tokens, read + self.max_held_out_tokens)
        return rows

    def run(self) -> None:
        from crosscoder.measure.health import describe, watch
        from crosscoder.measure.reading import read_dictionary
        from crosscoder.studies.cells import marked, new_dictionary, require_source

        job, budget, dictionary, scale_L, started = current(), self.budget, None, None, ""
        is_chain = budget.trainer(self.arm) is not training.train
        along = self.divide or ("features" if is_chain else None)
        share = partial(shard_for, ranks=job.mesh(self.data_ranks), along=along) if job.size > 1 else None
        train, held_out = self.splits("train", "held_out")
        if self.start_from is not None:
            dictionary = load_dictionary(self.start_from)
            dictionary.require_input_scale("--start-from")
            scale_L, started = dictionary.input_scale, f"/from {file_sha256(self.start_from / WEIGHTS)}"
        source = make_null(self.null, SiteSource(train, held_out, self.site, scale_L=scale_L), quiet=False)
        if dictionary is None:
            dictionary = new_dictionary(self.arm, source, budget, seed=self.seed, share=share)
        elif share is not None:
            dictionary = divided(dictionary, share(type(dictionary), dictionary.config))
        require_source(dictionary, source)
        options: dict[str, Any] = {}
        if not is_chain:  # which trains one layer at a time

            def few() -> Iterator[Marked]:
                return islice(marked(source, self.device), HELD_OUT_BATCHES)

            options = {"monitor": partial(watch, batches=few), "monitor_every": self.held_out_every}
        config = replace(budget.train_config(), checkpoint_every=self.checkpoint_every)
        logger = None
        if self.log_to is not None and job.is_first:
            settings = json.loads(json.dumps(self.settings(), default=str))
            logger = open_logger(self.log_to, self.out, project=self.log_project, settings=settings)
        result = budget.trainer(self.arm)(
            dictionary,
            source.batches(budget.batch, seed=budget.data_seed, steps=budget.steps),
            config=lengthened(self.out, config) if self.resume else config,
            folder=self.out,
            resume=self.resume,
            device=self.device,
            data_fingerprint=f"{source.fingerprint}/{budget.data_seed}{started}",
            logger=logger,
            **options,
        )
        if logger is not None:
            close_logger(logger)
        if isinstance(train, ActivationStream):
            train.settle()
        if not job.is_first:
            return
        trained = result.dictionary if job.size == 1 else load_dictionary(self.out / "dictionary").to(self.device)
        say(
            f"trained on {result.tokens:,} tokens; reads {source.reads or 'a store that keeps no record of what it is'}"
        )
        with Progress("held-out tokens", held_out.n_tokens, unit="token") as progress:
            reading = read_dictionary(trained, marked(source, self.device), watch=counted(progress))
        for line in describe(trained, reading):
            say(line)
        give(self.out / "dictionary")


@dataclass(frozen=True, kw_only=True)
class Evaluate(Reading, Printed):
    """Measure a dictionary on held-out tokens: explained variance, L0, dead features, loss recovered.

    A short table is printed; --out and --json have every number. With --subject also the loss that the model recovers
    with reconstructions in the place of what the dictionary reads, all layers at once. What --out writes says of which
    dictionary it is: `crosscoder card` and `push` print it, and --nulls puts it beside another's.

    $ crosscoder evaluate --dictionary runs/cc/dictionary --activations runs/acts
    $ crosscoder evaluate --dictionary runs/cc/dictionary --subject runs/A/step-488 --tokens-folder runs/tokens
    $ crosscoder evaluate --dictionary runs/gaussian/dictionary --activations runs/acts --null gaussian --out null.json
    $ crosscoder evaluate --dictionary runs/cc/dictionary --activations runs/acts --nulls null.json
    """

    dictionary: Path  # What `crosscoder train` wrote, or organisation/repository on the Hub
    site: SiteKind | None = None  # What is read of each block. None: what the dictionary reads
    raw_inputs: Annotated[bool, RAW] = False
    loss_tokens: int = 8192  # With --subject: held-out tokens to recover the loss on, each some runs of it; 0: none
    nulls: tuple[Path, ...] = ()  # What --out wrote of dictionaries of nulls, to be shown beside it
    out: Path | None = None  # Write every number as JSON here, with whose they are

    def idle(self) -> Idle:
        found = {**super().idle(), "held-out tokens are read in order": ("window_tokens",)}
        if self.json:
            found["--json prints the numbers of one dictionary"] = ("nulls",)
        return found if self.activations is None else {**found, "only a model has a loss": ("loss_tokens",)}

    def run(self) -> None:
        from crosscoder.measure.health import describe
        from crosscoder.studies.cells import dictionary_rows, evaluate_dictionary

        nulls = [Evaluation.load(path) for path in self.nulls]
        dictionary = load_dictionary(self.dictionary).to(self.device)
        require_nulls(nulls, dictionary.reads)
        dictionary.require_input_scale("evaluation", raw_inputs=self.raw_inputs)
        site = self.site or kind_read(dictionary.reads)
        # A Gaussian's mean and covariance are those of the training tokens.
        read = self if self.activations is not None else self.as_read(dictionary.reads)
        *others, held_out = read.splits(*(["train"] if self.null == "gaussian" else []), "held_out")
        for record, owner in ((dictionary.reads, "the dictionary"), (held_out.harvested, "the store")):
            if record is None:
                say(f"warning: {owner} keeps no record of what it reads, so nobody checks that both belong together")
        facts = dictionary.facts()  # of the weights as they are kept
        at_usual_scale(dictionary, lambda: held_out.site_scale(site))
        if dictionary.reads is not None and held_out.harvested is not None:
            dictionary.reads = dictionary.reads.on_tokens(held_out.harvested.tokens)
        source = SiteSource((others or [held_out])[0], held_out, site, scale_L=dictionary.input_scale)
        shown = make_null(self.null, source, quiet=False)
        with Progress("held-out tokens", held_out.n_tokens, unit="token") as progress:
            reading = evaluate_dictionary(dictionary, shown, device=self.device, watch=counted(progress))
        for line in describe(dictionary, reading)[1:]:  # the first is in the table
            say(line)
        rows = dictionary_rows(Place(site=site), dictionary, reading) + self.loss_rows(dictionary, held_out, site)
        numbers = {row.key: row.value for row in rows} | {"tokens_held_out": reading.n_tokens}
        run = describe_run()
        found = Evaluation(about=facts.about(run["command"], run["versions"]), values=numbers)
        if self.out is not None:
            found.save(self.out)
        if self.json:
            give(json.dumps(numbers, indent=2))
            return
        give(f"{self.dictionary}: {facts.form}, {dictionary.extra_repr().splitlines()[0]}")
        give(terminal_table([found, *nulls]))

    def loss_rows(self, dictionary: Dictionary, held_out: Activations, site: SiteKind) -> list[Row]:
        """What the model predicts with every layer replaced; nothing where it cannot be asked, which is said."""
        from crosscoder.measure.splice import splice_losses

        if not isinstance(held_out, ActivationStream) or self.loss_tokens < 1:
            return []
        harvester, tokens = held_out.harvester, held_out.tokens
        if self.null is not None:
            reason = f"the {self.null} null is no model's"
        elif harvester.reads == "mlp" or dictionary.config.written().start:
            reason = "the dictionary does not reconstruct all that it reads"
        else:
            reason = meaningless_loss(harvester.model, harvester.probed)
        if reason is not None:
            say(f"loss recovered is left out: {reason}")
            return []
        n_rows = min(len(tokens), -(-self.loss_tokens // tokens.sequence_length))
        ids_RS = tokens[torch.linspace(0, len(tokens) - 1, n_rows).round().long()].to(input_device(harvester.model))
        where: dict[str, Any] = {"layers": select_site_numbers(harvester.sites, site), "kind": site}
        batches = ids_RS.split(max(1, LOSS_BATCH // tokens.sequence_length))
        found = splice_losses(dictionary, harvester.model, list(harvester.blocks), batches, **where, each=False)
        if list(found.sites.values())[-1]["loss_recovered"] is None:
            say("loss recovered is undefined: without what the dictionary reads the model loses next to nothing")
        return rows_at(Place(site=site), found.clean | list(found.sites.values())[-1])
