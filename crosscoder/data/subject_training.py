"""Small subjects trained from scratch on token blocks, with checkpoints along the way.

The order of the data is a pure function of the seed, the number of passes over it is computed, recorded and
said aloud, and every checkpoint is an ordinary `transformers` folder with a manifest.
"""

from __future__ import annotations

import math
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
from crosscoder.data.subject import build_subject, load_model, without_progress_bars
from crosscoder.data.tokens import TokenBlocks
from crosscoder.foundation.artifact import committed_directory, read_json, verify_directory, write_json
from crosscoder.foundation.config import config, from_mapping, to_mapping
from crosscoder.foundation.console import Progress, say

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCHEMA = "crosscoder.subject/1"
RUN_FILE = "run.json"
MAX_HELD_OUT_BLOCKS = 64
MUCH_BETTER = 0.95
"""A loss below this much of another is worth a warning."""
FIRST_CHECKPOINT = 1 / 3
"""Where in training the first kept checkpoint after the initial weights lies, as a fraction of the steps."""


@config
class SubjectConfig:
    """A subject's shape and its training."""

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
    n_checkpoints: PositiveInt = 20
    """Kept in the last two thirds of training, the end included; the initial weights are kept besides."""
    seed: int = 0
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Of the blocks' matrices; all else has AdamW. Muon (Jordan et al. 2024) learns more from a token: one 8x64
    ended at 2.47 nats after 2 M tokens, where five with AdamW ended at 2.55 to 2.61. A step takes longer where
    matrices are small."""
    muon_learning_rate: PositiveFloat = 0.01
    """Its peak, where `learning_rate` is that of all else; both rise and fall alike."""
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
        """Linear warm-up, then a cosine to a tenth."""
        return self.learning_rate * self.rate_share_at(step)

    def rate_share_at(self, step: int) -> float:
        """The learning rates of a step over their peaks."""
        warmup = math.ceil(self.warmup_fraction * self.n_steps)
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, self.n_steps - warmup)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


@config
class SubjectCheckpoint:
    """Weights kept after `step` steps, and their loss on text never trained on (nats per token)."""

    step: int
    tokens: int
    held_out_loss: Annotated[float, Field(allow_inf_nan=True)]
    folder: str
    """Name inside the run's folder."""


@config
class SubjectRun:
    """A finished training run: its checkpoints in order, the initial weights first."""

    folder: Path
    config: SubjectConfig
    checkpoints: tuple[SubjectCheckpoint, ...]
    epochs: float
    """Passes over the training blocks; above 1 means that text was repeated."""
    tokens_per_second: float
    train_fingerprint: str

    @classmethod
    def load(cls, folder: str | Path) -> SubjectRun:
        """The record of a finished run; a FileNotFoundError if it has not finished."""
        path = Path(folder) / RUN_FILE
        return from_mapping(cls, {**read_json(path), "folder": str(folder)}, where=str(path))

    def load_model(self, index: int, *, device: str | torch.device = "cpu") -> PreTrainedModel:
        """The subject at `checkpoints[index]`, verified, in evaluation mode and without gradients."""
        return load_checkpoint(self.folder / self.checkpoints[index].folder, device=device)


def load_checkpoint(folder: str | Path, *, device: str | torch.device = "cpu") -> PreTrainedModel:
    """A kept subject, verified against its manifest, in evaluation mode and without gradients."""
    verify_directory(folder, schema=SCHEMA)
    return load_model(folder, device=device)


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

    The tokenizer, if given, is kept beside the weights of each.

    Raises:
        ValueError: the blocks are not of length `context`, or the two sets have different vocabularies.
        FloatingPointError: the loss is not finite; names the step.
    """
    folder = Path(folder)
    _check_tokens(config, train_tokens, held_out_tokens)
    model = build_subject(
        config.n_layers,
        config.d_model,
        vocab_size=train_tokens.vocab_size,
        context=config.context,
        head_dim=config.head_dim,
        seed=config.seed,
    ).to(device)
    n_seen = config.n_steps * config.batch
    epochs = n_seen / len(train_tokens)
    if epochs > 1:
        say(f"subject: {n_seen} sequences asked of {len(train_tokens)}; every text is repeated, {epochs:.2f} epochs")
    spacing = max(1, len(held_out_tokens) // MAX_HELD_OUT_BLOCKS)
    held_out_BS = held_out_tokens[::spacing][:MAX_HELD_OUT_BLOCKS].to(device)

    def keep(step: int) -> SubjectCheckpoint:
        name = f"step-{step}"
        with committed_directory(folder / name, schema=SCHEMA) as temporary, without_progress_bars():
            model.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
        tokens, loss = step * config.batch * config.context, held_out_loss(model, held_out_BS)
        return SubjectCheckpoint(step=step, tokens=tokens, held_out_loss=loss, folder=name)

    checkpoints, kept = [keep(0)], set(config.checkpoint_steps)
    training_seconds, started = 0.0, time.perf_counter()
    label = f"subject {config.n_layers}x{config.d_model}"
    with Progress(label, config.n_steps, unit="step", quiet=quiet) as progress:
        for step, loss in _training_steps(model, config, train_tokens):
            progress.advance(loss=loss)
            if step in kept:
                training_seconds += time.perf_counter() - started
                checkpoints.append(keep(step))
                started = time.perf_counter()
    run = SubjectRun(
        folder=folder,
        config=config,
        checkpoints=tuple(checkpoints),
        epochs=epochs,
        tokens_per_second=n_seen * config.context / training_seconds,
        train_fingerprint=train_tokens.fingerprint,
    )
    write_json(folder / RUN_FILE, {k: v for k, v in to_mapping(run).items() if k != "folder"})
    return run


def next_token_loss(model: Any, ids_BS: Tensor) -> Tensor:
    """Mean cross-entropy of each next token, in nats; the loss of the last position has no target."""
    hidden_BSD = model.model(ids_BS, use_cache=False).last_hidden_state
    logits = F.linear(hidden_BSD[:, :-1].flatten(0, 1), model.lm_head.weight)
    return F.cross_entropy(logits.float(), ids_BS[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, ids_BS: Tensor, *, batch: int = 32) -> float:
    """Mean next-token cross-entropy over all blocks, in nats per token."""
    was_training = model.training
    model.eval()
    total = sum(float(next_token_loss(model, part)) * len(part) for part in ids_BS.split(batch))
    model.train(was_training)
    return total / len(ids_BS)


@torch.no_grad()
def causal_loss(model: Any, ids_BS: Tensor, *, batch: int = 4) -> float:
    """Mean next-token cross-entropy of any causal model on blocks of equal length, in nats per token."""
    total = 0.0
    for part in ids_BS.split(batch):
        logits = model(part, use_cache=False).logits[:, :-1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())) * len(part)
    return total / len(ids_BS)


@torch.no_grad()
def loss_of_policies(
    model: Any, blocks: TokenBlocks, *, bos: int | None, n_blocks: int = 16, batch: int = 4
) -> dict[bool, float]:
    """Loss on the text of some of the blocks, in nats per token: with `bos` before it (True) and without (False).

    The text and the tokens counted are the same for both: each is predicted from at least one token of text, and no
    special token is counted. Without a `bos`, or where the blocks have no such token, there is nothing to compare.
    """
    origin = blocks.origin
    device = next(model.parameters()).device
    chosen = blocks[:: max(1, len(blocks) // n_blocks)][:n_blocks].to(device)
    text_BS = chosen[:, 1:] if origin is not None and origin.bos is not None else chosen[:, :-1]  # room for the BOS
    special = torch.tensor(origin.special_ids if origin is not None else (), device=device, dtype=torch.int64)
    counted_BS = ~torch.isin(text_BS[:, 1:], special)
    totals = dict.fromkeys((False,) if bos is None else (True, False), 0.0)
    for rows, counted in zip(text_BS.split(batch), counted_BS.split(batch), strict=True):
        for with_bos in totals:
            given = F.pad(rows, (1, 0), value=bos or 0) if with_bos else rows
            logits = model(given, use_cache=False).logits[:, -rows.shape[1] : -1]
            loss = F.cross_entropy(logits[counted].float(), rows[:, 1:][counted], reduction="sum")
            totals[with_bos] += float(loss)
    n_counted = int(counted_BS.sum())
    return {with_bos: total / n_counted for with_bos, total in totals.items()} if n_counted else {}


def describe_policies(losses: dict[bool, float], *, with_bos: bool) -> str:
    """What `loss_of_policies` found, of blocks that begin with a BOS or not; a second line warns if that is worse."""
    names, flags = {True: "with BOS", False: "without BOS"}, {True: "--bos", False: "--no-bos"}
    if with_bos not in losses:
        return "no token of text is predicted from another, so there is no loss"
    said = f"held-out loss of the model: {losses[with_bos]:.3f} nats/token {names[with_bos]}"
    if len(losses) == 1:
        return said
    used, other = losses[with_bos], losses[not with_bos]
    said += f", {other:.3f} {names[not with_bos]}"
    if not other < MUCH_BETTER * used:
        return said
    return (
        f"{said}\nwarning: the model reads this text much better {names[not with_bos]} than {names[with_bos]}; "
        f"prepare it again with {flags[not with_bos]}"
    )


def _training_steps(model: Any, config: SubjectConfig, tokens: TokenBlocks) -> Iterator[tuple[int, float]]:
    optimizers, device = _optimizers(model, config), next(model.parameters()).device
    half = config.precision == "bfloat16"
    if half and device.type == "cpu":
        model.set_attn_implementation("eager")  # the fused CPU kernel is half as fast in bfloat16
    model.train()
    for index in range(config.n_steps):
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
        found.append(StackedMuon([{"params": matrices, "peak": config.muon_learning_rate}]))
    return found


def _check_tokens(config: SubjectConfig, train: TokenBlocks, held_out: TokenBlocks) -> None:
    if {train.sequence_length, held_out.sequence_length} != {config.context}:
        raise ValueError(
            f"the blocks have {train.sequence_length} (train) and {held_out.sequence_length} (held-out) tokens, the "
            f"context is {config.context}; pack the documents again with that sequence length"
        )
    if train.vocab_size != held_out.vocab_size or train.tokenizer_hash != held_out.tokenizer_hash:
        raise ValueError("the train and held-out blocks were made by different tokenizers; prepare them together")
