"""A whole dictionary divided over ranks, and put together again."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from crosscoder.dictionary.config import DictionaryConfig
from crosscoder.dictionary.dictionary import Dictionary
from crosscoder.dictionary.kept import note_stale_card
from crosscoder.dictionary.saved import FILES, SCHEMA
from crosscoder.dictionary.shard import Along, Shard
from crosscoder.foundation.artifact import committed_directory
from crosscoder.foundation.hub import CARD
from crosscoder.foundation.ranks import Ranks
from crosscoder.foundation.tensors import Streamed, blocks_of, in_order, pass_on

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
    along = along or ("layers" if n_layers >= max(2, ranks.size) and busy >= LEAST_BUSY else "features")
    return Shard.of(config.n_features if along == "features" else n_layers, ranks, along)


def whole_tensors(dictionary: Dictionary) -> dict[str, Tensor | Streamed]:
    """Every whole tensor by name; of one that ranks divide, all of them use up what is streamed, and rank 0 gets it."""
    shapes, whole = dictionary.tensor_shapes(dictionary.config), dict[str, Tensor | Streamed](dictionary.state_dict())
    for name, tensor in dictionary.state_dict().items():
        if dictionary.shard is not None and (axis := dictionary.axis_of(name)) is not None:
            whole[name] = Streamed(shapes[name], tensor.dtype, dictionary.shard.blocks(tensor, axis))
    return whole


def gathered(dictionary: Dictionary) -> Dictionary | None:
    """The whole dictionary on rank 0's CPU, None elsewhere, of one that ranks divide; all ranks call it."""
    if dictionary.shard is None:
        return dictionary
    if not dictionary.shard.ranks.job.is_first:
        return pass_on(whole_tensors(dictionary))
    whole = type(dictionary)(**dictionary.config.settings())
    targets, tensors = whole.state_dict(), whole_tensors(dictionary)
    for name in in_order(tensors):
        begin, flat = 0, targets[name].view(-1)
        for block in blocks_of(tensors[name]):
            flat[begin : begin + block.numel()] = block.flatten()
            begin += block.numel()
    whole.reads, whole.frozen = dictionary.reads, dictionary.frozen
    return whole.train(dictionary.training)


def save_whole(dictionary: Dictionary, folder: Path) -> None:
    """`save_pretrained` of the whole of what ranks may divide, which none of them holds; all ranks call it."""
    if dictionary.shard is None:
        dictionary.save_pretrained(folder)
    elif not dictionary.shard.ranks.job.is_first:
        pass_on(whole_tensors(dictionary))
    else:
        with committed_directory(folder, schema=SCHEMA, files=FILES) as temporary:
            dictionary.write_files(temporary, whole_tensors(dictionary))
        if (folder / CARD).is_file():
            note_stale_card(folder, type(dictionary).from_pretrained(folder))


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
