"""A whole dictionary divided over ranks, and put together again."""

from __future__ import annotations

import math

from torch import Tensor

from crosscoder.dictionary.config import DictionaryConfig
from crosscoder.dictionary.dictionary import Dictionary
from crosscoder.dictionary.shard import Along, Shard
from crosscoder.foundation.ranks import Ranks

LEAST_BUSY = 0.75
"""The share of the ranks' time that must not be spent waiting for the one with most layers, to divide by them."""


def shard_for(form: type[Dictionary], config: DictionaryConfig, ranks: Ranks, along: Along | None = None) -> Shard:
    """This rank's part of a dictionary: a bank by layers where they come out even enough, all else by features.

    along: one of both instead.

    Raises:
        ValueError: there are more ranks than features, or than layers that have weights of their own.
    """
    n_layers = math.prod(form.layout(config).groups)
    if along == "layers" and n_layers == 1:
        raise ValueError(f"the layers of this {form.__name__} have no weights of their own; divide it by features")
    busy = n_layers / (ranks.size * -(-n_layers // ranks.size))
    along = along or ("layers" if n_layers >= ranks.size and busy >= LEAST_BUSY else "features")
    return Shard.of(config.n_features if along == "features" else n_layers, ranks, along)


def whole_tensors(dictionary: Dictionary) -> dict[str, Tensor]:
    """Every tensor by name, on the CPU; where ranks divide the dictionary all call it, and rank 0 alone gets all."""
    whole = dict[str, Tensor]()
    for name, tensor in dictionary.state_dict().items():
        axis, own = dictionary.axis_of(name), tensor.detach()
        found = own if dictionary.shard is None or axis is None else dictionary.shard.whole(own, axis)
        if found is not None:
            whole[name] = found.cpu().contiguous()
    return whole


def gathered(dictionary: Dictionary) -> Dictionary | None:
    """The whole dictionary on rank 0's CPU, None elsewhere, of one that ranks divide; all ranks call it."""
    tensors = whole_tensors(dictionary)
    if dictionary.shard is None or not dictionary.shard.ranks.job.is_first:
        return None if dictionary.shard is not None else dictionary
    whole = type(dictionary)(**dictionary.config.settings())
    whole.load_state_dict(tensors)
    whole.reads, whole.frozen = dictionary.reads, dictionary.frozen
    return whole.train(dictionary.training)


def divided(dictionary: Dictionary, shard: Shard) -> Dictionary:
    """This rank's part of a whole dictionary; further training is of all parts together.

    Raises:
        ValueError: it is divided already, or the shards do not make up its features or layers.
    """
    if dictionary.shard is not None:
        raise ValueError(f"{dictionary.shard.called} are a part already")
    part = type(dictionary)(shard=shard, **dictionary.config.settings())
    axes = {name: part.axis_of(name) for name in part.state_dict()}
    own = {n: one if (axis := axes[n]) is None else shard.part(one, axis) for n, one in dictionary.state_dict().items()}
    part.load_state_dict(own)
    part.reads, part.frozen = dictionary.reads, dictionary.frozen
    return part.to(dictionary.encoder).train(dictionary.training)
