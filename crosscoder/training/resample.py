"""Resampling of dead features: what the L1 family has in place of an auxiliary loss."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

from crosscoder.data.order import seeded_generator
from crosscoder.dictionary.sparsity import JumpReLU
from crosscoder.training.state import TrainState

ENCODER_SHARE = 0.2  # of the alive encoder rows' mean norm (Bricken et al. 2023)


@torch.no_grad()
def resample_dead(state: TrainState, x_BLD: Tensor, error_BLD: Tensor, *, dead_after_tokens: int) -> int:
    """Start dead features again at inputs that are badly reconstructed; returns how many.

    Bricken et al. 2023, "Towards Monosemanticity", appendix "Neuron resampling", on the batch at hand: rows are drawn
    with probability proportional to their squared loss; the decoder row is the drawn input, centred, at norm 1; the
    encoder row is the same at a fifth of the mean norm of the alive ones; the bias is 0; the moments of all of them
    are 0. Both are cut to what the structure lets the feature write and read. Rows are drawn without replacement, so
    that no two features start alike; where dead features are more than rows with an error, the rest wait.

    A pure function of the state and the batch: the generator is seeded by the dictionary's seed and the step.
    """
    dictionary, config = state.dictionary, state.dictionary.config
    grouped, dead_GF = dictionary.grouped(), state.firing.dead(dead_after_tokens)
    n_groups, n_features = dead_GF.shape
    x_RGN = grouped.split(x_BLD) - grouped.center_GN
    loss_RG = error_BLD[:, config.written()].reshape(len(x_RGN), n_groups, -1).double().square().sum(2).cpu()
    generator = seeded_generator("resample", config.seed, state.step)
    count = 0
    for group in range(n_groups):
        weight_R = (loss_RG[:, group] / loss_RG[:, group].max().clamp_min(1e-300)).square()
        n_drawn = min(int(dead_GF[group].sum()), int((weight_R > 0).sum()))
        if n_drawn == 0:
            continue
        rows = weight_R.multinomial(n_drawn, generator=generator).to(x_RGN.device)
        dead = dead_GF[group].nonzero().squeeze(1)[:n_drawn]
        alive_FN = grouped.encoder_GFN[group][~dead_GF[group]]
        norm = alive_FN.norm(dim=1).mean() if len(alive_FN) else x_RGN.new_ones(())
        _start_again(state, group * n_features + dead, x_RGN[rows, group], ENCODER_SHARE * norm)
        state.firing.silent_GF[group, dead] = 0
        count += n_drawn
    return count


def _start_again(state: TrainState, features: Tensor, rows_RN: Tensor, encoder_norm: Tensor) -> None:
    optimizer, dictionary = state.optimizer, state.dictionary
    optimizer.replace_rows(features, {"encoder": rows_RN, "decoder": rows_RN})
    masked = dictionary.grouped()  # reads as 0 what the structure forbids
    encoder_RN, decoder_RN = (rearrange(weight, "g f n -> (g f) n")[features] for weight in masked[:2])
    zeros_R1 = rows_RN.new_zeros(len(features), 1)
    new = {
        "encoder": encoder_norm * torch.nn.functional.normalize(encoder_RN, dim=1),
        "decoder": torch.nn.functional.normalize(decoder_RN, dim=1),
        "encoder_bias": zeros_R1,
    }
    if isinstance(dictionary.config.sparsity, JumpReLU):
        new["log_threshold"] = zeros_R1 + math.log(dictionary.config.sparsity.threshold)
    optimizer.replace_rows(features, new)
