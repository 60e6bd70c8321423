"""A whole dictionary divided over ranks, and put together again."""

from __future__ import annotations

from crosscoder.dictionary.dictionary import Dictionary
from crosscoder.dictionary.shard import Shard
from crosscoder.dictionary.weights import OF_FEATURES, whole_tensors


def gathered(dictionary: Dictionary) -> Dictionary | None:
    """The whole dictionary on rank 0's CPU, None elsewhere, of one that ranks divide; all ranks call it."""
    tensors = whole_tensors(dictionary)
    if dictionary.shard is None or not dictionary.shard.ranks.is_first:
        return None if dictionary.shard is not None else dictionary
    whole = type(dictionary)(**dictionary.config.settings())
    whole.load_state_dict(tensors)
    whole.reads, whole.frozen = dictionary.reads, dictionary.frozen
    return whole.train(dictionary.training)


def divided(dictionary: Dictionary, shard: Shard) -> Dictionary:
    """This rank's part of a whole dictionary; further training is of all parts together.

    Raises:
        ValueError: it is divided already, or the shards do not make up its features.
    """
    if dictionary.shard is not None:
        raise ValueError(f"features {dictionary.shard.start} to {dictionary.shard.stop} are a part already")
    part = type(dictionary)(shard=shard, **dictionary.config.settings())
    axis, whole = len(part.layout(part.config).groups), dictionary.state_dict()
    own = {name: shard.part(one, axis) if name in OF_FEATURES else one for name, one in whole.items()}
    part.load_state_dict(own)
    part.reads, part.frozen = dictionary.reads, dictionary.frozen
    return part.to(dictionary.encoder).train(dictionary.training)
