"""One training loop for every dictionary.

`train` takes any iterable of `x_BLD`. Every step is a function of the state and its batch alone: no random number is
drawn, order comes from the batches, and a run that was killed continues from its newest verified checkpoint to the
same bits, metrics included.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from crosscoder.dictionary import Dictionary
from crosscoder.dictionary.initial import initialize_bias, normalize_decoder, remove_parallel_gradient
from crosscoder.dictionary.interface import checked_input
from crosscoder.dictionary.losses import explained_variance, loss_terms
from crosscoder.foundation.artifact import write_json
from crosscoder.foundation.config import to_mapping
from crosscoder.foundation.console import Progress
from crosscoder.foundation.provenance import describe_run
from crosscoder.training.checkpoint import TrainState, latest_checkpoint, load_checkpoint, save_checkpoint
from crosscoder.training.firing import FiringTracker
from crosscoder.training.schedule import learning_rate_factor

Batches = Iterable[Tensor] | Callable[[int], Iterable[Tensor]]


class NonFiniteError(FloatingPointError):
    """A batch, a loss or a gradient holds NaN or infinity; the parameters were not changed by it."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a dictionary is trained.

    steps: how many; None takes every batch. With None and batches of unknown number the rate never decays.
    learning_rate: the peak, for Adam with betas (0.9, 0.999).
    warmup_steps, decay_fraction: linear rise over the first steps, linear fall over the last fraction of the run.
    grad_clip: largest gradient norm over all parameters; 0 turns clipping off.
    precision: `bf16` runs the encoder's product under autocast; parameters, sums and Adam stay fp32.
    dead_after_tokens: silence after which the auxiliary term tries to revive a feature.
    bias_init: where the decoder bias starts, from the first batch.
    log_every, checkpoint_every: in steps; 0 turns checkpoints off.
    """

    steps: int | None = None
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    decay_fraction: float = 0.3
    grad_clip: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    dead_after_tokens: int = 100_000
    bias_init: Literal["geometric_median", "mean", "zero"] = "geometric_median"
    log_every: int = 50
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps is {self.steps}; expected at least 1, or None for every batch")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate is {self.learning_rate}; expected a positive number, such as 1e-3")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction is {self.decay_fraction}; expected a number from 0 to 1")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision is {self.precision!r}; expected 'fp32' or 'bf16'")
        if self.bias_init not in ("geometric_median", "mean", "zero"):
            raise ValueError(f"bias_init is {self.bias_init!r}; expected 'geometric_median', 'mean' or 'zero'")
        for name in ("warmup_steps", "grad_clip", "dead_after_tokens", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if self.log_every < 1:
            raise ValueError(f"log_every is {self.log_every}; expected at least 1")


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns: the dictionary (evaluation mode), its logged metrics, and how far it went."""

    dictionary: Any
    metrics: list[dict[str, float]]
    steps: int
    tokens: int


def train(
    dictionary: Any,
    batches: Batches,
    *,
    config: TrainConfig | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    device: torch.device | str | None = None,
    data_fingerprint: str | None = None,
    label: str = "training",
    quiet: bool = False,
) -> TrainResult:
    """Trains `dictionary` in place on `batches` of `[..., L, D]` and returns it with its metrics.

    batches: an iterable of tensors, or a function that gives the batches from a step number on. On resume an iterable
        is replayed and its used part skipped, so it must give the same batches again.
    folder: where `metrics.jsonl`, `run.json`, checkpoints and the finished `dictionary/` go; None writes nothing.
    resume: continue from the folder's newest verified checkpoint, if there is one.

    Raises:
        ValueError: a batch of the wrong shape, no batches, fewer than `config.steps`, or a folder in use.
        NonFiniteError: a batch, loss or gradient is not finite; the parameters are as before that step.
    """
    config = config or TrainConfig()
    device = torch.device(device) if device is not None else next(iter(dictionary.parameters())).device
    dictionary.to(device).train()
    settings = {
        "class": type(dictionary).__name__,
        "dictionary": to_mapping(dictionary.config),
        "training": to_mapping(config),
        "data": data_fingerprint,
    }
    groups = dictionary.grouped().center_GN.shape[0]
    state = TrainState(
        dictionary,
        torch.optim.Adam(dictionary.parameters(), lr=config.learning_rate, fused=True),
        FiringTracker(groups, dictionary.config.n_features, device=device),
    )
    run = _RunFolder(Path(folder), settings) if folder is not None else None
    metrics = run.open(state, resume=resume) if run else []
    n_steps = config.steps if config.steps is not None else _length(batches)
    with Progress(label, n_steps, unit="step", quiet=quiet) as progress:
        progress.advance(state.step)
        for x in _batches_from(batches, state.step, n_steps):
            shown = _step(state, x.to(device, non_blocking=True), config, n_steps)
            if state.step % config.log_every == 0 or state.step == n_steps:
                metrics.append(shown())
                if run:
                    run.log(metrics[-1])
            progress.advance(1)
            if run and config.checkpoint_every and state.step % config.checkpoint_every == 0:
                run.checkpoint(state)
    if state.step == 0 or (config.steps is not None and state.step < config.steps):
        raise ValueError(
            f"the batches ended after {state.step} of {config.steps or 'at least 1'} steps; "
            "give more data or fewer steps"
        )
    dictionary.eval()
    if run:
        run.finish(state)
    return TrainResult(dictionary, metrics, state.step, state.tokens)


def _length(batches: Batches) -> int | None:
    return len(batches) if hasattr(batches, "__len__") else None  # ty: ignore[invalid-argument-type]


def _batches_from(batches: Batches, start: int, n_steps: int | None) -> Iterator[Tensor]:
    remaining = None if n_steps is None else n_steps - start
    if isinstance(batches, Iterable):
        return islice(batches, start, n_steps)
    return islice(batches(start), remaining)


def _step(state: TrainState, x: Tensor, config: TrainConfig, n_steps: int | None) -> Callable[[], dict[str, float]]:
    """Takes one optimiser step and returns a function that computes what to log about it."""
    dictionary = state.dictionary
    parameters = list(dictionary.parameters())
    x_BLD = checked_input(x, dictionary.config).to(parameters[0].dtype)
    _require_finite_batch(x_BLD, state.step)
    if state.step == 0:
        initialize_bias(dictionary, x_BLD, method=config.bias_init)
    rate = config.learning_rate * learning_rate_factor(
        state.step, n_steps=n_steps, warmup=config.warmup_steps, decay_fraction=config.decay_fraction
    )
    state.optimizer.param_groups[0]["lr"] = rate
    state.optimizer.zero_grad(set_to_none=True)
    with _autocast(config, x_BLD.device):
        out = dictionary(x_BLD)
        terms = loss_terms(dictionary, x_BLD, out, dead_GF=state.firing.dead(config.dead_after_tokens))
    loss = torch.stack(list(terms.values())).sum()
    loss.backward()
    _project_decoder_gradient(dictionary)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not bool(torch.isfinite(loss + norm)):
        raise NonFiniteError(
            f"step {state.step}: loss {loss.item():.4g}, gradient norm {norm.item():.4g}; the parameters are as they "
            "were before this step. A lower learning_rate is the usual mend."
        )
    if config.grad_clip and norm > config.grad_clip:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], config.grad_clip / norm)
    state.optimizer.step()
    normalize_decoder(dictionary)
    state.firing.update(out.code, x_BLD.shape[0])
    state.step += 1
    state.tokens += x_BLD.shape[0]

    def numbers() -> dict[str, float]:
        values = {f"loss/{name}": term.item() for name, term in terms.items()}
        ev_L = explained_variance(x_BLD, out.recon.detach().float().view(x_BLD.shape))
        return {
            "step": state.step,
            "tokens": state.tokens,
            "loss": loss.item(),
            **values,
            "explained_variance": ev_L.mean().item(),
            "l0": out.code.l0().float().mean().item(),
            "silent_features": int(state.firing.dead(config.dead_after_tokens).sum()),
            "gradient_norm": norm.item(),
            "learning_rate": rate,
        }

    return numbers


def _autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if config.precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def _project_decoder_gradient(dictionary: Dictionary) -> None:
    for name, parameter in dictionary.named_parameters():
        if name == "decoder" and parameter.grad is not None:
            remove_parallel_gradient(dictionary, parameter.grad)


def _require_finite_batch(x_BLD: Tensor, step: int) -> None:
    if x_BLD.numel() == 0:
        raise ValueError(f"step {step}: the batch has shape {tuple(x_BLD.shape)}, no token to learn from")
    if bool(torch.isfinite(x_BLD.abs().amax())):
        return
    token, layer, _ = (~torch.isfinite(x_BLD)).nonzero()[0].tolist()
    count = int((~torch.isfinite(x_BLD)).any(2).any(1).sum())
    raise NonFiniteError(
        f"step {step}: the batch holds NaN or infinity in {count} of {x_BLD.shape[0]} tokens, first at token {token}, "
        f"layer {layer}; the parameters are unchanged. Harvest in fp32 or bf16 and drop such tokens."
    )


class _RunFolder:
    """The files of one run: metrics.jsonl, run.json, checkpoints/ and, at the end, dictionary/."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._folder, self._settings = folder, settings
        self._metrics = folder / "metrics.jsonl"

    def open(self, state: TrainState, *, resume: bool) -> list[dict[str, float]]:
        """Load the newest checkpoint into `state` if asked to; the metrics up to that step are returned."""
        newest = latest_checkpoint(self._folder / "checkpoints")
        if newest is not None and not resume:
            raise ValueError(f"{self._folder} already holds {newest.name}; pass resume=True, or choose a new folder")
        if newest is not None:
            load_checkpoint(newest, state, settings=self._settings)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._folder / "run.json", describe_run(self._settings))
        kept = [entry for entry in _read_metrics(self._metrics) if entry["step"] <= state.step]
        if newest is None:
            kept = []
        self._metrics.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        return kept

    def log(self, entry: dict[str, float]) -> None:
        with self._metrics.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")

    def checkpoint(self, state: TrainState) -> None:
        save_checkpoint(state, self._folder / "checkpoints", settings=self._settings)

    def finish(self, state: TrainState) -> None:
        if not (self._folder / "checkpoints" / f"step-{state.step:09d}").exists():
            self.checkpoint(state)
        state.dictionary.save_pretrained(self._folder / "dictionary")  # ty: ignore[missing-attribute]


def _read_metrics(path: Path) -> list[dict[str, float]]:
    """Whole lines only: a process killed while writing leaves a torn last one."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries
