"""What a training step of a divided dictionary sends, by formula: set beside what `Ranks` counts."""

from __future__ import annotations

import math

from crosscoder.dictionary.choice import BINS, ROUNDS, SELECTION
from crosscoder.dictionary.config import DictionaryConfig
from crosscoder.dictionary.dictionary import Dictionary
from crosscoder.dictionary.shard import CENTER, FIRING, GRADIENTS, RECONSTRUCTION, Along
from crosscoder.dictionary.sparsity import BatchTopK, TopK
from crosscoder.dictionary.weights import OF_FEATURES

NUMBER, COUNT = 4, 8  # bytes; sums of many are in float64 and take as many as counts


def step_traffic(
    form: type[Dictionary],
    config: DictionaryConfig,
    tokens: int,
    n_ranks: int,
    along: Along = "features",
    n_data: int = 1,
) -> dict[str, int]:
    """Bytes of a step's collectives on rank 0 of R, by name, as `Ranks.traffic` counts them.

    n_ranks: those that divide the dictionary, in each of `n_data` groups that share out the tokens of the batch.

    Without the auxiliary term, which sums a second reconstruction where features are dead, without the small fixed ones
    (tens of bytes, and all that there is along layers), and without the counts of ties, of which there are some where
    equal scores meet the cut.
    """
    layout, shapes = form.layout(config), form.tensor_shapes(config)
    n_groups, own = math.prod(layout.groups), -(-tokens // n_data)
    by_layers = along == "layers"
    groups = -(-n_groups // n_ranks) if by_layers else n_groups
    widest = config.n_features if by_layers else -(-config.n_features // n_ranks)
    selection, is_divided = 0, not by_layers and n_ranks > 1
    match config.sparsity:
        case TopK(k=k) if is_divided:
            gathered, rows = min(k, widest) * n_ranks, own * math.prod(layout.rows_of_token)
            selection = rows * (NUMBER * gathered if gathered <= ROUNDS * BINS else COUNT * ROUNDS * BINS)
        case BatchTopK() if is_divided or n_data > 1:
            selection = groups * COUNT * (ROUNDS * BINS + (n_data > 1))
    found = {
        RECONSTRUCTION: NUMBER * own * config.n_layers * config.d_model * (1 + len(config.prefixes)),
        CENTER: NUMBER * math.prod(shapes["decoder_bias"]),
        "gradient norms": COUNT * n_groups,
    }
    of_feature = sum(math.prod(shapes[name]) for name in OF_FEATURES if name in shapes) // (
        n_groups * config.n_features
    )
    n_held = groups * (widest * of_feature + math.prod(shapes["decoder_bias"]) // n_groups)
    between = {GRADIENTS: NUMBER * n_held, FIRING: groups * widest}
    return {
        **{name: size * is_divided for name, size in found.items()},
        **{name: size * (n_data > 1) for name, size in between.items()},
        SELECTION: selection,
    }
