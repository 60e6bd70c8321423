"""All that a training run carries from one step to the next, and how its dead features start again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from crosscoder.data.order import seeded_generator
from crosscoder.dictionary import Dictionary, SparseCode
from crosscoder.dictionary.codec import to_global
from crosscoder.dictionary.shard import FIRING
from crosscoder.dictionary.sparsity import BatchTopK, JumpReLU, TopK
from crosscoder.dictionary.stack import Stack
from crosscoder.dictionary.weights import Weights
from crosscoder.foundation.ranks import Ranks
from crosscoder.training.frozen import Frozen, decoder_start, hold_near
from crosscoder.training.optimizer import RowAdam

MOMENTS = ("exp_avg", "exp_avg_sq")
ENCODER_SHARE = 0.2  # of the alive encoder rows' mean norm (Bricken et al. 2023)


class FiringTracker:
    """Tokens seen since each feature was last active, `[G, F]`."""

    def __init__(self, n_groups: int, n_features: int, *, device: torch.device | str = "cpu") -> None:
        self.silent_GF = torch.zeros(n_groups, n_features, dtype=torch.int64, device=device)

    def update(self, code: SparseCode, n_tokens: int, data: Ranks | None = None) -> None:
        """Count one batch of `n_tokens`; a stored value of zero is not activity, and none is below zero.

        data: the ranks that have the rest of the batch's tokens.
        """
        features, values = to_global(code, self.silent_GF.shape[0]), code.values.detach()
        total_F = values.new_zeros(self.silent_GF.numel()).index_add_(0, features, values)
        is_active_F = total_F > 0
        if data is not None and data.size > 1:
            is_active_F = data.largest(is_active_F.to(torch.uint8), FIRING).bool()
        self.silent_GF.add_(n_tokens).masked_fill_(is_active_F.view(self.silent_GF.shape), 0)

    def dead(self, after_tokens: int) -> Tensor:
        """True for features silent for at least `after_tokens`, `[G, F]`."""
        return self.silent_GF >= after_tokens


@dataclass
class TrainState:
    """A dictionary, its optimiser, the silence of its features, and how far the run is.

    The dictionary's state includes its inference threshold and input scale. The data cursor is `step`: batch number
    `step` is the next one. What a step draws at random it draws from a generator seeded by `step`, so there is none to
    keep.
    """

    dictionary: Dictionary
    optimizer: RowAdam
    firing: FiringTracker
    step: int = 0
    tokens: int = 0
    first_batch: str = ""
    rise_from: int = 0
    """The step from which the learning rate rises (see `lengthen`)."""
    name: str = ""
    """Of several dictionaries in training."""
    start_RN: Tensor | None = None
    """The directions that a soft-frozen decoder's rows stay near to, see `decoder_start`."""

    @property
    def weights(self) -> Weights:
        """What a step changes."""
        return self.dictionary

    @property
    def members(self) -> list[TrainState]:
        """The state of each dictionary that a step trains."""
        return [self]

    @property
    def k_G(self) -> list[int]:
        """How many features a row keeps in each dictionary, where the rule sets it."""
        rule = self.dictionary.config.sparsity
        return [rule.k] * self.dictionary.n_groups if isinstance(rule, TopK | BatchTopK) else []

    def clear_gradients(self) -> None:
        """Hold none any more; without the hooks of `Optimizer.zero_grad`, which cost more than this."""
        for parameter in self.optimizer.param_groups[0]["params"]:
            parameter.grad = None

    def advance(self, n_tokens: int) -> None:
        """Count a step."""
        self.step, self.tokens = self.step + 1, self.tokens + n_tokens

    def release(self) -> None:
        """Nothing: its memory is its own (see `StackState`)."""

    def hold_decoder(self) -> None:
        """Turn back rows that a step took too far from their start, where that is asked for."""
        if self.start_RN is not None:
            hold_near(self.dictionary.decoder.view(self.start_RN.shape), self.start_RN)

    @property
    def called(self) -> str:
        """What an error says of which dictionary it is."""
        return f", dictionary {self.name!r}" if self.name else ""

    @classmethod
    def start(
        cls,
        dictionary: Dictionary,
        learning_rate: float = 1e-3,
        *,
        precision: str = "fp32",
        frozen: Frozen = "none",
        name: str = "",
    ) -> Self:
        """The state before the first step; on a GPU in bf16 the optimiser keeps the encoder rounded for its product."""
        keep = dictionary.encoder.is_cuda and precision == "bf16"
        firing = FiringTracker(dictionary.n_groups, dictionary.n_held, device=dictionary.encoder.device)
        optimizer = RowAdam(dictionary, lr=learning_rate, keep_working_copy=keep)
        start_RN = decoder_start(dictionary) if frozen == "soft_decoder" else None
        return cls(dictionary, optimizer, firing, name=name, start_RN=start_RN)


class StackState:
    """The states of dictionaries that take their steps together, in one memory; what a `TrainState` is to a step.

    Each of `members` stays a state of its own, whose tensors are views: it can be saved, loaded from and resampled by
    itself. All must be at the same step. `release` gives them memory of their own again.
    """

    def __init__(self, members: list[TrainState]) -> None:
        self.members, self.weights = members, Stack([one.dictionary for one in members])
        first = members[0].optimizer
        self.optimizer = RowAdam(self.weights, keep_working_copy=first.keep_working_copy)
        self.optimizer.sizes = [one.dictionary.config.n_features for one in members]
        n_groups, n_features = self.weights.n_groups, self.weights.config.n_features
        self.firing = FiringTracker(n_groups, n_features, device=self.weights.threshold.device)
        self.k_G = [k for one in members for k in one.k_G]
        for one, silent_GF in zip(members, self.firing.silent_GF.chunk(len(members)), strict=True):
            own_GF = silent_GF[:, : one.dictionary.config.n_features]
            own_GF.copy_(one.firing.silent_GF)
            one.firing.silent_GF = own_GF
        for name, parameter in self.weights.named_parameters():
            self._share_moments(name, parameter)
        if first.keep_working_copy:
            working_GFX = self.weights.encoder.detach().to(torch.bfloat16)
            self.optimizer.working_RN = working_GFX.view(n_groups * n_features, -1)
            for one, view in zip(members, self.weights.views("encoder", working_GFX), strict=True):
                one.optimizer.working_RN = view.view(-1, self.optimizer.working_RN.shape[1])

    def _share_moments(self, name: str, parameter: Tensor) -> None:
        """One tensor of each moment of a weight; every dictionary gets its part, and the common count of steps."""
        own = [one.optimizer.state[getattr(one.dictionary, name)] for one in self.members]
        state = self.optimizer.state[parameter]
        state["step"] = own[0].get("step", torch.zeros((), dtype=torch.float32)).clone()
        for key in MOMENTS:
            shapes = [getattr(one.dictionary, name) for one in self.members]
            tensors = [moments.get(key, torch.zeros_like(shape)) for moments, shape in zip(own, shapes, strict=True)]
            state[key] = self.weights.joined(name, tensors, fill=0.0)
            for moments, view in zip(own, self.weights.views(name, state[key]), strict=True):
                moments |= {"step": state["step"], key: view}

    @property
    def step(self) -> int:
        return self.members[0].step

    @property
    def tokens(self) -> int:
        return self.members[0].tokens

    @property
    def rise_from(self) -> int:
        return self.members[0].rise_from

    def clear_gradients(self) -> None:
        """Hold none any more, neither together nor as the dictionaries' parts, which share their memory."""
        for optimizer in (self.optimizer, *(one.optimizer for one in self.members)):
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = None

    def advance(self, n_tokens: int) -> None:
        """Count a step."""
        for one in self.members:
            one.advance(n_tokens)

    def share_gradients(self) -> None:
        """Let the dictionaries' gradients be their parts of these."""
        for name, parameter in self.weights.named_parameters():
            if parameter.grad is not None:
                for one, view in zip(self.members, self.weights.views(name, parameter.grad), strict=True):
                    getattr(one.dictionary, name).grad = view

    def release(self) -> None:
        """Give every state memory of its own."""
        self.weights.release()
        for one in self.members:
            one.firing.silent_GF = one.firing.silent_GF.clone()
            for parameter in one.dictionary.parameters():
                moments = one.optimizer.state[parameter]
                moments |= {key: moments[key].clone() for key in moments}


State = TrainState | StackState


@torch.no_grad()
def resample_dead(state: TrainState, x_BLD: Tensor, error_BLD: Tensor, *, dead_after_tokens: int) -> int:
    """Start dead features again at inputs that are badly reconstructed; returns how many.

    Bricken et al. 2023, "Towards Monosemanticity", appendix "Neuron resampling", on the batch at hand: rows are drawn
    with probability proportional to their squared loss; the decoder row is the drawn input, centred, at norm 1; the
    encoder row is the same at a fifth of the mean norm of the alive ones; the bias is 0; the moments of all of them
    are 0. Both are cut to what the structure lets the feature write and read. Rows are drawn without replacement, so
    that no two features start alike; where dead features are more than rows with an error, the rest wait.

    A pure function of the state and the batch: generators are seeded by the dictionary's seed, the step and the layer.
    Ranks that divide the features draw the same rows, and each takes those that are its dead features' turn.

    error_BLD: of this rank's tokens, where ranks share out the batch.
    """
    dictionary, config = state.dictionary, state.dictionary.config
    grouped, dead_GF = dictionary.grouped(), state.firing.dead(dead_after_tokens)
    n_groups, n_features = dead_GF.shape
    x_RGN = grouped.split(x_BLD) - grouped.center_GN
    own_BLD, n_own = error_BLD[:, config.written()], len(x_RGN) * n_groups // len(x_BLD)
    loss_BX = own_BLD.flatten(1).unflatten(1, (n_own, -1)).double().square().sum(2)
    loss_RG = dictionary.data.rows(loss_BX, "numbers").view(-1, n_groups).cpu()
    others, first = dictionary.others, dictionary.by_layer
    ranks = others.ranks if others else Ranks()
    n_dead_WG = ranks.gather(dead_GF.sum(1), "numbers")
    before_G, total_G = n_dead_WG[: ranks.rank].sum(0).tolist(), n_dead_WG.sum(0).tolist()
    norm_GF = grouped.encoder_GFN.norm(dim=2).double().masked_fill(dead_GF, 0)
    alive_2G = torch.stack([norm_GF.sum(1), (~dead_GF).sum(1).double()])
    alive_2G = others.add_once(alive_2G, "numbers") if others else alive_2G
    norm_G = torch.where(alive_2G[1] > 0, alive_2G[0] / alive_2G[1], 1)
    count = 0
    for group in range(n_groups):
        weight_R = (loss_RG[:, group] / loss_RG[:, group].max().clamp_min(1e-300)).square()
        n_drawn = min(total_G[group], int((weight_R > 0).sum()))
        if n_drawn == 0:
            continue
        generator = seeded_generator("resample", config.seed, state.step, group + (first.start if first else 0))
        rows = weight_R.multinomial(n_drawn, generator=generator).to(x_RGN.device)[before_G[group] :]
        dead = dead_GF[group].nonzero().squeeze(1)[: len(rows)]
        new_RN = x_RGN[rows[: len(dead)], group]
        _start_again(state, group * n_features + dead, new_RN, ENCODER_SHARE * norm_G[group])
        state.firing.silent_GF[group, dead] = 0
        count += n_drawn
    return int(dictionary.of_layers(torch.tensor(count, device=dead_GF.device)))


def _start_again(state: TrainState, features: Tensor, rows_RN: Tensor, encoder_norm: Tensor) -> None:
    dictionary, normalize = state.dictionary, torch.nn.functional.normalize
    read_RN, write_RN = (
        rows_RN if mask is None else rows_RN * mask.expand_as(dictionary.encoder).flatten(1)[features]
        for mask in (dictionary.read_mask, dictionary.write_mask)
    )
    zeros_R1 = rows_RN.new_zeros(len(features), 1)
    new = {
        "encoder": encoder_norm * normalize(read_RN, dim=1),
        "decoder": normalize(write_RN, dim=1),
        "encoder_bias": zeros_R1,
    }
    if isinstance(dictionary.config.sparsity, JumpReLU):
        new["log_threshold"] = zeros_R1 + math.log(dictionary.config.sparsity.threshold)
    state.optimizer.replace_rows(features, new)
