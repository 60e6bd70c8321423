"""Which features are active where in a text, by sequence and position, for tools that read examples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crosscoder.data.sources import Source
from crosscoder.data.tokens import TokenBlocks
from crosscoder.dictionary import Dictionary, LayerwiseSAE
from crosscoder.foundation.console import Progress
from crosscoder.foundation.origin import require_same
from crosscoder.measure.reading import sparse_rows


@dataclass(frozen=True, eq=False)
class Activity:
    """Every active pair of one flat dictionary on some blocks of tokens.

    Pairs are in the order of the text. Tokens that the dictionary was not made to read have none.
    """

    name: str
    n_features: int
    tokens_BS: Tensor
    read_BS: Tensor  # which tokens were read, bool
    sequence_P: np.ndarray  # int32, rows of tokens_BS
    position_P: np.ndarray  # int32
    feature_P: np.ndarray  # int32
    value_P: np.ndarray  # float32, above 0


def module_names(dictionary: Dictionary) -> list[str]:
    """One name for a crosscoder; for a bank one for each layer, as `transformers` calls the block that it reads."""
    if not isinstance(dictionary, LayerwiseSAE):
        return ["crosscoder"]
    reads, n_layers = dictionary.reads, dictionary.config.n_layers
    if reads is None or reads.site != "residual" or 0 in reads.sites:
        return [f"layer-{layer}" for layer in range(n_layers)]
    return [f"layers.{site - 1}" for site in reads.sites]


@torch.no_grad()
def collect_activity(
    dictionary: Dictionary, source: Source, tokens: TokenBlocks, blocks: Tensor, *, device: str = "cpu"
) -> list[Activity]:
    """What is active on the held-out tokens of a source, for each flat dictionary side by side.

    source: at the dictionary's scale. blocks: the numbers of the blocks that it reads, ascending.
    """
    require_same(dictionary.reads, source.reads, owner="the dictionary", given="the activations")
    names, context, n_features = module_names(dictionary), tokens.sequence_length, dictionary.config.n_features
    parts: list[list[tuple[np.ndarray, ...]]] = [[] for _ in names]
    read_BS = torch.zeros(len(blocks), context, dtype=torch.bool)
    with Progress("encode", len(blocks) * context, unit="token") as progress:
        for batch in source.marked():
            token_B = batch.token_B[batch.kept_B.cpu()].cpu()
            row_B, position_B = torch.searchsorted(blocks, token_B // context), token_B % context
            read_BS[row_B, position_B] = True
            code = dictionary.encode(batch.kept().to(device))
            found = sparse_rows(code, len(token_B), len(names), n_features)
            for group, part in enumerate(parts):
                own = found[:, group * n_features : (group + 1) * n_features].tocoo()
                at = (one.numpy()[own.row].astype(np.int32) for one in (row_B, position_B))
                part.append((*at, own.col.astype(np.int32), own.data))
            progress.advance(len(token_B))
    return [
        Activity(name, n_features, tokens[blocks], read_BS, *(np.concatenate(columns) for columns in zip(*part)))
        for name, part in zip(names, parts, strict=True)
    ]
