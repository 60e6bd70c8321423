"""One optimiser step, its settings, and what stops it before it does harm."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from itertools import repeat
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from crosscoder.dictionary.codec import SparseCode, checked_input, non_finite
from crosscoder.dictionary.dictionary import Dictionary
from crosscoder.dictionary.losses import explained
from crosscoder.dictionary.weights import Weights
from crosscoder.foundation.config import config
from crosscoder.training.finite import NonFiniteError, require_sound
from crosscoder.training.frozen import Frozen
from crosscoder.training.gradients import accumulate_gradients
from crosscoder.training.history import Entry
from crosscoder.training.lengthen import learning_rate_factor, linear_rise
from crosscoder.training.state import State, TrainState, resample_dead

BiasInit = Literal["geometric_median", "mean", "zero"]


@config
class TrainConfig:
    """How a dictionary is trained.

    steps: how many; None takes every batch. With None and batches of unknown number the rate never decays.
    learning_rate: the peak, for Adam with betas (0.9, 0.999).
    warmup_steps, decay_fraction: linear rise over the first steps, linear fall over the last fraction of the run.
    penalty_warmup_steps: linear rise of the penalty of a sparsity rule that has one.
    grad_clip: largest gradient norm over all parameters, of each layer of a bank by itself; 0 turns clipping off.
    precision: `bf16` chooses the active features by scores rounded to bf16; everything else stays fp32, but for the
        products of the auxiliary term. Ranks that divide the features each choose so among their own, and fp32 scores
        choose among what they chose, so that some of the pairs nearest to the cut are others than on one device.
    dead_after_tokens: silence after which the auxiliary term tries to revive a feature.
    bias_init: where the decoder bias starts, from the first batch; one that is not zero any more is left as it is.
    log_every, checkpoint_every: in steps; 0 turns checkpoints off.
    resample_every: steps between two resamplings of the dead features (`resample_dead`), 0 for none. The last one is
        before the rate begins to fall, so that every feature is trained to the end.
    frozen: what stays as the dictionary begins: of a new one, random directions, the same for encoder and decoder
        (`DictionaryConfig.seed`). `encoder` or `decoder` stays to the bit; the rows of a `soft_decoder` move within
        cosine .8 of their start, as nearest projections after each step. Biases and thresholds are trained always. What
        these baselines show without learnt features is no finding (Korznikov et al. 2026, arXiv 2602.14111). Refused
        with `resample_every`, which writes new rows into both, and for a warm chain, which begins from trained ones.
    """

    steps: PositiveInt | None = None
    learning_rate: PositiveFloat = 1e-3
    warmup_steps: NonNegativeInt = 50
    decay_fraction: Annotated[float, Field(ge=0, le=1)] = 0.3
    penalty_warmup_steps: NonNegativeInt = 50
    grad_clip: NonNegativeFloat = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    dead_after_tokens: NonNegativeInt = 100_000
    bias_init: BiasInit = "geometric_median"
    log_every: PositiveInt = 50
    checkpoint_every: NonNegativeInt = 0
    resample_every: NonNegativeInt = 0
    frozen: Frozen = "none"

    def __post_init__(self) -> None:
        if self.resample_every and self.frozen != "none":
            raise ValueError(
                f"resample_every is {self.resample_every} and frozen {self.frozen!r}: resampling would write new rows "
                "where they must stay; set one of them to 0 or 'none'"
            )


def take_step(state: State, x: Tensor, config: TrainConfig, n_steps: int | None) -> Callable[[], list[Entry]]:
    """Takes one optimiser step and returns a function that computes what to log of each dictionary of the state."""
    weights = state.weights
    x_BLD = _checked_batch(x, state)
    own_BLD = weights.data.part(x_BLD)
    rate = _rate(state, config, n_steps)
    state.optimizer.param_groups[0]["lr"] = rate
    state.clear_gradients()
    kept = (weights.threshold, weights.decoder_bias)
    before = [tensor.detach().clone() for tensor in kept]
    try:
        if state.step == 0:
            for member in state.members:
                if not member.dictionary.on_any(member.dictionary.decoder_bias.any()):
                    initialize_bias(member.dictionary, x_BLD, method=config.bias_init)
        out = accumulate_gradients(
            state,
            own_BLD,
            dead_GF=state.firing.dead(config.dead_after_tokens),
            penalty_factor=linear_rise(state.step, warmup=config.penalty_warmup_steps),
            precision=config.precision,
        )
        loss_S, norm_G = out.losses().detach(), state.optimizer.gradient_norms(out.squares, untouched=True)
        norm_S = weights.of_layers(norm_G.view(len(loss_S), -1).double().square().sum(1)).sqrt()
        if not _are_finite(loss_S, norm_S):
            raise NonFiniteError(_diverged(state, loss_S, norm_S))
    except BaseException as error:
        with torch.no_grad():
            for tensor, old in zip(kept, before, strict=True):
                tensor.copy_(old)
        _blame_earlier_steps(state, error)
        raise
    clips = config.grad_clip and bool((norm_G > config.grad_clip).any())
    state.optimizer.update(scale_G=(config.grad_clip / norm_G).clamp_max(1) if clips else None)
    for member in state.members:
        member.hold_decoder()
    state.firing.update(out.code, x_BLD.shape[0], weights.data)
    state.advance(x_BLD.shape[0])
    resampled = [_resample_if_due(*one, config, n_steps) for one in zip(state.members, repeat(x_BLD), out.errors)]

    def numbers() -> list[Entry]:
        l0_S = _mean_l0(state, out.code, x_BLD.shape[0])
        return [
            {
                "step": state.step,
                "tokens": state.tokens,
                "loss": loss_S[place].item(),
                **{f"loss/{name}": term.item() for name, term in out.terms[place].items()},
                "explained_variance": _mean_explained(weights, x_BLD, own_BLD, out.errors[place]),
                "l0": l0_S[place],
                "silent_features": int(weights.of_all(member.firing.dead(config.dead_after_tokens).sum())),
                "gradient_norm": norm_S[place].item(),
                "learning_rate": rate,
                **resampled[place],
            }
            for place, member in enumerate(state.members)
        ]

    return numbers


def _are_finite(loss_S: Tensor, norm_S: Tensor) -> bool:
    return all(map(math.isfinite, (loss_S + norm_S).tolist()))


def _rate(state: State, config: TrainConfig, n_steps: int | None) -> float:
    shape = {"warmup": config.warmup_steps, "decay_fraction": config.decay_fraction, "rise_from": state.rise_from}
    return config.learning_rate * learning_rate_factor(state.step, n_steps=n_steps, **shape)


def _blame_earlier_steps(state: State, error: BaseException) -> None:
    """Raise what is wrong with the parameters, where a step finds that it cannot be taken."""
    for member in state.members if isinstance(error, ValueError) else ():
        require_sound(member)


def _diverged(state: State, loss_S: Tensor, norm_S: Tensor) -> str:
    place = int((~torch.isfinite(loss_S + norm_S)).nonzero()[0])
    return (
        f"step {state.step}{state.members[place].called}: loss {loss_S[place].item():.4g}, gradient norm "
        f"{norm_S[place].item():.4g}; the parameters are as they were before this step. A lower learning_rate is the "
        "usual mend."
    )


@torch.no_grad()
def initialize_bias(dictionary: Dictionary, x_BLD: Tensor, *, method: BiasInit) -> None:
    """Set the decoder bias of every layer to the centre of a first batch."""
    center_GN = dictionary.grouped().center_GN
    x_BGN = dictionary.grouped().split(x_BLD).to(center_GN)
    match method:
        case "geometric_median":
            center_GN.copy_(torch.stack([geometric_median(x_BN) for x_BN in x_BGN.unbind(1)]))
        case "mean":
            center_GN.copy_(x_BGN.mean(0, dtype=torch.float64))  # the same beside any other layers
        case "zero":
            center_GN.zero_()
    if dictionary.others is not None:
        dictionary.others.ranks.job.share(dictionary.decoder_bias.detach(), "start")


def geometric_median(x_BN: Tensor, *, n_steps: int = 50, tolerance: float = 1e-5) -> Tensor:
    """The point with the least summed distance to the rows, `[N]` (Weiszfeld's iteration).

    Half the rows may be moved arbitrarily far without moving it far, which the mean does not survive.
    """
    # Squares of large numbers would overflow; by a power of two, so that other numbers keep their bits.
    size = torch.ldexp(x_BN.new_ones(()), torch.frexp(x_BN.abs().amax()).exponent)
    x_BN = x_BN / size
    point_N = x_BN.mean(0)
    for _ in range(n_steps):
        distance_B = (x_BN - point_N).norm(dim=1).clamp_min(1e-12)
        weight_B = distance_B.reciprocal()
        moved_N = (weight_B @ x_BN) / weight_B.sum()
        step = (moved_N - point_N).norm()
        point_N = moved_N
        if step <= tolerance * moved_N.norm().clamp_min(1e-12):
            break
    return point_N * size


def _resample_if_due(
    state: TrainState, x_BLD: Tensor, error_BLD: Tensor, config: TrainConfig, n_steps: int | None
) -> Entry:
    """How many features were resampled after this step, to log; nothing where resampling is off."""
    if not config.resample_every:
        return {}
    is_falling = n_steps is not None and state.step > n_steps * (1 - config.decay_fraction)
    if state.step % config.resample_every or is_falling:
        return {"resampled": 0}
    return {"resampled": resample_dead(state, x_BLD, error_BLD, dead_after_tokens=config.dead_after_tokens)}


def _mean_l0(state: State, code: SparseCode, n_tokens: int) -> list[float]:
    """Active features of a row, of each dictionary the mean over the rows of `n_tokens` tokens, those of all ranks."""
    weights, n_sets = state.weights, len(state.members)
    active_S = code.l0().view(n_sets, code.n_rows // n_sets).sum(1).double()
    n_rows = n_tokens * state.members[0].dictionary.rows_of_token
    return (weights.of_all(weights.of_tokens(active_S)) / n_rows).tolist()


def _mean_explained(weights: Weights, x_BLD: Tensor, own_BLD: Tensor, error_BLD: Tensor) -> float | None:
    """Explained variance averaged over layers; None for a batch in which it is undefined, such as a single token.

    own_BLD, error_BLD: of this rank's tokens.
    """
    ev_L = x_BLD.new_full((1,), math.nan, dtype=torch.float64)
    with contextlib.suppress(ValueError):
        written = weights.config.written()
        recon_BLD = (own_BLD + error_BLD)[:, written].to(x_BLD.dtype)
        square_L = (own_BLD[:, written] - recon_BLD).double().square().sum((0, 2))
        ev_L = explained(x_BLD[:, written], weights.of_tokens(square_L))
    n_layers = len(ev_L) if weights.by_layer is None else weights.by_layer.n_whole
    mean = weights.of_layers(ev_L.sum()).item() / n_layers
    return None if math.isnan(mean) else mean


def _checked_batch(x: Tensor, state: State) -> Tensor:
    x_BLD = checked_input(x.detach(), state.weights.config).to(state.weights.encoder.dtype)
    if x_BLD.numel() == 0:
        raise ValueError(f"step {state.step}: the batch has shape {tuple(x_BLD.shape)}, no token to learn from")
    if where := non_finite(x_BLD):
        raise NonFiniteError(
            f"step {state.step}: the batch holds NaN or infinity{where}; the parameters are unchanged. Harvest in fp32 "
            "or bf16 and drop such tokens."
        )
    if (shard := state.weights.by_layer) is not None:
        x_BLD = x_BLD[:, shard.start : shard.stop].contiguous()
    return x_BLD.clone() if x_BLD.is_inference() else x_BLD
