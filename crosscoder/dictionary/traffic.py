"""What a training step of a divided dictionary sends, by formula: set beside what `Ranks` counts."""

from __future__ import annotations

import math

from crosscoder.dictionary.choice import BINS, ROUNDS, SELECTION
from crosscoder.dictionary.config import DictionaryConfig
from crosscoder.dictionary.dictionary import Dictionary
from crosscoder.dictionary.shard import CENTER, RECONSTRUCTION, Along
from crosscoder.dictionary.sparsity import BatchTopK, TopK

NUMBER, COUNT = 4, 8  # bytes; sums of many are in float64 and take as many as counts


def step_traffic(
    form: type[Dictionary], config: DictionaryConfig, tokens: int, n_ranks: int, along: Along = "features"
) -> dict[str, int]:
    """Bytes of a step's collectives on R ranks, by name, as `Ranks.traffic` counts them.

    Without the auxiliary term, which sums a second reconstruction where features are dead, without the small fixed ones
    (tens of bytes, and all that there is along layers), and without the counts of ties, of which there are some where
    equal scores meet the cut.
    """
    if along == "layers":
        return dict.fromkeys((RECONSTRUCTION, SELECTION, CENTER, "gradient norms"), 0)
    layout = form.layout(config)
    n_groups, rows = math.prod(layout.groups), tokens * math.prod(layout.rows_of_token)
    widest = -(-config.n_features // n_ranks)
    selection = 0
    match config.sparsity:
        case TopK(k=k):
            gathered = min(k, widest) * n_ranks
            selection = rows * (NUMBER * gathered if gathered <= ROUNDS * BINS else COUNT * ROUNDS * BINS)
        case BatchTopK():
            selection = n_groups * COUNT * ROUNDS * BINS
    return {
        RECONSTRUCTION: NUMBER * tokens * config.n_layers * config.d_model * (1 + len(config.prefixes)),
        SELECTION: selection,
        CENTER: NUMBER * math.prod(form.tensor_shapes(config)["decoder_bias"]),
        "gradient norms": COUNT * n_groups,
    }
