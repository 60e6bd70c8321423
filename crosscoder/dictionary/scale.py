"""The scale of a dictionary's inputs changed, and its weights with it: of raw activations the function stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from crosscoder.dictionary.dictionary import Dictionary
from crosscoder.foundation.console import say


def is_raw(dictionary: Dictionary) -> bool:
    """Whether it reads activations as the model gives them, as most dictionaries that others publish do."""
    return bool((dictionary.input_scale == 1).all())


@torch.no_grad()
def rescale(dictionary: Dictionary, scale_L: Tensor) -> None:
    """Let a dictionary read activations times `scale_L`, in place; its codes of the same activations stay.

    Raises:
        ValueError: features are chosen by norms of decoder rows, or one SAE reads all layers: a scale of each layer
            would change the function.
    """
    config, factor_L = dictionary.config, (scale_L.to(dictionary.input_scale) / dictionary.input_scale)
    if config.selection_weight != "none":
        raise ValueError("features are chosen by norms of decoder rows, which a scale would change")
    if config.shared and not torch.allclose(factor_L, factor_L[:1]):
        raise ValueError("one SAE reads all layers, which a scale for each would tell apart")
    axes = (1, -1, 1) if dictionary.layer_axis == 1 else (-1, 1, 1)
    factor, of_bias = (factor_L[0],) * 2 if config.shared else (factor_L.view(axes), factor_L[:, None])
    dictionary.encoder.div_(factor)
    dictionary.decoder.mul_(factor)
    dictionary.decoder_bias.mul_(of_bias)
    dictionary.input_scale.copy_(scale_L)
    if dictionary.reads is not None:
        dictionary.reads = replace(dictionary.reads, scale=tuple(dictionary.input_scale.tolist()))


def at_usual_scale(dictionary: Dictionary, usual: Callable[[], Tensor]) -> None:
    """A dictionary of raw activations at the scale that gives each layer the same usual norm, in place.

    usual: gives that scale, of the layers that it is read on; not asked for other dictionaries.

    What is measured of layers (shares, spreads, drift) then weighs them alike, as in dictionaries that were trained
    here. Others stay as they are, and so does one whose function a scale would change, which is said.
    """
    if not is_raw(dictionary) or len(usual_L := usual()) != dictionary.config.n_layers:
        return  # other layers are refused by whoever reads it on them
    try:
        rescale(dictionary, usual_L)
    except ValueError as error:
        say(f"note: of this dictionary's layers the loud ones count more, as raw activations have it: {error}")
