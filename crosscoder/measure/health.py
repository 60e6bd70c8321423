"""Whether a dictionary does on held-out tokens what it was trained for: a few numbers, and lines for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import Tensor

from crosscoder.data.sources import Marked
from crosscoder.dictionary import BatchTopK, Dictionary, TopK
from crosscoder.measure.reading import Reading, measure_dictionary

L0_TOLERANCE = 0.1
"""Share by which L0 may differ from what was asked before it is said."""


def watch(dictionary: Dictionary, batches: Callable[[], Iterable[Tensor | Marked]]) -> dict[str, float | None]:
    """Explained variance, L0 and dead share on held-out batches, for `train`'s monitor."""
    measured = measure_dictionary(dictionary, batches())
    return {
        "held_out_explained_variance": measured.explained_variance,
        "held_out_l0": measured.code.nnz / measured.code.shape[0],
        "held_out_dead_share": 1 - float(measured.alive_GF.mean()),
    }


def describe(dictionary: Dictionary, reading: Reading) -> list[str]:
    """What a reading on held-out tokens found, one line for each thing that a person should know."""
    l0, found = reading.l0, reading.outliers
    lines = [
        f"on {reading.n_tokens:,} held-out tokens: explained variance {reading.explained_variance:.4f}, L0 {l0:.1f}, "
        f"dead {reading.dead_share:.1%}"
    ]
    written = reading.explained_variance_L[dictionary.config.written()]
    first = len(reading.explained_variance_L) - len(written)
    if constant := [layer for layer, value in enumerate(written, first) if math.isnan(value)]:
        lines.append(
            f"layers {', '.join(map(str, constant))} (from 0) are constant on these tokens: there is nothing to "
            "explain, and the explained variance is that of the other layers"
        )
    rule = dictionary.config.sparsity
    target = rule.k if isinstance(rule, TopK | BatchTopK) else getattr(getattr(rule, "penalty", None), "target", None)
    if target is not None and abs(l0 / (asked := target * reading.n_groups) - 1) > L0_TOLERANCE:
        lines.append(
            f"L0 is {l0 / asked - 1:+.0%} from the {asked:g} that was asked for: the thresholds have not settled "
            "(train for more steps), or held-out tokens differ from those that set them"
        )
    if found is not None and found.share:
        worst = int(found.energy_L.argmax())
        lines.append(
            f"outliers: {found.share:.3%} of the harvested tokens, {found.energy_L[worst]:.1%} of the squared norm at "
            f"layer {worst}; explained variance {found.explained_variance_usual:.4f} without them, "
            f"{found.explained_variance_every:.4f} with them"
        )
    return lines
