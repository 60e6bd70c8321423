"""The activations that a dictionary reads, of its model on some tokens, as its record says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.sites import kind_read
from crosscoder.data.sources import Activations, SiteKind, SiteSource, Source
from crosscoder.data.stream import ActivationStream
from crosscoder.data.tokens import TokenBlocks
from crosscoder.dictionary import Dictionary
from crosscoder.foundation.origin import MismatchError, ModelOrigin, Reads, require_same


def harvested_as(reads: Reads) -> dict[str, Any]:
    """How a `ResidualHarvester` reads what a record says."""
    before = (reads.sites[0] - 1,) if reads.site == "write" else ()
    return {
        "layers": (*before, *dict.fromkeys(reads.sites)),
        "reads": "mlp" if reads.site == "mlp" else "residual",
        "keep_outliers": reads.keep_outliers,
    }


def require_same_reads(mine: Reads | None, other: Reads | None, *, given: str) -> None:
    """`require_same` of a dictionary's record and another, where a model is its weights, by whatever name."""
    if mine is not None and other is not None and mine.model.weights == other.model.weights:
        other = replace(other, model=mine.model)
    require_same(mine, other, owner="the dictionary", given=given)


def source_of(
    dictionary: Dictionary,
    model: nn.Module,
    tokens: TokenBlocks,
    *,
    max_tokens: int | None = 50_000,
    blocks_path: str | None = None,
    origin: ModelOrigin | None = None,
) -> SiteSource:
    """A model's activations on tokens at the sites and in the scale of a dictionary, harvested as they are asked for.

    max_tokens: how many to read at least, in whole blocks evenly spread over the text; None: all.
    """
    if dictionary.reads is None:
        raise ValueError(
            "the dictionary keeps no record of what it reads; give it one by dictionary.set_input(source.scale_L, "
            "source.reads), or read a store: crosscoder features --activations"
        )
    harvester = ResidualHarvester(model, **harvested_as(dictionary.reads), blocks_path=blocks_path, origin=origin)
    return as_dictionary_reads(dictionary, ActivationStream(harvester, tokens, max_tokens=max_tokens, ahead=False))


def as_dictionary_reads(dictionary: Dictionary, read: Activations, site: SiteKind | None = None) -> SiteSource:
    """Activations at the sites and in the scale of a dictionary, all of them to be read in order.

    site: None: what the dictionary reads.
    """
    reads = dictionary.reads
    if reads is not None and reads.null is not None:
        raise MismatchError(
            f"the dictionary was trained on the {reads.null} null, whose tokens are of no text: nothing shows what its "
            "features mean"
        )
    source = SiteSource(read, read, site or kind_read(reads), scale_L=dictionary.input_scale)
    require_same_reads(reads, source.reads, given="the activations")
    require_shape(dictionary, source)
    return source


def require_shape(dictionary: Dictionary, source: Source, *, owner: str = "the dictionary") -> None:
    """Refuse activations of another number of layers or width than the dictionary reads."""
    shape, expected = (source.n_layers, source.d_model), (dictionary.config.n_layers, dictionary.config.d_model)
    if shape != expected:
        raise MismatchError(
            f"the activations have {shape[0]} layers of width {shape[1]} (sites {list(source.sites)}), {owner} "
            f"reads {expected[0]} of width {expected[1]}; choose its --layers"
        )
