"""Small subjects trained from scratch on token blocks, with checkpoints along the way.

The order of the data is a pure function of the seed, the number of passes over it is computed, recorded and
said aloud, and every checkpoint is an ordinary `transformers` folder with a manifest.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from crosscoder.data.muon import StackedMuon
from crosscoder.data.order import batch_indices
from crosscoder.data.subject import SUBJECT_SCHEMA, build_subject, load_model, without_progress_bars
from crosscoder.data.subject_state import FOLDER, load_state, read_record, require_same_run, save_state
from crosscoder.data.tokens import TokenBlocks
from crosscoder.foundation.artifact import committed_directory, read_sealed, verify_directory, write_sealed
from crosscoder.foundation.config import config, from_mapping, to_mapping
from crosscoder.foundation.console import Progress, say
from crosscoder.foundation.damage import reading
from crosscoder.foundation.failpoints import failpoint
from crosscoder.foundation.lock import locked, remove_leftovers
from crosscoder.foundation.signals import Stopped, safe_point, watching

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KEEP_SECONDS = 30.0
"""Work after which what a run goes on from is written again."""
RUN_FILE = "run.json"
MAX_HELD_OUT_BLOCKS, HELD_OUT_BATCH = 64, 32
FIRST_CHECKPOINT = 1 / 3
"""Where in training the first kept checkpoint after the initial weights lies, as a fraction of the steps."""


@config
class SubjectConfig:
    n_layers: PositiveInt
    """Blocks."""
    d_model: PositiveInt
    """Width; a multiple of `head_dim`."""
    context: Annotated[int, Field(ge=2)] = 128
    """Tokens of a training sequence, and the longest text that the subject can read."""
    head_dim: PositiveInt = 32
    """Width of an attention head."""
    batch: PositiveInt = 32
    """Sequences a step."""
    tokens: PositiveInt = 1_500_000
    """Training tokens, rounded to whole steps."""
    learning_rate: PositiveFloat = 3e-3
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Share of the steps in which the learning rate rises."""
    n_checkpoints: Annotated[PositiveInt, Field(le=10_000)] = 20
    """Kept in the last two thirds of training, the end included; the initial weights are kept besides."""
    seed: int = 0
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Of the blocks' matrices; all else has AdamW. Muon (Jordan et al. 2024) learns more from a token: one 8x64
    ended at 2.47 nats after 2 M tokens, where five with AdamW ended at 2.55 to 2.61. A step takes longer where
    matrices are small."""
    muon_learning_rate: PositiveFloat = 0.015
    """Its peak, where `learning_rate` is that of all else; both rise and fall alike."""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """In a thousand steps .9 learns more than .95: a 2x128 lost .008 nats less after 1 M tokens."""
    decay: Literal["cosine", "linear"] = "cosine"
    """How rates fall after the rise: as a cosine to a tenth, or linearly to nothing, .01 nats better in a thousand
    steps."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products in training; weights and optimiser are float32 in both. On a CPU with bfloat16
    instructions `bfloat16` is about 1.5 times as fast; without them it is slower."""

    def __post_init__(self) -> None:
        if self.n_checkpoints > len(self.checkpoint_steps):
            raise ValueError(
                f"{self.n_steps} steps cannot hold {self.n_checkpoints} checkpoints in their last "
                "two thirds; ask for fewer checkpoints, more tokens or a smaller batch"
            )

    @property
    def n_steps(self) -> int:
        return max(1, round(self.tokens / (self.batch * self.context)))

    @property
    def checkpoint_steps(self) -> list[int]:
        """The steps after which weights are kept, in order, without step 0."""
        first = max(1, round(FIRST_CHECKPOINT * self.n_steps)) if self.n_checkpoints > 1 else self.n_steps
        spacing = (self.n_steps - first) / max(1, self.n_checkpoints - 1)
        return sorted({round(first + i * spacing) for i in range(self.n_checkpoints)})

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then what `decay` says."""
        return self.learning_rate * self.rate_share_at(step)

    def rate_share_at(self, step: int) -> float:
        """The learning rates of a step over their peaks."""
        warmup = math.ceil(self.warmup_fraction * self.n_steps)
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, self.n_steps - warmup)
        if self.decay == "linear":
            return 1 - progress
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


@config
class SubjectCheckpoint:
    """Weights kept after `step` steps, and their loss on text never trained on (nats per token)."""

    step: int
    tokens: int
    held_out_loss: Annotated[float, Field(allow_inf_nan=True)]
    folder: Annotated[str, Field(pattern=r"^step-\d+$")]
    """Name inside the run's folder."""


@config
class SubjectRun:
    """A finished training run: its checkpoints in order, the initial weights first."""

    folder: Path
    config: SubjectConfig
    checkpoints: Annotated[tuple[SubjectCheckpoint, ...], Field(min_length=1)]
    epochs: float
    """Passes over the training blocks; above 1 means that text was repeated."""
    tokens_per_second: float
    train_fingerprint: str

    @classmethod
    def load(cls, folder: str | Path) -> SubjectRun:
        """The record of a finished run; a FileNotFoundError if it has not finished, a DamagedArtifactError if it was
        changed since."""
        path = Path(folder) / RUN_FILE
        value = read_sealed(path, mend="delete the folder to train the subject again")
        with reading(path):
            return from_mapping(cls, {**value, "folder": str(folder)}, where=str(path))

    def load_model(self, index: int, *, device: str | torch.device = "cpu") -> PreTrainedModel:
        """The subject at `checkpoints[index]`, verified, in evaluation mode and without gradients."""
        return load_checkpoint(self.folder / self.checkpoints[index].folder, device=device)


def load_checkpoint(folder: str | Path, *, device: str | torch.device = "cpu") -> PreTrainedModel:
    """A kept subject, verified against its manifest, in evaluation mode and without gradients."""
    verify_directory(folder, schema=SUBJECT_SCHEMA, hashes=False)  # `load_model` checks the hashes
    return load_model(folder, device=device)


@watching()
def train_subject(
    config: SubjectConfig,
    train_tokens: TokenBlocks,
    held_out_tokens: TokenBlocks,
    *,
    folder: str | Path,
    device: str | torch.device = "cpu",
    tokenizer: PreTrainedTokenizerBase | None = None,
    quiet: bool = False,
) -> SubjectRun:
    """Train a subject and keep its checkpoints in `folder/step-N`; `folder/run.json` is written last.

    One that was stopped goes on, to the same bits; one that is finished is read again. The tokenizer, if given, is kept
    beside the weights of each checkpoint.

    Raises:
        ValueError: the blocks are not of length `context`, the two sets have different vocabularies, or `folder` holds
            a run of other settings or other text.
        FloatingPointError: the loss is not finite; names the step.
        InUseError: another process trains in `folder`.
        Stopped: a signal came; what the run goes on from is in `folder`.
    """
    folder = Path(folder)
    _check_tokens(config, train_tokens, held_out_tokens)
    settings = {**to_mapping(config), "train_fingerprint": train_tokens.fingerprint}
    with locked(folder):
        remove_leftovers(folder)
        if (folder / RUN_FILE).is_file():
            done = SubjectRun.load(folder)
            require_same_run(folder, {**to_mapping(done.config), "train_fingerprint": done.train_fingerprint}, settings)
            say(f"{folder} holds this subject, trained")
        else:
            _Training(config, train_tokens, held_out_tokens, folder, device, tokenizer, settings).run(quiet=quiet)
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
    return SubjectRun.load(folder)


class _Training:
    """One run, from its beginning or from where it was."""

    def __init__(
        self,
        config: SubjectConfig,
        train_tokens: TokenBlocks,
        held_out_tokens: TokenBlocks,
        folder: Path,
        device: str | torch.device,
        tokenizer: PreTrainedTokenizerBase | None,
        settings: dict[str, Any],
    ) -> None:
        self.config, self.tokens, self.folder = config, train_tokens, folder
        self.tokenizer, self.settings = tokenizer, settings
        sizes = {"vocab_size": train_tokens.vocab_size, "context": config.context, "head_dim": config.head_dim}
        self.model = build_subject(config.n_layers, config.d_model, **sizes, seed=config.seed).to(device)
        self.optimizers = _optimizers(self.model, config)
        spacing = max(1, len(held_out_tokens) // MAX_HELD_OUT_BLOCKS)
        self.held_out_BS = held_out_tokens[::spacing][:MAX_HELD_OUT_BLOCKS].to(device)
        self.step, self.seconds = 0, 0.0
        self.checkpoints: list[SubjectCheckpoint] = []

    def run(self, *, quiet: bool) -> None:
        """Take all steps that are left, and write the record of the run."""
        config, n_seen = self.config, self.config.n_steps * self.config.batch
        epochs = n_seen / len(self.tokens)
        if epochs > 1:
            say(f"subject: {n_seen} of {len(self.tokens)} sequences; every text is repeated, {epochs:.2f} epochs")
        self._resume()
        try:
            self._take_steps(quiet=quiet)
        except Stopped as stop:
            self._save()
            raise Stopped(f"{stop} after {self.step:,} of {config.n_steps:,} steps; kept in {self.folder}") from stop
        found = {
            "config": to_mapping(config),
            "checkpoints": [to_mapping(one) for one in self.checkpoints],
            "epochs": epochs,
            "tokens_per_second": n_seen * config.context / self.seconds,
            "train_fingerprint": self.tokens.fingerprint,
        }
        write_sealed(self.folder / RUN_FILE, found)

    def _take_steps(self, *, quiet: bool) -> None:
        config, kept = self.config, {0, *self.config.checkpoint_steps}
        label, saved_at = f"subject {config.n_layers}x{config.d_model}", time.monotonic()
        with Progress(label, config.n_steps, unit="step", quiet=quiet, initial=self.step) as progress:
            if self.step in kept and self.step not in [one.step for one in self.checkpoints]:
                self.checkpoints.append(self._keep())
            started = time.perf_counter()
            for step, loss in _training_steps(self.model, config, self.tokens, self.optimizers, self.step):
                self.step = step
                self.seconds += time.perf_counter() - started
                progress.advance(tokens=config.batch * config.context, loss=loss)
                failpoint("subject.step")
                safe_point()
                if self.step in kept:
                    self.checkpoints.append(self._keep())
                if time.monotonic() - saved_at > KEEP_SECONDS:
                    self._save()
                    saved_at = time.monotonic()
                started = time.perf_counter()

    def _keep(self) -> SubjectCheckpoint:
        name = f"step-{self.step}"
        with committed_directory(self.folder / name, schema=SUBJECT_SCHEMA) as temporary, without_progress_bars():
            self.model.save_pretrained(temporary)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(temporary)
        loss, tokens = held_out_loss(self.model, self.held_out_BS), self.step * self.config.batch * self.config.context
        return SubjectCheckpoint(step=self.step, tokens=tokens, held_out_loss=loss, folder=name)

    def _save(self) -> None:
        record: dict[str, Any] = {"step": self.step, "seconds": self.seconds, "settings": self.settings}
        record["checkpoints"] = [to_mapping(one) for one in self.checkpoints]
        save_state(self.folder, self.model, self.optimizers, record)

    def _resume(self) -> None:
        if (record := read_record(self.folder)) is None:
            return
        kept = {"decay": "cosine", "muon_momentum": 0.95, **record["settings"]}  # older records do not say these
        require_same_run(self.folder, kept, self.settings)
        load_state(self.folder, self.model, self.optimizers)
        self.step, self.seconds = record["step"], record["seconds"]
        self.checkpoints = [from_mapping(SubjectCheckpoint, one) for one in record["checkpoints"]]
        say(f"going on from step {self.step:,} of {self.config.n_steps:,}")


def next_token_loss(model: Any, ids_BS: Tensor, *, reduction: Literal["mean", "none"] = "mean") -> Tensor:
    """Mean cross-entropy of each next token, in nats, or each one's; the loss of the last position has no target."""
    hidden_BSD = model.model(ids_BS, use_cache=False).last_hidden_state
    logits = F.linear(hidden_BSD[:, :-1].flatten(0, 1), model.lm_head.weight)
    return F.cross_entropy(logits.float(), ids_BS[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def block_losses(model: nn.Module, ids_BS: Tensor) -> Tensor:
    """Mean next-token cross-entropy of each block, in nats per token, `[B]`."""
    was_training = model.training
    model.eval()
    parts = [
        next_token_loss(model, part, reduction="none").view(len(part), -1) for part in ids_BS.split(HELD_OUT_BATCH)
    ]
    model.train(was_training)
    return torch.cat([part.double().mean(1) for part in parts])


def held_out_loss(model: nn.Module, ids_BS: Tensor) -> float:
    """Mean next-token cross-entropy over all blocks, in nats per token."""
    return float(block_losses(model, ids_BS).mean())


def _training_steps(
    model: Any,
    config: SubjectConfig,
    tokens: TokenBlocks,
    optimizers: list[torch.optim.Optimizer] | None = None,
    start: int = 0,
) -> Iterator[tuple[int, float]]:
    """Takes the steps from `start` on; the number of steps taken, and the loss of the last."""
    optimizers = optimizers or _optimizers(model, config)
    device = next(model.parameters()).device
    half = config.precision == "bfloat16"
    if half and device.type == "cpu":
        model.set_attn_implementation("eager")  # the fused CPU kernel is half as fast in bfloat16
    model.train()
    for index in range(start, config.n_steps):
        chosen = batch_indices(len(tokens), batch=config.batch, seed=config.seed, index=index)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * config.rate_share_at(index)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = next_token_loss(model, tokens[chosen].to(device))
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the subject's loss is {value} at step {index}; lower the learning rate")
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(list(model.parameters()), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        yield index + 1, value


def _optimizers(model: Any, config: SubjectConfig) -> list[torch.optim.Optimizer]:
    """The optimisers of all parameters; each group keeps the peak of its learning rate."""
    in_blocks = {id(p) for p in model.model.layers.parameters() if p.ndim == 2 and config.optimizer == "muon"}
    rest = [p for p in model.parameters() if id(p) not in in_blocks]
    decay = ((0.1, [p for p in rest if p.ndim >= 2]), (0.0, [p for p in rest if p.ndim < 2]))
    groups = [{"params": each, "weight_decay": one, "peak": config.learning_rate} for one, each in decay]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)]
    if in_blocks:
        matrices = [p for p in model.parameters() if id(p) in in_blocks]
        groups = [{"params": matrices, "peak": config.muon_learning_rate}]
        found.append(StackedMuon(groups, momentum=config.muon_momentum))
    return found


def _check_tokens(config: SubjectConfig, train: TokenBlocks, held_out: TokenBlocks) -> None:
    if {train.sequence_length, held_out.sequence_length} != {config.context}:
        raise ValueError(
            f"the blocks have {train.sequence_length} (train) and {held_out.sequence_length} (held-out) tokens, the "
            f"context is {config.context}; pack the documents again with that sequence length"
        )
    if train.vocab_size != held_out.vocab_size or train.tokenizer_hash != held_out.tokenizer_hash:
        raise ValueError("the train and held-out blocks were made by different tokenizers; prepare them together")
